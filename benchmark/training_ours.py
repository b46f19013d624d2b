"""The library's training and bare step in blocks of steps, for benchmark/training.py."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from blocks import Block, peak_memory

from aligned_reid.config import Config
from aligned_reid.data import TrainImages, open_data
from aligned_reid.data.loader import num_processors
from aligned_reid.data.sampler import IdentityBatchSampler
from aligned_reid.distributed import World, process_group, read_world
from aligned_reid.model import AlignedReID
from aligned_reid.run import open_devices
from aligned_reid.training.learner import Learner
from aligned_reid.training.log import Log
from aligned_reid.training.trainer import Trainer


class TimedTrainer(Trainer):
    """The library's loop with an epoch of a few steps, each timed with the loading of its images."""

    def __init__(self, num_steps: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.num_steps = num_steps
        self.step_seconds: list[float] = []

    def steps(self, epoch: int) -> Iterator[Any]:  # type: ignore[override]
        start = time.perf_counter()
        for batches in itertools.islice(super().steps(epoch), self.num_steps):
            yield batches
            self.accelerator.synchronize()
            now = time.perf_counter()
            self.step_seconds.append(now - start)
            start = now


def our_block(config: Config, steps: int, cache_folder: Path) -> Block:
    """Train `steps` timed steps after an untimed one; the process may be a rank."""
    world = read_world()
    (accelerator,) = open_devices(config, world)
    images = TrainImages(open_data(config.data_path), size=config.resize_h_w)
    if config.cache:
        images.open_cache([cache_folder], lambda line: None)
    shards = world.size if config.id_sampling == "sharded" else 1
    batches = (config.ids_per_batch, config.ims_per_id, config.train_final_batch, config.seed or 0)
    sampler = IdentityBatchSampler(images.person_ids, *batches, world.rank, num_shards=shards)
    model = AlignedReID(images.num_classes, pretrained="none")
    log = Log(None, is_main=False)
    with tempfile.TemporaryDirectory() as folder, process_group(world, accelerator.backend):
        config = replace(config, exp_dir=folder)
        trainer = TimedTrainer(steps + 1, config, [model], images, sampler, [accelerator], world, log)
        trainer.train_epoch(1)
    return Block(trainer.step_seconds[1:], peak_memory(), accelerator.describe())


def our_rank(config: Config, steps: int, cache_folder: Path, rank: int, num_ranks: int, port: int) -> Block:
    """our_block as one of several processes that share the processors."""
    torch.set_num_threads(max(1, num_processors() // num_ranks))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return our_block(config, steps, cache_folder)


def bare_block(config: Config, steps: int) -> Block:
    """Forward, backward and optimizer of the same model on random images: no data, no mining, no log.

    The loss is the mean square of the global features, which costs next to nothing.
    """
    (accelerator,) = open_devices(config, World())
    num_classes = TrainImages(open_data(config.data_path), size=config.resize_h_w).num_classes
    learner = Learner(config, AlignedReID(num_classes, pretrained="none"), accelerator, World())
    learner.start_epoch(1)
    images = torch.randn(config.ids_per_batch * config.ims_per_id, 3, *config.resize_h_w, device=accelerator.device)
    images = images.to(memory_format=accelerator.memory_format)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        learner.optimizer.zero_grad()
        with accelerator.autocast():
            features = learner.network(images)
        learner.scaler.backward(features.global_feat.float().square().mean())
        learner.scaler.step(learner.optimizer)
        accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    return Block(seconds[1:], peak_memory(), accelerator.describe())
