"""One run from settings to results.json: open device and data, train, evaluate, write."""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aligned_reid.accelerator import Accelerator, open_accelerator
from aligned_reid.config import Config
from aligned_reid.data.sampler import IdentityBatchSampler
from aligned_reid.distributed import World, close_group, job_of_world, open_group, read_world, sum_over_ranks
from aligned_reid.errors import InputError, RunStopped
from aligned_reid.evaluation.extract import extract_features, feature_blocks
from aligned_reid.evaluation.feature_file import FeatureWriter
from aligned_reid.evaluation.protocol import Measures, evaluate_features
from aligned_reid.model import AlignedReID, load_weights, open_model
from aligned_reid.preflight import RunInput, check_input, check_save_file
from aligned_reid.rendezvous import is_same_job
from aligned_reid.training.best import Best
from aligned_reid.training.checkpoint import read_last_good, set_aside
from aligned_reid.training.log import Log
from aligned_reid.training.trainer import Speed, Trainer
from aligned_reid.weights import (
    BEST_NAME,
    CHECKPOINT_NAME,
    PREVIOUS_NAME,
    SAFETENSORS_NAME,
    digest_of,
    find_state_dict,
    settings_of,
    write_safetensors,
)

RESULTS_NAME = "results.json"
MARK_NAMES = ("query", "gallery", "multi-query")
SCORE_NAMES = ("global", "global_re_ranked", "local", "local_re_ranked", "global_local", "global_local_re_ranked")


def run(config: Config) -> dict[str, Any]:
    """Train and evaluate, or with --only_test evaluate, as `config` says; returns what results.json holds.

    Under a launcher every process calls it; rank 0 writes. Raises InputError for a user's mistake, RunStopped where the
    loss is not finite.
    """
    world = read_world()
    given = check_input(config, has_run_dir=world.is_main)
    accelerator = open_device(config, world.local_rank)
    with process_group(world, accelerator, config) as world:
        config = go_on_after_restart(config, world, accelerator)
        config = settle_seed(config, world, accelerator)
        with run_folder(config, world) as log:
            log_settings(config, world, accelerator, given, log)
            return train_and_evaluate(config, world, accelerator, given, log)


def open_device(config: Config, local_rank: int) -> Accelerator:
    """The device that a process of the run computes on. Raises InputError where it cannot be used as asked."""
    return open_accelerator(
        config.device,
        config.npu,
        local_rank,
        mixed_precision=config.amp == "O1",
        amp_backend=config.amp_backend,
        tf32=config.tf32,
        deterministic=config.deterministic,
        compiled=config.compile,
    )


@contextmanager
def process_group(world: World, accelerator: Accelerator, config: Config) -> Iterator[World]:
    """The run's process group. Raises RunStopped, in one line, where a rank waits in vain for another."""
    accelerator.prepare_group(config.timeout)
    meeting = open_group(world, accelerator.backend, config.addr, config.timeout)
    try:
        yield dataclasses.replace(world, job=job_of_world(world, meeting))
    except RuntimeError as error:
        explained = meeting.explain(error) if meeting and not isinstance(error, RunStopped) else None
        if explained is None:
            raise
        raise explained from error
    finally:
        close_group()


def go_on_after_restart(config: Config, world: World, accelerator: Accelerator) -> Config:
    """The config, with `resume` where this launch has written a checkpoint: a launcher has restarted the ranks then.

    Another launch's checkpoint is a former run's, and only --resume true goes on from that.
    """
    if config.resume or config.only_test:
        return config
    found = 0.0
    if world.is_main and any((config.run_dir / name).is_file() for name in (CHECKPOINT_NAME, PREVIOUS_NAME)):
        with suppress(InputError):
            found = float(is_same_job(world.job, read_last_good(config.run_dir).content.get("job", {})))
    agreed = sum_over_ranks(torch.tensor(found, device=accelerator.device))
    return dataclasses.replace(config, resume=agreed.item() > 0)


