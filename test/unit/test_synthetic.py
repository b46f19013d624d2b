"""The drawn data set: the same bytes from the same seed, a valid layout, its difficulty, and bad arguments."""

import os
import pickle
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import contents, refusal

from aligned_reid.data.partitions import GALLERY, MULTI_QUERY, QUERY, parse_image_name, read_partitions
from aligned_reid.synthetic.make import make_synthetic

NUM_IDS, NUM_CAMERAS, NUM_IMAGES = 24, 3, 4


@pytest.fixture(scope="module")
def small_set(tmp_path_factory) -> Path:
    save_dir = tmp_path_factory.mktemp("small") / "set"
    return make_synthetic(save_dir, NUM_IDS, NUM_CAMERAS, NUM_IMAGES, seed=3, num_workers=1)


def test_the_same_seed_gives_the_same_bytes_for_any_number_of_workers_and_images(small_set, tmp_path):
    again = make_synthetic(tmp_path / "again", NUM_IDS, NUM_CAMERAS, NUM_IMAGES, seed=3, num_workers=2)
    assert contents(again) == contents(small_set)
    fewer = make_synthetic(tmp_path / "fewer", 5, 2, 2, seed=3, num_workers=1)
    assert contents(fewer / "images").items() <= contents(small_set / "images").items()


def test_another_seed_gives_other_images_and_leaves_global_states(tmp_path):
    before, num_threads = np.random.get_state()[1].copy(), cv2.getNumThreads()
    sets = [contents(make_synthetic(tmp_path / str(seed), 4, 2, 2, seed=seed, num_workers=1)) for seed in (1, 2)]
    assert (np.random.get_state()[1] == before).all() and cv2.getNumThreads() == num_threads
    images = [name for name in sets[0] if name.startswith("images/")]
    assert len(images) == 5 * 2 * 2
    assert all(sets[0][name] != sets[1][name] for name in images)


def test_images_are_of_one_size_and_parts_complete_with_all_marks_under_each_camera(small_set):
    images = [cv2.imread(str(path)) for path in (small_set / "images").iterdir()]
    assert len(images) == (NUM_IDS + 1) * NUM_CAMERAS * NUM_IMAGES
    assert all(image.shape == (128, 64, 3) and image.std() > 5 for image in images)
    partitions = read_partitions(small_set / "partitions.pkl")
    names = sorted(os.listdir(small_set / "images"))
    assert names == sorted(partitions.trainval_im_names + partitions.test_im_names)
    assert sorted(partitions.trainval_im_names) == sorted(partitions.train_im_names + partitions.val_im_names)
    assert sorted(pickle.loads((small_set / "ori_to_new_im_name.pkl").read_bytes()).values()) == names
    marks = defaultdict(list)
    for name, mark in zip(partitions.test_im_names, partitions.test_marks, strict=True):
        person_id, camera, _ = parse_image_name(name)
        marks[person_id, camera].append(mark)
    for (person_id, _), of_pair in marks.items():
        wanted = [GALLERY] * NUM_IMAGES if person_id == 0 else [QUERY, MULTI_QUERY, *[GALLERY] * (NUM_IMAGES - 2)]
        assert sorted(of_pair) == sorted(wanted)
    test_ids = {person_id for person_id, _ in marks}
    assert len(partitions.trainval_ids2labels) == NUM_IDS * 3 // 4
    assert 0 in test_ids and not partitions.trainval_ids2labels.keys() & test_ids


@pytest.mark.parametrize(("num_cameras", "num_images"), [(2, 2), (4, 5)])
def test_queries_have_matches_under_other_cameras(tmp_path, num_cameras, num_images):
    save_dir = make_synthetic(tmp_path / "set", 5, num_cameras, num_images, seed=1, num_workers=1)
    partitions = read_partitions(save_dir / "partitions.pkl")
    for part in ("val", "test"):
        names, marks = getattr(partitions, f"{part}_im_names"), getattr(partitions, f"{part}_marks")
        parsed = [(*parse_image_name(name), mark) for name, mark in zip(names, marks, strict=True)]
        gallery = {(person, camera) for person, camera, _, mark in parsed if mark == GALLERY}
        queries = [(person, camera) for person, camera, _, mark in parsed if mark == QUERY]
        assert queries
        for person, camera in queries:
            assert any(other == person and place != camera for other, place in gallery)


