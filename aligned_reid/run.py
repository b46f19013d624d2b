"""One run from settings to results.json: open device and data, train, evaluate, write."""

from __future__ import annotations

import dataclasses
import json
import secrets
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aligned_reid.config import Config
from aligned_reid.data.dataset import TrainImages
from aligned_reid.data.identities import describe_overlap, identity_record
from aligned_reid.data.sampler import IdentityBatchSampler
from aligned_reid.device import Accelerator, find_wrong_layer, open_accelerator
from aligned_reid.distributed import World, from_rank, process_group, read_world, sum_over_ranks, wait_for_all
from aligned_reid.errors import InputError
from aligned_reid.evaluation.best import Best
from aligned_reid.evaluation.evaluate import load_for_test, measure, settle_test
from aligned_reid.evaluation.extract import feature_blocks, inference_copy
from aligned_reid.evaluation.feature_file import FeatureWriter
from aligned_reid.lock import hold
from aligned_reid.model import AlignedReID, architecture_of, load_weights
from aligned_reid.preflight import RunInput, check_input, check_save_file
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
    write_safetensors,
)

RESULTS_NAME, CONFIG_NAME = "results.json", "config.json"
MARK_NAMES = ("query", "gallery", "multi-query")


def run(config: Config) -> dict[str, Any]:
    """Train and evaluate, or with --only_test evaluate, as `config` says; returns what results.json holds.

    Under a launcher every process calls it; rank 0 writes. Raises InputError for a user's mistake, RunStopped where the
    loss is not finite.
    """
    world = read_world()
    given = check_input(config, has_run_dir=world.is_main, reads_images=world.local_rank == 0)
    accelerator = open_device(config, world.local_rank)
    check_devices(config, world, accelerator)
    accelerator.prepare_group(config.timeout)
    group = process_group(world, accelerator.backend, config.addr, config.timeout)
    with run_lock(config, world), group as world:
        config = go_on_after_restart(config, world, accelerator)
        config = settle_seed(config, world, accelerator)
        with run_folder(config, world) as log:
            if config.only_test:
                config = settle_test(config, given.weights, log)
            settle_precision(config, accelerator, given)
            log_settings(config, world, accelerator, given, log)
            return train_and_evaluate(config, world, accelerator, given, log)


def open_device(config: Config, local_rank: int, index: int | None = None) -> Accelerator:
    """The device that a process of the run computes on, or the one at `index`.

    Raises InputError where it cannot be used as asked.
    """
    return open_accelerator(
        config.device,
        config.npu if index is None else index,
        local_rank,
        mixed_precision=config.amp == "O1",
        amp_backend=config.amp_backend,
        tf32=config.tf32,
        deterministic=config.deterministic,
        compiled=config.compile,
    )


def check_devices(config: Config, world: World, accelerator: Accelerator) -> None:
    """Raise InputError where --sync_bn or --models_apart asks for what the devices do not give."""
    if config.sync_bn and accelerator.name == "cpu":
        raise InputError("--sync_bn true: torch has no batch norm over several processes for CPUs; leave it out")
    if not config.models_apart:
        return
    if world.size > 1:
        if world.size != config.num_models:
            raise InputError(
                f"--models_apart true: of {world.size} processes each has a model, and --num_models is "
                f"{config.num_models}; start as many, or one for all models"
            )
        return
    num_devices = 0 if accelerator.name == "cpu" else accelerator.count() - accelerator.index
    if num_devices < config.num_models:
        raise InputError(
            f"--models_apart true: {config.num_models} models need as many devices, and {num_devices} are there from "
            f"{accelerator.device}; leave it out, and they share one"
        )


def go_on_after_restart(config: Config, world: World, accelerator: Accelerator) -> Config:
    """The config, with `resume` set if a launcher has restarted this run: then the checkpoint is from the same launch.

    Only --resume true resumes from the checkpoint of an earlier launch.
    """
    if config.resume or config.only_test or not world.job:
        return config
    found = 0.0
    if world.is_main and any((config.run_dir / name).is_file() for name in (CHECKPOINT_NAME, PREVIOUS_NAME)):
        with suppress(InputError):
            found = float(world.job == read_last_good(config.run_dir).content.get("job"))
    agreed = sum_over_ranks(torch.tensor(found, device=accelerator.device))
    return dataclasses.replace(config, resume=agreed.item() > 0)


def run_lock(config: Config, world: World) -> AbstractContextManager[None]:
    """Rank 0 keeps other runs out of the run folder, which is made. Raises InputError if one is there."""
    if not world.is_main:
        return nullcontext()
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return hold(config.run_dir, "--exp_dir")


