"""Distance matrices of whole test sets, in memory bounded by the matrix itself and a few blocks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aligned_reid.distance import MIN_SQUARED_DISTANCE, aligned_distance, euclidean_distance
from aligned_reid.errors import InputError
from aligned_reid.evaluation.compiled import compiled, in_threads, to_tensor
from aligned_reid.evaluation.product import product

# Tiles, each in one thread, rather than rows in all threads: none waits for another, and the distances are finished
# while the products are in cache.
GLOBAL_TILE = 512
DEVICE_ROWS_PER_BLOCK = 1024
# Dot products of a block and a tile: 32 * 8 stripes by 256 * 8 stripes, 2 MB a thread, read back while still in cache.
QUERIES_PER_BLOCK = 32
GALLERY_PER_TILE = 256
# Costs held at a time by the form in torch, [H * G, m, n]: in cache on a CPU, enough work for a kernel on a device.
CPU_COSTS_PER_BLOCK = 2**21
DEVICE_COSTS_PER_BLOCK = 2**26

Float32s = NDArray[np.float32]


def global_distance_matrix(x: Any, y: Any) -> Float32s:
    """Euclidean distances, float32 [M, N], of features [M, D] and [N, D]: tensors of any device, or arrays.

    As distance.euclidean_distance. Where y is x itself, half is computed and mirrored. Raises InputError on other
    shapes.
    """
    same = x is y
    x, y = _as_float32(x), _as_float32(y)
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        shapes = f"{list(x.shape)} and {list(y.shape)}"
        raise InputError(f"global_distance_matrix: needs features [M, D] and [N, D] of one width, got {shapes}")
    dist = torch.empty(len(x), len(y))
    device = _device_of(x, y)
    if device.type != "cpu":
        y = y.to(device)
        for first in range(0, len(x), DEVICE_ROWS_PER_BLOCK):
            rows = slice(first, first + DEVICE_ROWS_PER_BLOCK)
            dist[rows] = euclidean_distance(x[rows].to(device), y).cpu()
        return dist.numpy()
    x_norms, y_norms = x.square().sum(1, keepdim=True), y.square().sum(1)

    def tile(first: int, begin: int) -> None:
        rows, columns = slice(first, first + GLOBAL_TILE), slice(begin, begin + GLOBAL_TILE)
        block = dist[rows, columns]
        torch.add(y_norms[columns], product(x[rows], y[columns]), alpha=-2, out=block)
        block.add_(x_norms[rows]).clamp_(min=MIN_SQUARED_DISTANCE).sqrt_()
        if same and begin > first:
            dist[columns, rows] = block.t()

    firsts, begins = range(0, len(x), GLOBAL_TILE), range(0, len(y), GLOBAL_TILE)
    tiles = [(first, begin) for first in firsts for begin in begins if not same or begin >= first]
    in_threads(lambda corner: tile(*corner), tiles)
    return dist.numpy()


def local_distance_matrix(x: Any, y: Any) -> Float32s:
    """Aligned distances, float32 [M, N], of stripes [M, H, d] and [N, G, d]: tensors of any device, or arrays.

    As distance.aligned_distance, for any number of stripes and any norm. On a CPU it runs in as many threads as torch
    uses. Where y is x itself, half is computed and mirrored. Raises InputError on other shapes.
    """
    same = x is y
    x, y = _as_float32(x), _as_float32(y)
    if x.dim() != 3 or y.dim() != 3 or x.shape[2] != y.shape[2] or 0 in (x.shape[1], y.shape[1]):
        shapes = f"{list(x.shape)} and {list(y.shape)}"
        raise InputError(f"local_distance_matrix: needs stripes [M, H, d] and [N, G, d] of one width, got {shapes}")
    device = _device_of(x, y)
    kernel = compiled("aligned_tile") if device.type == "cpu" else None
    if kernel is None:
        return _local_by_torch(x, y, same, device)
    return _local_by_tiles(x, y, same, kernel)


def _as_float32(x: Any) -> Tensor:
    return to_tensor(x).float()


def _device_of(x: Tensor, y: Tensor) -> torch.device:
    """Where to compute: on a device as soon as one of them is there."""
    return y.device if x.device.type == "cpu" else x.device


def _local_by_tiles(x: Tensor, y: Tensor, same: bool, kernel: Callable[..., None]) -> Float32s:
    num_x, num_y = x.shape[1], y.shape[1]
    x_rows = x.reshape(-1, x.shape[2])  # [M * H, d]
    x_norms = (x_rows.square().sum(1) / 4).numpy()
    dist = np.empty((len(x), len(y)), np.float32)

    def tile(first: int) -> None:
        columns = slice(first, min(first + GALLERY_PER_TILE, len(y)))
        width = columns.stop - first
        stripes = y[columns].transpose(0, 1).reshape(num_y * width, -1)  # [G * T, d]: image after image of one stripe
        y_norms = (stripes.square().sum(1) / 4).numpy().reshape(num_y, width)
        totals = np.empty((num_y + 1, width), np.float32)
        num_rows = columns.stop if same else len(x)
        for begin in range(0, num_rows, QUERIES_PER_BLOCK):
            rows = slice(begin, min(begin + QUERIES_PER_BLOCK, num_rows))
            of_rows = slice(begin * num_x, rows.stop * num_x)
            dots = product(x_rows[of_rows], stripes)
            kernel(dots.numpy(), x_norms[of_rows], y_norms, totals, dist[rows, columns])
        if same:
            dist[columns, :first] = dist[:first, columns].T
            square = dist[columns, columns]
            square[:] = np.triu(square) + np.triu(square, 1).T

    tiles = range(0, len(y), GALLERY_PER_TILE)
    in_threads(tile, reversed(tiles))  # where y is x, the last ones are the longest
    return dist


def _local_by_torch(x: Tensor, y: Tensor, same: bool, device: torch.device) -> Float32s:
    costs = CPU_COSTS_PER_BLOCK if device.type == "cpu" else DEVICE_COSTS_PER_BLOCK
    side = max(1, int((costs / (x.shape[1] * y.shape[1])) ** 0.5))
    dist = torch.empty(len(x), len(y))

    def tile(first: int) -> None:
        columns = slice(first, first + side)
        y_block = y[columns].to(device)
        for begin in range(0, min(first + side, len(x)) if same else len(x), side):
            rows = slice(begin, begin + side)
            dist[rows, columns] = aligned_distance(x[rows].to(device), y_block).cpu()
            if same and begin < first:
                dist[columns, rows] = dist[rows, columns].t()

    tiles = range(0, len(y), side)
    if device.type == "cpu":
        in_threads(tile, reversed(tiles))
    else:
        for first in tiles:
            tile(first)
    return dist.numpy()
