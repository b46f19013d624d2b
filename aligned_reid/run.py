"""One run from settings to results.json: open data and device, train, evaluate, write."""

from __future__ import annotations

import json
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aligned_reid.cli import command_line
from aligned_reid.config import Config
from aligned_reid.data.dataset import FolderImages, TestImages, TrainImages
from aligned_reid.data.identities import describe_overlap, identity_record
from aligned_reid.data.sampler import IdentityBatchSampler
from aligned_reid.device import Accelerator, check_device_name, find_wrong_layer, open_accelerator
from aligned_reid.distributed import World, from_main, process_group, read_world
from aligned_reid.errors import InputError
from aligned_reid.evaluation.best import Best
from aligned_reid.evaluation.evaluate import evaluate_models, load_for_test, settle_test
from aligned_reid.evaluation.extract import feature_blocks, inference_copy
from aligned_reid.evaluation.features import FeatureWriter
from aligned_reid.files import write_file
from aligned_reid.lock import hold
from aligned_reid.model import AlignedReID, architecture_of, load_weights
from aligned_reid.preflight import RunInput, check_input, check_save_file, open_images, read_start_weights
from aligned_reid.release import write_models
from aligned_reid.training.checkpoint import read_last_good, set_aside
from aligned_reid.training.log import Log
from aligned_reid.training.trainer import Trainer
from aligned_reid.weights import (
    BEST_NAME,
    CHECKPOINT_NAME,
    PREVIOUS_NAME,
    RESULTS_NAME,
    SAFETENSORS_NAME,
    digest_of,
    find_state_dict,
)

CONFIG_NAME = "config.json"


def run(config: Config) -> dict[str, Any]:
    """Train and evaluate, or with --only_test evaluate only; returns the content of results.json.

    Under a launcher every process calls it, and rank 0 writes. Raises InputError for a user's mistake, RunStopped if
    the run cannot continue.
    """
    world = read_world()
    run_input = check_input(config, world)
    accelerators = open_devices(config, world)
    accelerator = accelerators[0]
    accelerator.prepare_group(config.timeout)
    group = process_group(world, accelerator.backend, config.addr, config.timeout)
    if world.is_main:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    lock = hold(config.run_dir, "--exp_dir") if world.is_main else nullcontext()
    with lock, group as world:
        config = resume_after_restart(config, world, accelerator)
        config = settle_seed(config, accelerator)
        with run_folder(config, world) as log:
            if config.only_test:
                config = settle_test(config, run_input.weights, log)
            settle_precision(config, accelerator, run_input.train)
            log_settings(config, world, accelerator, run_input, log)
            return train_and_evaluate(config, world, accelerators, run_input, log)


def open_devices(config: Config, world: World) -> list[Accelerator]:
    """The devices that this process computes on: one, or with several --npu one for each model.

    Raises InputError if one cannot be used as asked.
    """
    accelerators = [
        open_accelerator(config, index, world.local_rank)
        for index in reversed(config.npu or (None,))  # the first one last: it stays the current device
    ]
    return accelerators[::-1]


def resume_after_restart(config: Config, world: World, accelerator: Accelerator) -> Config:
    """The config, with `resume` set if a launcher has restarted this run: then the checkpoint is of the same launch.

    Only --resume true continues from an earlier launch's checkpoint.
    """
    if config.resume or config.only_test or not world.job:
        return config

    def is_restart() -> bool:
        try:
            return read_last_good(config.run_dir).content.get("job") == world.job
        except InputError:  # there is no checkpoint
            return False

    return replace(config, resume=from_main(is_restart, accelerator.device))


@contextmanager
def run_folder(config: Config, world: World) -> Iterator[Log]:
    """The run's log. An earlier run's files in the folder are renamed, so that nothing is lost."""
    folder, renamed = config.run_dir, []
    if world.is_main and not config.resume:
        earlier = [folder / RESULTS_NAME, folder / CONFIG_NAME]
        if not config.only_test:
            names = (CHECKPOINT_NAME, PREVIOUS_NAME, BEST_NAME, SAFETENSORS_NAME, "model.md", "log.txt", "tensorboard")
            earlier += [folder / "profile", *(folder / name for name in names)]
            earlier += [*sorted(folder.glob("model_?.safetensors")), *sorted(folder.glob("model_?.md"))]
        renamed = [path.name for path in map(set_aside, earlier) if path]
        write_json(folder / CONFIG_NAME, config.to_dict())  # of a resumed run: once it is known to fit
    log = Log(folder if config.log_to_file else None, is_main=world.is_main)
    if renamed:
        log(f"files of an earlier run in {folder} are kept as {', '.join(renamed)}")
    try:
        yield log
    finally:
        log.close()


