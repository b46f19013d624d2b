"""CMC, mAP and mINP against the golden vectors and against the protocol written out with a sort."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, refusal

from aligned_reid.evaluation import Ranking, rank, ranking

VECTORS = np.load(GOLDEN / "ranking.npz")
GOLDEN_INPUTS = [VECTORS[name] for name in ("dist", "query_ids", "gallery_ids", "query_cams", "gallery_cams")]


@pytest.fixture(params=["counted", "sorted"])
def every_way(request, monkeypatch):
    if request.param == "sorted":
        monkeypatch.setattr(ranking, "MAX_COUNTED_MATCHES", 2)


def random_case(seed: int, num_query: int = 23, num_gallery: int = 60, levels: int = 1000) -> list[np.ndarray]:
    """Few `levels` of distance: many ties."""
    rng = np.random.default_rng(seed)
    sizes = (num_query, num_gallery)
    labels = [rng.integers(0, number, size) for number in (8, 3) for size in sizes]
    return [rng.integers(0, levels, sizes).astype(np.float32), *labels]


def naive_rank(
    dist, query_ids, gallery_ids, query_cams, gallery_cams, topk=10, separate_camera_set=False, first_match_break=True
) -> dict[str, Any]:
    """Sort all, remove the excluded images, walk down the list."""
    cmc, inps = np.zeros(topk), []
    aps, ap_steps = np.full((2, len(dist)), np.nan)
    for q in range(len(dist)):
        order = np.argsort(dist[q], kind="stable")
        same_person = gallery_ids[order] == query_ids[q]
        same_camera = gallery_cams[order] == query_cams[q]
        matches = same_person[~(same_person & same_camera)]
        if not matches.any():
            continue
        precision = matches.cumsum() / np.arange(1, len(matches) + 1)
        precision_before = np.append(1.0, precision[:-1])
        aps[q] = ((precision_before + precision) / 2)[matches].mean()
        ap_steps[q] = precision[matches].mean()
        inps.append(precision[np.flatnonzero(matches)[-1]])
        shown = same_person[~same_camera] if separate_camera_set else matches
        places = np.flatnonzero(shown)
        for already, place in enumerate(places[:1] if first_match_break else places):
            if place - already < topk:
                cmc[place - already] += 1 if first_match_break else 1 / len(places)
    return {
        "cmc": cmc.cumsum() / len(inps),
        "ap": aps,
        "ap_step": ap_steps,
        "mean_ap": np.nanmean(aps),
        "mean_ap_step": np.nanmean(ap_steps),
        "mean_inp": np.mean(inps),
        "num_valid_queries": len(inps),
    }


def check(computed: Ranking, expected: dict[str, Any]):
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(computed, name), value, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.usefixtures("every_way")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_golden(dtype: type):
    dist, *labels = GOLDEN_INPUTS
    ranks = np.unique(dist, return_inverse=True)[1].reshape(dist.shape)  # the same order in either type
    computed = rank(dist if dtype is np.float64 else ranks.astype(dtype), *labels, topk=50)
    np.testing.assert_allclose(computed.cmc, VECTORS["cmc_market1501"], rtol=0, atol=1e-9)
    valid = VECTORS["is_valid_query"] == 1
    assert computed.num_valid_queries == valid.sum() == 59
    for name, key in (("ap", "ap_trapezoid"), ("ap_step", "ap_step")):
        np.testing.assert_allclose(getattr(computed, name)[valid], VECTORS[key][valid], rtol=0, atol=1e-9)
        assert np.isnan(getattr(computed, name)[~valid]).all()
        assert getattr(computed, f"mean_{name}") == pytest.approx(float(VECTORS[f"mean_{key}"]), abs=1e-9)
    allshots = rank(dist, *labels, topk=50, first_match_break=False)
    np.testing.assert_allclose(allshots.cmc, VECTORS["cmc_allshots"], rtol=0, atol=1e-9)


@pytest.mark.usefixtures("every_way")
@pytest.mark.parametrize("levels", [2, 7, 10**6])
def test_rank_equals_the_naive_protocol(levels: int):
    for seed in range(4):
        case = random_case(seed, levels=levels)
        for topk in (1, 10, 200):
            for options in ({}, {"separate_camera_set": True}, {"first_match_break": False}):
                check(rank(*case, topk=topk, **options), naive_rank(*case, topk=topk, **options))
    blocks = random_case(9, num_query=300, num_gallery=80, levels=levels)
    check(rank(*blocks), naive_rank(*blocks))


def test_hand_made_example():
    #        other, removed, match, other, match
    dist = [[0.1, 0.2, 0.3, 0.4, 0.5]]
    result = rank(dist, [7], [1, 7, 7, 2, 7], [0], [0, 0, 1, 1, 2], topk=3)
    assert result.cmc.tolist() == [0, 1, 1]
    assert result.mean_ap_step == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert result.mean_ap == pytest.approx(((0 / 1 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 2)
    assert result.mean_inp == 2 / 4


@pytest.mark.parametrize("separate_camera_set", [False, True])
def test_single_gallery_shot_is_the_mean_of_all_draws(separate_camera_set: bool):
    """The expectation, person by person: how likely is it that fewer than k of them come before the match?"""
    case = random_case(3, num_query=12, num_gallery=40, levels=10**6)
    dist, query_ids, gallery_ids, query_cams, gallery_cams = case
    options = {"single_gallery_shot": True, "separate_camera_set": separate_camera_set, "topk": 8}
    computed = np.mean([rank(*case, seed=seed, **options).cmc for seed in range(60)], axis=0)
    expected = np.zeros(8)
    for q in range(12):
        same_camera = gallery_cams == query_cams[q]
        kept = ~same_camera if separate_camera_set else ~(same_camera & (gallery_ids == query_ids[q]))
        own = np.flatnonzero(kept & (gallery_ids == query_ids[q]))
        for match in own:
            before = np.array([1.0])  # probability of 0, 1, ... persons before the match
            for person in set(gallery_ids[kept]) - {query_ids[q]}:
                share = (dist[q, kept & (gallery_ids == person)] < dist[q, match]).mean()
                before = np.convolve(before, [1 - share, share])
            expected += np.append(before, np.zeros(8))[:8].cumsum() / len(own) / 12
    np.testing.assert_allclose(computed, expected, atol=0.02)
    assert computed[-1] <= 1


def test_single_gallery_shot_is_seeded_and_leaves_the_rest():
    case = random_case(4)
    one, again, other = (rank(*case, single_gallery_shot=True, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.cmc, again.cmc)
    assert not np.array_equal(one.cmc, other.cmc)
    np.testing.assert_array_equal(one.ap, rank(*case).ap)
    one_image_each = [np.random.default_rng(0).random((4, 8)), [0, 1, 2, 3], range(8), [0] * 4, [1] * 8]
    shot, all_images = rank(*one_image_each, single_gallery_shot=True), rank(*one_image_each)
    np.testing.assert_allclose(shot.cmc, all_images.cmc)


def test_tensors_lists_and_arrays_give_the_same():
    dist, *labels = random_case(6, levels=50)
    expected = rank(dist, *labels)
    tensors = [torch.from_numpy(values) for values in (dist, *labels)]
    lists = [dist.tolist(), *(values.tolist() for values in labels)]
    names = [[f"person {i}" for i in values] for values in labels]
    read_only = [values.copy() for values in (dist, *labels)]
    for values in read_only:
        values.setflags(write=False)
    others = [np.asfortranarray(dist), *labels], [dist.astype(np.int64), *labels], [dist, *names]
    for case in (tensors, lists, read_only, *others):
        for computed, value in zip(rank(*case), expected, strict=True):
            np.testing.assert_array_equal(computed, value)
    np.testing.assert_array_equal(rank(dist * np.float32(3e35), *labels).ap, expected.ap)  # the sum of a row overflows
    half = rank(torch.from_numpy(dist).bfloat16(), *labels)
    assert half.mean_ap == pytest.approx(rank(dist.astype(np.float16), *labels).mean_ap)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_distance_that_is_not_finite_names_the_query(value):
    dist, *labels = random_case(0, num_query=100)
    dist[70, 5] = value
    message = refusal(rank, dist, *labels)
    assert "query 70 " in message and "NaN or infinity" in message


@pytest.mark.parametrize("options", [{}, {"single_gallery_shot": True}, {"separate_camera_set": True}])
def test_no_query_with_a_match_is_refused(options):
    dist, query_ids, gallery_ids, *cams = random_case(0)
    assert "No valid query" in refusal(rank, dist, query_ids, gallery_ids + 100, *cams, **options)
    assert "No valid query" in refusal(rank, dist, query_ids, gallery_ids, [0] * 23, [0] * 60, **options)


@pytest.mark.parametrize(
    ("place", "shape", "name"),
    [
        (0, (0, 60), "dist"),
        (0, (23, 0), "dist"),
        (0, (23,), "dist"),
        (1, (22,), "query_ids"),
        (2, (61,), "gallery_ids"),
        (3, (23, 1), "query_cams"),
        (4, (0,), "gallery_cams"),
    ],
)
def test_wrong_input_is_refused(place, shape, name):
    case = random_case(0)
    assert "topk" in refusal(rank, *case, topk=0)
    case[place] = np.zeros(shape)
    assert name in refusal(rank, *case)
