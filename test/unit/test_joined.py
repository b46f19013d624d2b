"""Joining prepared data sets: identities and cameras apart, one training part, and each set's own test."""

import json
import os
import shlex
import shutil

import pytest
from conftest import TINY, assert_refused, contents, full_disk, refusal

from aligned_reid.data import make_synthetic, parse_image_name, read_partitions
from aligned_reid.data.partitions import Partitions, write_partitions
from aligned_reid.data.prepare.joined import prepare_joined


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """Another drawn set: it has the same numbers of persons as the first one, and other persons."""
    return make_synthetic(tmp_path_factory.mktemp("data") / "other", 8, 3, 2, seed=2)


def test_identities_cameras_and_labels_are_kept_apart(tiny_data, other_data, tmp_path):
    save_dir = prepare_joined([tiny_data, other_data], tmp_path / "joined")
    first, second = (read_partitions(folder / "partitions.pkl") for folder in (tiny_data, other_data))
    joined = read_partitions(save_dir / "partitions.pkl")
    last_person, last_camera = 16, 2

    def moved(name: str) -> str:
        person_id, camera, index = parse_image_name(name)
        return f"{person_id + last_person + 1:08d}_{camera + last_camera + 1:04d}_{index:08d}.jpg"

    for part in ("trainval", "train", "val"):
        own, others = (getattr(one, f"{part}_im_names") for one in (first, second))
        assert getattr(joined, f"{part}_im_names") == own + list(map(moved, others))
    assert joined.val_marks == first.val_marks + second.val_marks
    for part in ("trainval", "train"):
        own, others, both = (getattr(one, f"{part}_ids2labels") for one in (first, second, joined))
        assert both == own | {person + last_person + 1: label + len(own) for person, label in others.items()}
    assert (joined.test_im_names, joined.test_marks) == (first.test_im_names, first.test_marks)
    test = read_partitions(save_dir / "partitions_other.pkl")
    assert (test.test_im_names, test.test_marks) == (list(map(moved, second.test_im_names)), second.test_marks)
    assert test.train_im_names == joined.train_im_names
    assert (save_dir / "partitions_tiny.pkl").read_bytes() == (save_dir / "partitions.pkl").read_bytes()
    for name in second.test_im_names:
        assert (save_dir / "images" / moved(name)).samefile(other_data / "images" / name)


def test_images_are_copied_where_links_are_impossible(tiny_data, other_data, tmp_path, monkeypatch):
    linked = prepare_joined([tiny_data, other_data], tmp_path / "linked")
    monkeypatch.setattr(os, "link", full_disk)
    copied = prepare_joined([tiny_data, other_data], tmp_path / "copied")
    for path in (linked / "images").iterdir():
        copy = copied / "images" / path.name
        assert copy.read_bytes() == path.read_bytes() and not copy.samefile(path)


def test_an_interrupted_join_resumes(tiny_data, other_data, tmp_path):
    source = tmp_path / "other"
    shutil.copytree(other_data, source)
    image = max((source / "images").iterdir())
    image.rename(tmp_path / "away.jpg")
    assert image.name in refusal(prepare_joined, [tiny_data, source], tmp_path / "joined")
    assert not (tmp_path / "joined" / "partitions.pkl").exists()
    image.symlink_to("../../away.jpg")  # links in a source are followed
    joined = prepare_joined([tiny_data, source], tmp_path / "joined")
    assert any(path.samefile(tmp_path / "away.jpg") for path in (joined / "images").iterdir())
    before = (tmp_path / "joined" / "images").stat().st_mtime_ns
    prepare_joined([tiny_data, source], tmp_path / "joined")
    assert (tmp_path / "joined" / "images").stat().st_mtime_ns == before


def test_mistakes_are_refused(command, tiny_data, other_data, tmp_path):
    for name in ("empty", "x"):
        (tmp_path / name).mkdir()
    (tmp_path / "x" / "tiny").symlink_to(other_data)
    (tmp_path / "again").symlink_to(tiny_data)
    assert "two or more" in refusal(prepare_joined, [tiny_data], tmp_path / "joined")
    reasons = {"none": "does not exist", "empty": "has no", "again": "twice", "x/tiny": "called"}
    for source, reason in reasons.items():
        assert reason in refusal(prepare_joined, [tiny_data, tmp_path / source], tmp_path / "joined")
    assert "inside the source" in refusal(prepare_joined, [tiny_data, other_data], tiny_data / "joined")
    (tmp_path / "empty" / "images").mkdir()
    name = "00000001_9999_00000000.jpg"  # more cameras than names can hold
    write_partitions(tmp_path / "empty" / "partitions.pkl", Partitions([name], {1: 0}, [name], {1: 0}, [], [], [], []))
    assert "10002" in refusal(prepare_joined, [tiny_data, tmp_path / "empty"], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
    for flags in ((), ("--sources", tiny_data), ("--sources", tiny_data, "--save_dir", tmp_path / "joined")):
        assert_refused(command("prepare_joined.py", *flags))


def test_a_folder_with_anything_else_is_refused(tiny_data, other_data, tmp_path):
    copy = shutil.copytree(tiny_data, tmp_path / "copy")
    (tmp_path / "notes" / "mine").mkdir(parents=True)
    joined = prepare_joined([tiny_data, other_data], tmp_path / "joined")
    for save_dir in (copy, tmp_path / "notes", joined):
        before = contents(save_dir)
        assert "something else" in refusal(prepare_joined, [other_data, tiny_data], save_dir)
        assert contents(save_dir) == before


def test_the_join_is_trained_on_and_each_set_tested(command, tiny_data, other_data, tmp_path, small_trunk):
    joined, run = tmp_path / "joined", tmp_path / "run"
    done = command("prepare_joined.py", "--sources", tiny_data, other_data, "--save_dir", joined)
    assert done.status == 0, done.err
    assert done.out.splitlines()[0].split() == ["trainval", "108", "images,", "18", "identities"]
    assert all(f"--data_path={shlex.quote(str(data))}" in done.out for data in (joined, other_data))

    def scores(*flags, folder=tmp_path / "test"):
        done = command("train.py", *TINY, f"--exp_dir={folder}", *flags)
        assert done.status == 0, done.err
        return json.loads((folder / "results.json").read_text())["global"]

    of_run = scores(f"--data_path={joined}", "--total_epochs=1", folder=run)
    test = ("--only_test=true", f"--model_weight_file={run}")
    assert scores(*test, f"--data_path={tiny_data}") == of_run
    in_join = scores(*test, f"--data_path={joined}", f"--partition_file={joined / 'partitions_other.pkl'}")
    assert in_join == scores(*test, f"--data_path={other_data}")
