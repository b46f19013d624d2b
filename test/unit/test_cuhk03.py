"""Preparing CUHK03's new protocol, on made-up files of its formats. The real data set was never available."""

import pickle
import shlex
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import assert_refused, contents, preparation_refusal
from PIL import Image
from scipy.io import savemat

from aligned_reid import InputError
from aligned_reid.data import open_data
from aligned_reid.data.partitions import read_partitions
from aligned_reid.data.prepare.cuhk03 import find_raw_cuhk03, prepare_cuhk03
from aligned_reid.data.prepare.jpeg import encode_jpeg

# The protocol's images: pair of cameras, person of the pair, camera and number; and the new number of the person.
NAMES = ["1_001_1_01", "1_001_1_02", "1_001_2_06", "1_002_1_01", "1_002_2_07", "2_001_1_01", "2_001_2_10"]
IMAGES = {f"{name}.png": (person, int(name[6])) for name, person in zip(NAMES, (7, 7, 7, 3, 3, 5, 5), strict=True)}
TRAIN, GALLERY, QUERY = [4, 5], [2, 3, 7], [1, 6]  # counted from 1, as MATLAB does
SHAPES = ((2, 10), (1, 10))  # of the pairs: persons and images


def picture(kind: str, name: str) -> np.ndarray:
    """A smooth picture, with another size and other colors for each name."""
    seed = sum(map(ord, kind + name)) % 60
    rows, columns = np.mgrid[0 : 30 + seed, 0 : 16 + seed]
    return np.stack([rows * 2, columns * 2, rows + seed], axis=-1).astype(np.uint8)


def write_images_file(path: Path) -> None:
    """cuhk-03.mat as MATLAB writes it: cells are references, axes are reversed, a missing image is []."""
    with h5py.File(path, "w", userblock_size=512) as file:
        refs = file.create_group("#refs#")
        empty = refs.create_dataset("empty", data=np.zeros(2, np.uint64))
        for kind in ("labeled", "detected"):
            cells = [np.full(shape[::-1], empty.ref, h5py.ref_dtype) for shape in SHAPES]
            for name in IMAGES:
                pair, person, _, number = (int(field) - 1 for field in name[:-4].split("_"))
                cells[pair][number, person] = refs.create_dataset(f"{kind}{name}", data=picture(kind, name).T).ref
            pairs = [refs.create_dataset(f"{kind}{pair}", data=one).ref for pair, one in enumerate(cells)]
            file.create_dataset(kind, data=np.array([pairs], h5py.ref_dtype))


def cells(names) -> np.ndarray:
    return np.array([[np.array([name])] for name in names], dtype=object)


def write_protocol(path: Path, **changes) -> None:
    people, cameras = zip(*IMAGES.values(), strict=True)
    content = {"labels": people, "camId": cameras, "train_idx": TRAIN, "query_idx": QUERY, "gallery_idx": GALLERY}
    content = {name: np.array([values], float).T for name, values in content.items()} | {"filelist": cells(IMAGES)}
    savemat(path, {name: value for name, value in (content | changes).items() if value is not None})


@pytest.fixture
def raw(tmp_path) -> Path:
    root = tmp_path / "cuhk03"
    (root / "cuhk03_release").mkdir(parents=True)
    write_images_file(root / "cuhk03_release" / "cuhk-03.mat")
    for kind in ("labeled", "detected"):
        write_protocol(root / f"cuhk03_new_protocol_config_{kind}.mat")
    return root


def assert_prepared(save_dir: Path, kind: str) -> None:
    names = list(IMAGES)
    new_names = pickle.loads((save_dir / "ori_to_new_im_name.pkl").read_bytes())
    assert list(new_names) == [names[row - 1] for row in TRAIN + GALLERY + QUERY]
    counted = {}
    for name, new in new_names.items():
        person, camera = IMAGES[name]
        index = counted[person, camera] = counted.get((person, camera), -1) + 1
        assert new == f"{person:08d}_{camera:04d}_{index:08d}.jpg"
        assert (save_dir / "images" / new).read_bytes() == encode_jpeg(picture(kind, name))
    partitions = read_partitions(save_dir / "partitions.pkl")
    assert partitions.trainval_ids2labels == {3: 0}
    assert partitions.test_im_names == [new_names[names[row - 1]] for row in QUERY + GALLERY]
    assert partitions.test_marks == [0, 0, 1, 1, 1]


def refusal(source: Path, save_dir: Path, kind: str = "labeled") -> str:
    return preparation_refusal(prepare_cuhk03, source, save_dir, kind)


