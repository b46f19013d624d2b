"""Re-ranking with k-reciprocal encoding (Zhong et al., CVPR 2017, arXiv:1701.08398), in memory linear in the images.

The N = Q + G images are the queries, then the gallery. Of their N x N distances only the nearest neighbours of each
image are kept; whatever follows from them is sparse.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from aligned_reid.errors import InputError
from aligned_reid.evaluation.compiled import compiled, in_threads, to_numpy
from aligned_reid.evaluation.feature_distances import FeatureDistances, name_of, transposed
from aligned_reid.evaluation.nearest import NearestLists

# Rows of 2 kB: narrower blocks of columns are read from memory at half the speed.
COLUMNS_PER_BLOCK = 512
# How many rows of a block are computed or transposed at a time, 512 kB.
ROWS_PER_PART = 256
# How many pairs of weights the Jaccard step unrolls at a time, so that its arrays stay in the cache.
PAIRS_PER_BLOCK = 100_000

Array = NDArray[Any]
Float32s = NDArray[np.float32]
Indices = NDArray[np.int64]


class _Distances(Protocol):
    """Squared distances among N images, of which the first num_query are queries."""

    num_query: int
    num_images: int

    def lists(self, length: int, final: Float32s | None) -> Sequence[NearestLists]:
        """The `length` nearest of each image, in the images' order, and those of queries into final [Q, G]."""

    def entries(self, rows: Indices, columns: Indices) -> Float32s:
        """[n], [n] -> [n]."""


class _Neighbours(NamedTuple):
    """The nearest images of each image, nearest first, equals by index."""

    indices: NDArray[np.int32]  # [N, k]
    dist: Float32s  # [N, k], squared, over the column's maximum
    column_max: Float32s  # [N], the largest squared distance of each image