@contextmanager
def run_folder(config: Config, world: World) -> Iterator[Log]:
    """The run's log. A former run's files in the folder are renamed, so that nothing is lost."""
    folder = config.run_dir
    if world.is_main:
        former = [folder / RESULTS_NAME, folder / CONFIG_NAME]
        if not (config.resume or config.only_test):
            names = (CHECKPOINT_NAME, PREVIOUS_NAME, BEST_NAME, SAFETENSORS_NAME, "log.txt", "tensorboard")
            former += [folder / name for name in names] + sorted(folder.glob("model_?.safetensors"))
        renamed = [set_aside(path) for path in former] if not config.resume else []
        log = Log(folder if config.log_to_file else None)
        if any(renamed):
            log(f"files of a former run in {folder} are kept as {', '.join(path.name for path in renamed if path)}")
        if not config.resume:  # which may yet be refused
            write_json(folder / CONFIG_NAME, config.to_dict())
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


def settle_precision(config: Config, accelerator: Accelerator, given: RunInput) -> None:
    """Let the device compute in float32 if its 16-bit type is wrong for the run's network; rank 0 checks for all."""

    def check() -> str:
        if accelerator.half is None:
            return ""
        training = given.train is not None
        with torch.random.fork_rng(devices=[]):
            model = AlignedReID(
                given.train.num_classes if given.train else None,
                pretrained="none",
                **architecture_of(config.to_dict()),
            )
        network = model if training else inference_copy(model)
        network = network.to(accelerator.device).to(memory_format=accelerator.memory_format)
        return find_wrong_layer(network, config.resize_h_w, accelerator, backward=training)

    if where := from_rank(0, check, accelerator.device):
        accelerator.distrust_half(where)


def log_settings(config: Config, world: World, accelerator: Accelerator, given: RunInput, log: Log) -> None:
    """What runs where, on what, with which settings."""
    log(f"device {accelerator.describe()}, {world.size} process{'es' if world.size > 1 else ''}, seed {config.seed}")
    if accelerator.passed_over:
        log(accelerator.passed_over)
    log(f"settings: {' '.join(config.to_flags())}")
    if config.recipe != "reference":
        recipe = Config.of(recipe=config.recipe).differences(Config().to_dict())
        log(f"recipe {config.recipe}, where it differs from the reference: {'; '.join(recipe[1:])}")
    if given.train is not None:
        log(f"{config.trainset_part}: {len(given.train):,} images of {given.train.num_classes:,} identities")
    for name, images in given.tests.items():
        counts = np.bincount(images.marks, minlength=len(MARK_NAMES))
        which = f"test of {name}" if len(given.tests) > 1 else "test"
        log(f"{which}: {', '.join(f'{n:,} {mark}' for n, mark in zip(counts, MARK_NAMES, strict=True) if n)} images")


