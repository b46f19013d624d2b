"""Speed of the evaluation, compared with the published code's algorithm and with good plain numpy, in one run.

    python benchmark/evaluation.py [--size small|market|500k]

The features are random but have the structure of a test set: people, cameras, distractors. `market` has Market-1501's
size; it takes about 15 minutes on 2 cores and 12 GB of memory, mostly for the published code. numba's compilation, once
per installation, is not counted. Peak memory includes a function's result but not its inputs. A second table shows
feature extraction (see extraction.py). `500k` is Market-1501 with 500,000 distractors, measured by evaluation_large.py
with re-ranking; it takes more than an hour, and the published code cannot run at this size.
"""

import argparse
import ctypes
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import evaluation_large as large  # noqa: E402
import evaluation_numpy as plain  # noqa: E402
import evaluation_published as published  # noqa: E402
import extraction  # noqa: E402

from aligned_reid.evaluation import (  # noqa: E402
    global_distance_matrix,
    local_distance_matrix,
    rank,
    re_rank,
    re_rank_features,
)

SIZES = {"small": (400, 1600, 75), "market": (3368, 15913, 750)}  # queries, gallery, people
IMAGES = {"small": 64, "market": 512}  # to extract features of
NUM_CAMERAS = 6
DISTRACTORS = 0.17  # of the gallery
GLOBAL_WIDTH, LOCAL_SHAPE = 2048, (8, 128)
REPEAT_BELOW_SECONDS = 3


class TestSet(NamedTuple):
    query_global: np.ndarray
    gallery_global: np.ndarray
    query_local: np.ndarray
    gallery_local: np.ndarray
    labels: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # query ids, gallery ids, query cameras, gallery's


class Measurement(NamedTuple):
    seconds: float
    peak_bytes: float  # nan if the system does not report it
    result: Any


def make_test_set(num_query: int, num_gallery: int, num_people: int, seed: int = 0) -> TestSet:
    rng = np.random.default_rng(seed)
    query_ids = rng.integers(1, num_people + 1, num_query)
    gallery_ids = rng.integers(1, num_people + 1, num_gallery)
    gallery_ids[rng.random(num_gallery) < DISTRACTORS] = 0
    cams = [rng.integers(0, NUM_CAMERAS, num) for num in (num_query, num_gallery)]
    # each distractor has its own center
    people = np.concatenate([query_ids, np.where(gallery_ids, gallery_ids, num_people + 1 + np.arange(num_gallery))])
    feats = []
    for shape in ((GLOBAL_WIDTH,), LOCAL_SHAPE):
        centres = rng.standard_normal((people.max() + 1, *shape), np.float32)
        views = rng.standard_normal((NUM_CAMERAS, *shape), np.float32)
        feat = centres[people] + 0.5 * views[np.concatenate(cams)]
        feat += 1.5 * rng.standard_normal(feat.shape, np.float32)
        feat /= np.linalg.norm(feat, axis=-1, keepdims=True)
        feats += [feat[:num_query].copy(), feat[num_query:].copy()]
    return TestSet(*feats, (query_ids, gallery_ids, *cams))