def test_raw_pixels_find_less_than_half(tmp_path):
    large_set = make_synthetic(tmp_path / "set", 120, 3, 2, seed=3)  # among few people raw pixels do well
    partitions = read_partitions(large_set / "partitions.pkl")
    images = {mark: [] for mark in (QUERY, GALLERY, MULTI_QUERY)}
    for name, mark in zip(partitions.test_im_names, partitions.test_marks, strict=True):
        pixels = cv2.imread(str(large_set / "images" / name)).astype(np.float32).ravel()
        images[mark].append((parse_image_name(name), pixels))
    gallery = np.array([pixels for _, pixels in images[GALLERY]])
    num_correct = 0
    for query, pixels in images[QUERY]:
        distances = np.linalg.norm(gallery - pixels, axis=1)
        distances[[other[:2] == query[:2] for other, _ in images[GALLERY]]] = np.inf
        num_correct += images[GALLERY][int(distances.argmin())][0].person_id == query.person_id
    assert num_correct / len(images[QUERY]) < 0.5


def test_an_interrupted_drawing_resumes(small_set, tmp_path):
    save_dir = make_synthetic(tmp_path / "set", NUM_IDS, NUM_CAMERAS, NUM_IMAGES, seed=3, num_workers=1)
    images = sorted((save_dir / "images").iterdir())
    for path in [*images[7:40], save_dir / "partitions.pkl", save_dir / "ori_to_new_im_name.pkl"]:
        path.unlink()
    (save_dir / "images" / ".half.jpg.99.tmp").write_bytes(b"\xff\xd8")
    images[50].write_bytes(b"")  # as after a power failure
    untouched = images[0].stat().st_mtime_ns
    make_synthetic(save_dir, NUM_IDS, NUM_CAMERAS, NUM_IMAGES, seed=3, num_workers=1)
    assert contents(save_dir) == contents(small_set)
    assert images[0].stat().st_mtime_ns == untouched


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_ids", 3), ("num_cameras", 1), ("num_cameras", 10_000), ("images_per_camera", 1), ("seed", -1)],
)
def test_numbers_out_of_range_are_refused(tmp_path, name, value):
    numbers = {"num_ids": 4, "num_cameras": 2, "images_per_camera": 2, "seed": 1, name: value}
    assert f"{name} is {value}" in refusal(make_synthetic, tmp_path / "set", **numbers)
    assert "num_workers" in refusal(make_synthetic, tmp_path / "set", 4, 2, 2, 1, num_workers=0)
    assert not (tmp_path / "set").exists()


def test_folders_with_anything_else_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").touch()
    make_synthetic(tmp_path / "set", 4, 2, 2, seed=2, num_workers=1)
    before = contents(tmp_path)
    for save_dir, reason in (
        (tmp_path / "other", "something else"),
        (tmp_path / "set", "other settings"),
        (tmp_path / "file", "cannot write"),
        (tmp_path / "file" / "below", "cannot write"),
        (tmp_path / ("n" * 300), "cannot write"),
    ):
        assert reason in refusal(make_synthetic, save_dir, 4, 2, 2, seed=1)
    assert contents(tmp_path) == before


def test_the_script_prints_counts_and_the_next_command(command, tmp_path):
    save_dir = tmp_path / "a set"
    numbers = ("--num_cameras=2", "--images_per_camera=2", "--seed=5")
    done = command("make_synthetic.py", f"--save_dir={save_dir}", "--num_ids=4", *numbers)
    assert done.status == 0, done.err
    assert "query" in done.out and f"python script/train.py --data_path='{save_dir}' --pretrained=none" in done.out
    refused = command("make_synthetic.py", f"--save_dir={save_dir}", "--num_ids=3", *numbers)
    assert refused.status == 2 and refused.err.count("\n") == 1 and "num_ids" in refused.err
