"""The test of a run: its models on its data sets, with the settings stored with the weights unless a flag differs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from aligned_reid.config import Config, names_affecting
from aligned_reid.data.dataset import TestImages
from aligned_reid.device import Accelerator
from aligned_reid.distributed import World
from aligned_reid.errors import InputError
from aligned_reid.evaluation.extract import extract_features
from aligned_reid.evaluation.protocol import TITLES, EvaluationSettings, evaluate_features
from aligned_reid.flags import TEST, format_value
from aligned_reid.model import AlignedReID, open_model
from aligned_reid.training.log import Log
from aligned_reid.weights import settings_of

SCORE_NAMES = tuple(reversed(TITLES))  # in results.json


def settle_test(config: Config, content: Any, log: Callable[[str], None]) -> Config:
    """The config with the test options of a weight file's `content`; explicitly given flags stay.

    Raises InputError if the feature after a neck is asked for, but neither the file nor a flag says there is a neck.
    """
    settings = settings_of(content)
    trained = {name: settings[name] for name in names_affecting(TEST) if name in settings}
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
            "--feature_after_bn needs weights with a neck; if their file does not say so, add --bnneck true"
        )
    return config


def load_for_test(config: Config, content: Any, log: Callable[[str], None]) -> tuple[AlignedReID, bool]:
    """The model in a weight file's `content`, and whether to evaluate local distance.

    The default is whether the local branch was trained, as the file or the flags say.
    """
    source = config.model_weight_file or str(config.run_dir)
    local = config.use_local_distance
    if local is None:
        local = config.l_loss_weight > 0 or settings_of(content).get("l_loss_weight", 0.0) > 0
    model, report = open_model(content, source, need_local=local, settings=config.to_dict())
    log(report)
    return model, local


def evaluation_settings(config: Config, *, re_ranked: bool = True) -> EvaluationSettings:
    """The evaluation that a run's settings ask for; cosine distance is euclidean distance at unit length."""
    return EvaluationSettings(
        config.normalize_feature or config.test_distance == "cosine",
        re_ranked=re_ranked,
        multi_query_pool="average" if config.multi_query else "",
    )


def evaluate_models(
    models: Sequence[AlignedReID],
    images: TestImages,
    config: Config,
    world: World,
    accelerator: Accelerator,
    log: Log,
    *,
    local: bool,
) -> dict[str, Any]:
    """The scores in results.json, on rank 0; empty on other ranks.

    The first model's scores by distance, None if not evaluated; "models" has those of each of several models. All
    features are extracted first, so that no rank waits in a collective while rank 0 ranks.
    """
    start = time.monotonic()
    images = images.at_size(config.resize_h_w)
    features = [
        extract_features(
            model.to(accelerator.device),
            images,
            accelerator,
            world,
            local=local,
            workers=config.workers,
            flip=config.flip_test,
        )
        for model in models
    ]
    if not world.is_main:
        return {}
    seconds = time.monotonic() - start
    num_images = len(models) * len(images)
    log(f"features of {num_images:,} images in {seconds:.1f}s ({num_images / seconds:.1f} images/s)")
    results: list[dict[str, Any]] = []
    for number in range(len(models), 0, -1):  # the first model last: tools read the log's last line
        if len(models) > 1:
            log(f"Model {number} of {len(models)}")
        settings = evaluation_settings(config)
        scores = evaluate_features(features[number - 1], images, log, settings, config.dataset_name)
        results.insert(0, {**dict.fromkeys(SCORE_NAMES), **scores})
    return {**results[0], **({"models": results} if len(models) > 1 else {}), "extract_seconds": seconds}