@contextmanager
def run_folder(config: Config, world: World) -> Iterator[Log]:
    """The run's log. A former run's files in the folder are renamed, so that nothing is lost."""
    folder = config.run_dir
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        former = [folder / RESULTS_NAME, folder / "config.json"]
        if not (config.resume or config.only_test):
            names = (CHECKPOINT_NAME, PREVIOUS_NAME, BEST_NAME, SAFETENSORS_NAME, "log.txt", "tensorboard")
            former += [folder / name for name in names]
        renamed = [set_aside(path) for path in former] if not config.resume else []
        log = Log(folder if config.log_to_file else None)
        if any(renamed):
            log(f"files of a former run in {folder} are kept as {', '.join(path.name for path in renamed if path)}")
        write_json(folder / "config.json", config.to_dict())
    else:
        log = Log(None, is_main=False)
    try:
        yield log
    finally:
        log.close()


def settle_seed(config: Config, world: World, accelerator: Accelerator) -> Config:
    """The config with a seed that all ranks share: given, the resumed run's, or drawn by rank 0."""
    seed = config.seed
    if seed is None:
        mine = 0
        if world.is_main and config.resume:
            mine = int(read_last_good(config.run_dir).content["sampler"]["seed"])
        elif world.is_main:
            mine = secrets.randbelow(2**31)
        drawn = torch.tensor(mine, device=accelerator.device)
        seed = int(sum_over_ranks(drawn).item())
    torch.manual_seed(seed)
    return dataclasses.replace(config, seed=seed)


def log_settings(config: Config, world: World, accelerator: Accelerator, given: RunInput, log: Log) -> None:
    """What runs where, on what, with which settings."""
    log(f"device {accelerator.describe()}, {world.size} process{'es' if world.size > 1 else ''}, seed {config.seed}")
    if accelerator.passed_over:
        log(accelerator.passed_over)
    log(f"settings: {' '.join(config.to_flags())}")
    if given.train is not None:
        log(f"{config.trainset_part}: {len(given.train):,} images of {given.train.num_classes:,} identities")
    counts = np.bincount(given.test.marks, minlength=len(MARK_NAMES))
    log(f"test: {', '.join(f'{n:,} {name}' for n, name in zip(counts, MARK_NAMES, strict=True) if n)} images")


def train_and_evaluate(
    config: Config, world: World, accelerator: Accelerator, given: RunInput, log: Log
) -> dict[str, Any]:
    """The run itself; returns what results.json holds."""
    start = time.monotonic()
    local_was_trained = config.l_loss_weight > 0
    speed, profile, best = Speed(), None, None
    if given.train is None:
        model, local_was_trained = load_for_test(config, given.weights, log)
    else:
        trainer = train(config, world, accelerator, given, log)
        model, speed, profile = trainer.model, trainer.speed, trainer.profile.results()
        best = trainer.best.record if trainer.best else None
        if world.is_main:
            write_safetensors(config.run_dir / SAFETENSORS_NAME, model.state_dict(), config.to_dict())
    train_seconds = time.monotonic() - start
    use_local = local_was_trained if config.use_local_distance is None else config.use_local_distance

    start = time.monotonic()
    features = extract_features(model, given.test, accelerator, world, local=use_local, workers=config.workers)
    if not world.is_main:
        return {}
    extract_seconds = time.monotonic() - start
    rate = len(given.test) / extract_seconds
    log(f"features of {len(given.test):,} images in {extract_seconds:.1f}s ({rate:.1f} images/s)")
    measures = Measures(
        config.normalize_feature, multi_query_pool=config.multi_query_pool if config.multi_query else ""
    )
    scores = evaluate_features(features, given.test, log, measures)
    results = {
        **dict.fromkeys(SCORE_NAMES),
        **scores,
        "FPS": speed.fps,
        "ids_per_second": speed.fps / config.ims_per_id if speed.fps else None,
        "train_seconds": train_seconds if given.train is not None else None,
        "extract_seconds": extract_seconds,
        "evaluate_seconds": time.monotonic() - start,
        "best": best,
        "profile": profile,
        "device": accelerator.describe(),
        "num_processes": world.size,
        "config": config.to_dict(),
    }
    write_json(config.run_dir / RESULTS_NAME, results)
    return results


