"""Squared euclidean distances among many images, block by block: nothing of size N x N is kept.

Features are not copied; they may lie in mapped files.
"""

from __future__ import annotations

import functools
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from aligned_reid.distance import MIN_SQUARED_DISTANCE, at_least_float32, normalize
from aligned_reid.errors import InputError
from aligned_reid.evaluation.compiled import compiled, in_threads, num_threads, to_tensor
from aligned_reid.evaluation.nearest import NearestLists
from aligned_reid.evaluation.product import product

# Images of a tile's side: 4 MB of features each way, 1 MB of distances. Its lists are in units, so that several threads
# can fill them.
TILE = 512
UNIT = 128
TILES_PER_THREAD = 8  # computed before the lists of their common columns take them in
ROWS_PER_CHECK = 4096
PAIRS_PER_BLOCK = 1024
SECONDS_BETWEEN_SAVES = 300

Float32s = NDArray[np.float32]
Indices = NDArray[np.int64]


class Piece(NamedTuple):
    """Some of the features: rows of a tensor or array (None: all of them), at unit length where `unit_length`."""

    feat: Tensor
    rows: Indices | None = None
    unit_length: bool = False

    @property
    def num_images(self) -> int:
        return len(self.feat) if self.rows is None else len(self.rows)

    def get(self, index: slice | Tensor) -> Tensor:
        """Features of the piece's images at `index`, at least float32; a view where nothing has to change."""
        if self.rows is not None:
            chosen = self.rows[index if isinstance(index, slice) else index.numpy()]
            consecutive = len(chosen) and chosen[-1] - chosen[0] == len(chosen) - 1 and isinstance(index, slice)
            index = slice(int(chosen[0]), int(chosen[-1]) + 1) if consecutive else torch.from_numpy(chosen)
        feat = at_least_float32(self.feat[index if isinstance(index, slice) else index.to(self.feat.device)])
        return normalize(feat) if self.unit_length else feat