def train_and_evaluate(
    config: Config, world: World, accelerator: Accelerator, given: RunInput, log: Log
) -> dict[str, Any]:
    """The run itself; returns what results.json holds."""
    local_was_trained = config.l_loss_weight > 0
    speed, train_seconds, profile, best = Speed(), None, None, None
    if given.train is None:
        model, local_was_trained = load_for_test(config, given.weights, log)
        models = [model]
        if overlap := describe_overlap(given.test, given.weights):
            log(overlap)
    else:
        trainer = train(config, world, accelerator, given, log)
        models = trainer.tested_models()
        speed, train_seconds, profile = trainer.speed, trainer.seconds, trainer.profile.results()
        best = trainer.best.record if trainer.best else None
        if world.is_main:
            try:
                write_weights(models, config, trainer.checkpoints.trained_on)
            except (InputError, OSError) as error:  # a missing package or a full disk is no reason to lose the test
                log(f"{SAFETENSORS_NAME} is not written: {error}; the weights are in {CHECKPOINT_NAME}")
    use_local = local_was_trained if config.use_local_distance is None else config.use_local_distance

    start = time.monotonic()
    scores = measure(models, given.tests, config, world, accelerator, log, local=use_local)
    if not world.is_main:
        return {}
    results = {
        **scores,
        "FPS": speed.fps,
        "ids_per_second": speed.fps / config.ims_per_id if speed.fps else None,
        "train_seconds": train_seconds,
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
    given = check_input(config, reads_images=world.local_rank == 0)
    check_save_file(save_file)
    accelerator = open_device(config, world.local_rank)
    log = Log(None, is_main=world.is_main)
    lock = hold(save_file, "--save_file") if world.is_main else nullcontext()
    accelerator.prepare_group(config.timeout)
    with lock, process_group(world, accelerator.backend, config.addr, config.timeout):
        config = settle_test(config, given.weights, log)
        settle_precision(config, accelerator, given)
        log(f"device {accelerator.describe()}")
        images = given.test.at_size(config.resize_h_w)
        model, local_was_trained = load_for_test(config, given.weights, log)
        local = local_was_trained if config.use_local_distance is None else config.use_local_distance
        made_by = {
            "weights": digest_of(model.state_dict()),
            "resize_h_w": list(config.resize_h_w),
            "precision": str(accelerator.half or torch.float32),
            "normalize_feature": config.normalize_feature or config.test_distance == "cosine",
            "flip_test": config.flip_test,
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
        blocks = feature_blocks(
            model,
            images,
            accelerator,
            world,
            local=local,
            workers=config.workers,
            start=start,
            flip=config.flip_test,
        )
        for first, block in blocks:
            if writer:
                feats = {"global": block.global_feat, "local": block.local_feat}
                writer.write(first, {name: feat.numpy() for name, feat in feats.items() if feat is not None})
        if writer:
            writer.finish()
    next_command = f"python script/evaluate.py --features {shlex.quote(str(save_file))}"
    log(f"features of {len(images):,} images in {save_file}; next: {next_command}")


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
        0 if config.models_apart else world.rank,  # models that learn from each other see the same batches
        num_shards=world.size if config.id_sampling == "sharded" and not config.models_apart else 1,
    )
    if sampler.ids_with_few_images:
        log(
            f"{len(sampler.ids_with_few_images)} identities have fewer than {config.ims_per_id} images "
            f"(the first is {sampler.ids_with_few_images[0]}): theirs are drawn with repetition"
        )
    models = [start_model(config, images.num_classes, given.weights, log) for _ in range(config.num_models)]
    accelerators = [accelerator]
    if config.models_apart and world.size > 1:
        models = [models[world.rank]]
    elif config.models_apart:
        accelerators += [
            open_device(config, world.local_rank, accelerator.index + more) for more in range(1, config.num_models)
        ]
        for other in accelerators[1:]:
            other.half, other.wrong_half = accelerator.half, accelerator.wrong_half
    if config.cache:
        open_image_cache(config, world, accelerator, images, log)
    trainer = Trainer(config, models, images, sampler, accelerators, world, log, config.run_dir)
    if world.is_main:
        trainer.checkpoints.trained_on = identity_record(images, given.weights)
    if not config.resume and start_alike(models):
        log("the models start alike in all that is trained, and stay so: -idlw or -llw gives each a head of its own")
    if config.eval_every:
        trainer.best = Best(config, given.test, accelerator, world, log, config.run_dir)
        trainer.best.trained_on = trainer.checkpoints.trained_on
    if config.resume:
        trainer.resume()
        if world.is_main:
            write_json(config.run_dir / CONFIG_NAME, config.to_dict())
        if trainer.best:
            trainer.best.resume()
    trainer.train()
    return trainer


def start_model(config: Config, num_classes: int, weights: Any, log: Log) -> AlignedReID:
    """A model to train; several of a run differ in what starts at random. weights: of --model_weight_file."""
    start_elsewhere = config.resume or config.model_weight_file
    architecture = architecture_of(config.to_dict())
    pretrained = "none" if start_elsewhere else config.pretrained
    model = AlignedReID(num_classes, pretrained=pretrained, **architecture)
    if weights is not None and not config.resume:
        state = find_state_dict(weights, config.model_weight_file)
        log(load_weights(model, state, config.model_weight_file, need_local=False))
    elif not config.resume:
        log(model.trunk_report)
    return model


def start_alike(models: Sequence[AlignedReID]) -> bool:
    """Whether the first two of several models have the same weights, frozen heads aside."""
    if len(models) < 2:
        return False
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    return all(torch.equal(one.cpu(), other.cpu()) for one, other in pairs if one.requires_grad)


def open_image_cache(config: Config, world: World, accelerator: Accelerator, images: TrainImages, log: Log) -> None:
    """Let training images come from their cache. Rank 0 goes first: it builds it where that is due, and says so."""
    if not world.is_main:
        wait_for_all(accelerator.device)
    images.open_cache([Path(images.images_dir).parent / "cache", config.run_dir / "cache"], log)
    if world.is_main:
        wait_for_all(accelerator.device)


def write_weights(models: Sequence[AlignedReID], config: Config, trained_on: Mapping[str, list[str]]) -> None:
    """Each model's weights for other readers: model.safetensors, and model_2.safetensors, ... of several."""
    path = config.run_dir / SAFETENSORS_NAME
    for number, model in enumerate(models, start=1):
        own = path if number == 1 else path.with_stem(f"{path.stem}_{number}")
        write_safetensors(own, model.state_dict(), config.to_dict(), trained_on)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
