"""Evaluation of saved features: read and check the files, then by matrices, or streamed where these would not fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aligned_reid.data.partitions import GALLERY, QUERY
from aligned_reid.data.prepare.market1501 import JUNK_ID
from aligned_reid.device import available_memory
from aligned_reid.errors import InputError
from aligned_reid.evaluation.extract import FeatureSet
from aligned_reid.evaluation.feature_file import FeatureTable, Field, check_partner, load_features, open_features
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
FEATURE_COPIES = 3  # that it makes: joined, as they are measured, and apart as queries and gallery
LEFT_OUT = -1  # mark of an image that is neither query nor gallery


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

    Images of person JUNK_ID are left out, as Market-1501's protocol has it; the log counts them.

    normalize_feature: None does as the features' model was trained. use_local: None measures local distances where all
    files have local features. If the matrices take more than MATRIX_BYTES, or with the features more than the memory
    that is left, distances are streamed; pooled queries and re-ranked local distances are then left out, which the log
    says. What a streamed evaluation has done is kept in files named as `state`, for a call that goes on. Raises
    InputError for a file that is not usable, or does not fit the first. Labels are checked before features are read.
    """
    check_settings(measures.k1, measures.k2, measures.lambda_value)
    files = [open_features(paths[0])] + [open_features(path, default_mark=GALLERY) for path in paths[1:]]
    first, *others = files = leave_out_junk(files, log)
    for other in others:
        check_partner(first, other)
    if normalize_feature is None:
        normalize_feature = bool(first.made_by.get("normalize_feature", False))
    measures = dataclasses.replace(measures, normalize_feature=normalize_feature)
    local = all(file.local_feat is not None for file in files) if use_local is None else use_local
    for file in files:
        if local and file.local_feat is None:
            raise InputError(f"{file.source} has no field local: use --use_local_distance false")
    num_query = int((first.marks == QUERY).sum())
    num_gallery = sum(int((file.marks == GALLERY).sum()) for file in files)
    if num_query == 0 or num_gallery == 0:
        what = "query (mark 0)" if num_query == 0 else "gallery image (mark 1)"
        raise InputError(f"{first.source} has no {what}; both are needed")
    log(f"{num_query:,} query, {num_gallery:,} gallery images, {'global and local' if local else 'global'} features")
    query_bytes, free = num_query * bytes_per_image(first, local), available_memory()
    if query_bytes > free:
        sizes = f"{query_bytes / 1e9:,.2f} GB of memory and {free / 1e9:,.2f} GB are free"
        raise InputError(f"{first.source}: the queries' features take {sizes}: evaluate fewer queries at a time")
    tables = [load_features(file, local=local) for file in files]
    matrices = matrix_bytes(num_query, num_gallery, local and measures.re_ranked)
    copies = FEATURE_COPIES * bytes_per_image(first, local) * sum(map(len, tables))
    if matrices <= MATRIX_BYTES and matrices + copies <= available_memory():
        features, labels = join(tables, local)
        scores = evaluate_features(features, labels, log, measures)
    else:
        left_out = "single queries only" if measures.multi_query_pool else ""
        left_out += ", local distances not re-ranked" if local and measures.re_ranked else ""
        log("too many images for memory, so distances are streamed" + (left_out and f": {left_out.lstrip(', ')}"))
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


def leave_out_junk(files: Sequence[FeatureTable[Field]], log: Callable[[str], None]) -> list[FeatureTable[Field]]:
    """The files with other marks for images of person JUNK_ID, which are neither right nor wrong."""
    junk = [file.person_ids == JUNK_ID for file in files]
    num_query = int((junk[0] & (files[0].marks == QUERY)).sum())
    num_gallery = sum(int((rows & (file.marks == GALLERY)).sum()) for rows, file in zip(junk, files, strict=True))
    if num_query or num_gallery:
        log(f"left out as junk (person id {JUNK_ID}): {num_query:,} query, {num_gallery:,} gallery images")
    return [
        dataclasses.replace(file, marks=np.where(rows, LEFT_OUT, file.marks))
        for rows, file in zip(junk, files, strict=True)
    ]


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


def bytes_per_image(table: FeatureTable, local: bool) -> int:
    """Of an image's features as float32."""
    feats = (table.global_feat, table.local_feat if local else None)
    return 4 * sum(math.prod(feat.shape[1:]) for feat in feats if feat is not None)


def join(tables: Sequence[FeatureTable], local: bool) -> tuple[FeatureSet, LabelArrays]:
    """All features in memory, and their labels: the first table's rows and the others' gallery images."""
    rows = [np.arange(len(tables[0])), *(np.flatnonzero(table.marks == GALLERY) for table in tables[1:])]
    pairs = list(zip(tables, rows, strict=True))
    parts = [take(table, index, False, local) for table, index in pairs]
    local_parts = [part.local_feat for part in parts if part.local_feat is not None]
    features = FeatureSet(torch.cat([part.global_feat for part in parts]), torch.cat(local_parts) if local else None)
    labels = (np.concatenate([getattr(table, name)[index] for table, index in pairs]) for name in LabelArrays._fields)
    return features, LabelArrays(*labels)