def run_extraction(config: Config, save_file: Path) -> None:
    """Write the features of the test part to `save_file`, as `config` says; `only_test` is set in it.

    Under a launcher every process calls it and extracts a share; rank 0 writes. Raises InputError for a user's mistake.
    """
    world = read_world()
    given = check_input(config)
    check_save_file(save_file)
    accelerator = open_device(config, world.local_rank)
    log = Log(None, is_main=world.is_main)
    images = given.test
    with process_group(world, accelerator, config):
        log(f"device {accelerator.describe()}")
        model, local_was_trained = load_for_test(config, given.weights, log)
        local = local_was_trained if config.use_local_distance is None else config.use_local_distance
        made_by = {
            "weights": digest_of(model),
            "resize_h_w": list(config.resize_h_w),
            "precision": str(accelerator.half or torch.float32),
            "normalize_feature": settings_of(given.weights).get("normalize_feature", config.normalize_feature),
        }
        writer = None
        if world.is_main:
            labels = {"person_id": images.person_ids, "camera": images.cameras, "mark": images.marks}
            shapes = model.feature_shapes(config.resize_h_w, local=local)
            writer = FeatureWriter(save_file, images.image_names, labels, made_by, shapes)
        num_done = torch.tensor(writer.num_done if writer else 0, device=accelerator.device)
        start = int(sum_over_ranks(num_done).item())
        if start:
            log(f"{start:,} of {len(images):,} images are in {save_file}.part already")
        blocks = feature_blocks(model, images, accelerator, world, local=local, workers=config.workers, start=start)
        for first, block in blocks:
            if writer:
                feats = {"global": block.global_feat, "local": block.local_feat}
                writer.write(first, {name: feat.numpy() for name, feat in feats.items() if feat is not None})
        if writer:
            writer.finish()
    log(f"features of {len(images):,} images in {save_file}; next: python script/evaluate.py --features {save_file}")


def train(config: Config, world: World, accelerator: Accelerator, given: RunInput, log: Log) -> Trainer:
    """Train the epochs that are left; returns the trainer, which holds the model and its speed."""
    images = given.train
    assert images is not None
    sampler = IdentityBatchSampler(
        images.person_ids,
        config.ids_per_batch,
        config.ims_per_id,
        config.train_final_batch,
        config.seed or 0,
        world.rank,
        num_shards=world.size if config.id_sampling == "sharded" else 1,
    )
    if sampler.ids_with_few_images:
        log(
            f"{len(sampler.ids_with_few_images)} identities have fewer than {config.ims_per_id} images "
            f"(the first is {sampler.ids_with_few_images[0]}): theirs are drawn with repetition"
        )
    start_elsewhere = config.resume or config.model_weight_file
    model = AlignedReID(images.num_classes, pretrained="none" if start_elsewhere else config.pretrained)
    if given.weights is not None and not config.resume:
        weights = find_state_dict(given.weights, config.model_weight_file)
        log(load_weights(model, weights, config.model_weight_file, need_local=False))
    elif not config.resume:
        log(model.trunk_report)
    trainer = Trainer(config, model, images, sampler, accelerator, world, log, config.run_dir)
    if config.eval_every:
        trainer.best = Best(config, given.test, accelerator, world, log, config.run_dir)
    if config.resume:
        trainer.resume()
        if trainer.best:
            trainer.best.resume()
    trainer.train()
    return trainer


def load_for_test(config: Config, content: Any, log: Log) -> tuple[AlignedReID, bool]:
    """The model to evaluate, and whether its local branch was trained: as its checkpoint says, else as the flags do.

    content: of the weight file.
    """
    source = config.model_weight_file or str(config.run_dir)
    trained = config.l_loss_weight > 0 or settings_of(content).get("l_loss_weight", 0.0) > 0
    need_local = trained if config.use_local_distance is None else config.use_local_distance
    model, report = open_model(content, source, need_local=need_local)
    log(report)
    return model, trained


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
