"""Cumulative matching characteristic (CMC), mean average precision (mAP) and mean inverse negative penalty (mINP).

Protocol of Market-1501 (Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015): gallery images of
the query's own person and camera are removed. Nothing is sorted: the rank of a match is the number of gallery images
before it, less the removed ones among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aligned_reid.errors import InputError
from aligned_reid.evaluation.compiled import compiled, in_threads, to_numpy

QUERIES_PER_BLOCK = 64
# Counting passes over the row once a match; with more matches than this, sorting the row is cheaper.
MAX_COUNTED_MATCHES = 1000
SINGLE_SHOT_REPEATS = 100

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


class Ranking(NamedTuple):
    """Scores as fractions. `ap` and `ap_step` are nan where a query has no match; such queries count nowhere."""

    cmc: Floats  # [topk], share of valid queries with a match among the first 1, 2, ..., topk
    mean_ap: float  # of the trapezoid definition, the Market-1501 benchmark's own
    mean_ap_step: float  # of the step definition
    mean_inp: float
    num_valid_queries: int
    ap: Floats  # [Q], area under the precision-recall polyline that starts at recall 0, precision 1
    ap_step: Floats  # [Q], mean over matches of the precision at the match


@dataclass(frozen=True)
class _Labels:
    """Who and where: person and camera as codes from 0, and the gallery indices by person."""

    query_ids: Indices  # [Q]
    gallery_ids: Indices  # [G]
    query_cams: Indices  # [Q]
    gallery_cams: Indices  # [G]
    by_person: Indices  # [G], gallery indices sorted by person, then by index
    starts: Indices  # [people + 1], where each person's begin in by_person


@dataclass(frozen=True)
class RankOptions:
    """The options of `rank`."""

    topk: int = 10
    separate_camera_set: bool = False
    single_gallery_shot: bool = False
    first_match_break: bool = True
    seed: int = 0


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

    Equal distances rank by gallery index, as a stable sort gives. Options, all of the CMC only, as in the reference:

    - separate_camera_set: every gallery image of the query's camera is removed, whoever it shows (CUHK03).
    - single_gallery_shot: one gallery image of each person, drawn at random, the mean of 100 draws (CUHK03). A query's
      draws depend on `seed` and its index only.
    - first_match_break: only a query's first match counts; otherwise each of its n matches counts 1 / n ("allshots").

    mINP: number of matches over the rank of the last one (Ye et al., arXiv:2001.04193), mean over queries.

    Raises InputError where shapes and lengths disagree, query or gallery is empty, a distance is not finite, or no
    query has a match.
    """
    dist = to_numpy(dist)
    if dist.ndim != 2 or 0 in dist.shape:
        raise InputError(f"rank: needs dist [queries, gallery] with at least one of each, got {list(dist.shape)}")
    options = RankOptions(topk, separate_camera_set, single_gallery_shot, first_match_break, seed)
    ranker = BlockRanker(dist.shape, query_ids, gallery_ids, query_cams, gallery_cams, options)
    return ranker.finish([ranker.rank_rows(dist, 0)])


class RankedRows(NamedTuple):
    """What is known of B queries once they are ranked: all that CMC and the means are made of."""

    ap: Floats  # [B]
    ap_step: Floats  # [B]
    inp: Floats  # [B]
    increments: Floats  # [topk], the queries' sum of what each adds to the CMC at its ranks


