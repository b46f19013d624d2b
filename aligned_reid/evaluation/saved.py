"""Evaluation of saved features: read and check the files, then evaluate in memory, or streamed if it is too small."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aligned_reid.data.partitions import GALLERY, QUERY
from aligned_reid.data.prepare.market1501 import JUNK_ID
from aligned_reid.device import available_memory
from aligned_reid.errors import InputError
from aligned_reid.evaluation.extract import FeatureSet
from aligned_reid.evaluation.features import FeatureTable, check_partner, read_features
from aligned_reid.evaluation.kernels import to_tensor
from aligned_reid.evaluation.protocol import (
    EvaluationSettings,
    LabelArrays,
    Scores,
    evaluate_features,
    log_scores,
)
from aligned_reid.evaluation.re_ranking import check_settings
from aligned_reid.evaluation.streaming import LargeSet, rank_streamed, re_rank_streamed
from aligned_reid.evaluation.verification import verification_record

MATRIX_BYTES = 6 * 2**30  # distance matrices that an evaluation in memory may hold
FEATURE_COPIES = 3  # that it makes: joined, normalized, and split into queries and gallery
IGNORED = -1  # mark of an image that is neither query nor gallery


def evaluate_files(
    paths: Sequence[Path],
    settings: EvaluationSettings,
    log: Callable[[str], None],
    *,
    state: Path,
    normalize_feature: bool | None = None,
    use_local: bool | None = None,
) -> dict[str, Any]:
    """Evaluate the queries of the first file against the gallery images of all; returns the content of results.json.

    Images of person JUNK_ID are ignored, as in Market-1501's protocol. normalize_feature: None does as the model was
    trained. use_local: None evaluates local distances if all files have local features.

    If the matrices take more than MATRIX_BYTES, or with the features more than the available memory, distances are
    streamed, without pooled queries and re-ranked local distances; `state` then keeps the progress of re-ranking.
    Raises InputError for a file that is unusable or does not fit the first.
    """
    check_settings(settings.k1, settings.k2, settings.lambda_value)
    tables, local = read_tables(paths, use_local, log)
    first = tables[0]
    if normalize_feature is None:
        normalize_feature = bool(first.made_by.get("normalize_feature", False))
    settings = dataclasses.replace(settings, normalize_feature=normalize_feature)
    num_query = int((first.marks == QUERY).sum())
    num_gallery = sum(int((table.marks == GALLERY).sum()) for table in tables)
    if num_query == 0 or num_gallery == 0:
        what = "query (mark 0)" if num_query == 0 else "gallery image (mark 1)"
        raise InputError(f"{first.source} has no {what}; both are needed")
    log(f"{num_query:,} query, {num_gallery:,} gallery images, {'global and local' if local else 'global'} features")
    matrices = matrix_bytes(num_query, num_gallery, local and settings.re_ranked)
    feats = [first.global_feat] + ([first.local_feat] if local and first.local_feat is not None else [])
    image_bytes = 4 * sum(feat[0].size for feat in feats)
    copies = FEATURE_COPIES * image_bytes * sum(map(len, tables))
    if matrices <= MATRIX_BYTES and matrices + copies <= available_memory():
        scores = evaluate_features(*join(tables, local), log, settings, measured_on=Path(first.source).name)
    else:
        check_queries_fit(first, num_query * image_bytes)
        scores = evaluate_streamed(tables, local, log, settings, state)
    return {
        **scores,
        "num_query": num_query,
        "num_gallery": num_gallery,
        "files": {table.source: dict(table.made_by) for table in tables},
        **dataclasses.asdict(settings),
    }


def matrix_bytes(num_query: int, num_gallery: int, local_re_ranked: bool) -> int:
    """The size of two query x gallery matrices and, to re-rank local distances, of those among queries and gallery."""
    among = num_query**2 + num_gallery**2 if local_re_ranked else 0
    return 4 * (2 * num_query * num_gallery + among)


def read_tables(
    paths: Sequence[Path], use_local: bool | None, log: Callable[[str], None]
) -> tuple[list[FeatureTable], bool]:
    """The files' features, junk marked as ignored, and whether local distances are evaluated."""
    tables = [
        read_features(path, default_mark=None if path is paths[0] else GALLERY, local=use_local is not False)
        for path in paths
    ]
    tables = ignore_junk(tables, log)
    for other in tables[1:]:
        check_partner(tables[0], other)
    local = all(table.local_feat is not None for table in tables) if use_local is None else use_local
    for table in tables:
        if local and table.local_feat is None:
            raise InputError(f"{table.source} has no field local: use --use_local_distance false")
    return tables, local


def ignore_junk(tables: Sequence[FeatureTable], log: Callable[[str], None]) -> list[FeatureTable]:
    """The tables with images of person JUNK_ID marked as IGNORED: they count neither as right nor as wrong."""
    junk = [table.person_ids == JUNK_ID for table in tables]
    num_query = int((junk[0] & (tables[0].marks == QUERY)).sum())
    num_gallery = sum(int((rows & (table.marks == GALLERY)).sum()) for rows, table in zip(junk, tables, strict=True))
    if num_query or num_gallery:
        log(f"ignored as junk (person id {JUNK_ID}): {num_query:,} query, {num_gallery:,} gallery images")
    return [
        dataclasses.replace(table, marks=np.where(rows, IGNORED, table.marks))
        for rows, table in zip(junk, tables, strict=True)
    ]


def join(tables: Sequence[FeatureTable], local: bool) -> tuple[FeatureSet, LabelArrays]:
    """All features in memory, and their labels: the first table's rows and the others' gallery images."""
    rows = [slice(None), *(np.flatnonzero(table.marks == GALLERY) for table in tables[1:])]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(table, name)[index] for table, index in zip(tables, rows, strict=True)])

    feats = (to_tensor(joined(name)).float() for name in ("global_feat", "local_feat")[: 1 + local])
    return FeatureSet(*feats), LabelArrays(*map(joined, LabelArrays._fields))


def check_queries_fit(table: FeatureTable, query_bytes: int) -> None:
    free = available_memory()
    if query_bytes > free:
        sizes = f"{query_bytes / 1e9:,.2f} GB of memory and {free / 1e9:,.2f} GB are free"
        raise InputError(f"{table.source}: the queries' features take {sizes}: evaluate fewer queries at a time")


def evaluate_streamed(
    tables: Sequence[FeatureTable],
    local: bool,
    log: Callable[[str], None],
    settings: EvaluationSettings,
    state: Path,
) -> Scores:
    """Scores of plain distances, then of re-ranked global ones, which may take hours; each is logged when known."""
    omitted = ["single queries only"] if settings.multi_query_pool else []
    omitted += ["local distances not re-ranked"] if local and settings.re_ranked else []
    log("too many images for memory, so distances are streamed" + (f": {', '.join(omitted)}" if omitted else ""))
    data = LargeSet.of(tables, normalize_feature=settings.normalize_feature, local=local)
    rankings, counts = rank_streamed(data)
    scores = {name: log_scores(name, ranking, log, settings, counts.get(name)) for name, ranking in rankings.items()}
    if settings.re_ranked:
        re_ranked = re_rank_streamed(data, settings.k1, settings.k2, settings.lambda_value, state)
        scores |= {name: log_scores(name, ranking, log, settings) for name, ranking in re_ranked.items()}
    return {**scores, "verification": verification_record(counts, Path(tables[0].source).name)}
