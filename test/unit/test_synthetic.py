"""The drawn data set: the same bytes from the same seed, a valid layout, its difficulty, and bad arguments."""

import os
import pickle
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import assert_refused, contents, refusal

from aligned_reid.data import TestImages, open_data
from aligned_reid.data.partitions import GALLERY, MULTI_QUERY, QUERY
from aligned_reid.evaluation import Ranking, rank
from aligned_reid.synthetic.make import make_synthetic

NUM_IDS, NUM_CAMERAS, NUM_IMAGES = 24, 3, 4


@pytest.fixture(scope="module")
def small_set(tmp_path_factory) -> Path:
    save_dir = tmp_path_factory.mktemp("small") / "set"
    return make_synthetic(save_dir, NUM_IDS, NUM_CAMERAS, NUM_IMAGES, seed=3, num_workers=1)


def test_images_depend_on_the_seed_and_not_on_the_number_of_workers_or_images(small_set, tmp_path):
    again = make_synthetic(tmp_path / "again", NUM_IDS, NUM_CAMERAS, NUM_IMAGES, seed=3, num_workers=2)
    assert contents(again) == contents(small_set)
    before, num_threads = np.random.get_state()[1].copy(), cv2.getNumThreads()
    fewer, other = (
        contents(make_synthetic(tmp_path / str(seed), 5, 2, 2, seed=seed, num_workers=1) / "images") for seed in (3, 4)
    )
    assert fewer.items() <= contents(small_set / "images").items()
    assert fewer.keys() == other.keys() and not fewer.items() & other.items()
    assert (np.random.get_state()[1] == before).all() and cv2.getNumThreads() == num_threads


def test_images_are_of_one_size_and_parts_complete_with_all_marks_under_each_camera(small_set):
    data = open_data(small_set)
    images = [cv2.imread(str(path)) for path in (small_set / "images").iterdir()]
    assert len(images) == (NUM_IDS + 1) * NUM_CAMERAS * NUM_IMAGES
    assert all(image.shape == (128, 64, 3) and image.std() > 5 for image in images)
    names = sorted(os.listdir(data.images_dir))
    assert names == sorted(data.partitions.trainval_im_names + data.partitions.test_im_names)
    assert sorted(pickle.loads((small_set / "ori_to_new_im_name.pkl").read_bytes()).values()) == names
    test = TestImages(data, include_multi_query=True)
    assert len(data.partitions.trainval_ids2labels) == NUM_IDS * 3 // 4
    assert 0 in test.person_ids and not data.partitions.trainval_ids2labels.keys() & set(test.person_ids)
    for person, camera in product(set(test.person_ids), range(1, NUM_CAMERAS + 1)):
        marks = test.marks[(test.person_ids == person) & (test.cameras == camera)]
        expected = [GALLERY] * NUM_IMAGES if person == 0 else [QUERY, *[GALLERY] * (NUM_IMAGES - 2), MULTI_QUERY]
        assert sorted(marks) == expected


def ranked(save_dir: Path, part: str) -> tuple[Ranking, int]:
    """The ranking of a part by raw pixels, and its number of queries."""
    images = TestImages(open_data(save_dir), part, size=(128, 64))
    pixels = images.load(range(len(images))).images.flatten(1).float()
    split = [np.flatnonzero(images.marks == mark) for mark in (QUERY, GALLERY)]
    labels = [values[rows] for values in (images.person_ids, images.cameras) for rows in split]
    return rank(torch.cdist(pixels[split[0]], pixels[split[1]]), *labels), len(split[0])


@pytest.mark.parametrize(("num_cameras", "num_images"), [(2, 2), (4, 5)])
@pytest.mark.parametrize("part", ["val", "test"])
def test_queries_have_matches_under_other_cameras(tmp_path, num_cameras, num_images, part):
    save_dir = make_synthetic(tmp_path / "set", 5, num_cameras, num_images, seed=1, num_workers=1)
    ranking, num_queries = ranked(save_dir, part)
    assert ranking.num_valid_queries == num_queries > 0


def test_raw_pixels_find_less_than_half(tmp_path):
    large_set = make_synthetic(tmp_path / "set", 80, 3, 2, seed=3)  # among few people raw pixels do well
    assert ranked(large_set, "test")[0].cmc[0] < 0.5


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
    assert_refused(command("make_synthetic.py", f"--save_dir={save_dir}", "--num_ids=3", *numbers), "num_ids")
