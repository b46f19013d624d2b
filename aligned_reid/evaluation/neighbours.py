"""The nearest neighbours of every image, from distances that arrive tile by tile: no N x N matrix, no full sort."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from aligned_reid.evaluation.distances import FeatureDistances
from aligned_reid.evaluation.kernels import GROUP, compiled, in_threads
from aligned_reid.files import replacing

# Images along a tile's side: 4 MB of features each way, 1 MB of distances on a CPU. Several threads can fill the lists
# of one tile, a unit of images each.
TILE, DEVICE_TILE = 512, 2048
UNIT = 128
TILES_PER_THREAD = 8  # computed before they enter the lists of their columns
SECONDS_BETWEEN_SAVES = 300

Float32s = NDArray[np.float32]


class Neighbours:
    """For each of N images, the `length` smallest squared distances so far; ties go to the lower index.

    `largest` [N] and `total` [N] are the largest of all distances and their sum, which is not finite if one is not.
    """

    def __init__(self, num_images: int, length: int) -> None:
        self.dist = np.full((num_images, length), np.inf, np.float32)
        self.indices = np.zeros((num_images, length), np.int32)
        self.bound = np.full(num_images, np.inf, np.float32)
        self.largest = np.zeros(num_images, np.float32)
        self.total = np.zeros(num_images, np.float32)
        compiled("insert_nearest")  # before threads ask for it

    def add(self, images: slice, dist: NDArray[Any], first_column: int, first_row: int, square: bool = False) -> None:
        """Add distances to images first_row, ..., rows of dist [n, columns]; columns first_column, ... are `images`.

        Rows come in ascending order. square: dist holds distances that are not squared yet.
        """
        num_columns = images.stop - images.start
        if dist.dtype != np.float32 or not dist.flags.carray:  # kernels take no read-only array
            dist = dist[:, first_column : first_column + num_columns]
            dist = (np.square(dist) if square else dist).astype(np.float32, order="C")
            first_column, square = 0, False
        lists = (one[images] for one in (self.dist, self.indices, self.bound, self.largest, self.total))
        groups = np.zeros(-(-num_columns // GROUP), np.int64)
        compiled("insert_nearest")(dist, first_column, first_row, square, *lists, groups.view(np.uint8), groups)

    def nearest(self, number: int, scale: Float32s) -> tuple[NDArray[np.int32], Float32s]:
        """The `number` nearest images and their distances over `scale` [N], both [N, number]: ascending, ties by index.

        One integer a neighbour sorts both ways: the bits of non-negative floats ascend as the floats do.
        """

        def sort(first: int) -> tuple[NDArray[np.int32], Float32s]:
            block = slice(first, first + TILE)
            bits = (self.dist[block] / scale[block, None]).view(np.int32)
            keys = np.sort(bits.astype(np.int64) << 32 | self.indices[block])[:, :number]
            return keys.astype(np.int32), (keys >> 32).astype(np.int32).view(np.float32)

        indices, dist = zip(*in_threads(sort, range(0, len(self.dist), TILE)), strict=True)
        return np.concatenate(indices), np.concatenate(dist)


def find_neighbours(
    distances: FeatureDistances, length: int, final: Float32s | None = None, state: Path | None = None, key: str = ""
) -> Neighbours:
    """The `length` nearest images of each image. Fills `final` [Q, G] with the queries' distances on the way, if given.

    Each tile of distances serves its rows and its columns. With `state`, the lists are saved in that file every few
    minutes, a later call with the same key resumes from it, and a bar shows the progress.
    """
    blocks = distances.blocks(TILE if distances.on_cpu else DEVICE_TILE)
    found = Neighbours(distances.num_images, length)
    done = restore(state, key, found) if state else 0
    saved = time.monotonic()
    sizes = np.array([block.stop - block.start for block in blocks])
    work = np.cumsum(sizes) * sizes  # distances of each block to those before it and to itself
    with tqdm(total=int(work.sum()), initial=int(work[:done].sum()), desc="neighbours", unit="d", unit_scale=True,
              disable=None if state else True) as bar:  # fmt: skip
        for number in range(done, len(blocks)):
            add_block(distances, found, blocks[: number + 1], final)
            bar.update(int(work[number]))
            if state and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                with replacing(state) as file:
                    np.savez(file, key=np.array(key), num_blocks=np.array(number + 1), **vars(found))
                saved = time.monotonic()
    return found


def add_block(distances: FeatureDistances, found: Neighbours, blocks: list[slice], final: Float32s | None) -> None:
    """The tiles of the last block and each block up to it: the images of each enter the lists of the other.

    Lists take images in ascending order: the lists of the last block get the earlier images now, and those of the
    earlier blocks get the last block's images after all that came before.
    """
    columns, num_query = blocks[-1], distances.num_query

    def compute_tile(rows: slice) -> Float32s:
        dist = distances.squared(rows, columns)
        if rows.start < columns.start:
            turned = transposed(dist)
            for unit in units_of(rows):
                found.add(unit, turned, unit.start - rows.start, columns.start)
        if final is not None and rows.start < num_query <= columns.start:
            final[rows, columns.start - num_query : columns.stop - num_query] = dist
        return dist

    step = TILES_PER_THREAD * torch.get_num_threads()
    for begin in range(0, len(blocks), step):
        rows_of_tiles = blocks[begin : begin + step]
        # A device computes the tiles in order; threads would not make it faster.
        tiles = in_threads(compute_tile, rows_of_tiles) if distances.on_cpu else list(map(compute_tile, rows_of_tiles))

        def add_columns(unit: slice, rows_of_tiles: list[slice] = rows_of_tiles, tiles: list[Float32s] = tiles) -> None:
            for rows, dist in zip(rows_of_tiles, tiles, strict=True):
                found.add(unit, dist, unit.start - columns.start, rows.start)

        in_threads(add_columns, units_of(columns))


def units_of(block: slice) -> list[slice]:
    return [slice(begin, min(begin + UNIT, block.stop)) for begin in range(block.start, block.stop, UNIT)]


def transposed(source: Float32s) -> Float32s:
    """A contiguous copy by torch, which works tile by tile where numpy works row by row."""
    return torch.from_numpy(source).t().contiguous().numpy()


def restore(state: Path, key: str, found: Neighbours) -> int:
    """Fill the lists from `state` and return how many blocks are done; 0 without a usable state for `key`."""
    try:
        with np.load(state, allow_pickle=False) as saved:
            if str(saved["key"]) != key:
                return 0
            lists = {name: saved[name] for name in vars(found)}
            num_blocks = int(saved["num_blocks"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return 0
    vars(found).update(lists)
    return num_blocks
