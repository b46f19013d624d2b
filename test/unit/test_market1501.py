"""Preparing Market-1501, on a made-up one: names, order, parts, zip files, and sources that cannot be used."""

import os
import pickle
import shlex
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE, ROOT, assert_refused, contents, preparation_refusal
from PIL import Image

from aligned_reid.data.partitions import build_partitions, read_partitions
from aligned_reid.data.prepare.jpeg import encode_jpeg
from aligned_reid.data.prepare.market1501 import find_raw_market1501, prepare_market1501
from aligned_reid.data.transforms import decode_image

SCRIPT = "prepare_market1501.py"
refusal = partial(preparation_refusal, prepare_market1501)

NEW_NAMES = {
    "bounding_box_train/0002_c1s1_000451_03.jpg": "00000002_0001_00000000.jpg",
    "bounding_box_train/0007_c1s1_000001_01.jpg": "00000007_0001_00000000.jpg",
    "bounding_box_train/0007_c1s2_000009_01.jpg": "00000007_0001_00000001.jpg",
    "bounding_box_train/0007_c2s1_000001_01.jpg": "00000007_0002_00000000.jpg",
    "bounding_box_test/0000_c1s1_000151_01.jpg": "00000000_0001_00000000.jpg",
    "bounding_box_test/0001_c1s1_001051_00.jpg": "00000001_0001_00000000.jpg",
    "bounding_box_test/0001_c2s1_000301_00.jpg": "00000001_0002_00000000.jpg",
    "query/0001_c1s1_001051_00.jpg": "00000001_0001_00000001.jpg",
    "query/0003_c6s4_000001_00.jpg": "00000003_0006_00000000.jpg",
    "gt_bbox/0001_c1s1_001051_00.jpg": "00000001_0001_00000002.jpg",
    "gt_bbox/0001_c1s1_001126_00.jpg.jpg": "00000001_0001_00000003.jpg",
    "gt_bbox/0003_c6s4_000002_00.jpg": "00000003_0006_00000001.jpg",
}
LEFT_OUT = [
    "bounding_box_test/-1_c1s1_000401_03.jpg",
    "gt_bbox/0001_c2s1_000301_00.jpg",  # person 1 has no query under camera 2
    "gt_bbox/0007_c1s1_000001_01.jpg",  # person 7 is for training
    "bounding_box_train/Thumbs.db",
    "bounding_box_train/._0002_c1s1_000451_03.jpg",
    "bounding_box_test/Thumbs.db",
    "gt_query/0001_c1s1_001051_00_good.mat",
]


def content_of(original: str) -> bytes:
    """A JPEG of one color, different for each image; something else for names that are not images."""
    if not original.endswith(".jpg") or "/." in original:
        return b"not an image"
    color = np.frombuffer(sha256(original.encode()).digest(), np.uint8, 3)
    return encode_jpeg(np.full((8, 4, 3), color))


@pytest.fixture
def raw(tmp_path) -> Path:
    """A made-up Market-1501 folder."""
    root = tmp_path / "Market-1501-v15.09.15"
    for name in [*reversed(NEW_NAMES), *LEFT_OUT, "readme.txt"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content_of(name))
    return root


def zip_of(raw: Path, prefix: str = "", separator: str = "/") -> Path:
    path = raw.parent / "market.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/bounding_box_train/._0002_c1s1_000451_03.jpg", b"not an image")
        for file in sorted(raw.rglob("*"), reverse=True):
            archive.write(file, (prefix + str(file.relative_to(raw))).replace("/", separator))
    return path


def assert_prepared(save_dir: Path) -> None:
    assert sorted(path.name for path in save_dir.iterdir()) == ["images", "ori_to_new_im_name.pkl", "partitions.pkl"]
    assert pickle.loads((save_dir / "ori_to_new_im_name.pkl").read_bytes()) == NEW_NAMES
    images = {new: content_of(original) for original, new in NEW_NAMES.items()}
    assert contents(save_dir / "images") == images
    names = list(NEW_NAMES.values())
    train, gallery, query, multi_query = names[:4], names[4:7], names[7:9], names[9:]
    assert read_partitions(save_dir / "partitions.pkl") == build_partitions(train, query, gallery, multi_query)


