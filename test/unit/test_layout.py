"""What all preparations share: names, going on after an interruption, refusals, and images that are no JPEG."""

import io
import pickle
import shlex
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from aligned_reid import InputError
from aligned_reid.data.layout import (
    Namer,
    NewImage,
    Parts,
    check_paths,
    describe,
    encode_jpeg,
    folders_to_look_in,
    prepare_command,
    read_as_jpeg,
    write_data_set,
)
from aligned_reid.data.partitions import read_partitions, write_atomically


def made_up() -> Parts:
    """Three training images of two persons; a query, a multi-query and a gallery image of another."""
    name = Namer()
    return Parts(
        trainval=[name("a", 1, 1), name("b", 1, 1), name("c", 2, 3)],
        gallery=[name("d", 5, 2)],
        query=[name("e", 5, 1)],
        multi_query=[name("f", 5, 1)],
    )


def content_of(image: NewImage) -> bytes:
    return image.original.encode() * 9


def test_each_persons_images_are_counted_under_each_camera():
    assert [image.new_name for part in made_up() for image in part] == [
        "00000001_0001_00000000.jpg",
        "00000001_0001_00000001.jpg",
        "00000002_0003_00000000.jpg",
        "00000005_0002_00000000.jpg",
        "00000005_0001_00000000.jpg",
        "00000005_0001_00000001.jpg",
    ]


def test_what_is_written(tmp_path, capsys):
    save_dir = tmp_path / "new" / "set"
    assert write_data_set(save_dir, made_up(), content_of, 1, {"names.json": b"{}"}) == save_dir
    images = [image for part in made_up() for image in part]
    assert {path.name: path.read_bytes() for path in (save_dir / "images").iterdir()} == {
        image.new_name: content_of(image) for image in images
    }
    assert pickle.loads((save_dir / "ori_to_new_im_name.pkl").read_bytes()) == dict(images)
    assert (save_dir / "names.json").read_bytes() == b"{}"
    partitions = read_partitions(save_dir / "partitions.pkl")
    assert partitions.trainval_im_names == [image.new_name for image in made_up().trainval]
    assert [name[:13] for name in partitions.test_im_names] == ["00000005_0001", "00000005_0001", "00000005_0002"]
    assert partitions.test_marks == [0, 2, 1]
    assert capsys.readouterr().err.splitlines()[-1] == "copied 6 of 6 images"
    assert describe(partitions).splitlines()[0].split() == ["trainval", "3", "images,", "2", "identities"]


def test_an_interrupted_preparation_goes_on(tmp_path):
    written: list[str] = []

    def write(path: Path, content: bytes) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        write_atomically(path, content)
        written.append(path.name)

    with pytest.raises(KeyboardInterrupt):
        write_data_set(tmp_path, made_up(), content_of, 1, write=write)
    assert not (tmp_path / "partitions.pkl").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    (tmp_path / "images" / ".00000005_0001_00000001.jpg.7.tmp").write_bytes(b"half")
    write_data_set(tmp_path, made_up(), content_of, 1)
    assert len(list((tmp_path / "images").iterdir())) == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_partitions_do_not_outlive_what_their_names_meant(tmp_path):
    write_data_set(tmp_path, made_up(), content_of, 1)
    changed = Parts(*(list(part) for part in made_up()))
    first, second, *others = changed.trainval
    changed = changed._replace(
        trainval=[NewImage(second.original, first.new_name), NewImage(first.original, second.new_name), *others]
    )

    def stop(_: NewImage) -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_data_set(tmp_path, changed, stop, 1)
    assert not (tmp_path / "partitions.pkl").exists()
    write_data_set(tmp_path, changed, content_of, 1)
    assert (tmp_path / "images" / first.new_name).read_bytes() == content_of(second)
    with pytest.raises(KeyboardInterrupt):
        write_data_set(tmp_path, changed, stop, 1)
    assert (tmp_path / "partitions.pkl").exists()  # the same names: it is right


