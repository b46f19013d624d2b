"""Distance matrices of whole test sets, and squared distances block by block where an N x N matrix would not fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aligned_reid.distance import (
    MIN_SQUARED_DISTANCE,
    aligned_distance,
    at_least_float32,
    euclidean_distance,
    normalize,
)
from aligned_reid.errors import InputError
from aligned_reid.evaluation.kernels import compiled, in_threads, product, to_tensor

# On a CPU each tile is computed by one thread: no thread waits for another, and the products are still in cache when
# the distances are derived from them.
GLOBAL_TILE = 512
# Stripe products of a block of queries and a gallery tile: 32 * 8 by 256 * 8, 2 MB a thread.
QUERIES_PER_BLOCK = 32
GALLERY_PER_TILE = 256
# On a device: enough work for a kernel, 256 MB of stripe costs for 8 x 8 stripes.
DEVICE_TILE = 1024
ROWS_PER_CHECK = 4096
PAIRS_PER_BLOCK = 1024

Float32s = NDArray[np.float32]
Indices = NDArray[np.int64]


def global_distance_matrix(x: Any, y: Any) -> Float32s:
    """Euclidean distances, float32 [M, N], of features [M, D] and [N, D]: tensors of any device, or arrays.

    Equals distance.euclidean_distance; computed on the device that holds the features. If y is x, half is computed and
    mirrored. Raises InputError for other shapes.
    """
    same = x is y
    x, y = to_tensor(x).float(), to_tensor(y).float()
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        shapes = f"{list(x.shape)} and {list(y.shape)}"
        raise InputError(f"global_distance_matrix: needs features [M, D] and [N, D] of one width, got {shapes}")
    if x.device.type != "cpu" or y.device.type != "cpu":
        return _by_device_tiles(euclidean_distance, x, y, same)
    dist = torch.empty(len(x), len(y))
    x_norms, y_norms = x.square().sum(1, keepdim=True), y.square().sum(1)

    def compute_tile(first: int, begin: int) -> None:
        rows, columns = slice(first, first + GLOBAL_TILE), slice(begin, begin + GLOBAL_TILE)
        tile = dist[rows, columns]
        torch.add(y_norms[columns], product(x[rows], y[columns]), alpha=-2, out=tile)
        tile.add_(x_norms[rows]).clamp_(min=MIN_SQUARED_DISTANCE).sqrt_()
        if same and begin > first:
            dist[columns, rows] = tile.t()

    firsts, begins = range(0, len(x), GLOBAL_TILE), range(0, len(y), GLOBAL_TILE)
    corners = [(first, begin) for first in firsts for begin in begins if not same or begin >= first]
    in_threads(lambda corner: compute_tile(*corner), corners)
    return dist.numpy()


def local_distance_matrix(x: Any, y: Any) -> Float32s:
    """Aligned distances, float32 [M, N], of stripes [M, H, d] and [N, G, d]: tensors of any device, or arrays.

    Equals distance.aligned_distance; computed on the device that holds the stripes. If y is x, half is computed and
    mirrored. Raises InputError for other shapes.
    """
    same = x is y
    x, y = to_tensor(x).float(), to_tensor(y).float()
    if x.dim() != 3 or y.dim() != 3 or x.shape[2] != y.shape[2] or 0 in (x.shape[1], y.shape[1]):
        shapes = f"{list(x.shape)} and {list(y.shape)}"
        raise InputError(f"local_distance_matrix: needs stripes [M, H, d] and [N, G, d] of one width, got {shapes}")
    if x.device.type != "cpu" or y.device.type != "cpu":
        return _by_device_tiles(aligned_distance, x, y, same)
    num_x, num_y = x.shape[1], y.shape[1]
    x_rows = x.reshape(-1, x.shape[2])  # [M * H, d]
    x_norms = (x_rows.square().sum(1) / 4).numpy()
    dist = np.empty((len(x), len(y)), np.float32)
    aligned_tile = compiled("aligned_tile")

    def compute_tile(first: int) -> None:
        columns = slice(first, min(first + GALLERY_PER_TILE, len(y)))
        width = columns.stop - first
        stripes = y[columns].transpose(0, 1).reshape(num_y * width, -1)  # [G * T, d]: all images of a stripe together
        y_norms = (stripes.square().sum(1) / 4).numpy().reshape(num_y, width)
        totals = np.empty((num_y + 1, width), np.float32)
        num_rows = columns.stop if same else len(x)
        for begin in range(0, num_rows, QUERIES_PER_BLOCK):
            rows = slice(begin, min(begin + QUERIES_PER_BLOCK, num_rows))
            stripe_rows = slice(begin * num_x, rows.stop * num_x)
            dots = product(x_rows[stripe_rows], stripes)
            aligned_tile(dots.numpy(), x_norms[stripe_rows], y_norms, totals, dist[rows, columns])
        if same:
            dist[columns, :first] = dist[:first, columns].T
            square = dist[columns, columns]
            square[:] = np.triu(square) + np.triu(square, 1).T

    in_threads(compute_tile, reversed(range(0, len(y), GALLERY_PER_TILE)))  # if y is x, the last tiles take longest
    return dist


def _by_device_tiles(distance: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, same: bool) -> Float32s:
    """`distance` of all pairs on the device that holds x or y, tile by tile; the result is on the host."""
    device = y.device if x.device.type == "cpu" else x.device
    dist = torch.empty(len(x), len(y))
    for begin in range(0, len(y), DEVICE_TILE):
        columns = slice(begin, begin + DEVICE_TILE)
        for first in range(0, begin + 1 if same else len(x), DEVICE_TILE):
            rows = slice(first, first + DEVICE_TILE)
            dist[rows, columns] = distance(x[rows].to(device), y[columns].to(device)).cpu()
            if same and first < begin:
                dist[columns, rows] = dist[rows, columns].t()
    return dist.numpy()


class Piece(NamedTuple):
    """Features of some images: rows of a tensor, which may be a mapped file (None: all rows)."""

    feat: Tensor  # [n, ...]
    rows: Indices | None = None
    unit_length: bool = False  # whether `get` normalizes

    @property
    def num_images(self) -> int:
        return len(self.feat) if self.rows is None else len(self.rows)

    def get(self, index: slice | Indices) -> Tensor:
        """Features of the piece's images at `index`, at least float32; a view if nothing has to change."""
        rows: Any = index if self.rows is None else self.rows[index]
        if not isinstance(rows, slice):
            if isinstance(index, slice) and len(rows) and rows[-1] - rows[0] == len(rows) - 1:  # consecutive: a view
                rows = slice(int(rows[0]), int(rows[-1]) + 1)
            else:
                rows = torch.from_numpy(rows).to(self.feat.device)
        feat = at_least_float32(self.feat[rows])
        return normalize(feat) if self.unit_length else feat


