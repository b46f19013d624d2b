"""Exact nearest neighbors among features, and groups of near features: functions on tensors."""

from __future__ import annotations

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from tqdm import tqdm

from aligned_reid.distance import MIN_SQUARED_DISTANCE
from aligned_reid.evaluation.distances import global_distance_matrix
from aligned_reid.evaluation.kernels import product

QUERIES_PER_BLOCK = 256
SECONDS_WITHOUT_BAR = 2.0
MAX_LINKED = 20_000  # images of a linkage, whose distances take 8 bytes a pair twice: 3.2 GB
NEIGHBORS = 30  # of each image in the graph of more images


def nearest(queries: Tensor, feat: Tensor, norms: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of feat [N, D] to each of queries [Q, D]: their places and distances, both [Q, k], ascending.

    norms [N]: squared norms of feat. Distances as distance.euclidean_distance; equal ones in the order of their places.
    """
    places = np.empty((len(queries), k), np.int64)
    distances = np.empty((len(queries), k), np.float32)
    blocks = range(0, len(queries), QUERIES_PER_BLOCK)
    for first in tqdm(blocks, desc="search", leave=False, disable=None, delay=SECONDS_WITHOUT_BAR):
        block = queries[first : first + QUERIES_PER_BLOCK]
        # One query is limited by reading feat once, at which numpy's BLAS is faster than torch's.
        dots = product(block, feat).numpy() if len(block) > 1 else (feat.numpy() @ block[0].numpy())[None]
        squared = np.multiply(dots, -2, out=dots)  # [B, N], without the query's own norm
        squared += norms.numpy()
        rows = slice(first, first + len(block))
        places[rows] = k_smallest(squared, k)
        values = np.take_along_axis(squared, places[rows], axis=1) + np.square(block.numpy()).sum(axis=1, keepdims=True)
        distances[rows] = np.sqrt(values.clip(min=MIN_SQUARED_DISTANCE))
    return places, distances


def k_smallest(values: np.ndarray, k: int) -> np.ndarray:
    """The places of the k smallest values of each row, [Q, N] -> [Q, k], ascending; equal ones in order of place."""
    found = np.sort(np.argpartition(values, k - 1, axis=1)[:, :k], axis=1)
    order = np.argsort(np.take_along_axis(values, found, axis=1), axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)


def group_features(feat: Tensor, threshold: float, max_linked: int = MAX_LINKED) -> np.ndarray:
    """A label for each row of feat [N, D]; rows of one label are near each other: int64 [N].

    Clusters of average linkage, whose mean distance is at most the threshold. For more than `max_linked` rows, those
    that are among each other's NEIGHBORS nearest, and nearer than the threshold, are connected first; then each
    connected part is clustered, unless it is itself too large: it stays whole.
    """
    if len(feat) <= max_linked:
        return link(feat, threshold)
    places, distances = nearest(feat, feat, feat.square().sum(1), NEIGHBORS + 1)  # each is its own nearest, too
    rows, columns = np.nonzero(distances < threshold)
    edges = (np.ones(len(rows), bool), (rows, places[rows, columns]))
    graph = csr_array(edges, shape=(len(feat), len(feat)))
    num_parts, parts = connected_components(graph.multiply(graph.T), directed=False)
    labels = np.empty(len(feat), np.int64)
    num_labels = 0
    order = np.argsort(parts, kind="stable")
    for members in np.split(order, np.searchsorted(parts[order], np.arange(1, num_parts))):
        inner = link(feat[members], threshold) if len(members) <= max_linked else np.ones(len(members), np.int64)
        labels[members] = num_labels + inner
        num_labels += int(inner.max())
    return labels


def link(feat: Tensor, threshold: float) -> np.ndarray:
    """Clusters of average linkage (scipy's) of feat [N, D]: labels 1, 2, ... [N]."""
    if len(feat) == 1:
        return np.ones(1, np.int64)
    condensed = np.empty(len(feat) * (len(feat) - 1) // 2)  # row by row, the distances to later images
    end = 0
    for first in range(0, len(feat), QUERIES_PER_BLOCK):
        block = global_distance_matrix(feat[first : first + QUERIES_PER_BLOCK], feat[first:])
        for row, dist in enumerate(block):
            later = dist[row + 1 :]
            condensed[end : end + len(later)] = later
            end += len(later)
    return fcluster(linkage(condensed, "average"), threshold, "distance").astype(np.int64)
