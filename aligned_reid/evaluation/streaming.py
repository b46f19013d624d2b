"""Scores of a gallery too large for a distance matrix: some queries at a time against its mapped files."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from aligned_reid.data.partitions import GALLERY, QUERY
from aligned_reid.distance import normalize
from aligned_reid.evaluation.compiled import to_tensor
from aligned_reid.evaluation.distance_matrix import global_distance_matrix, local_distance_matrix
from aligned_reid.evaluation.extract import FeatureSet
from aligned_reid.evaluation.feature_distances import FeatureDistances, Piece
from aligned_reid.evaluation.feature_file import FeatureTable
from aligned_reid.evaluation.ranking import BlockRanker, RankedRows, Ranking
from aligned_reid.evaluation.re_ranking import ReRanker, list_length

BLOCK_BYTES = 2**30  # distances of some queries to the whole gallery; there may be two such blocks
GALLERY_ROWS_PER_PART = 8192  # copied out of the mapped file at a time
ROWS_PER_STEP = 64  # of queries in a block: what ranking takes in one go


@dataclass(frozen=True)
class LargeSet:
    """Queries in memory, and a gallery that may lie in several mapped files."""

    query: FeatureSet
    query_ids: NDArray[np.int64]
    query_cams: NDArray[np.int64]
    gallery: Sequence[FeatureTable]  # their rows of mark 1
    normalize_feature: bool

    @classmethod
    def of(cls, tables: Sequence[FeatureTable], *, normalize_feature: bool, local: bool) -> LargeSet:
        """Queries of the first table, gallery images of all. Local features are used where `local`."""
        first = tables[0]
        rows = np.flatnonzero(first.marks == QUERY)
        query = take(first, rows, normalize_feature, local)
        return cls(query, first.person_ids[rows], first.cameras[rows], tables, normalize_feature)

    @property
    def rows(self) -> list[NDArray[np.int64]]:
        """Of each table, its gallery images."""
        return [np.flatnonzero(table.marks == GALLERY) for table in self.gallery]

    @property
    def num_gallery(self) -> int:
        return sum(map(len, self.rows))

    def pieces(self) -> list[Piece]:
        """The global features of the queries, then of the gallery."""
        pieces = [Piece(self.query.global_feat)]
        for table, rows in zip(self.gallery, self.rows, strict=True):
            if len(rows):
                pieces.append(Piece(to_tensor(table.global_feat), rows, self.normalize_feature))
        return pieces

    def gallery_labels(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Person and camera of every gallery image, both [G]."""
        pairs = list(zip(self.gallery, self.rows, strict=True))
        ids, cams = ([getattr(table, name)[rows] for table, rows in pairs] for name in ("person_ids", "cameras"))
        return np.concatenate(ids), np.concatenate(cams)

    def gallery_parts(self) -> Iterator[tuple[slice, FeatureSet]]:
        """The gallery's features, some at a time, each with its place among all."""
        begin = 0
        for table, rows in zip(self.gallery, self.rows, strict=True):
            for first in range(0, len(rows), GALLERY_ROWS_PER_PART):
                part = rows[first : first + GALLERY_ROWS_PER_PART]
                feat = take(table, part, self.normalize_feature, self.query.local_feat is not None)
                yield slice(begin, begin + len(part)), feat
                begin += len(part)


def take(table: FeatureTable, rows: NDArray[np.int64], normalize_feature: bool, local: bool) -> FeatureSet:
    """Copies of some rows' features, in memory; rows ascend."""
    contiguous = len(rows) > 0 and rows[-1] - rows[0] == len(rows) - 1
    index: Any = slice(rows[0], rows[-1] + 1) if contiguous else rows

    def feature(feat: NDArray[Any]) -> Tensor:
        copy = torch.from_numpy(np.array(feat[index], np.float32))
        return normalize(copy) if normalize_feature else copy

    return FeatureSet(
        feature(table.global_feat), feature(table.local_feat) if local and table.local_feat is not None else None
    )


def rank_streamed(data: LargeSet, state: Path) -> dict[str, Ranking]:
    """`rank` of global, and where there are local features of local and global + local distances, without a matrix.

    Its scores are those of the whole matrices. Distances of one block of queries are in memory, and so many queries are
    a block that they fill BLOCK_BYTES. What is ranked is kept in the file `state` until all is: an interrupted call on
    the same data goes on behind it.
    """
    names = ("local", "global_local", "global") if data.query.local_feat is not None else ("global",)
    num_gallery = data.num_gallery

    def rank_block(ranker: BlockRanker, first: int, last: int) -> dict[str, RankedRows]:
        dist, local_dist = block_distances(data, first, last, num_gallery)
        ranked = {"global": ranker.rank_rows(dist, first)}
        if local_dist is not None:
            ranked["local"] = ranker.rank_rows(local_dist, first)
            ranked["global_local"] = ranker.rank_rows(np.add(local_dist, dist, out=local_dist), first)
        return ranked

    return rank_blocks(data, names, rank_block, state, fingerprint(data))


