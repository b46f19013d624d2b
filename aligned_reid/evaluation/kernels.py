"""The loops that numba compiles. Only compiled.py imports this module, and only where numba is there.

An inner loop over contiguous arrays is a function of its own for speed: written into the loops around it, it is not
vectorised, and several times as slow.
"""

from typing import Any

import numba
import numpy as np

# numpy's error model: a check for division by zero would keep the loops from being vectorised.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
# For the costs: fused multiply-add; no NaN and no infinity, so that min and max are single instructions.
COST_OPTIONS: dict[str, Any] = {**OPTIONS, "fastmath": {"contract", "nnan", "ninf", "nsz"}}

SIGNATURES = {
    "aligned_tile": "void(float32[:, ::1], float32[::1], float32[:, ::1], float32[:, ::1], float32[:, :])",
    "count_ranks": "void({dtype}[:, ::1], int64[::1], int64[::1], boolean[::1], int64[::1])",
    "insert_nearest": (
        "void(float32[:, ::1], int64, int64, boolean, float32[:, ::1], int32[:, ::1], float32[::1], float32[::1], "
        "float32[::1], uint8[::1], int64[::1])"
    ),
}

# tanh(sqrt(u)) / sqrt(u) as P(u) / Q(u) on 0 <= u <= 81, a minimax fit with relative error 2e-8: below float32's own.
# At u = 81 the cost is 1 within float32. No exponential, and all that remains fills the vector registers; the
# polynomial without a division that would do on unit stripes saves 4 % of the time of the whole.
MAX_U = np.float32(81)
P0, P1, P2, P3, P4 = map(np.float32, (1.0, 0.13381019, 0.0034955803, 2.0608953e-05, 1.3354489e-08))
Q0, Q1, Q2, Q3, Q4 = map(np.float32, (1.0, 0.46714336, 0.025876952, 0.00032856219, 7.7764861e-07))
MIN_U = np.float32(0.25e-12)
HALF = np.float32(0.5)
ZERO = np.float32(0)
BLOCKED = np.float32(1e30)  # no path comes from here

GROUP = 8  # columns that insert_nearest tests at a time, bytes of an int64


@numba.njit(**COST_OPTIONS)
def _cost(dot: Any, quarter_norms: Any) -> Any:
    """tanh(e / 2) of two stripes' euclidean distance e, from their dot product; u = (e / 2)^2."""
    u = min(max(quarter_norms - HALF * dot, MIN_U), MAX_U)
    numerator = P0 + u * (P1 + u * (P2 + u * (P3 + u * P4)))
    denominator = Q0 + u * (Q1 + u * (Q2 + u * (Q3 + u * Q4)))
    return np.sqrt(u) * numerator / denominator


@numba.njit(**COST_OPTIONS)
def _step(total: Any, left: Any, dots: Any, x_norm: Any, y_norms: Any) -> None:
    """One stripe pair for all images of the tile: total [T], from above on entry, from the left in `left` [T]."""
    for t in range(len(total)):
        total[t] = min(total[t], left[t]) + _cost(dots[t], x_norm + y_norms[t])


def aligned_tile(dots: Any, x_norms: Any, y_norms: Any, totals: Any, out: Any) -> None:
    """Aligned distances of B images to the T of a tile, from the dot products of their stripes.

    dots [B * H, G * T], row image-major, column stripe-major, so that the images of the tile are contiguous; x_norms
    [B * H] and y_norms [G, T], a quarter of the stripes' squared norms; totals [G + 1, T], scratch; out [B, T].
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
    """The rank of each gallery image of the query's person, by counting what is before it.

    dist [B, G]; the images of query q are same_person[bounds[q] : bounds[q + 1]]. Into ranks [matches], of those not
    removed. Counts are kept in 32 bits, which fills the vector registers.
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


@numba.njit(**OPTIONS)
def _take_row(row: Any, square: Any, bound: Any, below: Any, largest: Any, total: Any) -> None:
    for c in range(len(row)):
        value = row[c] * row[c] if square else row[c]
        # Not max or a condition: those become masked stores, which cost AMD's processors ten times as much.
        largest[c] = np.maximum(largest[c], value)
        total[c] += value
        below[c] = np.uint8(value < bound[c])


@numba.njit(**OPTIONS)
def _insert(value: Any, image: Any, nearest: Any, indices: Any) -> None:
    """After its equals, whose indices are lower."""
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
    """Put the rows of dist [n, columns], images first_image and following, into the lists of columns first_column on.

    Lists, each ascending: nearest [C, k] and the images, indices [C, k]; bound [C], the last entry of each. largest,
    total [C]: over all rows. below: scratch, bytes, 0 and padded to whole groups; groups, the same memory in integers
    of GROUP bytes, so that one look tells that a row has nothing for as many lists. With `square`, distances are
    squared first.
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