class FeatureDistances:
    """Of N images: queries, all of them in the first piece, then the gallery."""

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
        """Of features [Q, D] and [G, D], tensors or arrays, on their own device. Raises InputError on other shapes."""
        query, gallery = to_tensor(query), to_tensor(gallery)
        if query.dim() != 2 or gallery.dim() != 2 or 0 in (len(query), len(gallery)):
            shapes = f"{list(query.shape)} and {list(gallery.shape)}"
            raise InputError(f"re-ranking: needs features [Q, D] and [G, D], neither Q nor G being 0, got {shapes}")
        if query.shape[1] != gallery.shape[1]:
            raise InputError(f"re-ranking: features differ in width: {query.shape[1]} and {gallery.shape[1]}")
        return cls([Piece(query), Piece(gallery)])

    def blocks(self, size: int) -> list[slice]:
        """All images in blocks of at most `size`, none of which is in two pieces."""
        bounds = zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)
        return [slice(begin, min(begin + size, end)) for start, end in bounds for begin in range(start, end, size)]

    def get(self, rows: slice) -> Tensor:
        """Features of one of `blocks`."""
        piece = int(np.searchsorted(self.starts, rows.start, side="right")) - 1
        start = int(self.starts[piece])
        return self.pieces[piece].get(slice(rows.start - start, rows.stop - start)).to(self.dtype)

    def pick(self, images: Indices) -> Tensor:
        """Features [n, D] of any images."""
        picked = torch.empty((len(images), self.get(slice(0, 1)).shape[1]), dtype=self.dtype, device=self.norms.device)
        which = np.searchsorted(self.starts, images, side="right") - 1
        for number, piece in enumerate(self.pieces):
            places = np.flatnonzero(which == number)
            if len(places):
                rows = torch.from_numpy(images[places] - self.starts[number])
                picked[torch.from_numpy(places).to(picked.device)] = piece.get(rows)
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
        in_threads(fill, [block for block in self.blocks(TILE) if block.start >= self.num_query])
        return dist

    def entries(self, rows: Indices, columns: Indices) -> Float32s:
        """Distances of pairs, [n], [n] -> [n]."""
        values = np.empty(len(rows), np.float32)
        for first in range(0, len(rows), PAIRS_PER_BLOCK):
            block = slice(first, first + PAIRS_PER_BLOCK)
            difference = self.pick(rows[block]).sub_(self.pick(columns[block]))
            values[block] = difference.square_().sum(1).clamp_(min=MIN_SQUARED_DISTANCE).cpu().numpy()
        return values

    def lists(
        self, length: int, final: Float32s | None, state: Path | None = None, key: str = ""
    ) -> list[NearestLists]:
        """The `length` nearest images of each image, in lists of UNIT images or fewer, in the images' order.

        Each tile of distances serves both its rows and its columns. `final` [Q, G] is filled on the way where it is
        given. With `state`, what is found so far is kept in that file every few minutes, and a later call with the same
        key goes on from there; a bar shows how far it is.
        """
        blocks = self.blocks(TILE)
        units = [[NearestLists(min(UNIT, b.stop - s), length) for s in range(b.start, b.stop, UNIT)] for b in blocks]
        every = [lists for unit in units for lists in unit]
        compiled("insert_nearest")  # once, before the threads ask for it
        done = restore(state, key, every) if state else 0
        saved = time.monotonic()
        sizes = np.array([block.stop - block.start for block in blocks])
        work = np.cumsum(sizes) * sizes  # distances of each block to those before it and to itself
        hidden = None if state else True
        with tqdm(total=int(work.sum()), initial=int(work[:done].sum()), desc="neighbours", unit="d", unit_scale=True,
                  disable=hidden) as bar:  # fmt: skip
            for number in range(done, len(blocks)):
                self.add_block(blocks, units, number, final)
                bar.update(int(work[number]))
                if state and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    save(state, key, every, number + 1)
                    saved = time.monotonic()
        return every

    def add_block(
        self, blocks: list[slice], units: list[list[NearestLists]], number: int, final: Float32s | None
    ) -> None:
        """The tiles of block `number` and each block up to it: images of either enter the lists of the other.

        Lists take images in ascending order: those of this block get the earlier ones now, those of the earlier blocks
        get this one's images behind all that came before.
        """
        columns = blocks[number]

        def tile(other: int) -> Float32s:
            rows = blocks[other]
            dist = self.squared(rows, columns)
            if other < number:
                turned = transposed(dist)
                for unit, lists in enumerate(units[other]):
                    lists.add(turned, unit * UNIT, columns.start, square=False)
            if final is not None and rows.start < self.num_query <= columns.start:
                final[rows, columns.start - self.num_query : columns.stop - self.num_query] = dist
            return dist

        step = TILES_PER_THREAD * num_threads()
        for begin in range(0, number + 1, step):
            others = range(begin, min(begin + step, number + 1))
            tiles = in_threads(tile, others)

            def take_in(unit: int, others: range = others, tiles: list[Float32s] = tiles) -> None:
                for other, dist in zip(others, tiles, strict=True):
                    units[number][unit].add(dist, unit * UNIT, blocks[other].start, square=False)

            in_threads(take_in, range(len(units[number])))


def transposed(source: Float32s) -> Float32s:
    """A contiguous copy, by torch, which goes by tiles where numpy goes by rows."""
    return torch.from_numpy(source).t().contiguous().numpy()


def name_of(image: int, num_query: int) -> str:
    """An image in words."""
    kind, number = ("query", image) if image < num_query else ("gallery image", image - num_query)
    return f"{kind} {number} (counted from 0)"


def save(state: Path, key: str, every: Sequence[NearestLists], num_blocks: int) -> None:
    """Write the lists as they are after `num_blocks` blocks, whole or not at all."""
    fields = [np.concatenate(values) for values in zip(*(lists.arrays for lists in every), strict=True)]
    content: dict[str, Any] = {f"field{i}": field for i, field in enumerate(fields)}
    content |= {"key": np.array(key), "num_blocks": np.array(num_blocks)}
    temporary = state.with_name(state.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **content)
    temporary.replace(state)


def restore(state: Path, key: str, every: Sequence[NearestLists]) -> int:
    """Fill the lists from `state`; returns how many blocks are done, 0 where there is no state of this key."""
    try:
        with np.load(state, allow_pickle=False) as saved:
            if str(saved["key"]) != key:
                return 0
            fields = [saved[f"field{i}"] for i in range(len(every[0].arrays))]
            num_blocks = int(saved["num_blocks"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return 0
    begin = 0
    for lists in every:
        end = begin + len(lists.largest)
        lists.restore([field[begin:end] for field in fields])
        begin = end
    return num_blocks
