"""Writing a data set: names, resuming, refusals; and finding files in a source."""

import pickle
import shlex
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import contents, refusal

from aligned_reid.data.partitions import build_partitions, read_partitions
from aligned_reid.data.prepare.layout import Row, describe, write_table
from aligned_reid.data.prepare.sources import check_paths, find_image, folders_to_look_in, prepare_command

TABLE = [
    Row("a", 1, 1, "trainval"),
    Row("b", 1, 1, "trainval"),
    Row("c", 2, 3, "trainval"),
    Row("d", 5, 2, "gallery"),
    Row("e", 5, 1, "query"),
    Row("f", 5, 1, "multi_query"),
]
NEW_NAMES = {
    "a": "00000001_0001_00000000.jpg",
    "b": "00000001_0001_00000001.jpg",
    "c": "00000002_0003_00000000.jpg",
    "d": "00000005_0002_00000000.jpg",
    "e": "00000005_0001_00000000.jpg",
    "f": "00000005_0001_00000001.jpg",
}


def read(original: str, interrupt_at: str = "") -> bytes:
    if original == interrupt_at:
        raise KeyboardInterrupt
    return original.encode() * 9


IMAGES = {new: read(original) for original, new in NEW_NAMES.items()}


def test_images_maps_and_partitions_are_written(tmp_path, capsys):
    save_dir = tmp_path / "new" / "set"
    assert write_table(save_dir, TABLE, read, 1, {"names.json": b"{}"}) == save_dir
    assert contents(save_dir / "images") == IMAGES
    assert pickle.loads((save_dir / "ori_to_new_im_name.pkl").read_bytes()) == NEW_NAMES
    assert (save_dir / "names.json").read_bytes() == b"{}"
    train, gallery, query, multi_query = (list(map(NEW_NAMES.get, part)) for part in ("abc", "d", "e", "f"))
    expected = build_partitions(train, query, gallery, multi_query, num_val_ids=1)
    assert read_partitions(save_dir / "partitions.pkl") == expected
    assert capsys.readouterr().err.splitlines()[-1] == "wrote 6 of 6 images"
    lines = describe(save_dir, dataset="x").splitlines()
    assert lines[0].split() == ["trainval", "3", "images,", "2", "identities"]
    assert lines[-1].endswith(f"train.py --dataset=x --data_path={shlex.quote(str(save_dir))}")


def test_an_interrupted_preparation_resumes(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_table(tmp_path, TABLE, partial(read, interrupt_at="e"))
    assert not (tmp_path / "partitions.pkl").exists()
    images = tmp_path / "images"
    truncated, *kept = sorted(images.iterdir())
    assert len(kept) == 3
    dates = [path.stat().st_mtime_ns for path in kept]
    truncated.write_bytes(b"")  # as a power failure can do
    (images / ".00000005_0001_00000001.jpg.7.tmp").write_bytes(b"half")  # of a killed process
    write_table(tmp_path, TABLE, read)
    assert contents(images) == IMAGES
    assert [path.stat().st_mtime_ns for path in kept] == dates


def test_a_write_stopped_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "replace", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_table(tmp_path, TABLE, read)
    assert [path.name for path in tmp_path.iterdir()] == ["images"] and not list((tmp_path / "images").iterdir())


def test_partitions_are_removed_before_images_change_their_meaning(tmp_path):
    write_table(tmp_path, TABLE, read)
    swapped = [TABLE[1], TABLE[0], *TABLE[2:]]
    for table in (TABLE, swapped):
        with pytest.raises(KeyboardInterrupt):
            write_table(tmp_path, table, partial(read, interrupt_at="a"))
        assert (tmp_path / "partitions.pkl").exists() == (table is TABLE)
    write_table(tmp_path, swapped, read)
    assert (tmp_path / "images" / NEW_NAMES["a"]).read_bytes() == read("b")


def test_an_image_that_is_listed_twice_and_a_folder_of_other_images_are_refused(tmp_path):
    assert "e twice" in refusal(write_table, tmp_path / "set", [*TABLE, Row("e", 5, 9, "gallery")], read)
    assert not (tmp_path / "set").exists()
    other = tmp_path / "images" / "00000009_0001_00000000.jpg"
    other.parent.mkdir()
    other.write_bytes(b"other")
    assert other.name in refusal(write_table, tmp_path, TABLE, read)
    assert list(other.parent.iterdir()) == [other]
    assert "cannot write" in refusal(write_table, other / "set", TABLE, read)


def test_nothing_is_written_into_a_source(tmp_path):
    source = tmp_path / "set" / "images"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    for save_dir in (source, source / "x", tmp_path / "set", tmp_path / "link" / "x"):
        assert "inside the source" in refusal(check_paths, source, save_dir)
    check_paths(source, tmp_path / "other")
    for name in (tmp_path / "none", tmp_path / ("n" * 300), "~nobody_of_this_name/set"):
        assert "does not exist" in refusal(check_paths, name, tmp_path / "other")


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    _, save_dir = check_paths(tmp_path / "set", tmp_path / "loop")
    assert "cannot write" in refusal(write_table, save_dir, TABLE, read)


def test_sources_are_looked_for_two_folders_deep_and_images_under_other_endings(tmp_path):
    for folder in ("b", "a/deep/deeper", "__MACOSX", ".hidden"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "a" / "loop").symlink_to("loop")
    assert list(folders_to_look_in(tmp_path)) == [tmp_path, tmp_path / "a", tmp_path / "b", tmp_path / "a" / "deep"]
    assert not list(folders_to_look_in(tmp_path / "file"))
    for name in ("d.PNG", "e.jpg", "e.png"):
        (tmp_path / name).touch()
    (tmp_path / "c.jpg").symlink_to("nowhere")
    assert find_image(tmp_path / "d.jpg") == tmp_path / "d.PNG"
    assert find_image(tmp_path / "e.png") == tmp_path / "e.png"
    assert find_image(tmp_path / "c.png") is None
    assert find_image(tmp_path / ("n" * 300)) is None


def test_the_suggested_command_prepares_into_a_folder_beside_the_source(tmp_path, monkeypatch):
    command = prepare_command("x", Path("/a b/raw"), " --kind=y")
    paths = ["--source", "/a b/raw", "--save_dir", "/a b/raw_prepared"]
    assert shlex.split(command) == ["python", "script/prepare_x.py", *paths, "--kind=y"]
    (tmp_path / "raw.zip").touch()
    assert shlex.split(prepare_command("x", tmp_path / "raw.zip"))[-1] == f"{tmp_path}/raw_prepared"
    monkeypatch.chdir(tmp_path)
    assert shlex.split(prepare_command("x", Path(".")))[-1] == f"{tmp_path}_prepared"
