"""Evaluation of saved features: read and check the files, then by matrices, or streamed where these would not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aligned_reid.data.partitions import GALLERY, QUERY
from aligned_reid.errors import InputError
from aligned_reid.evaluation.extract import FeatureSet
from aligned_reid.evaluation.feature_file import FeatureTable, check_partner, read_features
from aligned_reid.evaluation.protocol import (
    LabelArrays,
    Measures,
    Scores,
    evaluate_features,
    format_ranking,
    title_of,
    to_scores,
)
from aligned_reid.evaluation.ranking import Ranking
from aligned_reid.evaluation.re_ranking import check_settings
from aligned_reid.evaluation.streaming import LargeSet, rank_streamed, re_rank_streamed, take

MATRIX_BYTES = 6 * 2**30  # of all distance matrices that an evaluation in memory holds at a time


def evaluate_files(
    paths: Sequence[Path],
    measures: Measures,
    log: Callable[[str], None],
    *,
    state: Path,
    normalize_feature: bool | None = None,
    use_local: bool | None = None,
) -> dict[str, Any]:
    """Evaluate the queries of the first file against the gallery images of all; returns what results.json holds.

    normalize_feature: None does as the features' model was trained. use_local: None measures local distances where all
    files have local features. Where the matrices take more than MATRIX_BYTES, distances are streamed; pooled queries
    and re-ranked local distances are then left out, which the log says. What a streamed evaluation has done is kept in
    files named as `state`, for a call that goes on. Raises InputError for a file that is not usable, or does not fit
    the first.
    """
    check_settings(measures.k1, measures.k2, measures.lambda_value)
    first, *others = tables = [read_features(paths[0])] + [
        read_features(path, default_mark=GALLERY) for path in paths[1:]
    ]
    for other in others:
        check_partner(first, other)
    if normalize_feature is None:
        normalize_feature = bool(first.made_by.get("normalize_feature", False))
    measures = dataclasses.replace(measures, normalize_feature=normalize_feature)
    local = all(table.local_feat is not None for table in tables) if use_local is None else use_local
    for table in tables:
        if local and table.local_feat is None:
            raise InputError(f"{table.source} has no field local: use --use_local_distance false")
    num_query = int((first.marks == QUERY).sum())
    num_gallery = sum(int((table.marks == GALLERY).sum()) for table in tables)
    if num_query == 0 or num_gallery == 0:
        what = "query (mark 0)" if num_query == 0 else "gallery image (mark 1)"
        raise InputError(f"{first.source} has no {what}; both are needed")
    log(f"{num_query:,} query, {num_gallery:,} gallery images, {'global and local' if local else 'global'} features")
    if matrix_bytes(num_query, num_gallery, local and measures.re_ranked) <= MATRIX_BYTES:
        features, labels = join(tables, local)
        scores = evaluate_features(features, labels, log, measures)
    else:
        left_out = "single queries only" if measures.multi_query_pool else ""
        left_out += ", local distances not re-ranked" if local and measures.re_ranked else ""
        log(
            "too many images for distance matrices, so distances are streamed"
            + (left_out and f": {left_out.lstrip(', ')}")
        )
        scores = evaluate_large(
            LargeSet.of(tables, normalize_feature=normalize_feature, local=local), log, measures, state
        )
    made_by = {table.source: dict(table.made_by) for table in tables}
    return {
        **scores,
        "num_query": num_query,
        "num_gallery": num_gallery,
        "files": made_by,
        **dataclasses.asdict(measures),
    }


def evaluate_large(data: LargeSet, log: Callable[[str], None], measures: Measures, state: Path) -> Scores:
    """Scores of plain distances, then of re-ranked global ones, which may take hours; each is logged once known."""
    scores: Scores = {}

    def take_in(rankings: dict[str, Ranking]) -> None:
        for name, ranking in rankings.items():
            scores[name] = to_scores(ranking)
            log(title_of(name, measures))
            log(format_ranking(ranking))

    take_in(rank_streamed(data, state))
    if measures.re_ranked:
        take_in(re_rank_streamed(data, measures.k1, measures.k2, measures.lambda_value, state))
    return scores


def matrix_bytes(num_query: int, num_gallery: int, within_gallery: bool) -> int:
    """What the evaluation in memory holds: two query x gallery matrices, and for local re-ranking the gallery's own."""
    return 4 * num_gallery * (2 * num_query + (num_gallery if within_gallery else 0))


def join(tables: Sequence[FeatureTable], local: bool) -> tuple[FeatureSet, LabelArrays]:
    """All features in memory, and their labels: the first table's rows and the others' gallery images."""
    rows = [np.arange(len(tables[0])), *(np.flatnonzero(table.marks == GALLERY) for table in tables[1:])]
    pairs = list(zip(tables, rows, strict=True))
    parts = [take(table, index, False, local) for table, index in pairs]
    local_parts = [part.local_feat for part in parts if part.local_feat is not None]
    features = FeatureSet(torch.cat([part.global_feat for part in parts]), torch.cat(local_parts) if local else None)
    labels = (np.concatenate([getattr(table, name)[index] for table, index in pairs]) for name in LabelArrays._fields)
    return features, LabelArrays(*labels)