def test_an_image_that_is_used_twice_is_named(tmp_path):
    parts = made_up()
    with pytest.raises(InputError, match="has e twice"):
        write_data_set(
            tmp_path / "set", parts._replace(gallery=[NewImage("e", "00000005_0009_00000000.jpg")]), bytes, 1
        )
    assert not (tmp_path / "set").exists()


def test_another_data_set_is_left_alone(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "00000009_0001_00000000.jpg").write_bytes(b"other")
    with pytest.raises(InputError, match="another data set"):
        write_data_set(tmp_path, made_up(), content_of, 1)
    assert len(list((tmp_path / "images").iterdir())) == 1


def test_a_source_is_never_written_into(tmp_path):
    for save_dir in (tmp_path / "set" / "images", tmp_path / "set" / "images" / "x", tmp_path / "set"):
        (tmp_path / "set" / "images").mkdir(parents=True, exist_ok=True)
        with pytest.raises(InputError, match="which stays as it is"):
            check_paths(tmp_path / "set" / "images", save_dir)
    check_paths(tmp_path / "set" / "images", tmp_path / "other")
    with pytest.raises(InputError, match="does not exist"):
        check_paths(tmp_path / "none", tmp_path / "other")


@pytest.fixture
def picture() -> np.ndarray:
    """A smooth picture, which JPEG keeps."""
    rows, columns = np.mgrid[0:60, 0:30]
    return np.stack([rows * 4, columns * 8, rows + columns], axis=-1).astype(np.uint8)


def test_jpegs_are_taken_byte_for_byte_whatever_their_name(picture, tmp_path):
    jpeg = simplejpeg.encode_jpeg(picture, quality=60)
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).write_bytes(jpeg)
        assert read_as_jpeg(tmp_path / name) == jpeg


@pytest.mark.parametrize("kind", ["png", "bmp", "webp"])
def test_other_images_become_jpegs(picture, tmp_path, kind):
    path = tmp_path / f"image.{kind}"
    Image.fromarray(picture).save(path, lossless=True)
    jpeg = read_as_jpeg(path)
    assert jpeg == encode_jpeg(picture)
    assert np.abs(simplejpeg.decode_jpeg(jpeg).astype(int) - picture).max() < 12
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.quantization[0][0] == 2  # of quality 95: the standard's 16 times a tenth


def test_gray_and_transparent_images_become_rgb(picture, tmp_path):
    Image.fromarray(picture).convert("L").save(tmp_path / "gray.png")
    Image.fromarray(picture).convert("RGBA").save(tmp_path / "transparent.png")
    for name in ("gray.png", "transparent.png"):
        assert simplejpeg.decode_jpeg(read_as_jpeg(tmp_path / name)).shape == (60, 30, 3)


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "webp"])
def test_damaged_images_are_named(picture, tmp_path, kind):
    path = tmp_path / f"image.{kind}"
    Image.fromarray(picture).save(path)
    content = path.read_bytes()
    for size, reason in ((len(content) // 2, "cut off|damaged"), (0, "empty")):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match=reason) as caught:
            read_as_jpeg(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(InputError, match="is missing"):
        read_as_jpeg(path)


def test_commands_and_places(tmp_path, monkeypatch):
    command = prepare_command("prepare_x.py", Path("/a b/raw"), "x", " --kind=y")
    paths = ["--source", "/a b/raw", "--save_dir", "/a b/x"]
    assert shlex.split(command) == ["python", "script/prepare_x.py", *paths, "--kind=y"]
    assert prepare_command("prepare_x.py", Path("/a/x"), "x").endswith("--source /a/x --save_dir /a/x_prepared")
    (tmp_path / "raw").mkdir()
    monkeypatch.chdir(tmp_path / "raw")
    paths = f"--source {tmp_path / 'raw'} --save_dir {tmp_path / 'x'}"
    assert prepare_command("prepare_x.py", Path("."), "x") == f"python script/prepare_x.py {paths}"
    monkeypatch.undo()
    (tmp_path / "b").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "file").touch()
    assert folders_to_look_in(tmp_path) == [tmp_path, tmp_path / "a", tmp_path / "b", tmp_path / "raw"]
    assert folders_to_look_in(tmp_path / "file") == []
