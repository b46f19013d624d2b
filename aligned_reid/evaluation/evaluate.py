"""The test of a run: its models on its data sets, as the weights were trained unless a flag says otherwise."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from aligned_reid.config import Config
from aligned_reid.data.dataset import TestImages
from aligned_reid.device import Accelerator
from aligned_reid.distributed import World
from aligned_reid.errors import InputError
from aligned_reid.evaluation.extract import FeatureSet, extract_features
from aligned_reid.evaluation.protocol import Measures, evaluate_features
from aligned_reid.flags import format_value
from aligned_reid.model import AlignedReID, open_model
from aligned_reid.training.log import Log
from aligned_reid.weights import settings_of

SCORE_NAMES = ("global", "global_re_ranked", "local", "local_re_ranked", "global_local", "global_local_re_ranked")
TEST_SETTINGS = (  # what belongs to a model's weights when it is tested
    "resize_h_w",
    "last_stride",
    "pooling",
    "bnneck",
    "feature_after_bn",
    "normalize_feature",
    "test_distance",
    "flip_test",
)
SetScores = dict[str, dict[str, Any]]  # by the data set's name: scores by distance, None where not measured


def settle_test(config: Config, content: Any, log: Log) -> Config:
    """The config with TEST_SETTINGS as the run had them that wrote a weight file's `content`; given flags stay.

    Raises InputError where the feature after a neck is asked for, and neither the file nor a flag speaks of one.
    """
    settings = settings_of(content)
    trained = {name: settings[name] for name in TEST_SETTINGS if name in settings}
    if "resize_h_w" in trained:
        trained["resize_h_w"] = tuple(trained["resize_h_w"])
    differing = {name: value for name, value in trained.items() if value != getattr(config, name)}
    taken = {name: value for name, value in differing.items() if name not in config.given}
    if taken:
        log(f"as the weights were trained: {' '.join(f'--{name}={format_value(taken[name])}' for name in taken)}")
    config = dataclasses.replace(config, **taken)
    if "resize_h_w" in differing.keys() - taken.keys():
        sizes = (format_value(size) for size in (trained["resize_h_w"], config.resize_h_w))
        log("the weights were trained at --resize_h_w={} and are tested at {}".format(*sizes))
    if config.feature_after_bn and not config.bnneck:
        raise InputError(
            "--feature_after_bn needs weights with a neck; where their file does not say so, give --bnneck true"
        )
    return config


def load_for_test(config: Config, content: Any, log: Log) -> tuple[AlignedReID, bool]:
    """The model to evaluate, and whether its local branch was trained: as its checkpoint says, else as the flags do.

    content: of the weight file.
    """
    source = config.model_weight_file or str(config.run_dir)
    trained = config.l_loss_weight > 0 or settings_of(content).get("l_loss_weight", 0.0) > 0
    need_local = trained if config.use_local_distance is None else config.use_local_distance
    model, report = open_model(content, source, need_local=need_local, settings=config.to_dict())
    log(report)
    return model, trained


def measures_of(config: Config, *, re_ranked: bool = True) -> Measures:
    """What a run's settings measure, and how; cosine distance is euclidean distance at unit length."""
    return Measures(
        config.normalize_feature or config.test_distance == "cosine",
        re_ranked=re_ranked,
        multi_query_pool=config.multi_query_pool if config.multi_query else "",
    )


def measure(
    models: Sequence[AlignedReID],
    tests: Mapping[str, TestImages],
    config: Config,
    world: World,
    accelerator: Accelerator,
    log: Log,
    *,
    local: bool,
) -> dict[str, Any]:
    """What results.json has of the test, on rank 0: empty on the others.

    The scores of the first model on the first data set; under "datasets" its scores on each, where there are several;
    under "models" the same of each model, where there are several. All features are extracted before any are compared:
    no rank waits in a collective for rank 0 to rank.
    """
    start = time.monotonic()
    features = [
        {
            name: extract_features(
                model.to(accelerator.device),
                images.at_size(config.resize_h_w),
                accelerator,
                world,
                local=local,
                workers=config.workers,
                flip=config.flip_test,
            )
            for name, images in tests.items()
        }
        for model in models
    ]
    if not world.is_main:
        return {}
    seconds = time.monotonic() - start
    num_images = len(models) * sum(map(len, tests.values()))
    log(f"features of {num_images:,} images in {seconds:.1f}s ({num_images / seconds:.1f} images/s)")
    measures = measures_of(config)
    results: list[dict[str, Any]] = []
    for number in range(len(models), 0, -1):  # the first one last: tools read the log's last line
        if len(models) > 1:
            log(f"Model {number} of {len(models)}")
        scores = evaluate_sets(features[number - 1], tests, log, measures)
        results.insert(0, {**next(iter(scores.values())), **({"datasets": scores} if len(scores) > 1 else {})})
    return {**results[0], **({"models": results} if len(models) > 1 else {}), "extract_seconds": seconds}


def evaluate_sets(
    features: Mapping[str, FeatureSet], tests: Mapping[str, TestImages], log: Log, measures: Measures
) -> SetScores:
    """The scores of each data set by its name, in their order; those that were not measured are None.

    The first set, whose scores are the run's, is evaluated last: tools read the log's last line.
    """
    scores: SetScores = {name: dict.fromkeys(SCORE_NAMES) for name in tests}
    for name in reversed(list(tests)):
        if len(tests) > 1:
            log(f"Data set {name}")
        scores[name].update(evaluate_features(features[name], tests[name], log, measures))
    return scores
