"""Training and feature extraction against the published loop, in one run: images/s of both, and the ratio.

    python benchmark/training.py --data_path=<prepared data set> [--resize_h_w=128,64] [--steps=6] [--rounds=2]

The published loop is the reference's algorithm, line for line, on today's torch: PIL decoding and float64 normalising
in two threads, float32 NCHW, Adam, hard samples by boolean masks, figures read back in every step. Both sides train
ResNet-50 from the same kind of start on the same images with 32 x 4 images a step. Each has a process of its own, so
that neither runs with the other's memory settings; they take turns in blocks of steps, and the first step of a block is
not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from loader import loader_rates, loader_table, published_image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.accelerator import open_accelerator
from aligned_reid.config import Config
from aligned_reid.data import IdentityBatchSampler, TestImages, TrainImages, open_data
from aligned_reid.distributed import World
from aligned_reid.evaluation.extract import extract_features
from aligned_reid.flags import parse_height_width
from aligned_reid.model import AlignedReID
from aligned_reid.training.log import Log
from aligned_reid.training.trainer import Trainer

IDS_PER_BATCH, IMS_PER_ID, TEST_BATCH = 32, 4, 32


class PublishedModel(nn.Module):
    """The reference's model."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        resnet = torchvision.models.resnet50(weights=None)
        self.base = nn.Sequential(*list(resnet.children())[:-2])
        self.local_conv = nn.Conv2d(2048, 128, 1)
        self.local_bn = nn.BatchNorm2d(128)
        self.local_relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, x):
        feat = self.base(x)
        global_feat = nn.functional.avg_pool2d(feat, feat.size()[2:]).view(len(feat), -1)
        local_feat = torch.mean(feat, -1, keepdim=True)
        local_feat = self.local_relu(self.local_bn(self.local_conv(local_feat)))
        return global_feat, local_feat.squeeze(-1).permute(0, 2, 1), self.fc(global_feat)