def settle_seed(config: Config, accelerator: Accelerator) -> Config:
    """The config with a seed that all ranks share: as given, as in the resumed run, or drawn by rank 0."""

    def choose() -> int:
        if config.resume:
            return int(read_last_good(config.run_dir).content["sampler"]["seed"])
        return secrets.randbelow(2**31)

    seed = from_main(choose, accelerator.device) if config.seed is None else config.seed
    torch.manual_seed(seed)
    return replace(config, seed=seed)


def settle_precision(config: Config, accelerator: Accelerator, train: TrainImages | None) -> None:
    """Make the device compute in float32 if its 16-bit type is wrong for the run's network; rank 0 checks for all."""

    def check() -> str:
        if accelerator.half is None:
            return ""
        with torch.random.fork_rng(devices=[]):
            num_classes = train.num_classes if train else None
            model = AlignedReID(num_classes, pretrained="none", **architecture_of(config.to_dict()))
        network = model if train else inference_copy(model)
        network = network.to(accelerator.device).to(memory_format=accelerator.memory_format)
        return find_wrong_layer(network, config.resize_h_w, accelerator, backward=train is not None)

    if where := from_main(check, accelerator.device):
        accelerator.distrust_half(where)


def log_settings(config: Config, world: World, accelerator: Accelerator, run_input: RunInput, log: Log) -> None:
    """Log the device, the settings and the data."""
    log(f"device {accelerator.describe()}, {world.size} process{'es' if world.size > 1 else ''}, seed {config.seed}")
    if accelerator.passed_over:
        log(accelerator.passed_over)
    log(f"settings: {' '.join(config.to_flags())}")
    if config.recipe != "reference":
        recipe = Config.of(recipe=config.recipe).differences(Config().to_dict())
        log(f"recipe {config.recipe}, compared with the reference: {'; '.join(recipe)}")
    if run_input.train is not None:
        log(f"{config.trainset_part}: {len(run_input.train):,} images of {run_input.train.num_classes:,} identities")
    counts = np.bincount(run_input.test.marks, minlength=3).tolist()
    kinds = zip(counts, ("query", "gallery", "multi-query"), strict=True)
    log(f"test: {', '.join(f'{count:,} {kind}' for count, kind in kinds if count)} images")


def train_and_evaluate(
    config: Config, world: World, accelerators: Sequence[Accelerator], run_input: RunInput, log: Log
) -> dict[str, Any]:
    """The run itself; returns the content of results.json."""
    accelerator = accelerators[0]
    training: dict[str, Any] = dict.fromkeys(("FPS", "ids_per_second", "train_seconds", "profile", "best"))
    if run_input.train is None:
        model, local = load_for_test(config, run_input.weights, log)
        models = [model]
        if overlap := describe_overlap(run_input.test, run_input.weights):
            log(overlap)
    else:
        trainer, best = train(config, world, accelerators, run_input, log)
        local = config.l_loss_weight > 0 if config.use_local_distance is None else config.use_local_distance
        models = trainer.tested_models()
        training = {**trainer.results(), "best": best.record}
    start = time.monotonic()
    scores = evaluate_models(models, run_input.test, config, world, accelerator, log, local=local)
    if not world.is_main:
        return {}
    results = {
        **scores,
        **training,
        "evaluate_seconds": time.monotonic() - start,
        "device": accelerator.describe(),
        "num_processes": world.size,
        "config": config.to_dict(),
    }
    write_json(config.run_dir / RESULTS_NAME, results)
    if run_input.train is not None:
        evaluated = results.get("models", [results])
        trained_on = trainer.checkpoints.trained_on
        write_models(models, config, trained_on, evaluated, run_input.train, run_input.test)
    return results


def train(
    config: Config, world: World, accelerators: Sequence[Accelerator], run_input: RunInput, log: Log
) -> tuple[Trainer, Best]:
    """Train the remaining epochs; returns the trainer, which holds the models, and the best evaluation in between."""
    images = run_input.train
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
    if few := sampler.ids_with_few_images:
        log(
            f"{len(few)} identities have fewer than {config.ims_per_id} images (the first is {few[0]}): "
            "their images are repeated"
        )
    models = [start_model(config, images.num_classes, run_input.weights, log) for _ in range(config.num_models)]
    for other in accelerators[1:]:
        other.half, other.wrong_half = accelerators[0].half, accelerators[0].wrong_half
    if config.cache:
        open_image_cache(config, world, accelerators[0], images, log)
    trained_on = identity_record(images, run_input.weights) if world.is_main else {}
    best = Best(config, run_input.test, accelerators[0], world, log, trained_on)
    trainer = Trainer(
        config,
        models,
        images,
        sampler,
        accelerators,
        world,
        log,
        trained_on=trained_on,
        after_epoch=best.after_epoch,
    )
    if not config.resume and start_alike(models):  # once the trainer has frozen the heads that have no loss
        log("the models start with equal trainable weights and stay equal: -idlw or -llw gives each a head")
    if config.resume:
        trainer.resume()
        best.resume()
        if world.is_main:
            write_json(config.run_dir / CONFIG_NAME, config.to_dict())
    trainer.train()
    return trainer, best


