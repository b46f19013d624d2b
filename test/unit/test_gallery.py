"""Search in a folder, groups of one person, and the index that keeps features between calls."""

import os
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import refusal

from aligned_reid import Gallery, ReID
from aligned_reid.distance import euclidean_distance, normalize
from aligned_reid.evaluation.extract import FeatureSet
from aligned_reid.inference.nearest import group_features, nearest


@pytest.fixture
def seen(reid, monkeypatch):
    """The names of the images that the model computes, in their order."""
    names, embed = [], reid.embed

    def noted(images, **options):
        names.extend(path.name for path, _ in images)
        return embed(images, **options)

    monkeypatch.setattr(reid, "embed", noted)
    return names


def index_of(photos):
    (path,) = (photos / ".aligned_reid").glob("*.h5")
    return path


def test_search_finds_the_nearest_by_the_distance_of_the_test(reid, photos):
    gallery = Gallery.open(photos, reid)
    paths = [photos / name for name in gallery.names]
    feats = reid(paths)
    feat = normalize(feats.global_feat)
    expected = euclidean_distance(feat[3:4], feat)[0]
    hits = gallery.search(paths[3], k=5)
    order = [place for place in expected.argsort().tolist() if place != 3][:5]
    assert [hit.path for hit in hits] == [paths[place] for place in order]
    assert [hit.distance for hit in hits] == pytest.approx(expected[order].tolist(), abs=1e-4)
    assert [hit.same_person for hit in hits] == [hit.distance < 0.5 for hit in hits]
    answers = gallery.search(paths, k=100)  # several queries
    assert [hit.path for hit in answers[3][:5]] == [hit.path for hit in hits]
    assert [len(hits) for hits in answers] == [11] * len(gallery)  # a file is not its own hit
    assert [len(hits) for hits in gallery.search(feats, k=100)] == [12] * len(gallery)


def test_wrong_queries_are_refused(reid, photos):
    gallery = Gallery.open(photos, reid)
    for query in (None, 5, FeatureSet(torch.zeros(1, 3), None)):
        refusal(gallery.search, query)


def test_a_linked_file_is_not_its_own_hit(reid, photos, tmp_path):
    inside, outside = next(photos.glob("*.jpg")), tmp_path / "link.jpg"
    inside.rename(tmp_path / "moved.jpg")
    inside.symlink_to(tmp_path / "moved.jpg")
    outside.symlink_to(next(photos.glob("inner/*.jpg")))
    gallery = Gallery.open(photos, reid)
    assert [len(hits) for hits in gallery.search([inside, outside, photos / "gone.jpg"], 100, print)] == [11, 11, 0]


def test_only_new_and_changed_files_are_computed(reid, seen, photos):
    first = Gallery.open(photos, reid)
    again = Gallery.open(photos, reid)
    assert len(seen) == 12 and again.names == first.names and torch.equal(again.feat, first.feat)
    seen.clear()
    paths = sorted(photos.glob("*.jpg"))
    shutil.copy(paths[1], paths[0])  # other content
    os.utime(paths[2], (1, 1))
    shutil.copy(paths[1], photos / "new.jpg")
    paths[3].unlink()
    changed = Gallery.open(photos, reid)
    assert len(Gallery.open(photos, reid)) == 12
    assert sorted(seen) == sorted([paths[0].name, paths[2].name, "new.jpg"])
    assert len(changed) == 12 and paths[3].name not in changed.names
    feats = dict(zip(changed.names, changed.feat, strict=True))
    assert torch.allclose(feats["new.jpg"], feats[paths[0].name], atol=1e-5)


def test_an_index_of_mostly_old_rows_is_made_smaller(reid, photos, monkeypatch):
    monkeypatch.setattr("aligned_reid.inference.index.ROWS_PER_CHUNK", 4)
    path, *others = photos.rglob("*.jpg")
    for other in others[2:]:
        other.unlink()
    for date in range(1, 15):
        os.utime(path, (date, date))
        Gallery.open(photos, reid)
    with h5py.File(index_of(photos)) as file:
        assert len(file["global"]) <= 2 * 3 + 4 + 1


def test_another_model_is_noticed(reid, tiny_run, photos):
    Gallery.open(photos, reid)
    lines = []
    Gallery.open(photos, ReID.from_pretrained(tiny_run, "cpu", flip_test=True), lines.append)
    assert len(lines) == 1 and "another model" in lines[0]


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-4000])


def of_another_model(path):
    with h5py.File(path, "r+") as file:
        file.attrs["made_by"] = np.bytes_(b"other")


def not_finite(path):
    with h5py.File(path, "r+") as file:
        file["global"][3, 5] = np.nan


