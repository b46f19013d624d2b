"""The compiled loops of the evaluation, matrix products, threads, and conversions from and to the caller's types.

An inner loop over contiguous arrays is a separate function for speed: inlined into the loops around it, it is not
vectorized and several times slower. All threads end with the call that started them, because worker processes may be
forked at any time.
"""

import functools
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from aligned_reid.device.cpu import mkl_leaves_avx512

ONEDNN_IS_FASTER = torch.backends.mkldnn.is_available() and mkl_leaves_avx512()


def product(x: Tensor, y: Tensor) -> Tensor:
    """Dot products x y^T, [M, N], of rows [M, D] and [N, D] of the same type and device.

    torch.mm uses MKL, which leaves AVX-512 of AMD's CPUs unused. Tensors in mkldnn layout are multiplied by oneDNN,
    which is almost twice as fast there.
    """
    if ONEDNN_IS_FASTER and x.device.type == "cpu" and x.dtype == torch.float32:
        return nn.functional.linear(x.to_mkldnn(), y).to_dense()
    return torch.mm(x, y.t())


def in_threads(function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
    """[function(*a) for a in zip(*arguments)] in as many threads as torch uses, each with single-threaded torch.

    Raises the first error.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return list(map(function, *arguments))
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, *arguments))
    finally:
        torch.set_num_threads(threads)  # MKL keeps one count for all threads


def to_numpy(x: Any) -> NDArray[Any]:
    """A tensor or anything numpy accepts as an array on the host; bfloat16 and float16 become float32."""
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    array = np.asarray(x)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def to_tensor(x: Any) -> Tensor:
    """A tensor without its gradient, or anything numpy accepts as a tensor; shares memory if possible."""
    if isinstance(x, Tensor):
        return x.detach()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")  # a mapped file: we only read
        return torch.from_numpy(np.ascontiguousarray(x))


@functools.cache
def compiled(name: str, dtype: str = "float32") -> Callable[..., None]:
    """The kernel `name` of this module as machine code that releases the interpreter lock, for distances of `dtype`.

    The code is cached on disk, or kept in memory if the disk cannot be written (read-only installation, full disk).
    """
    function, signature = globals()[name], SIGNATURES[name].format(dtype=dtype)
    try:
        return numba.njit([signature], cache=True, **OPTIONS)(function)
    except (RuntimeError, OSError):  # "no locator available", or the write failed
        return numba.njit([signature], **OPTIONS)(function)


# numpy's error model: a check for division by zero would prevent vectorization.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
# For the costs: fused multiply-add, and no NaN or infinity, so that min and max are single instructions.
COST_OPTIONS: dict[str, Any] = {**OPTIONS, "fastmath": {"contract", "nnan", "ninf", "nsz"}}

SIGNATURES = {
    "aligned_tile": "void(float32[:, ::1], float32[::1], float32[:, ::1], float32[:, ::1], float32[:, :])",
    "count_pairs": "void(int32[:, ::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[:, ::1])",
    "count_ranks": "void({dtype}[:, ::1], int64[::1], int64[::1], boolean[::1], int64[::1])",
    "insert_nearest": (
        "void(float32[:, ::1], int64, int64, boolean, float32[:, ::1], int32[:, ::1], float32[::1], float32[::1], "
        "float32[::1], uint8[::1], int64[::1])"
    ),
}

# tanh(sqrt(u)) / sqrt(u) as P(u) / Q(u) on 0 <= u <= 81, a minimax fit with relative error 2e-8, below that of
# float32. At u = 81 the cost is 1 in float32. This avoids the exponential, so the whole loop is vectorized.
MAX_U = np.float32(81)
P0, P1, P2, P3, P4 = map(np.float32, (1.0, 0.13381019, 0.0034955803, 2.0608953e-05, 1.3354489e-08))
Q0, Q1, Q2, Q3, Q4 = map(np.float32, (1.0, 0.46714336, 0.025876952, 0.00032856219, 7.7764861e-07))
MIN_U = np.float32(0.25e-12)
HALF = np.float32(0.5)
ZERO = np.float32(0)
BLOCKED = np.float32(1e30)  # larger than any path

BIN_SHIFT = 11  # bits of a float32 that a bin ignores: 12 of the mantissa's 23 remain
NUM_BINS = 1 << (31 - BIN_SHIFT)  # of all numbers that are not negative

GROUP = 8  # columns that insert_nearest tests at a time: bytes of an int64


@numba.njit(**COST_OPTIONS)
def _cost(dot: Any, quarter_norms: Any) -> Any:
    """tanh(e / 2) for the euclidean distance e of two stripes, from their dot product; u = (e / 2)^2."""
    u = min(max(quarter_norms - HALF * dot, MIN_U), MAX_U)
    numerator = P0 + u * (P1 + u * (P2 + u * (P3 + u * P4)))
    denominator = Q0 + u * (Q1 + u * (Q2 + u * (Q3 + u * Q4)))
    return np.sqrt(u) * numerator / denominator


@numba.njit(**COST_OPTIONS)
def _step(total: Any, left: Any, dots: Any, x_norm: Any, y_norms: Any) -> None:
    """One stripe pair for all images of the tile: total [T] enters as the cells above, left [T] as those left."""
    for t in range(len(total)):
        total[t] = min(total[t], left[t]) + _cost(dots[t], x_norm + y_norms[t])


def aligned_tile(dots: Any, x_norms: Any, y_norms: Any, totals: Any, out: Any) -> None:
    """Aligned distances of B images to the T images of a tile, from the dot products of their stripes.

    dots [B * H, G * T]: rows image by image, columns stripe by stripe, so that the tile's images are contiguous.
    x_norms [B * H], y_norms [G, T]: a quarter of the squared norms. totals [G + 1, T]: scratch. out [B, T].
    """
    num_images, tile = out.shape
    num_x, num_y = len(dots) // num_images, len(y_norms)
    for image in range(num_images):
        totals[0] = ZERO
        totals[1:] = BLOCKED
        for i in range(num_x):
            row = dots[image * num_x + i]
            for j in range(num_y):
                segment = row[j * tile : (j + 1) * tile]
                _step(totals[j + 1], totals[j], segment, x_norms[image * num_x + i], y_norms[j])
            totals[0] = BLOCKED
        out[image] = totals[num_y]


def count_ranks(dist: Any, bounds: Any, same_person: Any, removed: Any, ranks: Any) -> None:
    """The rank of each gallery image of the query's person, by counting the images before it.

    dist [B, G]. The images of query q are same_person[bounds[q] : bounds[q + 1]]; those `removed` are skipped. Writes
    ranks [matches]. The counters have 32 bits, which vectorizes better.
    """
    for q in range(len(dist)):
        row = dist[q]
        for match in range(bounds[q], bounds[q + 1]):
            if removed[match]:
                continue
            index = same_person[match]
            value = row[index]
            before = np.int32(0)
            for g in range(index):
                before += np.int32(row[g] <= value)
            for g in range(index + 1, len(row)):
                before += np.int32(row[g] < value)
            for other in range(bounds[q], bounds[q + 1]):
                g = same_person[other]
                if removed[other] and (row[g] < value or (row[g] == value and g < index)):
                    before -= np.int32(1)
            ranks[match] = before


def count_pairs(bits: Any, query_ids: Any, gallery_ids: Any, query_cams: Any, gallery_cams: Any, counts: Any) -> None:
    """Count the pairs under different cameras by the bins of their distances.

    bits [B, G]: the distances as integers, which have the same order. Adds to counts [2, NUM_BINS]: row 0 for pairs of
    one person, row 1 for the others.
    """
    for q in range(len(bits)):
        for g in range(len(gallery_cams)):
            if gallery_cams[g] != query_cams[q]:
                counts[int(gallery_ids[g] != query_ids[q]), bits[q, g] >> BIN_SHIFT] += 1


@numba.njit(**OPTIONS)
def _take_row(row: Any, square: Any, bound: Any, below: Any, largest: Any, total: Any) -> None:
    for c in range(len(row)):
        value = row[c] * row[c] if square else row[c]
        # Neither max() nor a condition: they become masked stores, ten times slower on AMD.
        largest[c] = np.maximum(largest[c], value)
        total[c] += value
        below[c] = np.uint8(value < bound[c])


@numba.njit(**OPTIONS)
def _insert(value: Any, image: Any, nearest: Any, indices: Any) -> None:
    """Insert after equal values: their indices are lower."""
    place = len(nearest) - 1
    while place > 0 and nearest[place - 1] > value:
        nearest[place] = nearest[place - 1]
        indices[place] = indices[place - 1]
        place -= 1
    nearest[place] = value
    indices[place] = image


def insert_nearest(
    dist: Any,
    first_column: Any,
    first_image: Any,
    square: Any,
    nearest: Any,
    indices: Any,
    bound: Any,
    largest: Any,
    total: Any,
    below: Any,
    groups: Any,
) -> None:
    """Insert rows of dist [n, columns], images first_image, ..., into the lists of columns first_column, ...

    nearest [C, k], ascending, and the images' indices [C, k]; bound [C]: the last entry of each list; largest, total
    [C]: over all rows so far. below: scratch bytes, zero-padded to whole groups; groups: the same memory as integers of
    GROUP bytes, so that one test skips GROUP lists. square: dist holds distances that are not squared yet.
    """
    num_columns = len(nearest)
    for image in range(len(dist)):
        row = dist[image, first_column : first_column + num_columns]
        _take_row(row, square, bound, below, largest, total)
        for group in range(len(groups)):
            if groups[group] != 0:
                for c in range(group * GROUP, (group + 1) * GROUP):
                    if below[c]:
                        value = row[c] * row[c] if square else row[c]
                        _insert(value, first_image + image, nearest[c], indices[c])
                        bound[c] = nearest[c, -1]
