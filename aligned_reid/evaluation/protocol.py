"""The evaluation protocol: which distances are evaluated and in which order, from features to scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aligned_reid.data.dataset import TestImages
from aligned_reid.data.partitions import GALLERY, MULTI_QUERY, QUERY
from aligned_reid.distance import normalize
from aligned_reid.evaluation.distances import global_distance_matrix, local_distance_matrix
from aligned_reid.evaluation.extract import FeatureSet
from aligned_reid.evaluation.ranking import Ranking, rank
from aligned_reid.evaluation.re_ranking import re_rank, re_rank_features
from aligned_reid.evaluation.verification import (
    VERIFIED,
    Counts,
    count_pairs,
    describe_curve,
    verification_curve,
    verification_record,
)

TITLES = {
    "global_local_re_ranked": "Global + local distance, re-ranked",
    "global_local": "Global + local distance",
    "local_re_ranked": "Local distance, re-ranked",
    "local": "Local distance",
    "global_re_ranked": "Global distance, re-ranked",
    "global": "Global distance",
}
DEFINITION = "average precision by the trapezoid rule, as in the Market-1501 benchmark"
POOLS: dict[str, Callable[..., Tensor]] = {"average": torch.mean, "max": torch.amax}

Scores = dict[str, dict[str, Any]]


class LabelArrays(NamedTuple):
    """Labels of N images."""

    person_ids: np.ndarray  # [N]
    cameras: np.ndarray  # [N]
    marks: np.ndarray  # [N]: 0 query, 1 gallery, 2 multi-query


Labels = TestImages | LabelArrays


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated in addition to plain distances, and how."""

    normalize_feature: bool = False
    re_ranked: bool = True
    k1: int = 20
    k2: int = 6
    lambda_value: float = 0.3
    multi_query_pool: str = ""  # a name in POOLS; empty: single queries only


def evaluate_features(
    features: FeatureSet,
    labels: Labels,
    log: Callable[[str], None],
    settings: EvaluationSettings,
    measured_on: str = "",
) -> Scores:
    """Scores by distance, as fractions: mAP, mAP_step, mINP, cmc1, cmc5, cmc10. Logs a heading and a line for each.

    "verification" holds the record of single queries (see evaluation.verification) with the data set's name
    `measured_on`; its figures are logged before the scores of their distance.

    mAP follows the trapezoid definition of the Market-1501 benchmark, mAP_step the step definition. Local distances are
    evaluated if `features` has local features. Scores of pooled queries (names ending in _multi_query) come first, the
    plain global distance of single queries last: tools read the log's last line. Raises InputError if no query has a
    match in the gallery.
    """
    if settings.normalize_feature:
        features = features.map(normalize)
    query, gallery = (np.flatnonzero(labels.marks == mark) for mark in (QUERY, GALLERY))
    ids, cameras = labels.person_ids, labels.cameras
    queries = {"": select(features, query)}
    if settings.multi_query_pool and (labels.marks == MULTI_QUERY).any():
        queries = {"_multi_query": pool_queries(features, labels, settings.multi_query_pool), **queries}
    gallery_features = select(features, gallery)
    pair_labels = (ids[query], ids[gallery], cameras[query], cameras[gallery])
    scores: Scores = {}
    counts: dict[str, Counts] = {}
    for suffix, query_features in queries.items():
        for name, dist in distances(query_features, gallery_features, settings):
            name += suffix
            ranking = rank(dist, *pair_labels)
            if name in VERIFIED:
                counts[name] = count_pairs(dist, *pair_labels)
            scores[name] = log_scores(name, ranking, log, settings, counts.get(name))
    return {**scores, "verification": verification_record(counts, measured_on)}


def select(features: FeatureSet, rows: np.ndarray) -> FeatureSet:
    index = torch.from_numpy(rows).to(features.global_feat.device)
    return features.map(lambda feat: feat.index_select(0, index))


def pool_queries(features: FeatureSet, labels: Labels, pool: str) -> FeatureSet:
    """The queries' features [Q, ...], each pooled over the multi-query images of its person and camera.

    In Market-1501 these are all boxes of that person and camera, including the query's own (Zheng et al., ICCV 2015,
    section 5.2). A query without multi-query images keeps its feature. pool: a name in POOLS, element by element.
    """
    members: dict[tuple[int, int], list[int]] = {}
    places = list(zip(labels.person_ids.tolist(), labels.cameras.tolist(), strict=True))
    for row in np.flatnonzero(labels.marks == MULTI_QUERY).tolist():
        members.setdefault(places[row], []).append(row)
    groups = [members.get(places[row], [row]) for row in np.flatnonzero(labels.marks == QUERY).tolist()]

    def pooled(feat: Tensor) -> Tensor:
        host = feat.cpu()
        return torch.stack([POOLS[pool](host[group], dim=0) for group in groups]).to(feat.device)

    return features.map(pooled)


def distances(query: FeatureSet, gallery: FeatureSet, settings: EvaluationSettings) -> Iterator[tuple[str, np.ndarray]]:
    """Names and query x gallery distances, one at a time: few of them are in memory together."""
    re_ranking = (settings.k1, settings.k2, settings.lambda_value)
    global_q_g = global_distance_matrix(query.global_feat, gallery.global_feat)
    if query.local_feat is not None:
        # Each matrix is computed once and turned into global + local in place.
        q_g = local_distance_matrix(query.local_feat, gallery.local_feat)
        if settings.re_ranked:
            q_q, g_g = (local_distance_matrix(one.local_feat, one.local_feat) for one in (query, gallery))
            yield "local_re_ranked", re_rank(q_g, q_q, g_g, *re_ranking)
        yield "local", q_g
        q_g += global_q_g
        if settings.re_ranked:
            q_q += global_distance_matrix(query.global_feat, query.global_feat)
            g_g += global_distance_matrix(gallery.global_feat, gallery.global_feat)
            yield "global_local_re_ranked", re_rank(q_g, q_q, g_g, *re_ranking)
            del q_q, g_g
        yield "global_local", q_g
        del q_g
    if settings.re_ranked:
        yield "global_re_ranked", re_rank_features(query.global_feat, gallery.global_feat, *re_ranking)
    yield "global", global_q_g


def log_scores(
    name: str,
    ranking: Ranking,
    log: Callable[[str], None],
    settings: EvaluationSettings,
    counts: Counts | None = None,
) -> dict[str, Any]:
    """Log the heading of the distance `name` and its scores; returns them as in results.json.

    counts: the pairs by distance, to log verification first. The 4th blank-separated field of the scores' line is
    rank@1: tools parse it.
    """
    values = {
        "mAP": ranking.mean_ap,
        "mAP_step": ranking.mean_ap_step,
        "mINP": ranking.mean_inp,
        **{f"cmc{k}": float(ranking.cmc[k - 1]) for k in (1, 5, 10)},
    }
    title = TITLES[name.removesuffix("_multi_query")]
    if name.endswith("_multi_query"):
        title += f", multi-query ({settings.multi_query_pool})"
    if counts is not None:
        log(f"{title}, pairs under different cameras: {describe_curve(verification_curve(counts))}")
    log(f"{title} ({DEFINITION})")
    log(", ".join(f"[{one}: {values[one]:5.2%}]" for one in ("mAP", "cmc1", "cmc5", "cmc10")))
    return values
