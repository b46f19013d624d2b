"""The nearest images of each image, from distances that arrive part by part: none is kept, nothing sorted whole."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligned_reid.evaluation.compiled import compiled

Float32s = NDArray[np.float32]


class NearestLists:
    """For each of C columns, the `length` smallest of the squared distances given so far, equals by image.

    `largest` [C] is the largest of them, `total` [C] their sum: where one of them is not finite, neither is the sum.
    """

    def __init__(self, num_columns: int, length: int) -> None:
        self._dist = np.full((num_columns, length), np.inf, np.float32)
        self._indices = np.zeros((num_columns, length), np.int32)
        self._bound = np.full(num_columns, np.inf, np.float32)
        self._groups = np.zeros(-(-num_columns // 8), np.int64)  # scratch, a byte for each column: kernels.GROUP
        self.largest = np.zeros(num_columns, np.float32)
        self.total = np.zeros(num_columns, np.float32)

    def add(self, dist: NDArray[Any], first_column: int, first_image: int, square: bool) -> None:
        """Rows of dist [n, columns] are the images from first_image on, its columns from first_column on the lists'.

        Images come in ascending order. With `square`, dist holds distances not yet squared.
        """
        if dist.dtype != np.float32 or not dist.flags.c_contiguous:
            dist = dist[:, first_column : first_column + len(self._dist)]
            dist = (np.square(dist) if square else dist).astype(np.float32, order="C")
            first_column, square = 0, False
        insert_nearest = compiled("insert_nearest")
        if insert_nearest is None:
            self._add_without_numba(dist[:, first_column : first_column + len(self._dist)], first_image, square)
        else:
            lists = (self._dist, self._indices, self._bound, self.largest, self.total)
            scratch = (self._groups.view(np.uint8), self._groups)
            insert_nearest(dist, first_column, first_image, square, *lists, *scratch)

    @property
    def arrays(self) -> list[NDArray[Any]]:
        """All that the lists hold, one row or entry a column: to save and `restore` them."""
        return [self._dist, self._indices, self.largest, self.total]

    def restore(self, arrays: Sequence[NDArray[Any]]) -> None:
        """Take over the `arrays` of other lists of the same size."""
        for own, given in zip(self.arrays, arrays, strict=True):
            own[:] = given
        self._bound[:] = self._dist[:, -1]

    def _add_without_numba(self, dist: NDArray[Any], first_image: int, square: bool) -> None:
        dist = (np.square(dist) if square else dist).T
        self.largest = np.fmax(self.largest, dist.max(axis=1))
        self.total = self.total + dist.sum(axis=1)
        images = np.arange(first_image, first_image + dist.shape[1], dtype=np.int32)
        length = self._dist.shape[1]
        keys = np.concatenate([_sort_keys(self._dist, self._indices), _sort_keys(dist, images)], axis=1)
        self._dist, self._indices = _from_keys(np.partition(keys, length - 1)[:, :length])

    def ascending(self, scale: Float32s, length: int) -> tuple[NDArray[np.int32], Float32s]:
        """Images and distances over `scale` [C], both [C, length]: nearest first, equals by image."""
        dist = self._dist / scale[:, None]
        dist, indices = _from_keys(np.sort(_sort_keys(dist, self._indices))[:, :length])
        return indices, dist


def _sort_keys(dist: Float32s, indices: NDArray[np.int32]) -> NDArray[np.int64]:
    """One integer each, in the order of distance, then index: the bits of floats from 0 on ascend as they do."""
    bits = np.ascontiguousarray(dist, np.float32).view(np.int32)
    return bits.astype(np.int64) << 32 | indices


def _from_keys(keys: NDArray[np.int64]) -> tuple[Float32s, NDArray[np.int32]]:
    return (keys >> 32).astype(np.int32).view(np.float32), keys.astype(np.int32)
