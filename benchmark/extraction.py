"""Images/s of feature extraction, loading included: the published loop, ours, and ours with --compile true.

    python benchmark/extraction.py [--data_path=<prepared data set>] [--resize_h_w=256,128] [--images=512] [--rounds=1]

benchmark/evaluation.py prints the same table. The published loop takes batches of 32 in float32 NCHW; ours uses the
device's best precision, shown in the table. Both run the same randomly initialized ResNet-50 over the same test images,
drawn ones by default. Each runs in its own process, and they take turns. The first BATCH_SIZE images, during which
workers start and torch.compile compiles, are not timed. The difference is the largest between our features and the
published ones, relative to the largest published value.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from blocks import in_own_processes, peak_memory
from loader import published_image
from training_published import PublishedModel

from aligned_reid.config import Config
from aligned_reid.data import TestImages, make_synthetic, open_data
from aligned_reid.distributed import World
from aligned_reid.evaluation import extract
from aligned_reid.flags import parse_height_width
from aligned_reid.model import AlignedReID
from aligned_reid.run import open_devices

PUBLISHED_BATCH = 32
BATCH_SIZE = extract.BATCH_SIZE


class Extraction(NamedTuple):
    """One turn: images/s, peak memory in MB, device, and global features [N, 2048]."""

    rate: float
    megabytes: float
    device: str
    features: np.ndarray


def make_model() -> AlignedReID:
    torch.manual_seed(0)
    return AlignedReID(None, pretrained="none")


def test_images(config: Config, num_images: int) -> TestImages:
    images = TestImages(open_data(config.data_path), size=config.resize_h_w)
    if len(images) <= BATCH_SIZE:
        raise SystemExit(f"{config.data_path}: {len(images)} test images; the first {BATCH_SIZE} are not timed")
    images.image_names = images.image_names[: BATCH_SIZE + num_images]
    return images


def published(config: Config, num_images: int) -> Extraction:
    """The reference's extraction, line for line on today's torch."""
    images = test_images(config, num_images)
    model = PublishedModel(1)
    weights = dict(zip(model.state_dict(), make_model().state_dict().values(), strict=False))  # in the same order
    model.load_state_dict(weights, strict=False)
    model.eval()
    features = []
    with torch.no_grad():
        for first in range(0, len(images), PUBLISHED_BATCH):
            if first == BATCH_SIZE:
                start = time.perf_counter()
            names = images.image_names[first : first + PUBLISHED_BATCH]
            batch = np.stack([published_image(f"{images.images_dir}/{name}", images.size, False) for name in names])
            features.append(model(torch.from_numpy(batch).float())[0].numpy())
    rate = (len(images) - BATCH_SIZE) / (time.perf_counter() - start)
    return Extraction(rate, peak_memory(), "cpu, float32 NCHW", np.concatenate(features))


def ours(config: Config, num_images: int) -> Extraction:
    """The library's extraction, as training and script/extract.py run it."""
    images = test_images(config, num_images)
    (accelerator,) = open_devices(config, World())
    extract.BATCHES_PER_BLOCK = 1  # of this process, so that the first batch is a block
    features = []
    given = (make_model(), images, accelerator, World())
    for first, block in extract.feature_blocks(*given, local=True, workers=config.workers):
        features.append(block.global_feat.numpy())
        if first == 0:
            start = time.perf_counter()
    rate = (len(images) - BATCH_SIZE) / (time.perf_counter() - start)
    return Extraction(rate, peak_memory(), accelerator.describe(), np.concatenate(features))


SIDES: dict[str, tuple[Callable[[Config, int], Extraction], bool]] = {
    "published": (published, False),
    "ours": (ours, False),
    "ours, --compile true": (ours, True),
}


def extract_by_turns(
    data_path: str, size: tuple[int, int], num_images: int, rounds: int
) -> dict[str, list[Extraction]]:
    """Every side's turns."""
    turns: dict[str, list[Extraction]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name, (side, compiled) in SIDES.items():
            config = Config(data_path=data_path, resize_h_w=size, compile=compiled, pretrained="none").checked()
            turns[name] += in_own_processes(side, [(config, num_images)])
    return turns


def extraction_table(data_path: str | None, size: tuple[int, int], num_images: int, rounds: int = 1) -> str:
    """All sides as a Markdown table, on the images of `data_path` (None: drawn ones)."""
    with tempfile.TemporaryDirectory() as folder:
        if data_path is None:  # one person of four is for the test, with 6 x 3 images
            num_ids = 4 * -(-(BATCH_SIZE + num_images) // 18)
            data_path = str(make_synthetic(Path(folder) / "drawn", num_ids, num_cameras=6, images_per_camera=3))
        turns = extract_by_turns(data_path, size, num_images, rounds)
    num_timed = len(turns["published"][0].features) - BATCH_SIZE
    title = f"features of {num_timed} images of {size[0]} x {size[1]}"
    rows = [
        f"| {title} | on | images/s | to published | MB at most | difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rates = {name: statistics.median(turn.rate for turn in measured) for name, measured in turns.items()}
    expected = turns["published"][0].features
    for name, measured in turns.items():
        difference = np.abs(measured[0].features - expected).max() / np.abs(expected).max()
        rows.append(
            f"| {name} | {measured[0].device} | {rates[name]:.1f} | {rates[name] / rates['published']:.2f} "
            f"| {max(turn.megabytes for turn in measured):,.0f} | {difference:.1e} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", help="a prepared data set (default: draw one)")
    parser.add_argument("--resize_h_w", type=parse_height_width, default=(256, 128))
    parser.add_argument("--images", type=int, default=512, help="test images to time")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    print(extraction_table(arguments.data_path, arguments.resize_h_w, arguments.images, arguments.rounds))


if __name__ == "__main__":
    main()