def test_a_folder_is_prepared_and_not_changed(raw, tmp_path):
    before = contents(raw)
    assert prepare_market1501(raw, tmp_path / "new" / "market1501") == tmp_path / "new" / "market1501"
    assert_prepared(tmp_path / "new" / "market1501")
    assert contents(raw) == before


def test_the_root_may_be_two_folders_below_the_source_and_gt_bbox_missing(raw, tmp_path):
    around = tmp_path / "download"
    (around / "datasets").mkdir(parents=True)
    raw.rename(around / "datasets" / raw.name)
    assert_prepared(prepare_market1501(str(around), str(tmp_path / "market1501")))
    (around / "datasets" / raw.name / "gt_bbox").rename(tmp_path / "away")
    partitions = read_partitions(prepare_market1501(around, tmp_path / "without") / "partitions.pkl")
    assert partitions.test_marks == [0, 0, 1, 1, 1]


@pytest.mark.parametrize(("prefix", "separator"), [("", "/"), ("a/b/", "/"), ("Market/", "\\")])
def test_a_zip_with_any_root_or_backslashes_is_prepared(raw, tmp_path, prefix, separator):
    source = zip_of(raw, prefix, separator)
    assert find_raw_market1501(source) == source
    assert_prepared(prepare_market1501(source, tmp_path / "market1501"))


@pytest.mark.parametrize("zipped", [False, True])
def test_images_are_recognized_by_content_and_other_files_counted(raw, tmp_path, zipped):
    for number, original in enumerate(NEW_NAMES):
        file, kind = raw / original, ("PNG", "JPEG", "BMP")[number % 3]
        ending = (".jpg", ".JPG", ".jpeg", ".png", ".jfif")[number % 5]
        Image.open(file).save(file.with_suffix(ending), kind)
        if ending != ".jpg":
            file.unlink()
    (raw / "query" / "more").mkdir()
    for name in ("notes.TXT", "more/0001_c1s1_001051_00.jpg"):
        (raw / "query" / name).touch()
    expected = {".db": 2, "hidden": 1, ".txt": 1, "folders": 1}
    if not zipped:
        for link in ("0009_c1s1_001051_00.jpg", "loop.jpg"):
            (raw / "query" / link).symlink_to("loop.jpg")
        expected["dangling links"] = 2
    lines: list[str] = []
    save_dir = prepare_market1501(zip_of(raw) if zipped else raw, tmp_path / "market1501", lines.append)
    new_names = pickle.loads((save_dir / "ori_to_new_im_name.pkl").read_bytes())
    assert Counter(new_names.values()) == Counter(NEW_NAMES.values())
    for new in new_names.values():
        assert decode_image(save_dir / "images" / new).shape == (8, 4, 3)
    assert len(lines) == 1
    assert all(f"{number} {kind}" in lines[0] for kind, number in expected.items())


def test_names_that_are_not_utf_8_are_prepared(raw, tmp_path):
    name = os.fsdecode(b"0009_c1s1_000151_\xe9.jpg")
    (raw / "bounding_box_test" / name).write_bytes(content_of("x.jpg"))
    (raw / "bounding_box_test" / os.fsdecode(b"note.\xe9")).write_text("")
    save_dir = tmp_path / os.fsdecode(b"market_\xe9")
    command = [sys.executable, str(ROOT / "script" / SCRIPT), "--source", str(raw), "--save_dir", str(save_dir)]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True)
    assert os.fsencode(save_dir) in done.stdout.splitlines()[-1]
    new_names = pickle.loads((save_dir / "ori_to_new_im_name.pkl").read_bytes())
    assert (save_dir / "images" / new_names[f"bounding_box_test/{name}"]).is_file()


