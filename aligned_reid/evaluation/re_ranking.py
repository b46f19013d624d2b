"""Re-ranking with k-reciprocal encoding (Zhong et al., CVPR 2017, arXiv:1701.08398), in memory linear in the images.

The N = Q + G images are the queries, then the gallery. Only the nearest neighbours of each image are kept of the N x N
distances; all matrices derived from them are sparse.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from aligned_reid.errors import InputError
from aligned_reid.evaluation.distances import FeatureDistances, name_of
from aligned_reid.evaluation.kernels import in_threads, to_numpy
from aligned_reid.evaluation.neighbours import Neighbours, find_neighbours, transposed

# Rows of 2 kB: narrower blocks of columns are read from memory at half the speed.
COLUMNS_PER_BLOCK = 512
# Rows of a block that are transposed at a time, 512 kB.
ROWS_PER_PART = 256
# Pairs of weights that the Jaccard step unrolls at a time, so that its arrays stay in cache.
PAIRS_PER_BLOCK = 100_000

Array = NDArray[Any]
Float32s = NDArray[np.float32]
Indices = NDArray[np.int64]


def re_rank(
    q_g_dist: Any, q_q_dist: Any, g_g_dist: Any, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> Float32s:
    """Re-ranked distances, float32 [Q, G], from distances (not squared) [Q, G], [Q, Q], [G, G], tensors or arrays.

    k1: size of the neighbourhoods; k2: number of neighbours averaged in query expansion (1: none); lambda_value: weight
    of the original distance, squared and divided by the query's largest, against the Jaccard distance. Among equal
    distances the lower index, queries first, is the nearer neighbour.

    Raises InputError for other shapes, empty sets, distances that are not finite, k1 < 1, k2 < 1, lambda_value outside
    0 to 1.
    """
    check_settings(k1, k2, lambda_value)
    q_g, q_q, g_g = to_numpy(q_g_dist), to_numpy(q_q_dist), to_numpy(g_g_dist)
    if q_g.ndim != 2 or 0 in q_g.shape:
        raise InputError(f"re-ranking: needs q_g_dist [Q, G], neither of them 0, got {list(q_g.shape)}")
    for name, matrix, num in (("q_q_dist", q_q, q_g.shape[0]), ("g_g_dist", g_g, q_g.shape[1])):
        if matrix.shape != (num, num):
            shapes = f"q_g_dist is {list(q_g.shape)}, so {name} must be {[num, num]}, got {list(matrix.shape)}"
            raise InputError(f"re-ranking: {shapes}")
    final = np.empty(q_g.shape, np.float32)
    neighbours = neighbours_in_matrices(q_g, q_q, g_g, list_length(sum(q_g.shape), k1, k2), final)

    def entries(rows: Indices, columns: Indices) -> Float32s:
        return squared_entries(q_g, q_q, g_g, rows, columns)

    ReRanker(len(q_g), neighbours, entries, k1, k2, lambda_value).blend(final, 0)
    return final


def re_rank_features(query: Any, gallery: Any, k1: int = 20, k2: int = 6, lambda_value: float = 0.3) -> Float32s:
    """re_rank of the euclidean distances of features [Q, D] and [G, D], block by block: no N x N matrix is kept.

    Features on a device are multiplied there. Differs from re_rank only if rounding swaps neighbours. Raises InputError
    as re_rank does.
    """
    check_settings(k1, k2, lambda_value)
    distances = FeatureDistances.between(query, gallery)
    final = np.empty((distances.num_query, distances.num_images - distances.num_query), np.float32)
    neighbours = find_neighbours(distances, list_length(distances.num_images, k1, k2), final)
    ReRanker(len(final), neighbours, distances.entries, k1, k2, lambda_value).blend(final, 0)
    return final


def check_settings(k1: int, k2: int, lambda_value: float) -> None:
    """Raise InputError if one of `re_rank`'s settings is out of range."""
    for name, value in (("k1", k1), ("k2", k2)):
        if not isinstance(value, int | np.integer) or value < 1:
            raise InputError(f"re-ranking: {name} must be a whole number of at least 1, got {value}")
    if not 0 <= lambda_value <= 1:
        raise InputError(f"re-ranking: lambda_value must lie between 0 and 1, got {lambda_value}")


def list_length(num_images: int, k1: int, k2: int) -> int:
    """How many nearest images of each image re-ranking needs.

    Two more than it uses: different values may become equal when divided, and then the lower index goes first.
    """
    return min(max(k1 + 1, k2) + 2, num_images)


class ReRanker:
    """Re-ranks some queries at a time, once the nearest images of all images are known."""

    def __init__(
        self,
        num_query: int,
        neighbours: Neighbours,
        entries: Callable[[Indices, Indices], Float32s],
        k1: int,
        k2: int,
        lambda_value: float,
    ) -> None:
        """entries: squared distances of pairs of images, [n], [n] -> [n]."""
        total = neighbours.total
        if not np.isfinite(total).all():
            name = name_of(int(np.argmin(np.isfinite(total))), num_query)
            raise InputError(f"re-ranking: the distances of {name} hold NaN or infinity; check the features")
        largest = np.where(neighbours.largest > 0, neighbours.largest, np.float32(1))  # 0 if all images coincide
        indices, dist = neighbours.nearest(min(max(k1 + 1, k2), len(total)), largest)
        encoding = encode(indices, dist, largest, entries, k1)
        if k2 != 1:
            expansion = indices[:, :k2]
            encoding = rows_to_sparse(expansion, np.float32(1 / expansion.shape[1])) @ encoding
        self._lambda_value = lambda_value
        self._largest = largest[:num_query]
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

        overlap[q, g] = sum over n of min(V[q, n], V[g, n]). It is 0 unless the gallery image shares a neighbour n with
        the query: such images are found in inverted lists, one for each column n of V.
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