@pytest.mark.parametrize("kind", ["labeled", "detected"])
def test_images_are_read_from_the_mat_file(raw, tmp_path, kind):
    before = contents(raw)
    assert_prepared(prepare_cuhk03(raw, tmp_path / "prepared", kind), kind)
    assert contents(raw) == before


def test_images_are_read_from_extracted_files(raw, tmp_path):
    shutil.rmtree(raw / "cuhk03_release")
    folder = raw / "images_detected"
    folder.mkdir()
    for name in IMAGES:
        Image.fromarray(picture("detected", name)).save(folder / name)
    (folder / "1_001_1_01.png").rename(folder / "1_001_1_01.bmp")  # its content is still a PNG
    assert_prepared(prepare_cuhk03(raw, tmp_path / "prepared", "detected"), "detected")
    (folder / "1_001_1_02.png").unlink()
    assert "1_001_1_02.png is missing" in refusal(raw, tmp_path / "other", "detected")
    assert "neither cuhk-03.mat nor images_labeled/" in refusal(raw, tmp_path / "other")


def test_sources_that_are_not_cuhk03_are_refused(raw, tmp_path):
    save_dir = tmp_path / "prepared"
    assert "cuhk03_new_protocol_config_labeled.mat" in refusal(raw / "cuhk03_release", save_dir)
    assert "inside the source" in refusal(raw, raw / "prepared")
    assert "--kind both" in refusal(raw, save_dir, "both")
    mat = raw / "cuhk03_release" / "cuhk-03.mat"
    with h5py.File(mat, "a") as file:
        del file["labeled"]
    assert "under labeled" in refusal(raw, save_dir)
    prepare_cuhk03(raw, tmp_path / "detected", "detected")
    mat.write_bytes(mat.read_bytes()[:1000])
    assert "cuhk-03.mat is damaged" in refusal(raw, save_dir)
    config = raw / "cuhk03_new_protocol_config_labeled.mat"
    config.write_bytes(config.read_bytes()[:200])
    assert f"{config} is damaged" in refusal(raw, save_dir)
    assert not save_dir.exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": None}, "labels"),
        ({"camId": np.ones((3, 1))}, "3 camId for 7 names"),
        ({"train_idx": np.array([[4], [8]])}, "train_idx"),
        ({"query_idx": np.array([[0]])}, "query_idx"),
        ({"gallery_idx": np.zeros((0, 0))}, "gallery_idx"),
        ({"labels": np.full((7, 1), 0.5)}, "labels"),
        ({"labels": np.full((7, 1), np.inf)}, "labels"),
        ({"train_idx": np.array([[1]])}, "person 7"),
        ({"train_idx": np.array([[4], [4]])}, "1_002_1_01.png twice"),
    ],
)
def test_inconsistent_protocols_are_refused(raw, tmp_path, changes, reason):
    write_protocol(raw / "cuhk03_new_protocol_config_labeled.mat", **changes)
    assert reason in refusal(raw, tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
    "name",
    ["1_001_1_03.png", "1_009_1_01.png", "9_001_1_01.png", "0_001_1_01.png", f"{'9' * 5000}_001_1_01.png", "x.png"],
)
def test_an_image_that_is_not_in_the_mat_file_is_named(raw, tmp_path, name):
    write_protocol(raw / "cuhk03_new_protocol_config_labeled.mat", filelist=cells([name, *list(IMAGES)[1:]]))
    assert name[:50] in refusal(raw, tmp_path / "prepared")


def test_the_original_data_set_is_recognized(raw, tmp_path):
    release = raw / "cuhk03_release"
    assert (find_raw_cuhk03(raw), find_raw_cuhk03(release)) == (raw, release)
    assert find_raw_cuhk03(tmp_path / "none") is find_raw_cuhk03(release / "cuhk-03.mat") is None
    with pytest.raises(InputError, match="--kind labeled"):
        open_data(raw)


def test_the_command_prints_counts_and_the_next_command(command, raw, tmp_path):
    flags = ("--source", raw, "--save_dir", tmp_path / "new")
    done = command("prepare_cuhk03.py", *flags, "--kind=labeled")
    assert done.status == 0, done.err
    assert [line.split()[:2] for line in done.out.splitlines()[3:5]] == [["query", "2"], ["gallery", "3"]]
    assert f"--dataset=cuhk03_labeled --data_path={shlex.quote(str(tmp_path / 'new'))}" in done.out
    for wrong in ((), ("--kind=both",)):
        assert_refused(command("prepare_cuhk03.py", *flags, *wrong), "--kind")
