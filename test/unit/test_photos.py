"""Preparing one's own photos: folders, CSV files, the division into parts, and sources that are refused."""

import json
import os
import pickle
import shutil
import unicodedata
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import contents, preparation_refusal, refusal
from PIL import Image

from aligned_reid.data.checks import check_images, check_protocol
from aligned_reid.data.dataset import TestImages, TrainImages, open_data
from aligned_reid.data.partitions import parse_image_name, read_partitions
from aligned_reid.data.prepare.photo_source import camera_of, find_photos, read_photos
from aligned_reid.data.prepare.photos import choose_queries, numbered, prepare_photos

refused = partial(preparation_refusal, prepare_photos)


def draw(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(seed).randint(0, 256, (40, 20, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)


def write_table(path: Path, rows, header: str = "path,person,camera") -> Path:
    path.write_text("\n".join([header, *rows]), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six persons, each seen twice by each of two cameras, in files of four kinds."""
    root = tmp_path / "my photos"
    photos = product(("anna", "bert", "Åsa", "d 4", "eve", "fay"), ("c1_0.jpg", "c1_1.png", "c2_0.bmp", "c2_1.webp"))
    for seed, (person, name) in enumerate(photos):
        draw(root / person / name, seed)
    (root / "anna" / "Thumbs.db").write_bytes(b"no photo")
    draw(root / ".hidden" / "skipped.jpg")
    return root


@pytest.fixture
def table(folder) -> Path:
    """The same photos as a CSV file beside them."""
    files = sorted(folder.rglob("c*_*"))
    rows = [f"my photos/{f.parent.name}/{f.name},{f.parent.name},{'door' if 'c1' in f.name else 'gate'}" for f in files]
    return write_table(folder.parent / "photos.csv", rows)


def names_in(save_dir: Path) -> dict[str, dict[str, str]]:
    return json.loads((save_dir / "names.json").read_text(encoding="utf-8"))


def parts_of(save_dir: Path) -> dict:
    """How many images are in trainval, and have each mark in the test."""
    partitions = read_partitions(save_dir / "partitions.pkl")
    return {"trainval": len(partitions.trainval_im_names), **Counter(partitions.test_marks)}


def assert_usable(save_dir: Path, num_test: int) -> None:
    """The data set passes the checks of training, and its division keeps persons apart."""
    data = open_data(save_dir)
    train, test = TrainImages(data, "trainval", (64, 32)), TestImages(data, "test", size=(64, 32))
    check_protocol(test.person_ids, test.cameras, test.marks)
    check_images(data, [*train.image_names, *test.image_names])
    assert not set(train.person_ids) & set(test.person_ids)
    assert len(set(test.person_ids)) == num_test
    is_match = (test.person_ids[:, None] == test.person_ids) & (test.cameras[:, None] != test.cameras)
    assert is_match[test.marks == 0][:, test.marks == 1].any(axis=1).all()  # every query has one in the gallery


def test_a_folder_is_prepared_and_not_changed(folder, tmp_path, capsys):
    before = contents(folder)
    save_dir = prepare_photos(folder, tmp_path / "prepared")
    assert contents(folder) == before
    assert capsys.readouterr().out == "skipped, not images: 1 .db\n"
    assert_usable(save_dir, num_test=3)
    names = names_in(save_dir)
    assert names["persons"] == {"1": "anna", "2": "bert", "3": "d 4", "4": "eve", "5": "fay", "6": "Åsa"}
    assert names["cameras"] == {"1": "1", "2": "2"}
    new_names = pickle.loads((save_dir / "ori_to_new_im_name.pkl").read_bytes())
    assert len(new_names) == 24
    for original, new in new_names.items():
        image = parse_image_name(new)
        assert original.startswith(f"{names['persons'][str(image.person_id)]}/c{image.camera}_{image.index}.")
        if original.endswith(".jpg"):  # copied as they are
            assert (save_dir / "images" / new).read_bytes() == before[original]
    test, val = TestImages(open_data(save_dir)), TestImages(open_data(save_dir), "val")
    pairs = set(zip(test.person_ids, test.cameras, test.marks, strict=True))
    assert len(pairs) == len(test) == 12  # one query and one other for each person and camera
    assert len(set(val.person_ids)) == 1  # of three; Market-1501's share, rounded up


def test_a_csv_file_gives_the_same_data_set_as_folders(folder, table, tmp_path):
    by_folder, by_table = prepare_photos(folder, tmp_path / "a"), prepare_photos(table, tmp_path / "b")
    assert (by_folder / "partitions.pkl").read_bytes() == (by_table / "partitions.pkl").read_bytes()
    assert contents(by_folder / "images") == contents(by_table / "images")
    assert names_in(by_table)["cameras"] == {"1": "door", "2": "gate"}


@pytest.mark.parametrize(("first", "second", "outside"), [("door", "gate", False), ("cam1", "Cam 2", True)])
def test_cameras_may_be_folders_in_or_around_those_of_persons(folder, tmp_path, first, second, outside):
    for file in list(folder.rglob("c*_*")):
        person, camera = file.parent.name, first if "c1" in file.name else second
        place = folder / camera / person if outside else folder / person / camera
        place.mkdir(parents=True, exist_ok=True)
        file.rename(place / f"{file.stem[-1]}{file.suffix}")
    save_dir = prepare_photos(folder, tmp_path / "prepared")
    assert_usable(save_dir, num_test=3)
    assert names_in(save_dir)["cameras"] == dict(zip("12", sorted((first, second)), strict=True))


def test_seed_and_share_decide_only_who_is_tested(folder, tmp_path):
    def prepare(**options) -> tuple[frozenset[str], frozenset[str], dict]:
        save_dir = prepare_photos(folder, tmp_path / "prepared", **options)
        test = TestImages(open_data(save_dir))
        queries = np.array(test.image_names)[test.marks == 0]
        return frozenset(test.person_ids), frozenset(queries), contents(save_dir / "images")

    drawn = [prepare(seed=seed) for seed in range(8)]
    assert prepare(seed=3) == drawn[3]
    assert len({tested for tested, _, _ in drawn}) > 2
    assert len({queries for _, queries, _ in drawn}) > 4
    assert all(images == drawn[0][2] for _, _, images in drawn)
    assert [len(prepare(test_share=share)[0]) for share in (0.01, 0.3, 0.5, 0.99, 1.0)] == [1, 2, 3, 5, 6]


def test_persons_of_one_camera_are_trained_on(folder, tmp_path, capsys):
    for file in folder.glob("[abef]*/c2_*"):
        file.unlink()
    save_dir = prepare_photos(folder, tmp_path / "prepared")
    note, share = capsys.readouterr().out.splitlines()[1:]
    assert "4 (the first is anna)" in note and "3 persons" in share
    assert_usable(save_dir, num_test=2)


def test_queries_leave_a_match_in_the_gallery():
    def choose(**by_camera):
        return choose_queries(by_camera, np.random.RandomState(0))

    assert choose(a=["a0"], b=["b0"], c=["c0"]) == ["b0", "c0"]  # a0 is their match
    assert choose(a=["a0", "a1"], b=["b0"]) == ["b0"]  # for a query of a, the gallery would have nothing under b
    assert len(choose(a=["a0", "a1"], b=["b0", "b1"])) == 2


def test_camera_is_read_from_the_name_and_names_are_numbered_in_sorted_order():
    cameras = {"c1_001.jpg": "1", "0001_c3s1_000151_01.jpg": "3", "x-Cam02.png": "2", "CAM7 evening.webp": "7"}
    cameras["0001_c10s3_00.jpg.jpg"] = "10"
    assert {name: camera_of(Path(name)) for name in cameras} == cameras
    for name in ("001.jpg", "pic1.jpg", "c1a.jpg", "cam.jpg", "c1_cam2.jpg", "abc3_d.jpg"):
        assert camera_of(Path(name)) == ""
    numbers = {"0": 1, "09": 2, "9": 3, "10": 4, "9" * 5000: 5, "a": 6, "b": 7}
    assert numbered(set(numbers)) == numbers


@pytest.mark.parametrize(
    ("photos", "reason"),
    [
        ("", "has no photos"),
        ("c1_9.png anna/c1_0.png", "c1_9.png"),  # without a person
        ("anna/c1_0.png anna/1.png", "no camera"),
        ("anna/door/1.png bert/c1_1.png", "not as deep as"),
        ("anna/door/old/1.png", "old is too deep"),
        ("anna/c1_0.png anna/c2_0.png", "one person only"),
        ("anna/c1_0.png bert/c2_0.png", "--cameras none"),
        ("door/anna/0.png door/bert/0.png gate/eve/0.png", "may be persons or cameras"),
        ("cam1/anna.png", "may be persons or cameras"),
        ("train/1_c1.png query/c1_1.png gallery/2_c1.png", "no person in the name"),
        ("train/1/c1.png query/2/c1.png gallery/2/c2.png people/3/c1.png", "in none of the parts"),
        ("train/1/c1.png train/2/c1.png query/2/c1.png gallery/2/c2.png", "training and test"),
        ("train/1/c1.png query/2/c1.png gallery/2/c1.png", "under another camera"),
        ("train/1/c1.png gallery/2/c1.png", "no photos for query"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(tmp_path, photos, reason):
    (tmp_path / "photos").mkdir()
    for photo in photos.split():
        draw(tmp_path / "photos" / photo)
    assert reason in refused(tmp_path / "photos", tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()


def test_options_out_of_range_are_refused(folder, tmp_path):
    for option, value in (("test_share", 0.0), ("test_share", 1.5), ("test_share", float("nan")), ("seed", -1)):
        assert f"--{option}" in refused(folder, tmp_path / "prepared", **{option: value})


def replaced(table: Path, old: str, new: str) -> Path:
    other = table.with_name("other.csv")
    other.write_text(table.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    return other


ROW = "my photos/anna/c1_1.png,anna,door"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("path", "other", "0 columns path"),
        ("camera", "other", "no camera"),
        ("camera", "camera,person", "2 columns person"),
        (ROW, "my photos/none.png,anna,door", "row 3: there is no file"),
        (ROW, "my photos/\0\x1b[1m.png,anna,door", "row 3: there is no file"),
        (ROW, "my photos/anna/c1_1.png, ,door", "row 3: no person"),
        (ROW, f"{ROW}\n\nmy photos/../my photos/anna/c1_1.png,bert,gate", "row 5: "),
    ],
)
def test_a_wrong_row_is_named(table, tmp_path, old, new, reason):
    assert reason in refused(replaced(table, old, new), tmp_path / "prepared")


@pytest.mark.parametrize("content", ["path,person,camera\n", "", "PK\x03\x04\x00"])
def test_a_table_without_rows_is_refused(tmp_path, content):
    (tmp_path / "other.csv").write_text(content)
    assert "other.csv" in refused(tmp_path / "other.csv", tmp_path / "prepared")


def test_photos_are_not_overwritten(tmp_path):
    names = [f"0000000{person}_000{camera}_00000000.jpg" for person in (1, 2) for camera in (1, 2)]
    for name in names:
        draw(tmp_path / "set" / "images" / name)
    table = write_table(tmp_path / "set" / "photos.csv", [f"images/{n},{3 - int(n[7])},{n[12]}" for n in names])
    before = contents(tmp_path)
    assert "choose another --save_dir" in refused(table, tmp_path / "set")
    assert contents(tmp_path) == before


def test_sources_are_recognized(folder, table, tmp_path):
    assert find_photos(folder) == folder and find_photos(table) == table
    prepared = prepare_photos(folder, tmp_path / "two" / "prepared")
    shutil.copytree(prepared, tmp_path / "two" / "again")
    for path in (tmp_path / "two", prepared, prepared / "partitions.pkl", prepared / "names.json", tmp_path / "none"):
        assert find_photos(path) is None, path


@pytest.fixture
def divided(tmp_path) -> Path:
    """Folders as layumi's Market-1501 has them: persons 1 to 3 for training, 4 to 6 for the test, and person -1."""
    root = tmp_path / "pytorch"
    for person, index in product(range(1, 7), range(4)):
        parts = ("query" if index < 2 else "gallery", "multi-query")
        for part in ("train_all", "train" if index else "val") if person <= 3 else parts:
            name = f"{person:04d}/{person:04d}_c{index % 2 + 1}s1_{index:06d}_03.jpg"
            draw(root / part / name, seed=10 * person + index)
    draw(root / "gallery" / "-1" / "-1_c1s1_000001_00.jpg")
    return root


def test_a_division_into_folders_is_kept(divided, tmp_path, capsys):
    assert find_photos(divided) == divided
    save_dir = prepare_photos(divided, tmp_path / "prepared", seed=7)
    log = capsys.readouterr().out
    assert "person -1: 1 photos" in log and "division" in log
    assert_usable(save_dir, num_test=3)
    assert parts_of(save_dir) == {"trainval": 12, 0: 6, 1: 6, 2: 12}  # nothing counts twice
    assert list(names_in(save_dir)["persons"].values()) == [f"{person:04d}" for person in range(1, 7)]
    train = read_partitions(save_dir / "partitions.pkl").trainval_im_names
    assert {parse_image_name(name).person_id for name in train} == {1, 2, 3}
    shutil.rmtree(divided / "train_all")  # then train and val are joined
    assert parts_of(prepare_photos(divided, tmp_path / "joined"))["trainval"] == 12


def test_parts_may_have_no_folders_for_persons(divided, tmp_path):
    flat = tmp_path / "flat"
    for part, name in (("train_all", "bounding_box_train"), ("query", "Query"), ("gallery", "bounding_box_test")):
        (flat / name).mkdir(parents=True)
        for file in divided.glob(f"{part}/*/*.jpg"):
            shutil.copy(file, flat / name)
    assert find_photos(flat) == flat
    save_dir = prepare_photos(flat, tmp_path / "prepared")
    assert parts_of(save_dir) == {"trainval": 12, 0: 6, 1: 6}
    assert names_in(save_dir)["persons"]["6"] == "0006"


def test_a_division_in_a_table_is_kept(table, tmp_path):
    header, *lines = table.read_text(encoding="utf-8").splitlines()
    given = {"anna": "Train", "bert": "train", "d 4": "val"}
    parts = [given.get(line.split(",")[1], "query" if "_0." in line else "gallery") for line in lines]
    write_table(table, map(",".join, zip(lines, parts, strict=True)), f"{header},part")
    save_dir = prepare_photos(table, tmp_path / "prepared")
    assert_usable(save_dir, num_test=3)
    assert parts_of(save_dir) == {"trainval": 12, 0: 6, 1: 6}
    assert "row 2: no part" in refused(replaced(table, ",Train", ","), tmp_path / "other")
    assert "row 2: part 'left'" in refused(replaced(table, ",Train", ",left"), tmp_path / "other")


def test_without_cameras_each_photo_has_its_own(tmp_path, capsys):
    plain = tmp_path / "plain"
    for seed, (person, index) in enumerate(product(("anna", "bert", "eve", "fay"), range(4))):
        draw(plain / person / f"{index}.png", seed)
    draw(plain / "gil" / "0.png", 99)
    assert "--cameras none" in refused(plain, tmp_path / "prepared")
    save_dir = prepare_photos(plain, tmp_path / "prepared", cameras="none")
    assert_usable(save_dir, num_test=2)
    assert parts_of(save_dir) == {"trainval": 9, 0: 2, 1: 6}  # one query per person
    assert "1 (the first is gil)" in capsys.readouterr().out
    images = [parse_image_name(path.name) for path in sorted((save_dir / "images").iterdir())]
    assert [image.camera for image in images[:5]] == [1, 2, 3, 4, 1] and not any(image.index for image in images)
    assert names_in(save_dir)["cameras"] == {}

    table = write_table(tmp_path / "plain.csv", [f"{f},{f.parent.name}" for f in plain.rglob("*.png")], "path,person")
    assert find_photos(table) == table
    assert "--cameras none" in refused(table, tmp_path / "other")
    assert parts_of(prepare_photos(table, tmp_path / "other", cameras="none"))[0] == 2


def write_rows(tmp_path: Path, pairs) -> Path:
    """A table of empty photos: a person and a camera each."""
    rows = []
    for number, (person, camera) in enumerate(pairs):
        (tmp_path / f"{number}.jpg").touch()
        rows.append(f'{number}.jpg,"{person}","{camera}"')
    return write_table(tmp_path / "names.csv", rows)


def test_more_cameras_than_names_can_hold_are_refused(tmp_path):
    table = write_rows(tmp_path, [("b" if number else "a", number) for number in range(10_001)])
    assert "10,001 cameras" in refused(table, tmp_path / "prepared")


def test_equal_names_get_one_spelling(tmp_path):
    persons = ("1", "01", "1.0", " 1 ", "v1.0", "v1.0", "-1", "\u00c5sa", "A\u030asa")
    cameras = ("cam1", "CAM1", "c01", "1", "Door", "door", "1", "camera 1", "1")
    photos = read_photos(write_rows(tmp_path, zip(persons, cameras, strict=True)))
    assert {photo.person for photo in photos} == {"01", "v1.0", "\u00c5sa"}  # not the junk
    assert {photo.camera for photo in photos} == {"1", "Door"}


@pytest.mark.parametrize("pair", [("Anna", "anna"), ("d  4", "d 4"), ("p01", "p1")])
def test_similar_names_are_refused(tmp_path, pair):
    message = refusal(read_photos, write_rows(tmp_path, [(name, "1") for name in pair]))
    assert all(repr(name) in message for name in pair)


@pytest.mark.parametrize(
    ("start", "separator", "encoding"),
    [
        ("sep=;\r\n", ";", "utf-8"),
        ('\n"SEP=|"\n', "|", "utf-8"),
        ("\n \n", ",", "utf-8-sig"),
        ("", "\t", "utf-16"),
        (";;\n", ";", "utf-8"),
    ],
)
def test_tables_saved_by_spreadsheets_are_read(table, tmp_path, start, separator, encoding):
    text = table.read_text(encoding="utf-8").replace("/", "\\").replace(",", separator)
    other = table.with_name("other.csv")
    other.write_bytes((start + unicodedata.normalize("NFD", text)).encode(encoding))
    assert find_photos(other) == other
    for photo, expected in zip(read_photos(other), read_photos(table), strict=True):
        assert photo._replace(original="") == expected._replace(original="")
    with other.open("ab") as file:
        file.write(f"\nnone{separator}a{separator}b".encode(encoding.removesuffix("-sig").replace("16", "16le")))
    assert f"row {26 + start.count(chr(10))}: there is no file" in refused(other, tmp_path / "prepared")


def test_a_table_in_gbk_is_refused_with_its_line(table, tmp_path):
    table.write_bytes(table.read_text(encoding="utf-8").replace("Åsa", "张三").encode("gbk"))
    assert "line 22 has the byte 0xd5" in refused(table, tmp_path / "prepared")


def test_photos_are_recognized_by_ending_or_content_and_other_files_counted(folder, tmp_path):
    for name in ("c1_5.TIF", "c1_6.jpg", "c1_7.jpg"):
        draw(folder / "anna" / name)
    (folder / "anna" / "c1_6.jpg").rename(folder / "anna" / "c1_6")
    (folder / "anna" / "c1_7.jpg").rename(folder / "anna" / "c1_7.jfif")
    (folder / "anna" / "c1_8.jpg").symlink_to("none.jpg")
    (tmp_path / "phone").mkdir()
    for place in (folder / "bert", folder / "eve", tmp_path / "phone"):
        (place / "c1_9.HEIC").write_bytes(b"ftypheic")
    lines: list[str] = []
    save_dir = prepare_photos(folder, tmp_path / "prepared", log=lines.append)
    assert len(list((save_dir / "images").iterdir())) == 24 + 3
    assert len(lines) == 1 and all(kind in lines[0] for kind in ("2 .heic", "1 dangling links", "1 .db"))
    assert "1 .heic" in refused(tmp_path / "phone", tmp_path / "none")


def test_names_that_are_not_utf_8_are_prepared(folder, tmp_path):
    name = os.fsdecode(b"\xc5sa \xff")
    (folder / "anna").rename(folder / name)
    save_dir = prepare_photos(folder, tmp_path / "prepared")
    assert_usable(save_dir, num_test=3)
    assert name in names_in(save_dir)["persons"].values()
    assert f"{name}/c1_0.jpg" in pickle.loads((save_dir / "ori_to_new_im_name.pkl").read_bytes())