def neighbours_in_matrices(q_g: Array, q_q: Array, g_g: Array, length: int, final: Float32s) -> Neighbours:
    """The `length` nearest images of each image, by columns of the whole matrix; final [Q, G] gets the squares of q_g.

    The matrices need not be symmetric: a query's distances to the gallery are the transpose of its row.
    """
    num_query, num_images = len(q_g), sum(q_g.shape)
    found = Neighbours(num_images, length)

    def add_columns(first: int, last: int) -> None:
        images = slice(first, last)
        if first >= num_query:
            found.add(images, q_g, first - num_query, 0, square=True)
            found.add(images, g_g, first - num_query, num_query, square=True)
            return
        found.add(images, q_q, first, 0, square=True)
        np.square(q_g[images], out=final[images], casting="same_kind")
        for begin in range(0, final.shape[1], ROWS_PER_PART):
            found.add(images, transposed(final[images, begin : begin + ROWS_PER_PART]), 0, num_query + begin)

    bounds = [*range(0, num_query, COLUMNS_PER_BLOCK), *range(num_query, num_images, COLUMNS_PER_BLOCK), num_images]
    in_threads(add_columns, bounds[:-1], bounds[1:])
    return found


def squared_entries(q_g: Array, q_q: Array, g_g: Array, rows: Indices, columns: Indices) -> Float32s:
    """Squared distances of pairs of images, [n], [n] -> [n]."""
    num_query = len(q_g)
    values = np.empty(len(rows), np.float32)
    row_is_query, column_is_query = rows < num_query, columns < num_query
    row, column = rows - num_query * ~row_is_query, columns - num_query * ~column_is_query
    for which, matrix, i, j in (
        (row_is_query & column_is_query, q_q, row, column),
        (row_is_query & ~column_is_query, q_g, row, column),
        (~row_is_query & column_is_query, q_g, column, row),
        (~row_is_query & ~column_is_query, g_g, row, column),
    ):
        values[which] = np.square(matrix[i[which], j[which]])
    return values


def encode(
    indices: NDArray[np.int32],
    dist: Float32s,
    largest: Float32s,
    entries: Callable[[Indices, Indices], Float32s],
    k1: int,
) -> sparse.csr_matrix:
    """The k-reciprocal encoding V, sparse [N, N]: row i weighs the expanded reciprocal neighbours of image i.

    indices, dist [N, k]: nearest images, nearest first, and their squared distances over `largest` [N].
    """
    forward = rows_to_sparse(indices[:, : k1 + 1], np.float32(1))
    half = rows_to_sparse(indices[:, : int(np.around(k1 / 2)) + 1], np.float32(1))
    reciprocal = forward.multiply(forward.T).tocsr()  # i and j in each other's lists
    half_reciprocal = half.multiply(half.T).tocsr()
    # A reciprocal neighbour j adds its half list if more than 2 / 3 of that list are neighbours of i as well.
    common = (reciprocal @ half_reciprocal.T).multiply(reciprocal).tocsr()
    half_sizes = np.diff(half_reciprocal.indptr)
    common.data = (3 * common.data > 2 * half_sizes[common.indices]).astype(np.float32)
    common.eliminate_zeros()
    expanded = (reciprocal + common @ half_reciprocal).tocsr()
    expanded.data[:] = 1

    # Weights exp(-distance): those of neighbours are known, the other distances are looked up.
    near_weights = forward.copy()
    by_index = np.argsort(indices[:, : k1 + 1], axis=1)  # the order within the rows of `forward`
    near_weights.data = np.exp(-np.take_along_axis(dist[:, : k1 + 1], by_index, axis=1).ravel())
    far = (expanded - expanded.multiply(forward)).tocsr()
    far.eliminate_zeros()
    rows = np.repeat(np.arange(far.shape[0]), np.diff(far.indptr))
    far.data = np.exp(-entries(far.indices.astype(np.int64), rows) / largest[rows])
    encoding = (expanded.multiply(near_weights) + far).tocsr()
    sums = np.add.reduceat(np.append(encoding.data, 0), encoding.indptr[:-1])
    encoding.data /= np.repeat(sums, np.diff(encoding.indptr)).astype(np.float32)
    return encoding


def rows_to_sparse(index: NDArray[np.int32], value: np.float32) -> sparse.csr_matrix:
    """index [N, k] -> sparse [N, N] with `value` at (i, index[i, :])."""
    num_images, num_entries = index.shape
    indptr = np.arange(num_images + 1, dtype=np.int32) * num_entries
    data = np.full(index.size, value, np.float32)
    matrix = sparse.csr_matrix((data, index.flatten(), indptr), shape=(num_images, num_images))
    matrix.sort_indices()
    return matrix
