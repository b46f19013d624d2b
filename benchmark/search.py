"""Seconds to search galleries of several sizes for one query and for many, beside plain numpy; and to load the index.

    python benchmark/search.py [--galleries=1000,20000,100000] [--queries=1000] [--rounds=5] [--folder=/tmp]

Random features of 2048 numbers at unit length are written to an index in a temporary folder (0.8 GB for 100,000 images)
and read as Gallery.open reads them. "numpy" is what one would write first: np.linalg.norm(gallery - query), then
np.argsort; for many queries a matrix product and np.argsort of its rows, in blocks of 64. Features are computed by
neither. Seconds are the median of the rounds; both sides have to give the same ten images.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.cli import parse_ints
from aligned_reid.inference.index import Rows, append_rows, read_index
from aligned_reid.inference.nearest import nearest

WIDTH, K, BLOCK = 2048, 10, 64
ROWS_PER_WRITE = 4096


def draw(num: int, seed: int) -> np.ndarray:
    """Random features at unit length, float32 [num, WIDTH]."""
    feat = np.random.default_rng(seed).standard_normal((num, WIDTH), np.float32)
    return feat / np.linalg.norm(feat, axis=1, keepdims=True)


def numpy_search(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """The K nearest of each query, [Q, K]."""
    if len(queries) == 1:
        return np.argsort(np.linalg.norm(gallery - queries, axis=1))[None, :K]
    norms = (gallery**2).sum(axis=1)
    blocks = [queries[first : first + BLOCK] for first in range(0, len(queries), BLOCK)]
    return np.concatenate([np.argsort(norms - 2 * block @ gallery.T, axis=1)[:, :K] for block in blocks])


def seconds_of(work: Callable[..., Any], *arguments: Any, rounds: int) -> tuple[float, Any]:
    """The median of `rounds` calls, and the result; the first call is not timed."""
    result = work(*arguments)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work(*arguments)
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def measure(num_gallery: int, num_queries: int, rounds: int, folder: Path) -> list[str]:
    """The rows of the table for one size. Exits if both sides differ."""
    path = folder / f"features-{num_gallery}.h5"
    for first in range(0, num_gallery, ROWS_PER_WRITE):
        num = min(ROWS_PER_WRITE, num_gallery - first)
        names = [b"%08d.jpg" % (first + row) for row in range(num)]
        append_rows(path, "drawn", Rows(names, [(0, 0)] * num, draw(num, first)))
    start = time.perf_counter()
    feat = torch.from_numpy(read_index(path, "drawn", print).feat)
    norms = feat.square().sum(1)
    loading = time.perf_counter() - start
    path.unlink()
    rows = []
    for count in (1, num_queries):
        queries = torch.from_numpy(draw(count, seed=num_gallery + 1))
        times = rounds if count == 1 else 1
        plain, expected = seconds_of(numpy_search, queries.numpy(), feat.numpy(), rounds=times)
        ours, (found, _) = seconds_of(nearest, queries, feat, norms, K, rounds=times)
        if (same := (found == expected).mean()) < 0.999:  # equal distances may be in another order
            raise SystemExit(f"{1 - same:.1%} of the images found differ")
        rows.append(f"| {num_gallery:,} | {count:,} | {plain:.4f} | {ours:.4f} | {plain / ours:.1f} | {loading:.2f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--galleries", type=parse_ints, default=(1000, 20_000, 100_000))
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="for temporary files")
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads")
    print("| gallery | queries | numpy, s | ours, s | times as fast | loading the index, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for num_gallery in arguments.galleries:
            print("\n".join(measure(num_gallery, arguments.queries, arguments.rounds, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
