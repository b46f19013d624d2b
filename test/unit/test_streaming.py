"""Streamed scores are those of whole matrices, over several files, in bounded memory, and after an interruption."""

import numpy as np
import pytest
import torch

from aligned_reid.distance import normalize
from aligned_reid.evaluation import (
    feature_distances,
    global_distance_matrix,
    local_distance_matrix,
    rank,
    re_rank_features,
    streaming,
)
from aligned_reid.evaluation.feature_distances import FeatureDistances
from aligned_reid.evaluation.feature_file import FeatureTable
from aligned_reid.evaluation.streaming import LargeSet, rank_streamed, re_rank_streamed


def make_table(source, num_images, seed, with_queries):
    rng = np.random.default_rng(seed)
    marks = rng.integers(0, 3, num_images) if with_queries else np.ones(num_images, int)
    feats = rng.standard_normal((num_images, 16)).astype(np.float32), rng.random((num_images, 4, 8), np.float32)
    source.touch()
    return FeatureTable(
        str(source), *feats, rng.integers(0, 12, num_images), rng.integers(0, 4, num_images), marks, None
    )


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Three files, read in many parts and many blocks of queries."""
    monkeypatch.setattr(streaming, "GALLERY_ROWS_PER_PART", 50)
    monkeypatch.setattr(streaming, "ROWS_PER_STEP", 16)
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 1)
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
    return {name: rank(matrix, *labels) for name, matrix in matrices.items()}


@pytest.mark.parametrize("normalize_feature", [False, True])
def test_scores_are_those_of_the_whole_matrices(tables, tmp_path, normalize_feature):
    data = LargeSet.of(tables, normalize_feature=normalize_feature, local=True)
    assert len(data.query_ids) > 3 * 16  # several blocks
    found = rank_streamed(data, tmp_path / "state.npz")
    assert list(found) == ["local", "global_local", "global"]
    for name, ranking in expected(tables, normalize_feature).items():
        np.testing.assert_allclose(found[name].ap, ranking.ap, rtol=1e-12)
        np.testing.assert_allclose(found[name].ap_step, ranking.ap_step, rtol=1e-12)
        np.testing.assert_array_equal(found[name].cmc, ranking.cmc)
        assert found[name].mean_inp == pytest.approx(ranking.mean_inp, rel=1e-12)
    assert not (tmp_path / "state.npz").exists()
    alone = rank_streamed(LargeSet.of(tables, normalize_feature=normalize_feature, local=False), tmp_path / "state.npz")
    assert list(alone) == ["global"]
    assert alone["global"].mean_ap == found["global"].mean_ap


def test_an_interrupted_run_goes_on(tables, tmp_path, monkeypatch):
    data = LargeSet.of(tables, normalize_feature=False, local=True)
    state = tmp_path / "state.npz"
    whole = rank_streamed(data, state)
    computed = []
    block_distances = streaming.block_distances

    def interrupted(data, first, last, num_gallery):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(first)
        return block_distances(data, first, last, num_gallery)

    monkeypatch.setattr(streaming, "block_distances", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rank_streamed(data, state)
    kept = state.read_bytes()
    computed[:] = [-1]
    with pytest.raises(KeyboardInterrupt):  # goes on behind the two, with the third
        rank_streamed(data, state)
    assert computed == [-1, 32]
    monkeypatch.setattr(streaming, "block_distances", block_distances)
    found = rank_streamed(data, state)
    for name, ranking in whole.items():
        np.testing.assert_array_equal(found[name].cmc, ranking.cmc)
        np.testing.assert_array_equal(found[name].ap, ranking.ap)

    for content in (kept[: len(kept) // 2], b"", kept):  # cut off, empty, of other settings: none is gone on with
        state.write_bytes(content)
        other = LargeSet.of(tables, normalize_feature=True, local=True)
        assert rank_streamed(other, state)["global"].mean_ap == expected(tables, True)["global"].mean_ap


@pytest.mark.parametrize("normalize_feature", [False, True])
def test_re_ranked_scores_are_those_of_the_matrix(tables, tmp_path, monkeypatch, normalize_feature):
    monkeypatch.setattr(feature_distances, "TILE", 40)
    monkeypatch.setattr(feature_distances, "UNIT", 16)
    monkeypatch.setattr(feature_distances, "SECONDS_BETWEEN_SAVES", -1)
    data = LargeSet.of(tables, normalize_feature=normalize_feature, local=False)
    query, *gallery = [piece.get(slice(0, piece.num_images)) for piece in data.pieces()]
    matrix = re_rank_features(query, torch.cat(gallery), 9, 3, 0.4)
    gallery_ids, gallery_cams = data.gallery_labels()
    whole = rank(matrix, data.query_ids, gallery_ids, data.query_cams, gallery_cams)

    state = tmp_path / "state.npz"
    add_block = FeatureDistances.add_block

    def interrupted(self, blocks, units, number, final):
        if number == len(blocks) - 2:
            raise KeyboardInterrupt
        add_block(self, blocks, units, number, final)

    monkeypatch.setattr(FeatureDistances, "add_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        re_rank_streamed(data, 9, 3, 0.4, state)
    added = []

    def counted(self, blocks, units, number, final):
        added.append(number)
        add_block(self, blocks, units, number, final)

    monkeypatch.setattr(FeatureDistances, "add_block", counted)
    found = re_rank_streamed(data, 9, 3, 0.4, state)["global_re_ranked"]
    assert len(added) == 2  # the rest was in the state file
    np.testing.assert_allclose(found.ap, whole.ap, atol=1e-6)
    np.testing.assert_array_equal(found.cmc, whole.cmc)
    assert not list(tmp_path.glob("state*"))
