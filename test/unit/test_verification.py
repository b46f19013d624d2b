"""The verification curve against a sort of all pairs, and what it says when there are few."""

import numpy as np
import pytest

from aligned_reid.evaluation.verification import (
    BIN_WIDTH,
    count_pairs,
    describe_curve,
    verification_curve,
    verification_record,
)


def random_case(seed, scale=1.0, num_query=40, num_gallery=900):
    """Distances of several magnitudes, smaller between photos of one person; persons; cameras."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 6, num) for num in (num_query, num_gallery)]
    cams = [rng.integers(0, 3, num) for num in (num_query, num_gallery)]
    dist = rng.gamma(4, 2, (num_query, num_gallery)) * np.where(ids[0][:, None] == ids[1], 0.3, 1)
    return (scale * dist).astype(np.float32), *ids, *cams


def pairs_of(dist, query_ids, gallery_ids, query_cams, gallery_cams):
    """Sorted distances of pairs under different cameras: of one person, of different persons."""
    other_camera, same = query_cams[:, None] != gallery_cams, query_ids[:, None] == gallery_ids
    return np.sort(dist[other_camera & same]), np.sort(dist[other_camera & ~same])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5])
def test_rates_at_the_thresholds_are_exact(scale):
    case = random_case(1, scale)
    same, different = pairs_of(*case)
    curve = verification_curve(count_pairs(*case))
    for rate, at in curve["at_fmr"].items():
        matches = int(len(different) * float(rate))
        assert (different < at["threshold"]).sum() <= matches
        assert at["threshold"] == pytest.approx(different[matches], rel=BIN_WIDTH)  # the next one is a false match more
        assert at["threshold"] <= different[matches]
        assert at["tmr"] == (same < at["threshold"]).mean()
    errors = [(different < curve["eer_threshold"]).mean(), (same >= curve["eer_threshold"]).mean()]
    assert curve["eer"] == pytest.approx(np.mean(errors), abs=1e-12)
    assert abs(errors[0] - errors[1]) < 0.01


def test_the_roc_is_that_of_the_sorted_pairs():
    case = random_case(2)
    thresholds = np.sort(np.concatenate(pairs_of(*case)))
    tmr, fmr = (np.searchsorted(pairs, thresholds, side="right") / len(pairs) for pairs in pairs_of(*case))
    roc = verification_curve(count_pairs(*case))["roc"]
    assert len(roc["fmr"]) == len(roc["tmr"]) <= 200
    assert roc["fmr"][-1] == roc["tmr"][-1] == 1
    np.testing.assert_allclose(roc["tmr"], np.interp(roc["fmr"], fmr, tmr), atol=0.01)


def test_pairs_under_one_camera_do_not_count():
    dist = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
    counts = count_pairs(dist, *map(np.array, ([7], [7, 7, 1, 1], [0], [0, 1, 0, 1])))
    assert counts.sum(axis=1).tolist() == [1, 1]
    curve = verification_curve(counts)
    assert 2 < curve["eer_threshold"] <= 4
    assert curve["eer"] == 0


def test_counts_of_blocks_add_up():
    dist, query_ids, gallery_ids, query_cams, gallery_cams = case = random_case(3)
    first, rest = (
        count_pairs(dist[rows], query_ids[rows], gallery_ids, query_cams[rows], gallery_cams)
        for rows in (slice(0, 1), slice(1, 40))
    )
    np.testing.assert_array_equal(first + rest, count_pairs(*case))


def test_a_rate_that_too_few_pairs_can_show_is_null():
    curve = verification_curve(count_pairs(*random_case(4, num_query=2, num_gallery=600)))
    assert [rate for rate, at in curve["at_fmr"].items() if at is None] == ["0.001", "0.0001"]
    assert "0.001: too few pairs" in describe_curve(curve)


def test_without_strangers_there_is_a_record_without_rates():
    counts = count_pairs(np.ones((1, 2), np.float32), *map(np.array, ([5], [5, 5], [0], [1, 2])))
    record = verification_record({"global": counts}, "photos")
    assert (record["measured_on"], record["num_same"], record["num_different"]) == ("photos", 2, 0)
    assert record["global_local"] is None
    assert record["global"]["eer"] is None and set(record["global"]["at_fmr"].values()) == {None}
    assert "no verification" in describe_curve(record["global"])