def re_rank(
    q_g_dist: Any, q_q_dist: Any, g_g_dist: Any, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> Float32s:
    """Re-ranked distances, float32 [Q, G], from distances (not squared) [Q, G], [Q, Q], [G, G], tensors or arrays.

    k1: size of the neighbourhoods; k2: how many neighbours are averaged in query expansion (1: none); lambda_value:
    weight of the original distance, squared and divided by the query's largest, against the Jaccard distance. Among
    equal distances the lower index, queries first, is the nearer neighbour.

    Raises InputError on other shapes, empty sets, distances that are not finite, k1 < 1, k2 < 1, lambda_value outside 0
    to 1.
    """
    check_settings(k1, k2, lambda_value)
    return _re_rank(_GivenDistances(to_numpy(q_g_dist), to_numpy(q_q_dist), to_numpy(g_g_dist)), k1, k2, lambda_value)


def re_rank_features(query: Any, gallery: Any, k1: int = 20, k2: int = 6, lambda_value: float = 0.3) -> Float32s:
    """re_rank of the euclidean distances of features [Q, D] and [G, D], computed by blocks: no N x N matrix is kept.

    Differs from re_rank only where rounding swaps neighbours. Raises InputError as re_rank does.
    """
    check_settings(k1, k2, lambda_value)
    return _re_rank(FeatureDistances.between(query, gallery), k1, k2, lambda_value)


def check_settings(k1: int, k2: int, lambda_value: float) -> None:
    """Raise InputError where one of `re_rank`'s settings is out of range."""
    for name, value in (("k1", k1), ("k2", k2)):
        if not isinstance(value, int | np.integer) or value < 1:
            raise InputError(f"re-ranking: {name} must be a whole number of at least 1, got {value}")
    if not 0 <= lambda_value <= 1:
        raise InputError(f"re-ranking: lambda_value must lie between 0 and 1, got {lambda_value}")


def _re_rank(distances: _Distances, k1: int, k2: int, lambda_value: float) -> Float32s:
    num_query, num_images = distances.num_query, distances.num_images
    final = np.empty((num_query, num_images - num_query), np.float32)
    lists = distances.lists(list_length(num_images, k1, k2), final)
    ReRanker(distances, lists, k1, k2, lambda_value).blend(final, 0)
    return final


def list_length(num_images: int, k1: int, k2: int) -> int:
    """How many nearest images of each image re-ranking needs.

    Two more than are used, for values that differ may be equal once divided, and then the lower index goes first.
    """
    return min(max(k1 + 1, k2) + 2, num_images)


class ReRanker:
    """Re-ranks queries some at a time, once the nearest images of all images are known."""

    def __init__(
        self, distances: _Distances, lists: Sequence[NearestLists], k1: int, k2: int, lambda_value: float
    ) -> None:
        num_query = distances.num_query
        neighbours = _neighbours(lists, min(max(k1 + 1, k2), distances.num_images), num_query)
        encoding = _encode(distances, neighbours, k1)
        if k2 != 1:
            expansion = neighbours.indices[:, :k2]
            encoding = _rows_to_sparse(expansion, np.float32(1 / expansion.shape[1])) @ encoding
        self._lambda_value = lambda_value
        self._largest = neighbours.column_max[:num_query]
        self._queries, self._lists = encoding[:num_query], encoding[num_query:].tocsc()
        self._list_sizes = np.diff(self._lists.indptr)
        sizes = self._list_sizes[self._queries.indices]
        self._pairs = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])[self._queries.indptr]  # [Q + 1]

    def blend(self, dist: Float32s, first_query: int) -> None:
        """Re-rank the squared distances [B, G] of queries first_query, first_query + 1, ..., in place."""
        num_query, num_gallery = dist.shape
        bounds, end = [first_query], first_query + num_query
        while bounds[-1] < end:
            by_pairs = int(np.searchsorted(self._pairs, self._pairs[bounds[-1]] + PAIRS_PER_BLOCK, side="right")) - 1
            by_cells = bounds[-1] + max(1, 10 * PAIRS_PER_BLOCK // num_gallery)
            bounds.append(min(max(by_pairs, bounds[-1] + 1), by_cells, end))
        targets = [dist[a - first_query : b - first_query] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        in_threads(self._blend_block, targets, bounds[:-1])

    def _blend_block(self, target: Float32s, first: int) -> None:
        """target := lambda * target / largest + (1 - lambda) * jaccard, where jaccard = 1 - overlap / (2 - overlap).

        overlap[q, g] = sum over n of min(V[q, n], V[g, n]). It is 0 but where a gallery image shares a neighbour n with
        the query: these are found in inverted lists, one for each column n of V.
        """
        num_query, num_gallery = target.shape
        last, lambda_value = first + num_query, self._lambda_value
        indptr, lists = self._queries.indptr, self._lists
        entries = slice(indptr[first], indptr[last])
        sizes = self._list_sizes[self._queries.indices[entries]]
        before = np.cumsum(sizes) - sizes
        place = np.arange(sizes.sum()) + np.repeat(lists.indptr[self._queries.indices[entries]] - before, sizes)
        shared = np.minimum(np.repeat(self._queries.data[entries], sizes), lists.data[place])
        row_start = np.repeat(np.arange(num_query) * num_gallery, np.diff(indptr[first : last + 1]))
        overlap = np.bincount(np.repeat(row_start, sizes) + lists.indices[place], shared)
        touched = np.flatnonzero(overlap)
        overlap = overlap[touched]
        target /= self._largest[first:last, None]
        target *= np.float32(lambda_value)
        target += np.float32(1 - lambda_value)
        target.reshape(-1)[touched] -= ((1 - lambda_value) * overlap / (2 - overlap)).astype(np.float32)


class _GivenDistances:
    """Of three distance matrices, which need not be symmetric."""

    def __init__(self, q_g_dist: Array, q_q_dist: Array, g_g_dist: Array) -> None:
        if q_g_dist.ndim != 2 or 0 in q_g_dist.shape:
            raise InputError(f"re-ranking: needs q_g_dist [Q, G], neither of them 0, got {list(q_g_dist.shape)}")
        num_query, num_gallery = q_g_dist.shape
        for name, matrix, num in (("q_q_dist", q_q_dist, num_query), ("g_g_dist", g_g_dist, num_gallery)):
            if matrix.shape != (num, num):
                raise InputError(
                    f"re-ranking: q_g_dist is {list(q_g_dist.shape)}, so {name} must be {[num, num]}, "
                    f"got {list(matrix.shape)}"
                )
        self.num_query, self.num_images = num_query, num_query + num_gallery
        self._q_g, self._q_q, self._g_g = q_g_dist, q_q_dist, g_g_dist

    def lists(self, length: int, final: Float32s | None) -> Sequence[NearestLists]:
        assert final is not None, "given distances are re-ranked whole"
        compiled("insert_nearest")  # once, before the threads ask for it

        def block(first: int, last: int) -> NearestLists:
            lists = NearestLists(last - first, length)
            self.collect(first, last, lists, final)
            return lists

        num_query, num_images = self.num_query, self.num_images
        bounds = [*range(0, num_query, COLUMNS_PER_BLOCK), *range(num_query, num_images, COLUMNS_PER_BLOCK), num_images]
        return in_threads(block, bounds[:-1], bounds[1:])

    def collect(self, first: int, last: int, lists: NearestLists, final: Float32s) -> None:
        """Add columns first to last to the lists, and write those of queries into their rows of final [Q, G]."""
        if first >= self.num_query:
            lists.add(self._q_g, first - self.num_query, 0, square=True)
            lists.add(self._g_g, first - self.num_query, self.num_query, square=True)
            return
        lists.add(self._q_q, first, 0, square=True)
        np.square(self._q_g[first:last], out=final[first:last], casting="same_kind")
        for begin in range(0, final.shape[1], ROWS_PER_PART):
            part = transposed(final[first:last, begin : begin + ROWS_PER_PART])
            lists.add(part, 0, self.num_query + begin, square=False)

    def entries(self, rows: Indices, columns: Indices) -> Float32s:
        values = np.empty(len(rows), np.float32)
        row_is_query, column_is_query = rows < self.num_query, columns < self.num_query
        row, column = rows - self.num_query * ~row_is_query, columns - self.num_query * ~column_is_query
        for which, matrix, i, j in (
            (row_is_query & column_is_query, self._q_q, row, column),
            (row_is_query & ~column_is_query, self._q_g, row, column),
            (~row_is_query & column_is_query, self._q_g, column, row),
            (~row_is_query & ~column_is_query, self._g_g, row, column),
        ):
            values[which] = np.square(matrix[i[which], j[which]])
        return values


def _neighbours(lists: Sequence[NearestLists], number: int, num_query: int) -> _Neighbours:
    """The `number` nearest images of every image, from its lists."""
    total, largest = (np.concatenate([getattr(one, name) for one in lists]) for name in ("total", "largest"))
    if not np.isfinite(total).all():
        name = name_of(int(np.argmin(np.isfinite(total))), num_query)
        raise InputError(f"re-ranking: the distances of {name} hold NaN or infinity; check the features")
    largest = np.where(largest > 0, largest, np.float32(1))  # 0 where all images coincide
    starts = np.cumsum([0, *(len(one.largest) for one in lists)])
    parts = in_threads(
        lambda one, start: one.ascending(largest[start : start + len(one.largest)], number), lists, starts[:-1]
    )
    indices, dist = (np.concatenate([part[i] for part in parts]) for i in range(2))
    return _Neighbours(indices, dist, largest)


def _encode(distances: _Distances, neighbours: _Neighbours, k1: int) -> sparse.csr_matrix:
    """The k-reciprocal encoding V, sparse [N, N]: row i weighs the expanded reciprocal neighbours of image i."""
    forward = _rows_to_sparse(neighbours.indices[:, : k1 + 1], np.float32(1))
    half = _rows_to_sparse(neighbours.indices[:, : int(np.around(k1 / 2)) + 1], np.float32(1))
    reciprocal = forward.multiply(forward.T).tocsr()  # i and j in each other's lists
    half_reciprocal = half.multiply(half.T).tocsr()
    # A reciprocal neighbour j brings its own half list along where more than 2 / 3 of that are neighbours of i as well.
    common = (reciprocal @ half_reciprocal.T).multiply(reciprocal).tocsr()
    half_sizes = np.diff(half_reciprocal.indptr)
    common.data = (3 * common.data > 2 * half_sizes[common.indices]).astype(np.float32)
    common.eliminate_zeros()
    expanded = (reciprocal + common @ half_reciprocal).tocsr()
    expanded.data[:] = 1

    # Weights exp(-distance): those of neighbours are at hand, the others' distances are looked up.
    near_weights = forward.copy()
    near_weights.data = np.exp(-_in_index_order(neighbours, k1 + 1))
    far = (expanded - expanded.multiply(forward)).tocsr()
    far.eliminate_zeros()
    rows = np.repeat(np.arange(far.shape[0]), np.diff(far.indptr))
    columns = far.indices.astype(np.int64)
    far.data = np.exp(-distances.entries(columns, rows) / neighbours.column_max[rows])
    encoding = (expanded.multiply(near_weights) + far).tocsr()
    sums = np.add.reduceat(np.append(encoding.data, 0), encoding.indptr[:-1])
    encoding.data /= np.repeat(sums, np.diff(encoding.indptr)).astype(np.float32)
    return encoding


def _rows_to_sparse(index: NDArray[np.int32], value: np.float32) -> sparse.csr_matrix:
    """index [N, k] -> sparse [N, N] with `value` at (i, index[i, :])."""
    num_images, num_entries = index.shape
    indptr = np.arange(num_images + 1, dtype=np.int32) * num_entries
    data = np.full(index.size, value, np.float32)
    matrix = sparse.csr_matrix((data, index.flatten(), indptr), shape=(num_images, num_images))
    matrix.sort_indices()
    return matrix


def _in_index_order(neighbours: _Neighbours, number: int) -> Float32s:
    """Distances of the first `number` neighbours as _rows_to_sparse orders them, [N * number]."""
    index, dist = neighbours.indices[:, :number], neighbours.dist[:, :number]
    return np.take_along_axis(dist, np.argsort(index, axis=1), axis=1).ravel()
