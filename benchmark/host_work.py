"""Host work of a training step without its model, compared with the published Ascend port: milliseconds and ratio.

    python benchmark/host_work.py --data_path=<prepared data set> [--ids_per_batch=128] [--rounds=5]

Both sides read a batch of images from their files. Then they take random features through mining, loss, backward and
the log's figures, in the order of their loops. The network's forward and backward passes and the optimizer are left
out. The sides take turns on one CPU thread. The published port reads 5 figures, the distances and the labels back from
the device in every step, and waits each time; a CPU does not show this, so the real difference is larger.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loader import published_image
from training_published import IMS_PER_ID, published_triplets

from aligned_reid.config import Config
from aligned_reid.data import TrainImages, open_data
from aligned_reid.data.dataset import TrainBatch
from aligned_reid.data.loader import make_loader
from aligned_reid.data.sampler import IdentityBatchSampler
from aligned_reid.device import Accelerator
from aligned_reid.flags import parse_height_width
from aligned_reid.model import Features
from aligned_reid.objective import Objective
from aligned_reid.training.log import Meters, Throughput

T = TypeVar("T")


class Published:
    """The port's step without its model: float64 images, a mask per side of the triplets, figures read back."""

    def __init__(self, images: TrainImages) -> None:
        self.images = images
        self.paths = [f"{images.images_dir}/{name}" for name in images.image_names]
        self.criterion = nn.MarginRankingLoss(margin=0.3)
        self.sums = [0.0] * 5

    def make_batch(self, indices: list[int]) -> torch.Tensor:
        mirrored = np.random.uniform(size=len(indices)) > 0.5
        images = [
            published_image(self.paths[index], self.images.size, mirror)
            for index, mirror in zip(indices, mirrored, strict=True)
        ]
        return torch.from_numpy(np.stack(images)).float()

    def step(self, feat: torch.Tensor, labels: torch.Tensor) -> None:
        dist_ap, dist_an = published_triplets(feat, labels)
        loss = self.criterion(dist_an, dist_ap, torch.ones_like(dist_an))
        loss.backward()
        figures = (dist_an > dist_ap, dist_an > dist_ap + 0.3, dist_ap, dist_an, loss)
        for number, figure in enumerate(figures):
            self.sums[number] += figure.detach().float().mean().cpu().numpy().item()


class Ours:
    """The library's step without its model."""

    def __init__(self, images: TrainImages, sampler: IdentityBatchSampler) -> None:
        loader = make_loader(images, sampler, workers=0, pin_memory=False)
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))
        self.accelerator = Accelerator(Config(amp="O0"))
        self.objective, self.meters, self.throughput = Objective(Config()), Meters(), Throughput(self.accelerator)
        self.throughput.start_epoch()

    def make_batch(self) -> TrainBatch:
        return next(self.batches)

    def step(self, feat: torch.Tensor, batch: TrainBatch) -> None:
        features = Features(feat, feat[:, :0], None)
        loss, figures = self.objective(features, batch.labels.to(self.accelerator.device, non_blocking=True))
        loss.backward()
        self.meters.update(figures)
        self.throughput.add(len(batch.labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--resize_h_w", type=parse_height_width, default=(256, 128))
    parser.add_argument("--ids_per_batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = TrainImages(open_data(arguments.data_path), size=arguments.resize_h_w)
    published = Published(images)
    ours = Ours(images, IdentityBatchSampler(images.person_ids, arguments.ids_per_batch, IMS_PER_ID, False, 0))
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[..., T], *given: object) -> T:
        start = time.perf_counter()
        result = work(*given)
        times.setdefault(name, []).append(time.perf_counter() - start)
        return result

    for _ in range(arguments.rounds + 1):
        batch = timed("ours, images", ours.make_batch)
        timed("published, images", published.make_batch, batch.indices.tolist())
        start = torch.randn(len(batch.labels), 2048)
        timed("ours, loss", ours.step, start.clone().requires_grad_(True), batch)
        timed("published, loss", published.step, start.clone().requires_grad_(True), batch.labels)
    print(f"{arguments.ids_per_batch} x {IMS_PER_ID} images, one thread, torch {torch.__version__}; medians in ms")
    print("| host work of a step | published port | ours | ratio |")
    print("| --- | --- | --- | --- |")
    median = {name: 1e3 * statistics.median(seconds[1:]) for name, seconds in times.items()}
    rows = {"images: file to batch": "images", "loss, hard samples, backward, figures": "loss"}
    for title, row in rows.items():
        theirs, own = median[f"published, {row}"], median[f"ours, {row}"]
        print(f"| {title} | {theirs:.1f} | {own:.1f} | {theirs / own:.1f} |")
    theirs, own = (sum(median[f"{side}, {row}"] for row in rows.values()) for side in ("published", "ours"))
    print(f"| together | {theirs:.1f} | {own:.1f} | {theirs / own:.1f} |")


if __name__ == "__main__":
    main()
