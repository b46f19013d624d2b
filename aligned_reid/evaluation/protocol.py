"""What is measured, in which order: Market-1501's protocol on global, local and summed distances."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from aligned_reid.data.partitions import GALLERY, MULTI_QUERY, QUERY
from aligned_reid.distance import normalize
from aligned_reid.evaluation.distance_matrix import global_distance_matrix, local_distance_matrix
from aligned_reid.evaluation.extract import FeatureSet
from aligned_reid.evaluation.ranking import Ranking, rank
from aligned_reid.evaluation.re_ranking import re_rank, re_rank_features

TITLES = {
    "global_local_re_ranked": "Global + local distance, re-ranked",
    "global_local": "Global + local distance",
    "local_re_ranked": "Local distance, re-ranked",
    "local": "Local distance",
    "global_re_ranked": "Global distance, re-ranked",
    "global": "Global distance",
}
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "average": lambda feat: feat.mean(dim=0),
    "max": lambda feat: feat.amax(dim=0),
}

Scores = dict[str, dict[str, float | None]]


class Labels(Protocol):
    """Who and what N images are: TestImages, FeatureTable, LabelArrays."""

    @property
    def person_ids(self) -> np.ndarray: ...  # [N]
    @property
    def cameras(self) -> np.ndarray: ...  # [N]
    @property
    def marks(self) -> np.ndarray: ...  # [N]: 0 query, 1 gallery, 2 multi-query


class LabelArrays(NamedTuple):
    """Labels by themselves."""

    person_ids: np.ndarray
    cameras: np.ndarray
    marks: np.ndarray


@dataclass(frozen=True)
class Measures:
    """What is measured besides plain distances, and how."""

    normalize_feature: bool = False
    re_ranked: bool = True
    k1: int = 20
    k2: int = 6
    lambda_value: float = 0.3
    multi_query_pool: str = ""  # of POOLS; empty: single queries only


def evaluate_features(features: FeatureSet, labels: Labels, log: Callable[[str], None], measures: Measures) -> Scores:
    """Scores by distance, as fractions: mAP, mAP_step, mINP, cmc1, cmc5, cmc10; `log` gets a heading and a line each.

    Local distances are measured where `features` has local features. Scores of pooled queries, whose names end in
    _multi_query, come first and the plain global distance of single queries last: tools read the last line. Raises
    InputError where no query has a match in the gallery.
    """
    if measures.normalize_feature:
        local_feat = None if features.local_feat is None else normalize(features.local_feat)
        features = FeatureSet(normalize(features.global_feat), local_feat)
    query, gallery = labels.marks == QUERY, labels.marks == GALLERY
    ids, cameras = labels.person_ids, labels.cameras
    queries = {"": select(features, query)}
    if measures.multi_query_pool and (labels.marks == MULTI_QUERY).any():
        queries = {"_multi_query": pool_queries(features, labels, measures.multi_query_pool), **queries}
    scores: Scores = {}
    for suffix, query_features in queries.items():
        for name, dist in distances(query_features, select(features, gallery), measures):
            ranking = rank(dist, ids[query], ids[gallery], cameras[query], cameras[gallery])
            scores[name + suffix] = to_scores(ranking)
            log(title_of(name + suffix, measures))
            log(format_ranking(ranking))
    return scores


def title_of(name: str, measures: Measures) -> str:
    """The heading of a score's line."""
    title = TITLES[name.removesuffix("_multi_query")]
    return title + (f", multi-query ({measures.multi_query_pool})" if name.endswith("_multi_query") else "")


def select(features: FeatureSet, rows: np.ndarray) -> FeatureSet:
    return FeatureSet(features.global_feat[rows], None if features.local_feat is None else features.local_feat[rows])


def pool_queries(features: FeatureSet, labels: Labels, pool: str) -> FeatureSet:
    """The queries' features [Q, ...], each pooled over the multi-query images of its person under its camera.

    In Market-1501 these are all boxes of that person there, the query's own among them (Zheng et al., ICCV 2015,
    section 5.2). A query that has none keeps its own feature. pool: average or max, element by element.
    """
    members: dict[tuple[int, int], list[int]] = {}
    places = zip(labels.person_ids.tolist(), labels.cameras.tolist(), strict=True)
    for row, (place, mark) in enumerate(zip(places, labels.marks.tolist(), strict=True)):
        if mark == MULTI_QUERY:
            members.setdefault(place, []).append(row)

    def pooled(feat: Tensor) -> Tensor:
        rows = []
        for row in np.flatnonzero(labels.marks == QUERY).tolist():
            group = members.get((int(labels.person_ids[row]), int(labels.cameras[row])))
            rows.append(POOLS[pool](feat[group]) if group else feat[row])
        return torch.stack(rows)

    local_feat = None if features.local_feat is None else pooled(features.local_feat)
    return FeatureSet(pooled(features.global_feat), local_feat)


def distances(query: FeatureSet, gallery: FeatureSet, measures: Measures) -> Iterator[tuple[str, np.ndarray]]:
    """Names and query x gallery distances, one at a time: few of them are in memory together."""
    settings = (measures.k1, measures.k2, measures.lambda_value)
    global_q_g = global_distance_matrix(query.global_feat, gallery.global_feat)
    if query.local_feat is not None:
        yield from local_distances(global_q_g, query, gallery, measures)
    if measures.re_ranked:
        yield "global_re_ranked", re_rank_features(query.global_feat, gallery.global_feat, *settings)
    yield "global", global_q_g


def local_distances(
    global_q_g: np.ndarray, query: FeatureSet, gallery: FeatureSet, measures: Measures
) -> Iterator[tuple[str, np.ndarray]]:
    """The distances that need local features; each matrix is made once and turned into global + local in place."""
    q_g = local_distance_matrix(query.local_feat, gallery.local_feat)
    if not measures.re_ranked:
        yield "local", q_g
        yield "global_local", np.add(q_g, global_q_g, out=q_g)
        return
    settings = (measures.k1, measures.k2, measures.lambda_value)
    q_q, g_g = (local_distance_matrix(one.local_feat, one.local_feat) for one in (query, gallery))
    yield "local_re_ranked", re_rank(q_g, q_q, g_g, *settings)
    yield "local", q_g
    q_g += global_q_g
    q_q += global_distance_matrix(query.global_feat, query.global_feat)
    g_g += global_distance_matrix(gallery.global_feat, gallery.global_feat)
    yield "global_local_re_ranked", re_rank(q_g, q_q, g_g, *settings)
    yield "global_local", q_g


def to_scores(ranking: Ranking) -> dict[str, float | None]:
    """A ranking as results.json has it: fractions, null where not defined."""
    values = {
        "mAP": ranking.mean_ap,
        "mAP_step": ranking.mean_ap_step,
        "mINP": ranking.mean_inp,
        **{f"cmc{k}": ranking.cmc[k - 1] if k <= len(ranking.cmc) else math.nan for k in (1, 5, 10)},
    }
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


def format_ranking(ranking: Ranking) -> str:
    """The reference's line; its 4th blank-separated field is rank@1."""
    scores = to_scores(ranking)
    parts = [(name, scores[name]) for name in ("mAP", "cmc1", "cmc5", "cmc10")]
    return ", ".join(f"[{name}: {math.nan if value is None else value:5.2%}]" for name, value in parts)
