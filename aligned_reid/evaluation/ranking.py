"""Cumulative matching characteristic (CMC), mean average precision (mAP) and mean inverse negative penalty (mINP).

Protocol of Market-1501 (Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015): gallery images of
the query's person and camera are removed. Nothing is sorted: the rank of a match is the number of gallery images before
it, minus the removed ones among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aligned_reid.errors import InputError
from aligned_reid.evaluation.kernels import compiled, in_threads, to_numpy

QUERIES_PER_BLOCK = 64
# Each match costs a pass over the row; with more matches than this, sorting the row is cheaper.
MAX_COUNTED_MATCHES = 1000
SINGLE_SHOT_REPEATS = 100

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Ranking(NamedTuple):
    """Scores as fractions. Queries without a match are excluded; their `ap` and `ap_step` are nan."""

    cmc: Floats  # [topk], share of valid queries with a match among the first 1, 2, ..., topk
    mean_ap: float  # by the trapezoid definition, as in the Market-1501 benchmark
    mean_ap_step: float  # by the step definition
    mean_inp: float
    num_valid_queries: int
    ap: Floats  # [Q], area under the precision-recall polyline that starts at recall 0, precision 1
    ap_step: Floats  # [Q], mean over matches of the precision at the match


class RankedRows(NamedTuple):
    """What the scores of B queries are made of."""

    ap: Floats  # [B]
    ap_step: Floats  # [B]
    inp: Floats  # [B]
    increments: Floats  # [topk], what the queries add to the CMC at each rank


def rank(
    dist: Any,
    query_ids: Any,
    gallery_ids: Any,
    query_cams: Any,
    gallery_cams: Any,
    topk: int = 10,
    separate_camera_set: bool = False,
    single_gallery_shot: bool = False,
    first_match_break: bool = True,
    seed: int = 0,
) -> Ranking:
    """CMC, mAP and mINP of distances [Q, G] (tensor or array); persons and cameras [Q] and [G], of any comparable type.

    Equal distances rank by gallery index, as in a stable sort. The options affect the CMC only, as in the reference:

    - separate_camera_set: remove all gallery images of the query's camera, of any person (CUHK03).
    - single_gallery_shot: one random gallery image of each person, the mean of 100 draws (CUHK03). A query's draws
      depend on `seed` and its index only.
    - first_match_break: count a query's first match only; otherwise each of its n matches counts 1 / n ("allshots").

    mINP: number of matches over the rank of the last one (Ye et al., arXiv:2001.04193), mean over queries.

    Raises InputError if shapes and lengths disagree, query or gallery is empty, a distance is not finite, or no query
    has a match.
    """
    dist = to_numpy(dist)
    if dist.ndim != 2 or 0 in dist.shape:
        raise InputError(f"rank: needs dist [queries, gallery] with at least one of each, got {list(dist.shape)}")
    if topk < 1:
        raise InputError(f"rank: topk must be at least 1, got {topk}")
    names = ("query_ids", "gallery_ids", "query_cams", "gallery_cams")
    labels = [to_numpy(values) for values in (query_ids, gallery_ids, query_cams, gallery_cams)]
    for name, array, expected in zip(names, labels, 2 * dist.shape, strict=True):
        if array.shape != (expected,):
            raise InputError(
                f"rank: dist is {list(dist.shape)}, so {name} must be [{expected}], got {list(array.shape)}"
            )
    ranker = BlockRanker(labels, topk, separate_camera_set, single_gallery_shot, first_match_break, seed)
    return ranker.finish([ranker.rank_rows(dist, 0)])


class BlockRanker:
    """`rank` for distances that arrive some queries at a time, so that no [Q, G] matrix is needed."""

    def __init__(
        self,
        labels: Sequence[NDArray[Any]],
        topk: int = 10,
        separate_camera_set: bool = False,
        single_gallery_shot: bool = False,
        first_match_break: bool = True,
        seed: int = 0,
    ) -> None:
        """labels: query_ids, gallery_ids, query_cams, gallery_cams; the rest as in `rank`."""
        self.topk, self.separate_camera_set, self.single_gallery_shot = topk, separate_camera_set, single_gallery_shot
        self.first_match_break, self.seed = first_match_break, seed
        # Persons and cameras as codes from 0.
        ids, cams = (
            np.unique(np.concatenate(pair), return_inverse=True)[1].reshape(-1) for pair in (labels[:2], labels[2:])
        )
        self.query_ids, self.gallery_ids = np.split(ids, [len(labels[0])])
        self.query_cams, self.gallery_cams = np.split(cams, [len(labels[0])])
        self.by_person = np.argsort(self.gallery_ids, kind="stable")  # gallery indices by person, then by index
        self.starts = np.searchsorted(self.gallery_ids[self.by_person], np.arange(ids.max() + 2))  # of each person's

    def rank_rows(self, dist: NDArray[Any], first_query: int) -> RankedRows:
        """dist [B, G] of queries first_query, first_query + 1, ..."""
        if dist.dtype not in (np.float32, np.float64):
            dist = dist.astype(np.float64)
        compiled("count_ranks", dist.dtype.name)  # before threads ask for it

        def rank_block(begin: int) -> RankedRows:
            # Kernels take no read-only array, such as a mapped file.
            block = np.require(dist[begin : begin + QUERIES_PER_BLOCK], requirements=("C", "W"))
            return self._rank_block(block, first_query + begin)

        return join_rows(in_threads(rank_block, range(0, len(dist), QUERIES_PER_BLOCK)))

    def finish(self, parts: Sequence[RankedRows]) -> Ranking:
        """The scores of all queries, from their parts in order."""
        ap, ap_step, inp, increments = join_rows(parts)
        num_valid = int(np.count_nonzero(~np.isnan(ap)))
        if num_valid == 0:
            raise InputError(
                "No valid query: no query has an image of its person from another camera in the gallery (images from "
                "the query's camera are removed); check person ids and cameras"
            )
        mean_ap, mean_ap_step, mean_inp = (float(np.nanmean(values)) for values in (ap, ap_step, inp))
        return Ranking(increments.cumsum() / num_valid, mean_ap, mean_ap_step, mean_inp, num_valid, ap, ap_step)

    def _rank_block(self, block: NDArray[Any], first: int) -> RankedRows:
        """Queries first, first + 1, ...: block [B, G]."""
        check_finite(block, first)
        query, ranks = self._match_ranks(block, first)
        num_matches = np.bincount(query, minlength=len(block))
        firsts = np.cumsum(num_matches) - num_matches
        position = np.arange(len(query)) - firsts[query]  # 0 for each query's first match, 1 for its second, ...
        scores = average_precisions(query, ranks, position, num_matches)
        if self.single_gallery_shot:
            hits = self._single_shot_hits(block, first, np.flatnonzero(num_matches))
            weights, repeats = np.ones(len(hits)), SINGLE_SHOT_REPEATS
        else:
            if self.separate_camera_set:
                query, ranks = self._ranks_by_sorting(block, first, separate_camera_set=True)
            hits = ranks - position  # the number of wrong images before each match
            weights = (position == 0).astype(np.float64) if self.first_match_break else 1 / num_matches[query]
            repeats = 1
        counted = hits < self.topk
        return RankedRows(*scores, np.bincount(hits[counted], weights[counted], minlength=self.topk) / repeats)

    def _match_ranks(self, block: NDArray[Any], first: int) -> tuple[Indices, Indices]:
        """Query (offset in the block) and rank (from 0, without removed images) of every match, sorted by both."""
        person = self.query_ids[first : first + len(block)]
        begin, number = self.starts[person], np.diff(self.starts)[person]
        if number.max() > MAX_COUNTED_MATCHES:
            return self._ranks_by_sorting(block, first, separate_camera_set=False)
        query = np.repeat(np.arange(len(block)), number)
        bounds = np.concatenate([[0], np.cumsum(number)])
        same_person = self.by_person[np.arange(len(query)) - bounds[query] + begin[query]]
        removed = self.gallery_cams[same_person] == self.query_cams[first + query]
        ranks = np.empty(len(query), np.int64)
        compiled("count_ranks", block.dtype.name)(block, bounds, same_person, removed, ranks)
        query, ranks = query[~removed], ranks[~removed]
        order = np.lexsort((ranks, query))
        return query[order], ranks[order]

    def _ranks_by_sorting(self, block: NDArray[Any], first: int, separate_camera_set: bool) -> tuple[Indices, Indices]:
        """As _match_ranks, for any number of matches and either protocol."""
        queries, ranks = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for offset, row in enumerate(block):
            is_match, kept = self._matches_and_kept(first + offset, separate_camera_set)
            if is_match.any():
                near = np.flatnonzero(kept & (row <= row[is_match].max()))
                found = np.flatnonzero(is_match[near[np.argsort(row[near], kind="stable")]])
                queries.append(np.full(len(found), offset))
                ranks.append(found)
        return np.concatenate(queries), np.concatenate(ranks)

    def _matches_and_kept(self, query: int, separate_camera_set: bool) -> tuple[Mask, Mask]:
        """Two masks over the gallery: matches of the query, and images that take part in its ranking."""
        same_person = self.gallery_ids == self.query_ids[query]
        other_camera = self.gallery_cams != self.query_cams[query]
        return same_person & other_camera, other_camera if separate_camera_set else ~same_person | other_camera

    def _single_shot_hits(self, block: NDArray[Any], first: int, valid: Indices) -> Indices:
        """How many persons rank before the query's in random galleries of one image a person.

        For the queries at offsets `valid`, [len(valid) * SINGLE_SHOT_REPEATS].
        """
        hits = [np.zeros(0, np.int64)]
        for offset in valid:
            query = first + int(offset)
            _, kept = self._matches_and_kept(query, self.separate_camera_set)
            candidates = self.by_person[kept[self.by_person]]
            persons, begin, number = np.unique(self.gallery_ids[candidates], return_index=True, return_counts=True)
            random = np.random.default_rng((self.seed, query)).random((SINGLE_SHOT_REPEATS, len(persons)))
            drawn = candidates[begin + (random * number).astype(np.int64)]  # [repeats, persons]
            own = drawn[:, persons == self.query_ids[query]]  # [repeats, 1]
            dist, own_dist = block[offset][drawn], block[offset][own]
            hits.append(((dist < own_dist) | ((dist == own_dist) & (drawn < own))).sum(axis=1))
        return np.concatenate(hits)


def join_rows(parts: Sequence[RankedRows]) -> RankedRows:
    ap, ap_step, inp = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return RankedRows(ap, ap_step, inp, np.sum([part.increments for part in parts], axis=0))


def check_finite(block: NDArray[Any], first: int) -> None:
    """Raise InputError for the first query with a distance that is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        suspects = np.flatnonzero(~np.isfinite(block.sum(axis=1)))  # a finite row may overflow, too
    for row in suspects:
        if not np.isfinite(block[row]).all():
            raise InputError(
                f"rank: the distances of query {first + row} (counted from 0) hold NaN or infinity; "
                "check the features of this query, and of the gallery if it is not the only one"
            )


def average_precisions(
    query: Indices, ranks: Indices, position: Indices, num_matches: Indices
) -> tuple[Floats, Floats, Floats]:
    """Query, rank and position of each match, sorted -> ap, ap_step, inp, each [B], nan for queries without a match."""
    precision = (position + 1) / (ranks + 1)
    precision_before = np.where(ranks > 0, position / np.maximum(ranks, 1), 1.0)
    with np.errstate(invalid="ignore"):
        ap_step = np.bincount(query, precision, len(num_matches)) / num_matches
        ap = np.bincount(query, (precision_before + precision) / 2, len(num_matches)) / num_matches
    inp = np.full(len(num_matches), np.nan)
    inp[query] = num_matches[query] / (ranks + 1)  # the value of a query's last match remains
    return ap, ap_step, inp
