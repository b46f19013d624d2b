"""The generated data set: same bytes from the same seed, a valid layout, the wanted difficulty, and bad arguments."""

import os
import pickle
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest

from aligned_reid import InputError
from aligned_reid.data.partitions import GALLERY, MULTI_QUERY, QUERY, parse_image_name, read_partitions
from aligned_reid.synthetic.make import make_synthetic

SCRIPT = Path(__file__).parents[2] / "script" / "make_synthetic.py"
NUM_IDS, NUM_CAMERAS, NUM_IMAGES = 24, 3, 4


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic(
        tmp_path_factory.mktemp("small") / "set", NUM_IDS, NUM_CAMERAS, NUM_IMAGES, seed=3, num_workers=1
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_same_seed_same_bytes_whatever_the_number_of_workers(small_set: Path, tmp_path: Path) -> None:
    again = make_synthetic(tmp_path / "again", NUM_IDS, NUM_CAMERAS, NUM_IMAGES, seed=3, num_workers=2)
    assert contents(again) == contents(small_set)


def test_other_seed_other_images(tmp_path: Path) -> None:
    sets = [contents(make_synthetic(tmp_path / str(seed), 4, 2, 2, seed=seed, num_workers=1)) for seed in (1, 2)]
    images = [name for name in sets[0] if name.startswith("images/")]
    assert len(images) == 5 * 2 * 2
    assert all(sets[0][name] != sets[1][name] for name in images)


def test_more_images_leave_the_others_as_they_are(small_set: Path, tmp_path: Path) -> None:
    fewer = make_synthetic(tmp_path / "fewer", 5, 2, 2, seed=3, num_workers=1)
    for path in (fewer / "images").iterdir():
        assert path.read_bytes() == (small_set / "images" / path.name).read_bytes()


def test_images_are_readable_and_of_one_size(small_set: Path) -> None:
    paths = sorted((small_set / "images").iterdir())
    assert len(paths) == (NUM_IDS + 1) * NUM_CAMERAS * NUM_IMAGES
    for path in paths:
        image = cv2.imread(str(path))
        assert image.shape == (128, 64, 3)
        assert image.std() > 5, path.name


def test_partitions(small_set: Path) -> None:
    partitions = read_partitions(small_set / "partitions.pkl")
    names = set(os.listdir(small_set / "images"))
    assert names == {*partitions.trainval_im_names, *partitions.test_im_names}
    assert len(names) == len(partitions.trainval_im_names) + len(partitions.test_im_names)
    assert set(partitions.trainval_im_names) == {*partitions.train_im_names, *partitions.val_im_names}
    train_ids = set(partitions.trainval_ids2labels)
    test_ids = {parse_image_name(name).person_id for name in partitions.test_im_names}
    assert len(train_ids) == NUM_IDS * 3 // 4
    assert not train_ids & test_ids
    assert 0 in test_ids
    new_names = pickle.loads((small_set / "ori_to_new_im_name.pkl").read_bytes())
    assert set(new_names.values()) == names


def test_marks(small_set: Path) -> None:
    partitions = read_partitions(small_set / "partitions.pkl")
    marks = defaultdict(list)
    for name, mark in zip(partitions.test_im_names, partitions.test_marks, strict=True):
        parsed = parse_image_name(name)
        marks[parsed.person_id, parsed.camera].append(mark)
    for (person_id, _), of_pair in marks.items():
        wanted = [GALLERY] * NUM_IMAGES if person_id == 0 else [QUERY, MULTI_QUERY, *[GALLERY] * (NUM_IMAGES - 2)]
        assert sorted(of_pair) == sorted(wanted)


@pytest.mark.parametrize(("num_cameras", "num_images"), [(2, 2), (3, 3), (4, 5)])
def test_every_query_has_a_match_under_another_camera(tmp_path: Path, num_cameras: int, num_images: int) -> None:
    save_dir = make_synthetic(tmp_path / "set", 5, num_cameras, num_images, seed=1, num_workers=1)
    partitions = read_partitions(save_dir / "partitions.pkl")
    assert sorted(set(partitions.val_marks)) == [QUERY, GALLERY]
    for names, marks in (
        (partitions.test_im_names, partitions.test_marks),
        (partitions.val_im_names, partitions.val_marks),
    ):
        parsed = [parse_image_name(name) for name in names]
        gallery = {image[:2] for image, mark in zip(parsed, marks, strict=True) if mark == GALLERY}
        queries = [image for image, mark in zip(parsed, marks, strict=True) if mark == QUERY]
        assert queries
        for query in queries:
            assert any(person == query.person_id and camera != query.camera for person, camera in gallery)


def test_raw_pixels_find_less_than_half(tmp_path: Path) -> None:
    large_set = make_synthetic(tmp_path / "set", 300, 3, 2, seed=3)  # among few people even raw pixels find somebody
    partitions = read_partitions(large_set / "partitions.pkl")
    pixels = {mark: [] for mark in (QUERY, GALLERY, MULTI_QUERY)}
    images = {mark: [] for mark in (QUERY, GALLERY, MULTI_QUERY)}
    for name, mark in zip(partitions.test_im_names, partitions.test_marks, strict=True):
        pixels[mark].append(cv2.imread(str(large_set / "images" / name)).astype(np.float32).ravel())
        images[mark].append(parse_image_name(name))
    gallery = np.array(pixels[GALLERY])
    num_correct = 0
    for query, image in zip(pixels[QUERY], images[QUERY], strict=True):
        distances = np.linalg.norm(gallery - query, axis=1)
        distances[[other[:2] == image[:2] for other in images[GALLERY]]] = np.inf
        num_correct += images[GALLERY][int(distances.argmin())].person_id == image.person_id
    assert num_correct / len(pixels[QUERY]) < 0.5


def test_global_random_state_and_opencv_threads_stay(tmp_path: Path) -> None:
    before, num_threads = np.random.get_state()[1].copy(), cv2.getNumThreads()
    make_synthetic(tmp_path / "set", 4, 2, 2, seed=1, num_workers=1)
    assert (np.random.get_state()[1] == before).all()
    assert cv2.getNumThreads() == num_threads


def test_started_again_it_completes(small_set: Path, tmp_path: Path) -> None:
    save_dir = make_synthetic(tmp_path / "set", NUM_IDS, NUM_CAMERAS, NUM_IMAGES, seed=3, num_workers=1)
    images = sorted((save_dir / "images").iterdir())
    for path in [*images[7:40], save_dir / "partitions.pkl", save_dir / "ori_to_new_im_name.pkl"]:
        path.unlink()
    (save_dir / "images" / ".half.jpg.99.tmp").write_bytes(b"\xff\xd8")
    untouched = images[0].stat().st_mtime_ns
    make_synthetic(save_dir, NUM_IDS, NUM_CAMERAS, NUM_IMAGES, seed=3, num_workers=1)
    assert contents(save_dir) == contents(small_set)
    assert images[0].stat().st_mtime_ns == untouched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_ids": 3}, "num_ids is 3"),
        ({"num_cameras": 1}, "num_cameras is 1"),
        ({"images_per_camera": 1}, "images_per_camera is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"num_cameras": 10_000}, "num_cameras is 10000"),
        ({"num_workers": 0}, "num_workers is 0"),
    ],
)
def test_bad_numbers(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_synthetic(
            tmp_path / "set", **{"num_ids": 4, "num_cameras": 2, "images_per_camera": 2, "seed": 1} | arguments
        )
    assert not (tmp_path / "set").exists()


def test_folder_that_is_not_its_own_stays(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"):
        make_synthetic(tmp_path, 4, 2, 2, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_set_with_other_settings_stays(tmp_path: Path) -> None:
    save_dir = make_synthetic(tmp_path / "set", 4, 2, 2, seed=1, num_workers=1)
    before = contents(save_dir)
    with pytest.raises(InputError, match="other settings"):
        make_synthetic(save_dir, 4, 2, 2, seed=2, num_workers=1)
    assert contents(save_dir) == before


def test_save_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for save_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="file"):
            make_synthetic(save_dir, 4, 2, 2, seed=1)


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_script(tmp_path: Path) -> None:
    save_dir = tmp_path / "a set"
    numbers = ("--num_ids=4", "--num_cameras=2", "--images_per_camera=2", "--seed=5")
    done = run_script(f"--save_dir={save_dir}", *numbers)
    assert done.returncode == 0, done.stderr
    assert "query" in done.stdout
    assert f"python script/train.py --data_path='{save_dir}'" in done.stdout
    assert (save_dir / "partitions.pkl").is_file()
    refused = run_script(f"--save_dir={save_dir}", *numbers[1:], "--num_ids=3")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert "num_ids is 3" in refused.stderr
