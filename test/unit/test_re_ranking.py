"""Re-ranking against the golden vectors and against the k-reciprocal encoding written out with sets and a full sort."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import GOLDEN, refusal

from aligned_reid.evaluation import distances as distances_module
from aligned_reid.evaluation import global_distance_matrix, neighbours, re_rank, re_rank_features, re_ranking

VECTORS = np.load(GOLDEN / "re_ranking.npz")
GOLDEN_DISTANCES = [VECTORS[name] for name in ("q_g_dist", "q_q_dist", "g_g_dist")]
SETTINGS = [(20, 6, 0.3), (7, 1, 0.5), (21, 4, 0.0), (1, 2, 1.0), (5, 30, 0.3), (500, 3, 0.2)]


@pytest.fixture
def small_blocks(monkeypatch):
    for module, sizes in (
        (re_ranking, {"COLUMNS_PER_BLOCK": 11, "ROWS_PER_PART": 9, "PAIRS_PER_BLOCK": 50}),
        (neighbours, {"TILE": 13, "UNIT": 5, "TILES_PER_THREAD": 1}),
        (distances_module, {"ROWS_PER_CHECK": 7, "PAIRS_PER_BLOCK": 7}),
    ):
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)


def features_of_people(seed: int, num_query: int = 30, num_gallery: int = 75, width: int = 8) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((12, width))
    people = rng.integers(0, 12, num_query + num_gallery)
    feat = (centres[people] + 0.5 * rng.standard_normal((len(people), width))).astype(np.float32)
    return [feat[:num_query], feat[num_query:]]


def distances_of(query: np.ndarray, gallery: np.ndarray, dtype: type = np.float32) -> list[np.ndarray]:
    pairs = ((query, gallery), (query, query), (gallery, gallery))
    return [np.linalg.norm(x[:, None] - y, axis=2).astype(dtype) for x, y in pairs]


def naive_re_rank(q_g_dist, q_q_dist, g_g_dist, k1: int, k2: int, lambda_value: float) -> np.ndarray:
    num_query = len(q_q_dist)
    dist = np.block([[q_q_dist, q_g_dist], [q_g_dist.T, g_g_dist]])
    dist = np.square(dist).astype(np.float32)
    dist = np.stack([column / (column.max() or np.float32(1)) for column in dist.T])
    num_images = len(dist)
    ranked = np.argsort(dist, axis=1, kind="stable")

    def reciprocal(k: int) -> list[set[int]]:
        neighbours = [set(row[: k + 1].tolist()) for row in ranked]
        return [{other for other in neighbours[image] if image in neighbours[other]} for image in range(num_images)]

    reciprocal_sets, half_sets = reciprocal(k1), reciprocal(int(np.around(k1 / 2)))
    encoding = np.zeros((num_images, num_images))
    for image in range(num_images):
        own = reciprocal_sets[image]
        expanded = set(own)
        for candidate in own:
            others = half_sets[candidate]
            if 3 * len(others & own) > 2 * len(others):
                expanded |= others
        members = sorted(expanded)
        weights = np.exp(-dist[image, members])
        encoding[image, members] = weights / weights.sum()
    if k2 != 1:
        encoding = np.stack([encoding[ranked[image, :k2]].mean(axis=0) for image in range(num_images)])
    overlap = np.array([[np.minimum(a, b).sum() for b in encoding[num_query:]] for a in encoding[:num_query]])
    jaccard = 1 - overlap / (2 - overlap)
    return (1 - lambda_value) * jaccard + lambda_value * dist[:num_query, num_query:]


@pytest.mark.parametrize("name", [name for name in VECTORS.files if name.startswith("reranked")])
def test_golden(name):
    parts = name.split("_")
    settings = int(parts[2]), int(parts[4]), float(parts[6])
    for dtype in (np.float64, np.float32):
        computed = re_rank(*(dist.astype(dtype) for dist in GOLDEN_DISTANCES), *settings)
        assert computed.dtype == np.float32
        np.testing.assert_allclose(computed, VECTORS[name], rtol=0, atol=1e-5)


def tied_distances(seed: int) -> list[np.ndarray]:
    """Only four different distances, and several identical images."""
    rng = np.random.default_rng(seed)
    distances = [rng.integers(1, 5, shape).astype(np.float32) for shape in ((8, 20), (8, 8), (20, 20))]
    distances[1][np.eye(8) == 1] = distances[2][np.eye(20) == 1] = distances[2][3:7, 3:7] = 0
    return distances


def asymmetric_distances(seed: int) -> list[np.ndarray]:
    """Columns count, as in the reference."""
    rng = np.random.default_rng(seed)
    return [rng.random(shape) for shape in ((10, 25), (10, 10), (25, 25))]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("settings", SETTINGS)
def test_re_rank_equals_the_naive_encoding(settings):
    seed = settings[0]
    for distances in (distances_of(*features_of_people(seed)), tied_distances(seed), asymmetric_distances(seed)):
        expected = naive_re_rank(*distances, *settings)
        np.testing.assert_allclose(re_rank(*distances, *settings), expected, atol=2e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("settings", SETTINGS)
def test_features_give_what_their_distances_give(settings):
    query, gallery = (feat.astype(np.float64) for feat in features_of_people(3))
    expected = naive_re_rank(*distances_of(query, gallery, np.float64), *settings)
    np.testing.assert_allclose(re_rank_features(query, gallery, *settings), expected, atol=1e-5)
    computed = re_rank_features(torch.from_numpy(query).float(), gallery.astype(np.float32), *settings)
    np.testing.assert_allclose(computed, expected, atol=1e-4)


def test_features_and_global_distances_agree_in_float32():
    query, gallery = features_of_people(1, num_query=300, num_gallery=900, width=32)
    distances = [global_distance_matrix(x, y) for x, y in ((query, gallery), (query, query), (gallery, gallery))]
    difference = np.abs(re_rank_features(query, gallery) - re_rank(*distances))
    assert np.quantile(difference, 0.999) < 1e-4


def test_the_same_in_any_number_of_threads(request):
    query, gallery = features_of_people(2, num_query=40, num_gallery=700)
    distances = distances_of(query, gallery)
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((re_rank(*distances), re_rank_features(query, gallery)))
    assert np.array_equal(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-4)


def test_degenerate_sets():
    one = np.array([[0.5]]), np.zeros((1, 1)), np.zeros((1, 1))
    same = np.zeros((3, 5)), np.zeros((3, 3)), np.zeros((5, 5))
    for distances, k1, k2 in ((one, 20, 6), (same, 2, 1), (same, 2, 2), (same, 20, 6)):
        expected = naive_re_rank(*distances, k1, k2, 0.3)
        np.testing.assert_allclose(re_rank(*distances, k1, k2), expected, atol=2e-6)
    assert np.isfinite(re_rank_features(np.ones((3, 4), np.float32), np.ones((5, 4), np.float32))).all()


def test_defaults_are_the_papers_and_inputs_of_any_kind_are_not_modified():
    distances = [dist.astype(np.float32) for dist in GOLDEN_DISTANCES]
    expected = re_rank(*distances, k1=20, k2=6, lambda_value=0.3)
    assert np.array_equal(re_rank(*distances), expected)
    assert all(map(np.array_equal, distances, (dist.astype(np.float32) for dist in GOLDEN_DISTANCES)))
    assert np.array_equal(re_rank(*map(torch.from_numpy, distances)), expected)
    assert np.array_equal(re_rank(*map(np.asfortranarray, distances)), expected)
    np.testing.assert_allclose(re_rank(*(dist.tolist() for dist in distances)), expected, atol=1e-5)
    for dist in distances:
        dist.setflags(write=False)  # as of a mapped file
    assert np.array_equal(re_rank(*distances), expected)
    query, gallery = features_of_people(4)
    expected = re_rank_features(query, gallery.copy())
    gallery.setflags(write=False)
    assert np.array_equal(re_rank_features(query, gallery), expected)
    halves = [torch.from_numpy(feat).bfloat16() for feat in (query, gallery)]
    assert re_rank_features(*halves).dtype == np.float32


@pytest.mark.parametrize(
    ("name", "value"), [("k1", 0), ("k1", 2.5), ("k2", 0), ("lambda_value", -0.1), ("lambda_value", float("nan"))]
)
def test_settings_out_of_range_are_refused(name, value):
    assert name in refusal(re_rank, *GOLDEN_DISTANCES, **{name: value})
    assert name in refusal(re_rank_features, *features_of_people(0), **{name: value})


def test_wrong_shapes_are_refused():
    q_g_dist, q_q_dist, g_g_dist = GOLDEN_DISTANCES
    for wrong, name in (
        ((q_g_dist.T, q_q_dist, g_g_dist), "q_q_dist"),
        ((q_g_dist, q_q_dist, g_g_dist[:-1]), "g_g_dist"),
        ((q_g_dist[:0], q_q_dist[:0, :0], g_g_dist), "q_g_dist"),
        ((q_g_dist[0], q_q_dist, g_g_dist), "q_g_dist"),
    ):
        assert name in refusal(re_rank, *wrong)
    query, gallery = features_of_people(0)
    for query_feat, gallery_feat in ((query, gallery[:, :5]), (query[:0], gallery), (query, gallery[0])):
        assert "re-ranking" in refusal(re_rank_features, query_feat, gallery_feat)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.nan])
def test_errors_name_the_image_that_is_not_finite(value):
    for dtype in (np.float32, np.float64):
        q_g_dist, q_q_dist, g_g_dist = (dist.astype(dtype) for dist in GOLDEN_DISTANCES)
        bad = q_g_dist.copy()
        bad[7, 30] = value
        assert "query 7 " in refusal(re_rank, bad, q_q_dist, g_g_dist)
        g_g_dist[:, 30] = value
        assert "gallery image 30 " in refusal(re_rank, q_g_dist, q_q_dist, g_g_dist)
    query, gallery = features_of_people(0)
    gallery[5, 2] = value
    assert "features of gallery image 5 " in refusal(re_rank_features, query, gallery)
