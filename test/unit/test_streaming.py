"""Streamed scores are those of whole matrices, over several files, and re-ranking resumes after an interruption."""

import os

import numpy as np
import pytest
import torch

from aligned_reid.distance import normalize
from aligned_reid.evaluation import (
    global_distance_matrix,
    local_distance_matrix,
    neighbours,
    rank,
    re_rank_features,
    streaming,
)
from aligned_reid.evaluation.features import FeatureTable
from aligned_reid.evaluation.streaming import LargeSet, rank_streamed, re_rank_streamed
from aligned_reid.evaluation.verification import BIN_WIDTH, count_pairs, verification_curve


def make_table(source, num_images, seed, with_queries):
    rng = np.random.default_rng(seed)
    marks = rng.integers(0, 3, num_images) if with_queries else np.ones(num_images, int)
    feats = rng.standard_normal((num_images, 16)).astype(np.float32), rng.random((num_images, 4, 8), np.float32)
    labels = rng.integers(0, 12, num_images), rng.integers(0, 4, num_images)
    source.touch()
    return FeatureTable(str(source), *feats, *labels, marks, None)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Three files, read in many parts and many blocks of queries."""
    for name, value in {"GALLERY_ROWS_PER_PART": 50, "ROWS_PER_STEP": 16, "BLOCK_BYTES": 1}.items():
        monkeypatch.setattr(streaming, name, value)
    sizes = ((300, True), (170, False), (1, False))
    return [make_table(tmp_path / f"{i}.h5", num, i, queries) for i, (num, queries) in enumerate(sizes)]


def expected(tables, normalize_feature):
    def unit(feat):
        return normalize(torch.from_numpy(feat)) if normalize_feature else torch.from_numpy(feat)

    query = tables[0].marks == 0
    gallery = [table.marks == 1 for table in tables]
    global_feat, local_feat, ids, cams = (
        np.concatenate([getattr(table, name)[rows] for table, rows in zip(tables, gallery, strict=True)])
        for name in ("global_feat", "local_feat", "person_ids", "cameras")
    )
    dist = global_distance_matrix(unit(tables[0].global_feat[query]), unit(global_feat))
    local = local_distance_matrix(unit(tables[0].local_feat[query]), unit(local_feat))
    labels = (tables[0].person_ids[query], ids, tables[0].cameras[query], cams)
    matrices = {"global": dist, "local": local, "global_local": local + dist}
    counts = {name: count_pairs(matrix, *labels) for name, matrix in matrices.items() if name != "local"}
    return {name: rank(matrix, *labels) for name, matrix in matrices.items()}, counts


@pytest.mark.parametrize("normalize_feature", [False, True])
def test_scores_equal_those_of_whole_matrices(tables, normalize_feature):
    data = LargeSet.of(tables, normalize_feature=normalize_feature, local=True)
    assert len(data.query_ids) > 3 * 16  # several blocks
    found, counts = rank_streamed(data)
    expected_rankings, expected_counts = expected(tables, normalize_feature)
    assert list(found) == ["local", "global_local", "global"]
    for name, ranking in expected_rankings.items():
        np.testing.assert_array_equal(found[name].cmc, ranking.cmc)
        for score in ("ap", "ap_step", "mean_inp"):
            np.testing.assert_allclose(getattr(found[name], score), getattr(ranking, score), rtol=1e-12)
    assert counts.keys() == expected_counts.keys() == {"global", "global_local"}
    for name, whole in expected_counts.items():
        assert (counts[name].sum(axis=1) == whole.sum(axis=1)).all()
        curve, expected_curve = verification_curve(counts[name]), verification_curve(whole)
        assert curve["eer"] == pytest.approx(expected_curve["eer"], abs=1e-3)
        assert curve["eer_threshold"] == pytest.approx(expected_curve["eer_threshold"], rel=2 * BIN_WIDTH)
    alone, counts = rank_streamed(LargeSet.of(tables, normalize_feature=normalize_feature, local=False))
    assert list(alone) == list(counts) == ["global"]
    assert alone["global"].mean_ap == found["global"].mean_ap


def interrupt(monkeypatch, after):
    """Let the search for neighbours stop after some blocks; returns a list that grows with the blocks added."""
    added, add_block = [], neighbours.add_block

    def counted(distances, found, blocks, final):
        if len(added) == after:
            raise KeyboardInterrupt
        add_block(distances, found, blocks, final)
        added.append(len(blocks))

    monkeypatch.setattr(neighbours, "add_block", counted)
    return added


@pytest.mark.parametrize("normalize_feature", [False, True])
def test_re_ranking_resumes_with_the_scores_of_the_matrix(tables, tmp_path, monkeypatch, normalize_feature):
    for name, value in {"TILE": 40, "UNIT": 16, "SECONDS_BETWEEN_SAVES": -1}.items():
        monkeypatch.setattr(neighbours, name, value)
    data = LargeSet.of(tables, normalize_feature=normalize_feature, local=False)
    query, *gallery = [piece.get(slice(0, piece.num_images)) for piece in data.global_pieces]
    matrix = re_rank_features(query, torch.cat(gallery), 9, 3, 0.4)
    whole = rank(matrix, data.query_ids, data.gallery_ids, data.query_cams, data.gallery_cams)
    state = tmp_path / "state.npz"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, after=3)
        re_rank_streamed(data, 9, 3, 0.4, state)
    kept = state.read_bytes()
    for content, resumed in ((kept[: len(kept) // 2], False), (b"", False), (kept, True)):
        state.write_bytes(content)
        with monkeypatch.context() as patch:
            added = interrupt(patch, after=None)
            found = re_rank_streamed(data, 9, 3, 0.4, state)["global_re_ranked"]
        assert (added[0] == 4) == resumed
        np.testing.assert_allclose(found.ap, whole.ap, atol=1e-6)
        np.testing.assert_array_equal(found.cmc, whole.cmc)
        assert not list(tmp_path.glob("state*"))
    for k1, lambda_value, first_block in ((9, 0.3, 4), (8, 0.4, 1)):  # the weight does not affect the neighbours
        state.write_bytes(kept)
        with monkeypatch.context() as patch:
            added = interrupt(patch, after=None)
            re_rank_streamed(data, k1, 3, lambda_value, state)
        assert added[0] == first_block


def test_re_ranking_starts_again_if_the_file_with_the_queries_was_replaced(tables, tmp_path, monkeypatch):
    for name, value in {"TILE": 40, "UNIT": 16, "SECONDS_BETWEEN_SAVES": -1}.items():
        monkeypatch.setattr(neighbours, name, value)
    tables[0].marks[tables[0].marks == 1] = 2  # no gallery images
    state = tmp_path / "state.npz"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, after=3)
        re_rank_streamed(LargeSet.of(tables, normalize_feature=False, local=False), 9, 3, 0.4, state)
    tables[0].global_feat[:] *= 3
    os.utime(tables[0].source, ns=(0, 0))
    data = LargeSet.of(tables, normalize_feature=False, local=False)
    found = re_rank_streamed(data, 9, 3, 0.4, state)["global_re_ranked"]
    expected = re_rank_streamed(data, 9, 3, 0.4, tmp_path / "new.npz")["global_re_ranked"]
    np.testing.assert_array_equal(found.ap, expected.ap)
