"""What a run leaves for the users of its models: weight files, and a model card beside each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aligned_reid.config import Config
from aligned_reid.data.dataset import TestImages, TrainImages
from aligned_reid.data.partitions import GALLERY, QUERY
from aligned_reid.evaluation.evaluate import SCORE_NAMES
from aligned_reid.evaluation.protocol import TITLES
from aligned_reid.evaluation.verification import VERIFIED
from aligned_reid.files import write_file
from aligned_reid.flags import TEST, TRAINING
from aligned_reid.model import AlignedReID
from aligned_reid.weights import SAFETENSORS_NAME, write_safetensors

# By a part of the data set's name, in lower case.
DATA_LICENCES = {
    "market": "Market-1501 is for research only; its authors forbid to distribute it and to use it commercially.",
    "cuhk03": "CUHK03 is for academic research only.",
    "msmt17": "MSMT17 is for academic research only, under an agreement with its authors.",
    "duke": "DukeMTMC was withdrawn by its authors in 2019; the people in it did not agree to its use.",
    "drawn": "The people in it are drawn by this project and have no licence of their own.",
}
START_LICENCES = {
    "imagenet": "torchvision's IMAGENET1K_V1 weights (BSD-3-Clause), trained on ImageNet, whose images are for "
    "non-commercial research and education.",
    "none": "random numbers; training started from nothing.",
}
UNKNOWN_LICENCE = "Its licence is not known to the program that wrote this card: ask its source."

TEMPLATE = """\
# {name}

Weights of AlignedReID, a model for person re-identification ([Zhang et al., 2017](https://arxiv.org/abs/1711.08184)):
a ResNet-50 turns a photo of a person, {size} pixels (height x width), into features. The nearer the features of two
photos, the likelier both show one person. This file was written by `aligned_reid` at the end of the training.

## Loading

    from aligned_reid import ReID

    reid = ReID.from_pretrained("{name}")
    print(reid.compare("a.jpg", "b.jpg"))

## Data and licences

- Trained on the data set `{dataset}`: {num_train:,} images of {num_persons:,} persons.
- Tested on its test part: {num_query:,} query and {num_gallery:,} gallery images.
- {data_licence}
- Starting weights: {start}

A licence that restricts data or starting weights may restrict these weights too.

## Recipe

`--recipe={recipe}`{differences}

## Scores

In percent; definitions as in the Market-1501 benchmark.

| distance | rank@1 | rank@5 | rank@10 | mAP | mAP (step) | mINP |
| --- | --- | --- | --- | --- | --- | --- |
{scores}

## Thresholds

Two photos count as one person if their distance is below the threshold. Measured on {num_same:,} pairs of one person
and {num_different:,} pairs of different persons, each pair under two cameras of the test. **Other cameras, light and
clothes shift these thresholds**: measure on photos of your own before you rely on one.

| distance | false matches | threshold | true matches found |
| --- | --- | --- | --- |
{thresholds}

## Intended use and limits

For research on re-identification, and to find photos of one person in recordings that you may process. The model
recognizes clothes and build rather than faces: it does not find people again after they have changed, and must not be
the only ground for a decision about a person. It expects one upright person in each photo, cut out by a detector. How
its errors differ between groups of people has not been measured. Laws on surveillance and biometric data apply.
"""


def write_models(
    models: Sequence[AlignedReID],
    config: Config,
    trained_on: dict[str, list[str]],
    evaluated: Sequence[Mapping[str, Any]],
    train: TrainImages,
    test: TestImages,
) -> None:
    """Write model.safetensors and its card model.md, and model_2, ... if there are several models.

    trained_on: see data.identities. evaluated: the scores of each model, as in results.json.
    """
    for number, (model, results) in enumerate(zip(models, evaluated, strict=True), start=1):
        path = config.run_dir / (SAFETENSORS_NAME if number == 1 else f"model_{number}.safetensors")
        write_safetensors(path, model.state_dict(), config.to_dict(), trained_on, results["verification"])
        write_file(path.with_suffix(".md"), model_card(path.name, config, results, train, test).encode())


def model_card(name: str, config: Config, results: Mapping[str, Any], train: TrainImages, test: TestImages) -> str:
    """The card of the weight file `name` as Markdown. results: the scores of its model, as in results.json."""
    record = results["verification"]
    changes = dict.fromkeys(
        line
        for what in (TRAINING, TEST)
        for line in config.differences(Config.of(recipe=config.recipe).to_dict(), affecting=what)
        if line.split(":")[0] not in ("data_path", "partition_file")  # paths of this machine
    )
    start = config.model_weight_file or config.pretrained
    height, width = config.resize_h_w
    return TEMPLATE.format(
        name=name,
        size=f"{height} x {width}",
        dataset=record["measured_on"],
        num_train=len(train),
        num_persons=train.num_classes,
        num_query=int(np.count_nonzero(test.marks == QUERY)),
        num_gallery=int(np.count_nonzero(test.marks == GALLERY)),
        data_licence=next(
            (text for part, text in DATA_LICENCES.items() if part in record["measured_on"].lower()), UNKNOWN_LICENCE
        ),
        start=START_LICENCES.get(start) or f"the file `{Path(start).name}`. {UNKNOWN_LICENCE}",
        recipe=config.recipe,
        differences=", and differing from it:\n\n" + "\n".join(f"- `{line}`" for line in changes) if changes else "",
        scores="\n".join(score_row(TITLES[one], results[one]) for one in SCORE_NAMES if results[one]),
        num_same=record["num_same"],
        num_different=record["num_different"],
        thresholds="\n".join(threshold_rows(TITLES[one], record[one]) for one in VERIFIED if record[one]),
    )


def score_row(title: str, scores: Mapping[str, float | None]) -> str:
    values = (scores[one] for one in ("cmc1", "cmc5", "cmc10", "mAP", "mAP_step", "mINP"))
    return f"| {title} | {' | '.join('' if value is None else f'{100 * value:.2f}' for value in values)} |"


def threshold_rows(title: str, curve: Mapping[str, Any]) -> str:
    """A row for the equal error rate, then one for each false-match rate that was measured."""
    rows = [(f"{float(rate):.2%}", at["threshold"], at["tmr"]) for rate, at in curve["at_fmr"].items() if at]
    if curve["eer"] is not None:
        rows.insert(0, (f"{curve['eer']:.2%} (equal error rate)", curve["eer_threshold"], 1 - curve["eer"]))
    return "\n".join(f"| {title} | {rate} | {threshold:.4g} | {tmr:.2%} |" for rate, threshold, tmr in rows)