def start_model(config: Config, num_classes: int, weights: Any, log: Log) -> AlignedReID:
    """A model to train. weights: the content of --model_weight_file; a resumed run loads its own later."""
    pretrained = "none" if config.resume or config.model_weight_file else config.pretrained
    model = AlignedReID(num_classes, pretrained=pretrained, **architecture_of(config.to_dict()))
    if config.resume:
        return model
    if weights is None:
        log(model.trunk_report)
    else:
        state = find_state_dict(weights, config.model_weight_file)
        log(load_weights(model, state, config.model_weight_file, need_local=False))
    return model


def start_alike(models: Sequence[AlignedReID]) -> bool:
    """Whether the first two of several models have the same weights, frozen heads aside."""
    if len(models) < 2:
        return False
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    return all(torch.equal(one.cpu(), other.cpu()) for one, other in pairs if one.requires_grad)


def open_image_cache(config: Config, world: World, accelerator: Accelerator, images: TrainImages, log: Log) -> None:
    """Read training images from their cache. Rank 0 comes first and builds it if necessary."""
    folders = [Path(images.images_dir).parent / "cache", config.run_dir / "cache"]
    from_main(lambda: images.open_cache(folders, log), accelerator.device)
    if not world.is_main:
        images.open_cache(folders, log)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def run_extraction(
    config: Config, save_file: Path, folder: Path | None = None, log: Callable[[str], None] | None = None
) -> None:
    """Write the features of the test images, or of all images in `folder`, to `save_file`; `config.only_test` is set.

    log gets a line on each stage (default: printed). Under a launcher every process calls it and extracts a share; rank
    0 writes. Raises InputError for a user's mistake.
    """
    world = read_world()
    log = log or Log(None, is_main=world.is_main)
    check_device_name(config.device)
    if world.is_main:
        check_save_file(save_file, "--save_file", ".h5", ".hdf5")
    if folder:
        images: TestImages = FolderImages(folder, config.resize_h_w, log)
    else:
        images, _ = open_images(config, world)
    weights = read_start_weights(config, None)
    (accelerator,) = open_devices(replace(config, npu=config.npu[:1]), world)
    lock = hold(save_file, "--save_file") if world.is_main else nullcontext()
    accelerator.prepare_group(config.timeout)
    with lock, process_group(world, accelerator.backend, config.addr, config.timeout):
        config = settle_test(config, weights, log)
        settle_precision(config, accelerator, None)
        log(f"device {accelerator.describe()}")
        images = images.at_size(config.resize_h_w)
        model, local = load_for_test(config, weights, log)
        writer = open_writer(save_file, config, model, images, accelerator, local) if world.is_main else None
        start = from_main(lambda: writer.num_done if writer else 0, accelerator.device)
        if start:
            log(f"{start:,} of {len(images):,} images are in {save_file}.part already")
        blocks = feature_blocks(
            model, images, accelerator, world, local=local, workers=config.workers, start=start, flip=config.flip_test
        )
        for first, block in blocks:
            if writer:
                feats = {"global": block.global_feat, "local": block.local_feat}
                writer.write(first, {name: feat.cpu().numpy() for name, feat in feats.items() if feat is not None})
        if writer:
            writer.finish()
    next_command = "" if folder else f"; next: {command_line('evaluate')} --features {shlex.quote(str(save_file))}"
    log(f"features of {len(images):,} images in {save_file}{next_command}")
    if isinstance(images, FolderImages) and images.num_left_out:
        raise InputError(f"{images.num_left_out:,} images could not be used, as listed above; the others are served")


def open_writer(
    save_file: Path, config: Config, model: AlignedReID, images: TestImages, accelerator: Accelerator, local: bool
) -> FeatureWriter:
    """The writer of `save_file`, which continues an interrupted one that was made in the same way."""
    made_by = {
        "weights": digest_of(model.state_dict()),
        "resize_h_w": list(config.resize_h_w),
        "precision": str(accelerator.half or torch.float32),
        "normalize_feature": config.normalize_feature or config.test_distance == "cosine",
        "flip_test": config.flip_test,
    }
    labels = {"person_id": images.person_ids, "camera": images.cameras}
    if len(images.marks):
        labels["mark"] = images.marks
    shapes = model.feature_shapes(config.resize_h_w, local=local)
    return FeatureWriter(save_file, images.image_names, labels, made_by, shapes)