class FeatureDistances:
    """Squared euclidean distances among N images: the queries, which are the first piece, then the gallery."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = pieces
        self.dtype = functools.reduce(torch.promote_types, (piece.feat.dtype for piece in pieces), torch.float32)
        self.starts = np.cumsum([0, *(piece.num_images for piece in pieces)])
        self.num_query, self.num_images = int(self.starts[1]), int(self.starts[-1])
        self.norms = torch.cat([self.get(rows).square().sum(1) for rows in self.blocks(ROWS_PER_CHECK)])
        finite = torch.isfinite(self.norms)
        if not finite.all():
            name = name_of(int(finite.int().argmin()), self.num_query)
            raise InputError(f"re-ranking: the features of {name} hold NaN or infinity")

    @classmethod
    def between(cls, query: Any, gallery: Any) -> FeatureDistances:
        """For features [Q, D] and [G, D], tensors or arrays, computed on their device. Raises InputError."""
        query, gallery = to_tensor(query), to_tensor(gallery)
        if query.dim() != 2 or gallery.dim() != 2 or 0 in (len(query), len(gallery)):
            shapes = f"{list(query.shape)} and {list(gallery.shape)}"
            raise InputError(f"re-ranking: needs features [Q, D] and [G, D], neither Q nor G being 0, got {shapes}")
        if query.shape[1] != gallery.shape[1]:
            raise InputError(f"re-ranking: features differ in width: {query.shape[1]} and {gallery.shape[1]}")
        return cls([Piece(query), Piece(gallery)])

    @property
    def on_cpu(self) -> bool:
        return self.norms.device.type == "cpu"

    def blocks(self, size: int) -> list[slice]:
        """All images in blocks of at most `size`, each within one piece."""
        bounds = zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)
        return [slice(begin, min(begin + size, end)) for start, end in bounds for begin in range(start, end, size)]

    def get(self, rows: slice) -> Tensor:
        """Features of one of `blocks`."""
        piece = int(np.searchsorted(self.starts, rows.start, side="right")) - 1
        start = int(self.starts[piece])
        return self.pieces[piece].get(slice(rows.start - start, rows.stop - start)).to(self.dtype)

    def pick(self, images: Indices) -> Tensor:
        """Features [n, D] of any images."""
        picked = torch.empty((len(images), self.pieces[0].feat.shape[1]), dtype=self.dtype, device=self.norms.device)
        which = np.searchsorted(self.starts, images, side="right") - 1
        for number, piece in enumerate(self.pieces):
            places = np.flatnonzero(which == number)
            if len(places):
                feat = piece.get(images[places] - self.starts[number]).to(self.dtype)
                picked.index_copy_(0, torch.from_numpy(places).to(picked.device), feat)
        return picked

    def squared(self, rows: slice, columns: slice) -> Float32s:
        """Distances [rows, columns] between two of `blocks`."""
        dist = torch.add(self.norms[columns], product(self.get(rows), self.get(columns)), alpha=-2)
        return dist.add_(self.norms[rows].unsqueeze(1)).clamp_(min=MIN_SQUARED_DISTANCE).float().cpu().numpy()

    def to_gallery(self, first: int, last: int) -> Float32s:
        """Distances [last - first, G] of some queries to the whole gallery."""
        dist = np.empty((last - first, self.num_images - self.num_query), np.float32)

        def fill(columns: slice) -> None:
            dist[:, columns.start - self.num_query : columns.stop - self.num_query] = self.squared(rows, columns)

        rows = slice(first, last)
        in_threads(fill, [block for block in self.blocks(GLOBAL_TILE) if block.start >= self.num_query])
        return dist

    def entries(self, rows: Indices, columns: Indices) -> Float32s:
        """Distances of pairs, [n], [n] -> [n]."""
        values = np.empty(len(rows), np.float32)
        for first in range(0, len(rows), PAIRS_PER_BLOCK):
            block = slice(first, first + PAIRS_PER_BLOCK)
            difference = self.pick(rows[block]).sub_(self.pick(columns[block]))
            values[block] = difference.square_().sum(1).clamp_(min=MIN_SQUARED_DISTANCE).cpu().numpy()
        return values


def name_of(image: int, num_query: int) -> str:
    """How messages call an image."""
    kind, number = ("query", image) if image < num_query else ("gallery image", image - num_query)
    return f"{kind} {number} (counted from 0)"