class BlockRanker:
    """`rank` for distances that arrive some queries at a time, so that no [Q, G] matrix has to exist."""

    def __init__(
        self,
        shape: tuple[int, int],
        query_ids: Any,
        gallery_ids: Any,
        query_cams: Any,
        gallery_cams: Any,
        options: RankOptions | None = None,
    ) -> None:
        """shape: (Q, G); the rest as in `rank`, with its errors."""
        self._options = options or RankOptions()
        if self._options.topk < 1:
            raise InputError(f"rank: topk must be at least 1, got {self._options.topk}")
        self._labels = _encode(shape, query_ids, gallery_ids, query_cams, gallery_cams)

    def rank_rows(self, dist: NDArray[Any], first_query: int) -> RankedRows:
        """dist [B, G] of queries first_query, first_query + 1, ..."""
        if dist.dtype not in (np.float32, np.float64):
            dist = dist.astype(np.float64)
        compiled("count_ranks", dist.dtype.name)  # once, before the threads ask for it

        def rank_block(begin: int) -> RankedRows:
            block = np.ascontiguousarray(dist[begin : begin + QUERIES_PER_BLOCK])
            return _rank_block(block, self._labels, self._options, first_query + begin)

        return _join(in_threads(rank_block, range(0, len(dist), QUERIES_PER_BLOCK)))

    def finish(self, parts: Sequence[RankedRows]) -> Ranking:
        """The scores of all queries, whose parts come in their order."""
        ap, ap_step, inp, increments = _join(parts)
        num_valid = int(np.count_nonzero(~np.isnan(ap)))
        if num_valid == 0:
            raise InputError(
                "No valid query: a query needs an image of the same person from another camera in the gallery (those "
                "of its own camera are removed), and no query has one; check person ids and cameras"
            )
        mean_ap, mean_ap_step, mean_inp = (float(np.nanmean(values)) for values in (ap, ap_step, inp))
        return Ranking(increments.cumsum() / num_valid, mean_ap, mean_ap_step, mean_inp, num_valid, ap, ap_step)


def _join(parts: Sequence[RankedRows]) -> RankedRows:
    ap, ap_step, inp = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return RankedRows(ap, ap_step, inp, np.sum([part.increments for part in parts], axis=0))


def _encode(shape: tuple[int, ...], query_ids: Any, gallery_ids: Any, query_cams: Any, gallery_cams: Any) -> _Labels:
    arrays = {
        "query_ids": query_ids,
        "gallery_ids": gallery_ids,
        "query_cams": query_cams,
        "gallery_cams": gallery_cams,
    }
    arrays = {name: to_numpy(values) for name, values in arrays.items()}
    for name, array in arrays.items():
        expected = shape[0] if name.startswith("query") else shape[1]
        if array.shape != (expected,):
            raise InputError(f"rank: dist is {list(shape)}, so {name} must be [{expected}], got {list(array.shape)}")
    ids = np.unique(np.concatenate([arrays["query_ids"], arrays["gallery_ids"]]), return_inverse=True)[1].reshape(-1)
    cams = np.unique(np.concatenate([arrays["query_cams"], arrays["gallery_cams"]]), return_inverse=True)[1].reshape(-1)
    gallery = ids[shape[0] :]
    by_person = np.argsort(gallery, kind="stable")
    starts = np.searchsorted(gallery[by_person], np.arange(ids.max() + 2))
    return _Labels(ids[: shape[0]], gallery, cams[: shape[0]], cams[shape[0] :], by_person, starts)


def _rank_block(block: NDArray[Any], labels: _Labels, options: RankOptions, first: int) -> RankedRows:
    """Queries first, first + 1, ...: block [B, G]."""
    _check_finite(block, first)
    query, ranks = _match_ranks(block, labels, first)
    num_matches = np.bincount(query, minlength=len(block))
    ap, ap_step, inp = _scores(query, ranks, num_matches)
    if options.single_gallery_shot:
        query, hits = _single_shot_hits(block, labels, options, first, np.flatnonzero(num_matches))
        weights, unit = np.ones(len(hits)), SINGLE_SHOT_REPEATS
    else:
        if options.separate_camera_set:
            query, ranks = _ranks_by_sorting(block, labels, first, separate_camera_set=True)
        position = _position_in_query(query, num_matches)
        hits = ranks - position  # how many wrong images are before each match
        weights = (position == 0).astype(np.float64) if options.first_match_break else 1 / num_matches[query]
        unit = 1
    shown = hits < options.topk
    increments = np.bincount(hits[shown], weights[shown], minlength=options.topk)
    return RankedRows(ap, ap_step, inp, increments / unit)


def _check_finite(block: NDArray[Any], first: int) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        suspects = ~np.isfinite(block.sum(axis=1))  # one fast pass; a finite row may overflow, hence the second look
    if suspects.any():
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if len(bad):
            raise InputError(
                f"rank: the distances of query {first + bad[0]} (counted from 0) hold NaN or infinity; "
                "check the features of this query, and of the gallery if it is not the only one"
            )


