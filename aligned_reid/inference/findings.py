"""What a report shows of a test: nearest images, distances of same and different people, cameras."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aligned_reid.data.partitions import GALLERY, QUERY
from aligned_reid.evaluation.extract import FeatureSet
from aligned_reid.evaluation.protocol import EvaluationSettings, LabelArrays, distances, log_scores, select
from aligned_reid.evaluation.ranking import rank
from aligned_reid.evaluation.verification import VERIFIED, Counts, count_pairs
from aligned_reid.inference.nearest import k_smallest

BROWSED = ("global", "global_local", "global_re_ranked", "global_local_re_ranked")  # distances with a grid of queries
CMC_RANKS = 50
NUM_HITS = 10  # gallery images shown for a query, without those that the protocol removes
MAX_REMOVED = 20  # removed ones shown with them

Indices = NDArray[np.int64]
Float32s = NDArray[np.float32]


class Split(NamedTuple):
    """Persons and cameras of Q queries and G gallery images, and their rows among all images."""

    query_ids: Indices
    gallery_ids: Indices
    query_cams: Indices
    gallery_cams: Indices
    query_rows: Indices
    gallery_rows: Indices

    @classmethod
    def of(cls, labels: LabelArrays) -> Split:
        rows = [np.flatnonzero(labels.marks == mark) for mark in (QUERY, GALLERY)]
        arrays = (labels.person_ids, labels.cameras, np.arange(len(labels.marks)))
        return cls(*(array[one] for array in arrays for one in rows))


class Findings(NamedTuple):
    """What the distances of a test show; dictionaries by the distance's name."""

    scores: dict[str, dict[str, float | None]]
    cmc: dict[str, list[float]]  # rank@1 to rank@CMC_RANKS
    ap: dict[str, list[float | None]]  # of each query; None without a match
    hits: dict[str, list[list[tuple[int, float]]]]  # of each query: gallery image and distance, nearest first
    pairs: dict[str, Counts]  # of verification
    rank1: dict[tuple[int, int], float]  # of queries of one camera in the gallery of another, by global distance


def find(features: FeatureSet, split: Split, settings: EvaluationSettings, log: Callable[[str], None]) -> Findings:
    """Rank a test by each distance and keep what the report shows; logs scores like an evaluation.

    features: of all images, as the test compares them. Raises InputError if no query has a match.
    """
    found = Findings({}, {}, {}, {}, {}, {})
    queries, gallery = select(features, split.query_rows), select(features, split.gallery_rows)
    for name, dist in distances(queries, gallery, settings):
        ranking = rank(dist, *split[:4], topk=CMC_RANKS)
        found.scores[name] = log_scores(name, ranking, log, settings)
        if name in BROWSED:
            found.cmc[name] = ranking.cmc.tolist()
            found.ap[name] = [None if math.isnan(one) else one for one in ranking.ap.tolist()]
            found.hits[name] = [
                list(zip(images.tolist(), row[images].tolist(), strict=True))
                for images, row in zip(nearest_images(dist, split), dist, strict=True)
            ]
        if name in VERIFIED:
            found.pairs[name] = count_pairs(dist, *split[:4])
        if name == "global":
            found.rank1.update(rank1_by_cameras(dist, split))
    return found


def nearest_images(dist: Float32s, split: Split) -> list[Indices]:
    """For each query of dist [Q, G] the gallery images nearest first, up to the NUM_HITS-th that the protocol counts.

    The nearest MAX_REMOVED of the images that the protocol removes, of the query's person and camera, are among them.
    """
    found = []
    for query, row in enumerate(dist):
        removed = (split.gallery_ids == split.query_ids[query]) & (split.gallery_cams == split.query_cams[query])
        images = k_smallest(row[None], min(NUM_HITS + int(removed.sum()), len(row)))[0]
        counted = ~removed[images]
        few = counted | ((~counted).cumsum() <= MAX_REMOVED)
        found.append(images[few & (counted.cumsum() - counted < NUM_HITS)])
    return found


def rank1_by_cameras(dist: Float32s, split: Split) -> dict[tuple[int, int], float]:
    """rank@1 of the queries of one camera against the gallery of another, of queries whose person that camera saw.

    dist [Q, G]; by (query camera, gallery camera), without pairs that have no such query.
    """
    table = {}
    for camera in np.unique(split.gallery_cams).tolist():
        gallery = np.flatnonzero(split.gallery_cams == camera)
        right = split.gallery_ids[gallery[dist[:, gallery].argmin(axis=1)]] == split.query_ids
        seen = np.isin(split.query_ids, split.gallery_ids[gallery])
        for other in np.unique(split.query_cams[seen]).tolist():
            if other != camera:
                table[other, camera] = float(right[seen & (split.query_cams == other)].mean())
    return table