def memory(field: str) -> float:
    """VmRSS or VmHWM of this process in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    return float(status.split(f"{field}:")[1].split()[0]) * 1024


def reset_peak() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def measure(function: Callable[..., Any], *inputs: Any) -> Measurement:
    """The best of up to 3 runs; slow functions run once."""
    best, peak = float("inf"), float("nan")
    begin = time.perf_counter()
    for _ in range(3):
        result = None  # a second result would count as memory
        reset_peak()
        before = memory("VmRSS")
        start = time.perf_counter()
        result = function(*inputs)
        best = min(best, time.perf_counter() - start)
        peak = np.nanmax([peak, memory("VmHWM") - before])
        if time.perf_counter() - begin > REPEAT_BELOW_SECONDS:
            break
    return Measurement(best, peak, result)


def largest_difference(ours: Any, theirs: Any) -> float:
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    return max(float(np.nanmax(np.abs(a - b))) for a, b in pairs)


def row(name: str, ours: Measurement, theirs: Measurement, numpy_form: Measurement | None) -> None:
    columns = [
        f"{name:<36}",
        f"{ours.seconds:9.3f}",
        f"{theirs.seconds:9.2f}",
        f"{theirs.seconds / ours.seconds:7.1f}x",
        f"{numpy_form.seconds / ours.seconds:7.1f}x" if numpy_form else f"{'-':>8}",
        f"{ours.peak_bytes / 2**20:9.0f}",
        f"{theirs.peak_bytes / 2**20:9.0f}",
        f"{theirs.peak_bytes / ours.peak_bytes:7.1f}x",
        f"{largest_difference(ours.result, theirs.result):10.1e}",
    ]
    print(" ".join(columns), flush=True)


def distances(form: Callable[..., np.ndarray], query: np.ndarray, gallery: np.ndarray) -> list[np.ndarray]:
    """Query x gallery, query x query, gallery x gallery."""
    return [form(query, gallery), form(query, query), form(gallery, gallery)]


def our_scores(dist: np.ndarray, *labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ranking = rank(dist, *labels)
    return ranking.cmc, ranking.ap


def published_scores(dist: np.ndarray, *labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return published.cmc(dist, *labels), published.average_precisions(dist, *labels)


def compare(data: TestSet) -> None:
    query, gallery, query_local, gallery_local, labels = data
    sizes = f"{len(query)} x {len(gallery)}"
    ours, theirs = measure(global_distance_matrix, query, gallery), measure(published.euclidean, query, gallery)
    row(f"global distance {sizes}", ours, theirs, measure(plain.euclidean, query, gallery))
    q_g_dist = ours.result

    forms = (our_scores, published_scores, plain.rank)
    row("CMC, both mAP, mINP", *(measure(form, q_g_dist, *labels) for form in forms))

    ours = measure(local_distance_matrix, query_local, gallery_local)
    theirs = measure(published.local, query_local, gallery_local)
    row(f"local distance {sizes}", ours, theirs, measure(plain.local, query_local, gallery_local))

    del ours, theirs
    given = [q_g_dist, global_distance_matrix(query, query), global_distance_matrix(gallery, gallery)]
    ours, theirs = measure(re_rank, *given), measure(published.re_rank, *given)
    row("re-ranking, given distances", ours, theirs, measure(plain.re_rank, *given))
    del given, q_g_dist

    distances_too = measure(distances, published.euclidean, query, gallery)
    seconds, peak = distances_too.seconds + theirs.seconds, sum(m.nbytes for m in distances_too.result)
    theirs = Measurement(seconds, max(distances_too.peak_bytes, theirs.peak_bytes + peak), theirs.result)
    del distances_too
    row("re-ranking, from 2048-d features", measure(re_rank_features, query, gallery), theirs, None)
    del ours, theirs

    sizes = f"{len(gallery)} x {len(gallery)}"
    ours = measure(local_distance_matrix, gallery_local, gallery_local)
    row(f"local distance {sizes}", ours, measure(published.local, gallery_local, gallery_local), None)


def warm_up(data: TestSet) -> None:
    """Let numba compile, or load its compiled code."""
    rank(global_distance_matrix(data.query_global, data.gallery_global), *data.labels)
    local_distance_matrix(data.query_local, data.gallery_local)
    re_rank_features(data.query_global, data.gallery_global)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=[*SIZES, "500k"], default="small")
    size = parser.parse_args().size
    if size == "500k":
        large.measure_sizes([516_000], re_rank_up_to=516_000, local=True)
        return
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, numpy {np.__version__}")
    print(f"size {size}: {SIZES[size][0]} queries, {SIZES[size][1]} gallery images")
    heads = (f"{'':<36}", f"{'ours s':>9}", f"{'publ. s':>9}", f"{'ratio':>8}", f"{'to numpy':>8}", f"{'ours MB':>9}",
             f"{'publ. MB':>9}", f"{'ratio':>8}", f"{'difference':>10}")  # fmt: skip
    print(" ".join(heads))
    warm_up(make_test_set(50, 200, 10))
    compare(make_test_set(*SIZES[size]))
    print(f"\n{extraction.extraction_table(None, (256, 128), IMAGES[size])}")


if __name__ == "__main__":
    main()
