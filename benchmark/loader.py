"""Images/s of one core from files to a normalized float32 batch: the published way, ours, and ours from the cache.

    python benchmark/loader.py --data_path=<prepared data set> [--resize_h_w=256,128] [--images=1024] [--rounds=3]

benchmark/training.py prints the same table. Each way runs in its own process with one thread, so that none has the
memory settings of another, and they take turns. Rates are per processor time, which depends less on other load than
wall time. Our loader ends with the uint8 batch; the device normalizes it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.data import TrainImages, open_data
from aligned_reid.data.sampler import SampleRequest
from aligned_reid.data.transforms import IM_MEAN, IM_STD, normalize_images
from aligned_reid.device import keep_freed_memory
from aligned_reid.flags import parse_height_width

BATCH = 128


def published_image(path: str, size: tuple[int, int], mirror: bool) -> np.ndarray:
    image = np.asarray(Image.open(path))
    image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    image = (image / 255.0 - np.array(IM_MEAN)) / np.array(IM_STD).astype(float)
    if mirror:
        image = image[:, ::-1, :]
    return image.transpose(2, 0, 1)


def published_batch(images: TrainImages, requests: list[SampleRequest]) -> torch.Tensor:
    mirrored = np.random.uniform(size=len(requests)) > 0.5
    paths = [f"{images.images_dir}/{images.image_names[request.index]}" for request in requests]
    made = [published_image(path, images.size, mirror) for path, mirror in zip(paths, mirrored, strict=True)]
    return torch.from_numpy(np.stack(made)).float()


def bytes_batch(images: TrainImages, requests: list[SampleRequest]) -> torch.Tensor:
    return images.__getitems__(requests).images


def normalized_batch(images: TrainImages, requests: list[SampleRequest]) -> torch.Tensor:
    return normalize_images(bytes_batch(images, requests))


# the function that makes a batch, and whether it uses the cache
WAYS: dict[str, tuple[bool, Callable[[TrainImages, list[SampleRequest]], torch.Tensor]]] = {
    "published": (False, published_batch),
    "ours live, uint8 batch": (False, bytes_batch),
    "ours live, normalised": (False, normalized_batch),
    "ours cached, uint8 batch": (True, bytes_batch),
    "ours cached, normalised": (True, normalized_batch),
}


def serve(way: str, data_path: str, size: tuple[int, int], num_images: int, folder: str, pipe: Connection) -> None:
    """One way in its own process: answers each message with images per second of processor time."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    cached, make_batch = WAYS[way]
    images = TrainImages(open_data(data_path), size=size)
    if cached:
        images.open_cache([Path(folder)], lambda line: None)
    if make_batch is not published_batch:
        keep_freed_memory()  # as in a run on a CPU
    drawn = np.random.RandomState(0).permutation(len(images))[:num_images].tolist()
    requests = [SampleRequest(index, 2**62 + index) for index in drawn]
    batches = [requests[first : first + BATCH] for first in range(0, len(requests), BATCH)]
    while pipe.recv():
        start = time.process_time()
        for batch in batches:
            make_batch(images, batch)
        pipe.send(len(requests) / (time.process_time() - start))


def loader_rates(data_path: str, size: tuple[int, int], num_images: int = 1024, rounds: int = 3) -> dict[str, float]:
    """Median images/s per core of each way. The first round, which loads the files into memory, is not counted."""
    context = multiprocessing.get_context("spawn")
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = {}, []
        for way in WAYS:
            pipes[way], theirs = context.Pipe()
            process = context.Process(target=serve, args=(way, data_path, size, num_images, folder, theirs))
            process.start()
            processes.append(process)
        for _ in range(rounds + 1):
            for way, pipe in pipes.items():
                pipe.send(True)
                rates[way].append(pipe.recv())
        for pipe in pipes.values():
            pipe.send(False)
        for process in processes:
            process.join()
    return {way: statistics.median(measured[1:]) for way, measured in rates.items()}


def loader_table(rates: dict[str, float]) -> str:
    """The rates as a Markdown table, each with its ratio to the published way."""
    rows = ["| loading, one core | images/s | ratio |", "| --- | --- | --- |"]
    rows += [f"| {way} | {rate:,.0f} | {rate / rates['published']:.1f} |" for way, rate in rates.items()]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--resize_h_w", type=parse_height_width, default=(256, 128))
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(loader_table(loader_rates(arguments.data_path, arguments.resize_h_w, arguments.images, arguments.rounds)))


if __name__ == "__main__":
    main()