def re_rank_streamed(data: LargeSet, k1: int, k2: int, lambda_value: float, state: Path) -> dict[str, Ranking]:
    """`rank` of the global distances that `re_rank_features` gives, without a matrix; resumed as rank_streamed is.

    The nearest images of every image are found first, which is nearly all of the work: it grows with the square of the
    number of images.
    """
    key = f"{fingerprint(data)} {k1} {k2} {lambda_value}"
    distances = FeatureDistances(data.pieces())
    nearest_state = state.with_name(f"{state.name}.neighbours")
    lists = distances.lists(list_length(distances.num_images, k1, k2), None, nearest_state, key)
    re_ranker = ReRanker(distances, lists, k1, k2, lambda_value)

    def rank_block(ranker: BlockRanker, first: int, last: int) -> dict[str, RankedRows]:
        dist = distances.to_gallery(first, last)
        re_ranker.blend(dist, first)
        return {"global_re_ranked": ranker.rank_rows(dist, first)}

    rankings = rank_blocks(data, ("global_re_ranked",), rank_block, state, key)
    nearest_state.unlink(missing_ok=True)
    return rankings


def rank_blocks(
    data: LargeSet,
    names: Sequence[str],
    rank_block: Callable[[BlockRanker, int, int], dict[str, RankedRows]],
    state: Path,
    key: str,
) -> dict[str, Ranking]:
    """Rank all queries, a block at a time; `state` keeps what is done, for a call with the same `key`."""
    gallery_ids, gallery_cams = data.gallery_labels()
    num_query, num_gallery = len(data.query_ids), len(gallery_ids)
    ranker = BlockRanker((num_query, num_gallery), data.query_ids, gallery_ids, data.query_cams, gallery_cams)
    size = max(1, BLOCK_BYTES // (4 * num_gallery * ROWS_PER_STEP)) * ROWS_PER_STEP
    done = Progress(state, f"{key} {size}", names)
    with tqdm(total=num_query, initial=done.num_queries, unit="query", desc=names[-1], disable=None) as bar:
        for first in range(done.num_queries, num_query, size):
            last = min(first + size, num_query)
            done.add(rank_block(ranker, first, last), last)
            bar.update(last - first)
    rankings = {name: ranker.finish(done.parts[name]) for name in names}
    state.unlink(missing_ok=True)
    return rankings


def block_distances(
    data: LargeSet, first: int, last: int, num_gallery: int
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Global and local distances [last - first, G] of some queries."""
    query = FeatureSet(*(None if feat is None else feat[first:last] for feat in data.query))  # type: ignore[arg-type]
    dist = np.empty((last - first, num_gallery), np.float32)
    local_dist = None if query.local_feat is None else np.empty_like(dist)
    for place, part in data.gallery_parts():
        dist[:, place] = global_distance_matrix(query.global_feat, part.global_feat)
        if local_dist is not None:
            local_dist[:, place] = local_distance_matrix(query.local_feat, part.local_feat)
    return dist, local_dist


def fingerprint(data: LargeSet) -> str:
    """What a state file has to have in common with a run that goes on with it."""
    files = [(os.path.realpath(table.source), os.stat(table.source).st_mtime_ns, len(table)) for table in data.gallery]
    has_local = data.query.local_feat is not None
    text = json.dumps([files, data.normalize_feature, has_local, len(data.query_ids)])
    return blake2b(text.encode(), digest_size=16).hexdigest()


class Progress:
    """What is ranked so far, in a file that is replaced whole after each block."""

    def __init__(self, state: Path, key: str, names: Sequence[str]) -> None:
        self.state, self.key, self.num_queries = state, key, 0
        self.parts: dict[str, list[RankedRows]] = {name: [] for name in names}
        try:
            with np.load(state, allow_pickle=False) as saved:
                if str(saved["key"]) == key:
                    self.parts = {
                        name: [RankedRows(*(saved[f"{name}/{f}"] for f in RankedRows._fields))] for name in names
                    }
                    self.num_queries = int(saved["num_queries"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return  # none, or cut off: all is ranked again

    def add(self, ranked: dict[str, RankedRows], num_queries: int) -> None:
        """Take one more block of queries; `num_queries` are done then."""
        content: dict[str, Any] = {"key": np.array(self.key), "num_queries": np.array(num_queries)}
        for name, parts in self.parts.items():
            self.parts[name] = [*parts, ranked[name]]
            for field in RankedRows._fields:
                values = [getattr(part, field) for part in self.parts[name]]
                content[f"{name}/{field}"] = np.sum(values, axis=0) if field == "increments" else np.concatenate(values)
        self.num_queries = num_queries
        temporary = self.state.with_name(self.state.name + ".tmp")
        with open(temporary, "wb") as file:
            np.savez(file, **content)
        temporary.replace(self.state)