def _scores(query: Indices, ranks: Indices, num_matches: Indices) -> tuple[Floats, Floats, Floats]:
    """Query and rank of each match, sorted by both -> ap, ap_step, inp, each [B], nan where there is no match."""
    position = _position_in_query(query, num_matches)
    precision = (position + 1) / (ranks + 1)
    precision_before = np.where(ranks > 0, position / np.maximum(ranks, 1), 1.0)
    with np.errstate(invalid="ignore"):
        ap_step = np.bincount(query, precision, len(num_matches)) / num_matches
        ap = np.bincount(query, (precision_before + precision) / 2, len(num_matches)) / num_matches
    inp = np.full(len(num_matches), np.nan)
    inp[query] = num_matches[query] / (ranks + 1)  # each query's last match is written last, and stays
    return ap, ap_step, inp


def _position_in_query(query: Indices, num_matches: Indices) -> Indices:
    """[matches], 0 for each query's first match, 1 for its second, ..."""
    return np.arange(len(query)) - (np.cumsum(num_matches) - num_matches)[query]


def _match_ranks(block: NDArray[Any], labels: _Labels, first: int) -> tuple[Indices, Indices]:
    """Query (offset in the block) and rank (from 0, removed images not counted) of every match, sorted by both."""
    count_ranks = compiled("count_ranks", block.dtype.name)
    person = labels.query_ids[first : first + len(block)]
    begin, number = labels.starts[person], np.diff(labels.starts)[person]
    if count_ranks is None or number.max() > MAX_COUNTED_MATCHES:
        return _ranks_by_sorting(block, labels, first, separate_camera_set=False)
    query = np.repeat(np.arange(len(block)), number)
    bounds = np.concatenate([[0], np.cumsum(number)])
    same_person = labels.by_person[np.arange(len(query)) - bounds[query] + begin[query]]
    removed = labels.gallery_cams[same_person] == labels.query_cams[first + query]
    ranks = np.empty(len(query), np.int64)
    count_ranks(block, bounds, same_person, removed, ranks)
    query, ranks = query[~removed], ranks[~removed]
    order = np.lexsort((ranks, query))
    return query[order], ranks[order]


def _ranks_by_sorting(
    block: NDArray[Any], labels: _Labels, first: int, separate_camera_set: bool
) -> tuple[Indices, Indices]:
    """As _match_ranks, without numba, for any number of matches and for either protocol."""
    queries, ranks = [], []
    for offset, row in enumerate(block):
        is_match, kept = _matches_and_kept(labels, first + offset, separate_camera_set)
        if is_match.any():
            near = np.flatnonzero(kept & (row <= row[is_match].max()))
            found = np.flatnonzero(is_match[near[np.argsort(row[near], kind="stable")]])
            queries.append(np.full(len(found), offset))
            ranks.append(found)
    empty = np.zeros(0, np.int64)
    return np.concatenate([empty, *queries]), np.concatenate([empty, *ranks])


def _matches_and_kept(
    labels: _Labels, query: int, separate_camera_set: bool
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two masks over the gallery: what counts as a match of the query, and what takes part in its ranking."""
    same_person = labels.gallery_ids == labels.query_ids[query]
    other_camera = labels.gallery_cams != labels.query_cams[query]
    return same_person & other_camera, other_camera if separate_camera_set else ~same_person | other_camera


def _single_shot_hits(
    block: NDArray[Any], labels: _Labels, options: RankOptions, first: int, valid: Indices
) -> tuple[Indices, Indices]:
    """For the valid queries' random galleries of one image a person: query, and how many persons are before its own.

    Both [queries * SINGLE_SHOT_REPEATS].
    """
    hits = []
    for offset in valid:
        query = first + int(offset)
        _, kept = _matches_and_kept(labels, query, options.separate_camera_set)
        candidates = labels.by_person[kept[labels.by_person]]
        persons, begin, number = np.unique(labels.gallery_ids[candidates], return_index=True, return_counts=True)
        random = np.random.default_rng((options.seed, query)).random((SINGLE_SHOT_REPEATS, len(persons)))
        drawn = candidates[begin + (random * number).astype(np.int64)]  # [repeats, persons]
        own = drawn[:, persons == labels.query_ids[query]]  # [repeats, 1]
        dist, own_dist = block[offset][drawn], block[offset][own]
        hits.append(((dist < own_dist) | ((dist == own_dist) & (drawn < own))).sum(axis=1))
    empty = np.zeros(0, np.int64)
    return np.repeat(valid, SINGLE_SHOT_REPEATS), np.concatenate([empty, *hits])
