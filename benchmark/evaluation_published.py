"""The evaluation of the published AlignedReID code, step by step: the baseline of benchmark/evaluation.py.

It makes the same numpy calls on the same shapes in the same order; nothing is added that would slow it down.
"""

import numpy as np
from sklearn.metrics import auc, precision_recall_curve


def euclidean(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[M, D], [N, D] -> [M, N]."""
    x_square = np.sum(np.square(x), axis=1)[..., np.newaxis]
    y_square = np.sum(np.square(y), axis=1)[np.newaxis, ...]
    squared = -2 * np.matmul(x, y.T) + x_square + y_square
    squared[squared < 0] = 0
    return np.sqrt(squared)


def local_block(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Aligned distance, [M, H, d], [N, G, d] -> [M, N], by a table of all stripe pairs."""
    num_x, h, width = x.shape
    num_y, g, _ = y.shape
    cost = euclidean(x.reshape(num_x * h, width), y.reshape(num_y * g, width))
    cost = (np.exp(cost) - 1.0) / (np.exp(cost) + 1.0)
    cost = cost.reshape(num_x, h, num_y, g).transpose(1, 3, 0, 2)
    total = np.zeros_like(cost)
    for i in range(h):
        for j in range(g):
            if i == 0 and j == 0:
                total[i, j] = cost[i, j]
            elif i == 0:
                total[i, j] = total[i, j - 1] + cost[i, j]
            elif j == 0:
                total[i, j] = total[i - 1, j] + cost[i, j]
            else:
                total[i, j] = np.min(np.stack([total[i - 1, j], total[i, j - 1]], axis=0), axis=0) + cost[i, j]
    return total[-1, -1].copy()


def local(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """In blocks of about 200 x 200 images."""
    rows = []
    for x_part in np.array_split(x, len(x) // 200 + 1):
        rows.append(
            np.concatenate([local_block(x_part, part) for part in np.array_split(y, len(y) // 200 + 1)], axis=1)
        )
    return np.concatenate(rows, axis=0)


def re_rank(
    q_g_dist: np.ndarray, q_q_dist: np.ndarray, g_g_dist: np.ndarray, k1: int = 20, k2: int = 6, weight: float = 0.3
) -> np.ndarray:
    original = np.concatenate(
        [np.concatenate([q_q_dist, q_g_dist], axis=1), np.concatenate([q_g_dist.T, g_g_dist], axis=1)], axis=0
    )
    original = np.power(original, 2).astype(np.float32)
    original = np.transpose(1.0 * original / np.max(original, axis=0))
    encoding = np.zeros_like(original).astype(np.float32)
    ranked = np.argsort(original).astype(np.int32)
    num_query, num_images = len(q_g_dist), sum(q_g_dist.shape)
    half = int(np.around(k1 / 2.0)) + 1
    for i in range(num_images):
        forward = ranked[i, : k1 + 1]
        reciprocal = forward[np.where(ranked[forward, : k1 + 1] == i)[0]]
        expanded = reciprocal
        for candidate in reciprocal:
            others = ranked[candidate, :half]
            others = others[np.where(ranked[others, :half] == candidate)[0]]
            if len(np.intersect1d(others, reciprocal)) > 2.0 / 3 * len(others):
                expanded = np.append(expanded, others)
        expanded = np.unique(expanded)
        weights = np.exp(-original[i, expanded])
        encoding[i, expanded] = 1.0 * weights / np.sum(weights)
    original = original[:num_query]
    if k2 != 1:
        averaged = np.zeros_like(encoding, dtype=np.float32)
        for i in range(num_images):
            averaged[i, :] = np.mean(encoding[ranked[i, :k2], :], axis=0)
        encoding = averaged
        del averaged
    del ranked
    inverted = [np.where(encoding[:, i] != 0)[0] for i in range(num_images)]
    jaccard = np.zeros_like(original, dtype=np.float32)
    for i in range(num_query):
        shared = np.zeros(shape=[1, num_images], dtype=np.float32)
        for place in np.where(encoding[i, :] != 0)[0]:
            images = inverted[place]
            shared[0, images] = shared[0, images] + np.minimum(encoding[i, place], encoding[images, place])
        jaccard[i] = 1 - shared / (2.0 - shared)
    final = jaccard * (1 - weight) + original * weight
    return final[:num_query, num_query:]


def cmc(dist: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray, query_cams: np.ndarray,
        gallery_cams: np.ndarray, topk: int = 10) -> np.ndarray:  # fmt: skip
    indices = np.argsort(dist, axis=1)
    matches = gallery_ids[indices] == query_ids[:, np.newaxis]
    hits = np.zeros([len(dist), topk])
    num_valid = 0
    for i in range(len(dist)):
        valid = (gallery_ids[indices[i]] != query_ids[i]) | (gallery_cams[indices[i]] != query_cams[i])
        if not np.any(matches[i, valid]):
            continue
        first = np.nonzero(matches[i, valid])[0][0]
        if first < topk:
            hits[i, first] += 1
        num_valid += 1
    return np.sum(hits.cumsum(axis=1), axis=0) / num_valid


def average_precisions(dist: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray, query_cams: np.ndarray,
                       gallery_cams: np.ndarray) -> np.ndarray:  # fmt: skip
    """[Q], by the area under scikit-learn's precision-recall curve, as its average_precision_score was in 0.18.1."""
    indices = np.argsort(dist, axis=1)
    matches = gallery_ids[indices] == query_ids[:, np.newaxis]
    aps = np.full(len(dist), np.nan)
    for i in range(len(dist)):
        valid = (gallery_ids[indices[i]] != query_ids[i]) | (gallery_cams[indices[i]] != query_cams[i])
        is_match = matches[i, valid]
        score = -dist[i][indices[i]][valid]
        if np.any(is_match):
            precision, recall, _ = precision_recall_curve(is_match, score)
            aps[i] = auc(recall, precision)
    return aps
