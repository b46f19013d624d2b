"""What is measured, in which order: Market-1501's protocol on global, local and summed distances."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

from aligned_reid.data.dataset import TestImages
from aligned_reid.data.partitions import GALLERY, QUERY
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


def evaluate_features(
    features: FeatureSet, images: TestImages, log: Callable[[str], None], *, normalize_feature: bool
) -> dict[str, dict[str, float | None]]:
    """Scores by distance, as fractions: mAP, mAP_step, mINP, cmc1, cmc5, cmc10; `log` gets a heading and a line each.

    Local distances are measured where `features` has local features. The plain global distance comes last: tools read
    the last line. Raises InputError where no query has a match in the gallery.
    """
    if normalize_feature:
        local_feat = None if features.local_feat is None else normalize(features.local_feat)
        features = FeatureSet(normalize(features.global_feat), local_feat)
    query, gallery = images.marks == QUERY, images.marks == GALLERY
    ids, cameras = images.person_ids, images.cameras
    scores = {}
    for name, dist in distances(features, query, gallery):
        ranking = rank(dist, ids[query], ids[gallery], cameras[query], cameras[gallery])
        scores[name] = to_scores(ranking)
        log(f"{TITLES[name]}")
        log(format_ranking(ranking))
    return scores


def distances(features: FeatureSet, query: np.ndarray, gallery: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Names and query x gallery distances, one at a time: few of them are in memory together."""
    q_global, g_global = features.global_feat[query], features.global_feat[gallery]
    global_q_g = global_distance_matrix(q_global, g_global)
    if features.local_feat is not None:
        yield from local_distances(
            global_q_g, q_global, g_global, features.local_feat[query], features.local_feat[gallery]
        )
    yield "global_re_ranked", re_rank_features(q_global, g_global)
    yield "global", global_q_g


def local_distances(
    global_q_g: np.ndarray, q_global: Tensor, g_global: Tensor, q_local: Tensor, g_local: Tensor
) -> Iterator[tuple[str, np.ndarray]]:
    """The distances that need local features; each matrix is made once and turned into global + local in place."""
    q_g, q_q, g_g = (
        local_distance_matrix(x, y) for x, y in ((q_local, g_local), (q_local, q_local), (g_local, g_local))
    )
    yield "local_re_ranked", re_rank(q_g, q_q, g_g)
    yield "local", q_g
    q_g += global_q_g
    q_q += global_distance_matrix(q_global, q_global)
    g_g += global_distance_matrix(g_global, g_global)
    yield "global_local_re_ranked", re_rank(q_g, q_q, g_g)
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