@pytest.mark.parametrize("damage", [cut_off, of_another_model, not_finite, lambda path: path.write_text("no index")])
def test_a_damaged_index_is_built_again_with_one_line(reid, seen, photos, damage):
    Gallery.open(photos, reid)
    damage(index_of(photos))
    lines = []
    for _ in range(2):
        assert len(Gallery.open(photos, reid, lines.append)) == 12
    assert len(seen) == 2 * 12 and len(lines) == 1 and "built again" in lines[0]


def test_an_interrupted_index_keeps_what_is_done(reid, seen, photos, monkeypatch):
    monkeypatch.setattr("aligned_reid.inference.reid.BATCH_SIZE", 4)
    monkeypatch.setattr("aligned_reid.inference.index.BATCH_SIZE", 4)
    (photos / "inner" / "zz.jpg").write_text("no image")

    def interrupt(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Gallery.open(photos, reid, on_error=interrupt)
    assert len(Gallery.open(photos, reid)) == 12
    assert seen[13:] == ["zz.jpg"]


def test_an_index_without_room_on_the_disk_is_one_line(reid, photos, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10_000))
    assert "No space" in refusal(Gallery.open, photos, reid)
    assert not list((photos / ".aligned_reid").glob("*.h5"))


def test_bad_and_other_files_are_reported_and_the_others_served(reid, photos):
    (photos / "notes.txt").write_text("notes")
    (photos / "bad\n<b>.jpg").write_text("no image")
    lines, errors = [], []
    assert len(Gallery.open(photos, reid, lines.append, errors.append)) == 12
    assert len(lines) == 1 and ".txt" in lines[0]
    assert len(errors) == 1 and r"bad\n<b>.jpg" in errors[0]


def test_a_folder_without_images_is_refused(reid, tmp_path):
    folder = tmp_path / "none"
    assert "not a folder" in refusal(Gallery.open, folder, reid)
    folder.mkdir()
    assert "no images" in refusal(Gallery.open, folder, reid)
    (folder / "bad.jpg").touch()
    assert "none of the 1" in refusal(Gallery.open, folder, reid)


def test_names_in_any_script_are_kept_and_copies_of_the_query_are_the_first_hits(reid, photos):
    names = ["照片 一.jpg", "two\nlines.jpg", "<script>.jpg", os.fsdecode(b"\xff.jpg")]
    source = next(photos.glob("*.jpg"))
    for name in names:
        shutil.copy(source, photos / name)
    for _ in range(2):
        hits = Gallery.open(photos, reid).search(source, k=4)
        assert {hit.path.name for hit in hits} == set(names)
        assert all(hit.distance < 1e-3 and hit.same_person for hit in hits)


def test_the_index_of_a_folder_that_cannot_be_written_to_is_in_the_cache(reid, seen, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("aligned_reid.inference.index.can_write", lambda folder: False)
    for _ in range(2):
        Gallery.open(photos, reid)
    assert len(seen) == 12 and not (photos / ".aligned_reid").exists()
    assert len(list((tmp_path / "cache" / "aligned_reid").rglob("*.h5"))) == 1


def test_nearest_is_exact_and_keeps_the_order_of_equals():
    feat = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    feat[100] = feat[7]
    queries = torch.cat([feat[7:8] + 0.01, torch.randn(99, 16, generator=torch.Generator().manual_seed(1))])
    for rows in (slice(0, 1), slice(0, 100)):
        places, distances = nearest(queries[rows], feat, feat.square().sum(1), 20)
        expected, order = euclidean_distance(queries[rows], feat).sort(dim=1, stable=True)
        assert np.allclose(distances, expected[:, :20], atol=1e-3)
        assert places[0, :2].tolist() == [7, 100]
        assert (places == order[:, :20].numpy()).mean() > 0.99
    assert nearest(queries, feat, feat.square().sum(1), 500)[0].shape == (100, 500)


@pytest.mark.parametrize("max_linked", [1000, 50])
def test_groups_are_the_persons(max_linked):
    random = torch.Generator().manual_seed(0)
    persons = torch.arange(20).repeat(6)
    feat = normalize(torch.randn(20, 32, generator=random))[persons] + 0.02 * torch.randn(120, 32, generator=random)
    labels = group_features(feat, 0.6, max_linked)
    assert len(set(labels)) == len(set(zip(labels.tolist(), persons.tolist(), strict=True))) == 20
    assert group_features(feat[:1], 0.6).tolist() == [1]


def test_groups_come_in_order_of_their_size_and_need_a_threshold(reid, photos, monkeypatch):
    gallery = Gallery.open(photos, reid)
    groups = gallery.group()
    assert [group.person for group in groups] == list(range(1, len(groups) + 1))
    assert [len(group.paths) for group in groups] == sorted((len(group.paths) for group in groups), reverse=True)
    assert sorted(path for group in groups for path in group.paths) == sorted(photos / name for name in gallery.names)
    assert len(gallery.group(threshold=10)) == 1 and len(gallery.group(threshold=1e-9)) == 12

    monkeypatch.setattr(reid, "verification", {})
    assert "1,000 pairs" in refusal(gallery.group)