@pytest.mark.parametrize("declared", [3 * 10**9, 1000])
def test_a_zip_entry_unpacks_to_no_more_than_it_declares(raw, tmp_path, declared):
    (raw / "query" / "0001_c1s1_001051_00.jpg").write_bytes(bytes(10**7))
    source = zip_of(raw)
    content = source.read_bytes()
    assert content.count(struct.pack("<L", 10**7)) == 2
    source.write_bytes(content.replace(struct.pack("<L", 10**7), struct.pack("<L", declared)))
    message = refusal(source, tmp_path / "market1501")
    assert "query/0001_c1s1_001051_00.jpg" in message
    assert ("3,000 MB" in message) == (declared > 1000)


def test_sources_that_are_not_market1501_are_refused(raw, tmp_path):
    save_dir = tmp_path / "market1501"
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "something else")
    (raw / "query" / "holiday.jpg").write_bytes(b"")
    for source, reason in (
        (raw / "readme.txt", "not a zip file"),
        (raw / "query", "bounding_box_train"),
        (tmp_path / "other.zip", "bounding_box_train"),
        (tmp_path, "inside the source"),
        (raw, "query/holiday.jpg"),
    ):
        assert reason in refusal(source, save_dir)
    assert not save_dir.exists()


def test_damaged_zips_are_refused(raw, tmp_path):
    source = zip_of(raw)
    content = bytearray(source.read_bytes())
    source.write_bytes(content[: len(content) // 2])
    assert "cut off" in refusal(source, tmp_path / "market1501")
    content[content.index(b"bounding_box_train/0002") + 50] ^= 0xFF
    source.write_bytes(content)
    assert "bounding_box_train/0002_c1s1_000451_03.jpg" in refusal(source, tmp_path / "market1501")
    (raw / "å.txt").touch()
    zip_of(raw)
    source.write_bytes(source.read_bytes().replace("å".encode(), b"\xff\xff"))
    assert "not a zip file" in refusal(source, tmp_path / "market1501")
    assert find_raw_market1501(source) is None


def test_a_number_that_is_too_long_for_a_name_is_refused(raw, tmp_path):
    source = zip_of(raw)
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr(f"query/{'9' * 5000}_c1s1_000001_00.jpg", b"")
    assert "not an image name" in refusal(source, tmp_path / "market1501")


@pytest.mark.parametrize("folder", ["bounding_box_train", "bounding_box_test", "query"])
def test_a_folder_without_images_is_named(raw, tmp_path, folder):
    for file in (raw / folder).iterdir():
        file.unlink()
    assert f"{folder}/" in refusal(raw, tmp_path / "market1501")
    (raw / folder / "0001_c1s1_000151_01.gif").write_bytes(b"GIF89a")
    assert "1 .gif" in refusal(raw, tmp_path / "market1501")


def test_the_original_data_set_is_recognized(raw, tmp_path):
    assert find_raw_market1501(tmp_path) == find_raw_market1501(raw) == raw
    for path in (raw / "query", raw / "readme.txt", tmp_path / "none"):
        assert find_raw_market1501(path) is None
    assert find_raw_market1501(prepare_market1501(raw, tmp_path / "p" / "market1501")) is None


def test_the_script_prints_counts_and_the_next_command(command, raw, tmp_path):
    save_dir = tmp_path / "market1501"
    done = command(SCRIPT, "--source", raw, "--save_dir", save_dir)
    assert done.status == 0
    assert_prepared(save_dir)
    assert len(done.err.splitlines()) <= 10
    skipped, *lines = done.out.splitlines()
    assert "2 .db" in skipped and "1 hidden" in skipped
    assert lines[0].split() == ["trainval", "4", "images,", "2", "identities"]
    assert [line.split()[:2] for line in lines[3:6]] == [["query", "2"], ["gallery", "3"], ["multi-query", "3"]]
    assert lines[-1] == f"next: python script/train.py --data_path={shlex.quote(str(save_dir))}"
    none = tmp_path / "none"
    for flags in (("--source", none, "--save_dir", tmp_path / "x"), ("--source", none), ("--sauce", none)):
        assert_refused(command(SCRIPT, *flags))
