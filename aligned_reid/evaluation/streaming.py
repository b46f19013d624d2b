"""Scores of a gallery too large for a distance matrix: some queries at a time against its mapped files."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from aligned_reid.data.partitions import GALLERY, QUERY
from aligned_reid.evaluation.distances import (
    FeatureDistances,
    Piece,
    global_distance_matrix,
    local_distance_matrix,
)
from aligned_reid.evaluation.features import FeatureTable
from aligned_reid.evaluation.kernels import to_tensor
from aligned_reid.evaluation.neighbours import find_neighbours
from aligned_reid.evaluation.ranking import BlockRanker, RankedRows, Ranking
from aligned_reid.evaluation.re_ranking import ReRanker, list_length
from aligned_reid.evaluation.verification import VERIFIED, Counts, count_pairs

BLOCK_BYTES = 2**30  # distances of some queries to the whole gallery; at most two such blocks exist
GALLERY_ROWS_PER_PART = 8192  # copied out of the mapped file at a time
ROWS_PER_STEP = 64  # queries that ranking takes at a time

Float32s = NDArray[np.float32]
Indices = NDArray[np.int64]


class LargeSet(NamedTuple):
    """Queries in memory, and a gallery that may lie in several mapped files. The first four fields are as in `rank`."""

    query_ids: Indices
    gallery_ids: Indices
    query_cams: Indices
    gallery_cams: Indices
    global_pieces: list[Piece]  # the queries, then the gallery images of each file
    local_pieces: list[Piece]  # the same; empty if local distances are not evaluated
    key: str  # identifies the files and settings

    @classmethod
    def of(cls, tables: Sequence[FeatureTable], *, normalize_feature: bool, local: bool) -> LargeSet:
        """Queries of the first table, gallery images of all."""
        query = np.flatnonzero(tables[0].marks == QUERY)
        galleries = [(table, rows) for table in tables if len(rows := np.flatnonzero(table.marks == GALLERY))]
        used = [(tables[0], query), *galleries]

        def pieces(name: str) -> list[Piece]:
            parts = [Piece(to_tensor(getattr(table, name)), rows, normalize_feature) for table, rows in used]
            return [Piece(parts[0].get(slice(0, len(query)))), *parts[1:]]

        def labels(name: str) -> Indices:
            return np.concatenate([getattr(table, name)[rows] for table, rows in galleries])

        files = [(os.path.realpath(table.source), os.stat(table.source).st_mtime_ns, len(rows)) for table, rows in used]
        return cls(
            tables[0].person_ids[query],
            labels("person_ids"),
            tables[0].cameras[query],
            labels("cameras"),
            pieces("global_feat"),
            pieces("local_feat") if local else [],
            blake2b(json.dumps([files, normalize_feature]).encode(), digest_size=16).hexdigest(),
        )


def rank_streamed(data: LargeSet) -> tuple[dict[str, Ranking], dict[str, Counts]]:
    """`rank` of global, and with local features of local and global + local distances, without a matrix.

    The second dict has the distances of VERIFIED names, counted for verification. Both equal those of whole matrices.
    Only the distances of one block of queries are in memory.
    """

    def distances(first: int, last: int) -> Iterator[tuple[str, Float32s]]:
        dist = distances_to_gallery(global_distance_matrix, data.global_pieces, first, last)
        if data.local_pieces:
            local_dist = distances_to_gallery(local_distance_matrix, data.local_pieces, first, last)
            yield "local", local_dist
            local_dist += dist
            yield "global_local", local_dist
        yield "global", dist

    return rank_blocks(data, distances)


def re_rank_streamed(data: LargeSet, k1: int, k2: int, lambda_value: float, state: Path) -> dict[str, Ranking]:
    """`rank` of the global distances that `re_rank_features` returns, without a matrix.

    Finding the nearest images of every image is nearly all of the work, and grows with the square of their number.
    The file `state` keeps the progress: an interrupted call on the same data, for lists of the same length, resumes.
    """
    features = FeatureDistances(data.global_pieces)
    length = list_length(features.num_images, k1, k2)
    neighbours = find_neighbours(features, length, state=state, key=f"{data.key} {length}")
    re_ranker = ReRanker(features.num_query, neighbours, features.entries, k1, k2, lambda_value)

    def distances(first: int, last: int) -> Iterator[tuple[str, Float32s]]:
        dist = features.to_gallery(first, last)
        re_ranker.blend(dist, first)
        yield "global_re_ranked", dist

    rankings, _ = rank_blocks(data, distances)
    state.unlink(missing_ok=True)
    return rankings


def rank_blocks(
    data: LargeSet, distances: Callable[[int, int], Iterable[tuple[str, Float32s]]]
) -> tuple[dict[str, Ranking], dict[str, Counts]]:
    """Rank all queries, a block of BLOCK_BYTES at a time, and count the distances of VERIFIED names.

    distances: of queries first to last, by name.
    """
    num_query, num_gallery = len(data.query_ids), len(data.gallery_ids)
    ranker = BlockRanker(data[:4])
    size = max(1, BLOCK_BYTES // (4 * num_gallery * ROWS_PER_STEP)) * ROWS_PER_STEP
    parts: dict[str, list[RankedRows]] = defaultdict(list)
    counts: dict[str, Counts] = {}
    with tqdm(total=num_query, unit="query", desc="ranking", disable=None) as bar:
        for first in range(0, num_query, size):
            last = min(first + size, num_query)
            labels = (data.query_ids[first:last], data.gallery_ids, data.query_cams[first:last], data.gallery_cams)
            for name, dist in distances(first, last):
                parts[name].append(ranker.rank_rows(dist, first))
                if name in VERIFIED:
                    counts[name] = counts.get(name, 0) + count_pairs(dist, *labels)
            bar.update(last - first)
    return {name: ranker.finish(rows) for name, rows in parts.items()}, counts


def distances_to_gallery(
    distance_matrix: Callable[[Tensor, Tensor], Float32s], pieces: Sequence[Piece], first: int, last: int
) -> Float32s:
    """Distances [last - first, G] of some queries."""
    query = pieces[0].get(slice(first, last))
    dist = np.empty((last - first, sum(piece.num_images for piece in pieces[1:])), np.float32)
    column = 0
    for piece in pieces[1:]:
        for begin in range(0, piece.num_images, GALLERY_ROWS_PER_PART):
            part = piece.get(slice(begin, min(begin + GALLERY_ROWS_PER_PART, piece.num_images)))
            dist[:, column : column + len(part)] = distance_matrix(query, part)
            column += len(part)
    return dist
