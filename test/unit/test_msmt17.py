"""Preparing MSMT17, on made-up folders of versions 1 and 2. The real data set was never available."""

import pickle
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_refused, contents, preparation_refusal
from PIL import Image

from aligned_reid.data.partitions import build_partitions, read_partitions
from aligned_reid.data.prepare.jpeg import encode_jpeg
from aligned_reid.data.prepare.msmt17 import find_raw_msmt17, prepare_msmt17
from aligned_reid.data.transforms import decode_image

ROWS = [  # list, image and new name
    ("train", "0000/0000_000_01_0303morning_0015_0.jpg", "00000000_0001_00000000.jpg"),
    ("train", "0000/0000_001_05_0303noon_0015_1.jpg", "00000000_0005_00000000.jpg"),
    ("train", "0001/0001_000_05_0303morning_0020_0.jpg", "00000001_0005_00000000.jpg"),
    ("val", "0001/0001_001_01_0303noon_0016_0.jpg", "00000001_0001_00000000.jpg"),
    ("gallery", "0000/0000_001_02_0303afternoon_0030_2.jpg", "00000002_0002_00000000.jpg"),
    ("gallery", "0000/0000_002_14_0303afternoon_0031_2.jpg", "00000002_0014_00000000.jpg"),
    ("gallery", "0003/0003_000_14_0303morning_0040_0.jpg", "00000005_0014_00000000.jpg"),
    ("query", "0000/0000_000_14_0303morning_0025_0.jpg", "00000002_0014_00000001.jpg"),
]
FOLDERS = {"train": "train", "val": "train", "gallery": "test", "query": "test"}
LISTS = [f"list_{part}.txt" for part in FOLDERS]
NEW_NAMES = {f"{FOLDERS[part]}/{name}": new for part, name, new in ROWS}

refusal = partial(preparation_refusal, prepare_msmt17)


def write_raw(root: Path, **names: str) -> Path:
    """names: of the folders train and test, if they are others."""
    for number, (part, name, _) in enumerate(ROWS):
        file = root / names.get(FOLDERS[part], FOLDERS[part]) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_jpeg(np.full((8, 4, 3), number, np.uint8)))
        with open(root / f"list_{part}.txt", "a") as lines:
            lines.write(f"{name} {int(name[:4])}\n")
    return root


@pytest.fixture
def raw(tmp_path) -> Path:
    return write_raw(tmp_path / "download" / "MSMT17_V1")


def test_persons_of_the_test_are_numbered_after_those_of_training(raw, tmp_path):
    before = contents(raw)
    save_dir = prepare_msmt17(raw, tmp_path / "msmt17")
    assert contents(raw) == before
    assert pickle.loads((save_dir / "ori_to_new_im_name.pkl").read_bytes()) == NEW_NAMES
    assert contents(save_dir / "images") == {new: before[original] for original, new in NEW_NAMES.items()}
    names = list(NEW_NAMES.values())
    expected = build_partitions(names[:4], query=names[7:], gallery=names[4:7])
    assert read_partitions(save_dir / "partitions.pkl") == expected


@pytest.mark.parametrize("version", ["v2", "V2"])
def test_version_2_is_found_in_the_folder_around_it(tmp_path, version):
    folders = {part: f"mask_{part}_{version}" for part in ("train", "test")}
    write_raw(tmp_path / "download" / "MSMT17_V2", **folders)
    save_dir = prepare_msmt17(tmp_path / "download", tmp_path / "msmt17")
    new_names = pickle.loads((save_dir / "ori_to_new_im_name.pkl").read_bytes())
    assert list(new_names.values()) == list(NEW_NAMES.values())
    assert {name.split("/")[0] for name in new_names} == set(folders.values())


def test_images_of_other_kinds_become_jpegs(raw, tmp_path):
    gallery, query = raw / list(NEW_NAMES)[4], raw / list(NEW_NAMES)[7]
    Image.open(query).save(query.with_suffix(".PNG"))
    query.unlink()
    Image.open(gallery).save(gallery, "PNG")
    save_dir = prepare_msmt17(raw, tmp_path / "msmt17")
    new_names = pickle.loads((save_dir / "ori_to_new_im_name.pkl").read_bytes())
    assert query.with_suffix(".PNG").relative_to(raw).as_posix() in new_names
    assert all(decode_image(path).shape == (8, 4, 3) for path in (save_dir / "images").iterdir())


def test_sources_that_cannot_be_used_are_refused(raw, tmp_path):
    save_dir = tmp_path / "msmt17"
    assert "list_train.txt" in refusal(raw / "train", save_dir)
    assert "inside the source" in refusal(raw, raw / "prepared")
    image = raw / "test" / "0003" / "0003_000_14_0303morning_0040_0.jpg"
    image.unlink()
    message = refusal(raw, save_dir)
    assert "list_gallery.txt, line 3:" in message and image.name in message
    assert not save_dir.exists()
    image.write_bytes(b"<html>")
    assert image.name in refusal(raw, save_dir)


@pytest.mark.parametrize("name", LISTS)
def test_damaged_lists_are_named(raw, tmp_path, name):
    text = (raw / name).read_text()
    for content, reason in (
        (b"", f"{name} is empty"),
        (text.replace(".jpg ", ".jpg;").encode(), f"{name}, line 1:"),
        (b"\xff\xfe\x00", name),
        ((text + text).encode(), "twice"),
    ):
        (raw / name).write_bytes(content)
        assert reason in refusal(raw, tmp_path / "msmt17")
    (raw / name).unlink()
    assert name in refusal(raw, tmp_path / "msmt17")


def test_the_data_set_is_recognized_and_the_command_prints_the_next_one(command, raw, tmp_path):
    assert find_raw_msmt17(raw) == find_raw_msmt17(raw.parent) == raw
    for path in (tmp_path / "none", raw / "train", raw / "list_train.txt"):
        assert find_raw_msmt17(path) is None
    done = command("prepare_msmt17.py", "--source", raw, "--save_dir", tmp_path / "msmt17")
    assert done.status == 0, done.err
    assert done.out.splitlines()[0].split()[:2] == ["trainval", "4"]
    assert f"--dataset=msmt17 --data_path={shlex.quote(str(tmp_path / 'msmt17'))}" in done.out
    assert_refused(command("prepare_msmt17.py", "--source", raw / "train", "--save_dir", tmp_path / "x"))