def published_batches(
    paths: list[str], ids: np.ndarray, size: tuple[int, int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of one epoch, an identity a time from two threads through a queue of 200."""
    identities = np.random.permutation(np.unique(ids))
    samples: queue.Queue = queue.Queue(maxsize=200)
    stop, pending, lock = threading.Event(), iter(identities), threading.Lock()

    def work() -> None:
        while not stop.is_set():
            with lock:
                identity = next(pending, None)
            if identity is None:
                return
            own = np.flatnonzero(ids == identity)
            chosen = np.random.choice(own, IMS_PER_ID, replace=len(own) < IMS_PER_ID)
            images = [published_image(paths[index], size, np.random.uniform() > 0.5) for index in chosen]
            while not stop.is_set():
                try:
                    samples.put((images, identity), timeout=0.1)
                    break
                except queue.Full:
                    continue

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(len(identities) // IDS_PER_BATCH):
            drawn = [samples.get() for _ in range(IDS_PER_BATCH)]
            images = np.stack(np.concatenate([images for images, _ in drawn]))
            yield images, np.repeat([identity for _, identity in drawn], IMS_PER_ID)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def published_triplets(feat: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n = len(feat)
    xx = torch.pow(feat, 2).sum(1, keepdim=True).expand(n, n)
    dist = (xx + xx.t()).addmm(feat, feat.t(), beta=1, alpha=-2).clamp(min=1e-12).sqrt()
    is_pos = labels.expand(n, n).eq(labels.expand(n, n).t())
    is_neg = labels.expand(n, n).ne(labels.expand(n, n).t())
    dist_ap, relative_p = torch.max(dist[is_pos].contiguous().view(n, -1), 1, keepdim=True)
    dist_an, relative_n = torch.min(dist[is_neg].contiguous().view(n, -1), 1, keepdim=True)
    indices = torch.arange(n).unsqueeze(0).expand(n, n)
    torch.gather(indices[is_pos].contiguous().view(n, -1), 1, relative_p)
    torch.gather(indices[is_neg].contiguous().view(n, -1), 1, relative_n)
    return dist_ap.squeeze(1), dist_an.squeeze(1)


class PublishedTraining:
    """The reference's loop, a block of steps at a time."""

    def __init__(self, images: TrainImages) -> None:
        self.images = images
        self.paths = [f"{images.images_dir}/{name}" for name in images.image_names]
        self.model = PublishedModel(images.num_classes).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=2e-4, weight_decay=5e-4)
        self.criterion = nn.MarginRankingLoss(margin=0.3)

    def block(self, steps: int) -> list[float]:
        """Seconds of each step but the first."""
        seconds = []
        start = time.perf_counter()
        for step, (images, labels) in enumerate(
            published_batches(self.paths, self.images.person_ids, self.images.size)
        ):
            self.step(torch.from_numpy(images).float(), torch.from_numpy(labels))
            now = time.perf_counter()
            seconds.append(now - start)
            start = now
            if step == steps:
                break
        return seconds[1:]

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        global_feat, _, _ = self.model(images)
        dist_ap, dist_an = published_triplets(global_feat, labels)
        loss = self.criterion(dist_an, dist_ap, torch.ones_like(dist_an))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for figure in (dist_an > dist_ap, dist_an > dist_ap + 0.3, dist_ap, dist_an, loss):
            figure.detach().float().mean().item()

    def extract(self, images: TestImages) -> float:
        """Images/s of the reference's feature extraction: one batch of 32 after another, float32 NCHW."""
        self.model.eval()
        start = time.perf_counter()
        with torch.no_grad():
            for first in range(0, len(images), TEST_BATCH):
                names = images.image_names[first : first + TEST_BATCH]
                batch = np.stack([published_image(f"{images.images_dir}/{name}", images.size, False) for name in names])
                for feat in self.model(torch.from_numpy(batch).float())[:2]:
                    feat.numpy()
        self.model.train()
        return len(images) / (time.perf_counter() - start)

    def describe(self) -> str:
        return "the published loop"


class OurTraining:
    """The library's loop, a block of steps at a time."""

    def __init__(self, images: TrainImages, workers: int, folder: Path) -> None:
        config = Config(total_epochs=1000, workers=workers, resize_h_w=images.size, seed=0)
        sampler = IdentityBatchSampler(images.person_ids, IDS_PER_BATCH, IMS_PER_ID, False, 0)
        model = AlignedReID(images.num_classes, pretrained="none")
        accelerator = open_accelerator("auto", None, 0, mixed_precision=True)
        self.accelerator, self.workers = accelerator, workers
        self.epoch = 0
        self.trainer = Trainer(config, model, images, sampler, accelerator, World(), Log(None, is_main=False), folder)

    def block(self, steps: int) -> list[float]:
        seconds: list[float] = []
        start = time.perf_counter()

        def progress(epoch: int) -> Iterator[object]:
            nonlocal start
            for step, batch in enumerate(self.trainer.loader):
                yield batch
                self.accelerator.synchronize()
                now = time.perf_counter()
                seconds.append(now - start)
                start = now
                if step == steps:
                    return

        self.trainer.progress = progress  # type: ignore[assignment,method-assign]
        self.epoch += 1
        self.trainer.train_epoch(self.epoch)
        return seconds[1:]

    def extract(self, images: TestImages) -> float:
        start = time.perf_counter()
        model = self.trainer.model
        extract_features(model, images, self.accelerator, World(), local=True, workers=self.workers)
        return len(images) / (time.perf_counter() - start)

    def describe(self) -> str:
        return self.accelerator.describe()


def serve(side: str, arguments: argparse.Namespace, connection: Connection) -> None:
    """One side, in its own process: answers "train" with seconds per step and "extract" with images/s."""
    data = open_data(arguments.data_path)
    train, test = TrainImages(data, size=arguments.resize_h_w), TestImages(data, size=arguments.resize_h_w)
    test.image_names = test.image_names[: arguments.extract]
    with tempfile.TemporaryDirectory() as folder:
        if side == "published":
            training: PublishedTraining | OurTraining = PublishedTraining(train)
        else:
            training = OurTraining(train, arguments.workers, Path(folder))
        connection.send(training.describe())
        with contextlib.suppress(EOFError):  # the benchmark has ended
            while True:
                work = connection.recv()
                connection.send(training.block(arguments.steps) if work == "train" else training.extract(test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--resize_h_w", type=parse_height_width, default=(256, 128))
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a block")
    parser.add_argument("--rounds", type=int, default=2, help="blocks of each side")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--extract", type=int, default=1024, help="test images to extract features of")
    arguments = parser.parse_args()
    rates_of_loading = loader_rates(arguments.data_path, arguments.resize_h_w)
    context = multiprocessing.get_context("spawn")
    connections, described = {}, {}
    for side in ("published", "ours"):
        connections[side], theirs = context.Pipe()
        context.Process(target=serve, args=(side, arguments, theirs)).start()
        theirs.close()  # so that a side that has ended is noticed
        described[side] = connections[side].recv()

    def ask(side: str, work: str) -> Any:
        connections[side].send(work)
        return connections[side].recv()

    seconds: dict[str, list[float]] = {side: [] for side in connections}
    rates: dict[str, list[float]] = {side: [] for side in connections}
    try:
        for _ in range(arguments.rounds):
            for side in connections:
                seconds[side] += ask(side, "train")
            for side in connections:
                rates[side].append(ask(side, "extract"))
    finally:
        for connection in connections.values():
            connection.close()
    print(f"{described['ours']}; {arguments.resize_h_w[0]} x {arguments.resize_h_w[1]}; medians")
    print("| work | published, images/s | ours, images/s | ratio |")
    print("| --- | --- | --- | --- |")
    batch = IDS_PER_BATCH * IMS_PER_ID
    training = {side: batch / statistics.median(steps) for side, steps in seconds.items()}
    extracting = {side: statistics.median(measured) for side, measured in rates.items()}
    for name, found in (("training, data included", training), ("feature extraction, data included", extracting)):
        print(f"| {name} | {found['published']:.1f} | {found['ours']:.1f} | {found['ours'] / found['published']:.2f} |")
    print()
    print(loader_table(rates_of_loading))


if __name__ == "__main__":
    main()
