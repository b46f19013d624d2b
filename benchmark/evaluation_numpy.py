"""The evaluation in well-written plain numpy, without compiled loops: the benchmark's second baseline."""

import numpy as np


def euclidean(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[M, D], [N, D] -> [M, N], in place."""
    dist = np.matmul(x, y.T)
    dist *= -2
    dist += np.square(x).sum(axis=1)[:, None]
    dist += np.square(y).sum(axis=1)
    np.maximum(dist, 1e-12, out=dist)
    return np.sqrt(dist, out=dist)


def local(x: np.ndarray, y: np.ndarray, block: int = 128) -> np.ndarray:
    """Aligned distance, [M, H, d], [N, G, d] -> [M, N]: stripe-major blocks, in place, the table by anti-diagonals."""
    dist = np.empty((len(x), len(y)), np.float32)
    for i in range(0, len(x), block):
        x_stripes = x[i : i + block].transpose(1, 0, 2)
        for j in range(0, len(y), block):
            dist[i : i + block, j : j + block] = _local_block(x_stripes, y[j : j + block].transpose(1, 0, 2))
    return dist


def _local_block(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    (h, num_x, width), (g, num_y, _) = x.shape, y.shape
    cost = euclidean(x.reshape(-1, width), y.reshape(-1, width))
    cost *= 0.5
    np.tanh(cost, out=cost)
    cost = cost.reshape(h, num_x, g, num_y)
    best = np.full((h + 1, num_x, num_y), np.inf, np.float32)  # the last anti-diagonal, by row
    for k in range(h + g - 1):
        first, last = max(0, k - g + 1), min(k, h - 1)
        if k:
            best[first + 1 : last + 2] = np.minimum(best[first : last + 1], best[first + 1 : last + 2])
        else:
            best[1] = 0
        for row in range(first, last + 1):
            best[row + 1] += cost[row, :, k - row]
        best[: first + 1] = np.inf
    return best[h]


def re_rank(
    q_g_dist: np.ndarray, q_q_dist: np.ndarray, g_g_dist: np.ndarray, k1: int = 20, k2: int = 6, weight: float = 0.3
) -> np.ndarray:
    """Partition instead of sort, sets of all images at once, and one sparse row an image."""
    num_query, num_images = len(q_g_dist), sum(q_g_dist.shape)
    original = np.block([[q_q_dist, q_g_dist], [q_g_dist.T, g_g_dist]])
    original = np.square(original, out=original).T
    original /= original.max(axis=1, keepdims=True)
    near = np.empty((num_images, k1 + 1), np.int64)
    for i in range(num_images):
        row = original[i]
        nearest = np.argpartition(row, k1)[: k1 + 1]
        near[i] = nearest[np.lexsort((nearest, row[nearest]))]
    half = int(np.around(k1 / 2)) + 1
    own = (near[near] == np.arange(num_images)[:, None, None]).any(axis=2)
    of_half = near[:, :half]
    own_half = (of_half[of_half] == np.arange(num_images)[:, None, None]).any(axis=2)

    columns, values = [], []
    for i in range(num_images):
        reciprocal = near[i, own[i]]
        others, valid = of_half[reciprocal], own_half[reciprocal]
        common = (np.isin(others, reciprocal) & valid).sum(axis=1)
        taken = 3 * common > 2 * valid.sum(axis=1)
        members = np.unique(np.append(reciprocal, others[taken][valid[taken]]))
        weights = np.exp(-original[i, members])
        columns.append(members)
        values.append(weights / weights.sum())
    if k2 != 1:
        columns, values = _averaged(near[:, :k2], columns, values, num_images)
    return _blend(original[:num_query, num_query:], columns, values, num_query, weight)


def _averaged(near: np.ndarray, columns: list, values: list, num_images: int) -> tuple[list, list]:
    new_columns, new_values = [], []
    row = np.zeros(num_images, np.float32)
    for neighbours in near:
        for other in neighbours:
            row[columns[other]] += values[other]
        members = np.unique(np.concatenate([columns[other] for other in neighbours]))
        new_columns.append(members)
        new_values.append(row[members] / len(neighbours))
        row[members] = 0
    return new_columns, new_values


def _blend(original: np.ndarray, columns: list, values: list, num_query: int, weight: float) -> np.ndarray:
    sizes = [len(members) for members in columns[num_query:]]
    images = np.repeat(np.arange(len(sizes)), sizes)
    flat_columns, flat_values = np.concatenate(columns[num_query:]), np.concatenate(values[num_query:])
    order = np.argsort(flat_columns, kind="stable")
    images, flat_values = images[order], flat_values[order]
    starts = np.searchsorted(flat_columns[order], np.arange(len(columns) + 1))
    final = original * np.float32(weight)
    for i in range(num_query):
        shared = np.zeros(len(sizes), np.float32)
        for place, value in zip(columns[i], values[i], strict=True):
            which = slice(starts[place], starts[place + 1])
            shared[images[which]] += np.minimum(value, flat_values[which])
        final[i] += (1 - weight) * (1 - shared / (2 - shared))
    return final


def rank(dist: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray, query_cams: np.ndarray,
         gallery_cams: np.ndarray, topk: int = 10) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(cmc [topk], ap [Q]): one sort of a row's values, then the places of its matches in it; ties not resolved."""
    hits, aps = np.zeros(topk), np.full(len(dist), np.nan)
    for i, row in enumerate(dist):
        same = np.flatnonzero(gallery_ids == query_ids[i])
        removed = gallery_cams[same] == query_cams[i]
        matches = np.sort(row[same[~removed]])
        if len(matches):
            ranks = np.searchsorted(np.sort(row), matches) - np.searchsorted(np.sort(row[same[removed]]), matches)
            found = np.arange(len(matches))
            before = np.where(ranks > 0, found / np.maximum(ranks, 1), 1)
            aps[i] = np.mean((before + (found + 1) / (ranks + 1)) / 2)
            if ranks[0] < topk:
                hits[ranks[0]] += 1
    return hits.cumsum() / np.count_nonzero(~np.isnan(aps)), aps
