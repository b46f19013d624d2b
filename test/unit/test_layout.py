"""What all preparations share: names, going on after an interruption, refusals, and images that are no JPEG."""

import io
import pickle
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from aligned_reid import InputError
from aligned_reid.data.partitions import read_partitions, write_atomically
from aligned_reid.data.prepare.layout import (
    Namer,
    NewImage,
    Parts,
    check_paths,
    describe,
    encode_jpeg,
    find_image,
    folders_to_look_in,
    prepare_command,
    read_as_jpeg,
    write_data_set,
)


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


ORIENTATION = 0x0112  # EXIF's tag
RAMP = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(32, axis=0)
GRAY = np.rint(255 * RAMP).astype(np.uint8)
COLOUR = np.stack([GRAY, 255 - GRAY, GRAY // 2], axis=-1)
ALPHA = GRAY[:, ::-1]
PALETTE = Image.fromarray(COLOUR).quantize(200)


def wide(values: np.ndarray, dtype: str) -> Image.Image:
    return Image.fromarray(np.rint(values).astype(dtype))


# The file's ending, its image, how that is saved, and what it shows in 8 bits.
MODES = {
    "1 bit": ("png", Image.fromarray(GRAY > 127), {}, (GRAY > 127) * 255),
    "8 bits, gray": ("png", Image.fromarray(GRAY), {}, GRAY),
    "16 bits": ("png", wide(RAMP * 65535, "<u2"), {}, GRAY),
    "16 bits, low byte first": ("tif", wide(RAMP * 65535, "<u2"), {}, GRAY),
    "16 bits, high byte first": ("tif", wide(RAMP * 65535, ">u2"), {}, GRAY),
    "16 bits, dark": ("png", wide(RAMP * 2000, "<u2"), {}, RAMP * 2000 / 257),
    "32 bits, up to 255": ("tif", wide(RAMP * 255, "<i4"), {}, GRAY),
    "32 bits, up to 65535": ("tif", wide(RAMP * 65535, "<i4"), {}, GRAY),
    "float, up to 1": ("tif", Image.fromarray(RAMP), {}, GRAY),
    "float, a little over 1": ("tif", Image.fromarray(RAMP * 1.04 - 0.02), {}, (RAMP * 1.04 - 0.02).clip(0, 1) * 255),
    "float, up to 255": ("tif", Image.fromarray(RAMP * 255), {}, GRAY),
    "float, up to 65535": ("tif", Image.fromarray(RAMP * 65535), {}, GRAY),
    "palette": ("png", PALETTE, {}, COLOUR),
    "palette, a colour transparent": ("png", PALETTE, {"transparency": 3}, COLOUR),
    "palette, half transparent": ("png", PALETTE, {"transparency": bytes(range(200))}, COLOUR),
    "palette, bmp": ("bmp", PALETTE, {}, COLOUR),
    "gray, transparent": ("png", Image.fromarray(np.stack([GRAY, ALPHA], axis=-1)), {}, GRAY),
    "transparent": ("png", Image.fromarray(np.dstack([COLOUR, ALPHA])), {}, COLOUR),
    "transparent, webp": (
        "webp",
        Image.fromarray(np.dstack([COLOUR, ALPHA])),
        {"lossless": True, "exact": True},
        COLOUR,
    ),
    "transparent, tiff": ("tif", Image.fromarray(np.dstack([COLOUR, ALPHA])), {}, COLOUR),
    "CMYK": ("tif", Image.fromarray(COLOUR).convert("CMYK"), {}, COLOUR),
    "CMYK, jpeg": ("jpg", Image.fromarray(COLOUR).convert("CMYK"), {"quality": 95}, COLOUR),
    "gray, jpeg": ("jpg", Image.fromarray(GRAY), {"quality": 95}, GRAY),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_its_right_values(tmp_path, mode):
    ending, image, options, expected = MODES[mode]
    image.save(tmp_path / f"image.{ending}", **options)
    expected = np.asarray(expected, dtype=np.float64)
    expected = expected if expected.ndim == 3 else expected[..., None]
    shown = simplejpeg.decode_jpeg(read_as_jpeg(tmp_path / f"image.{ending}"))
    assert shown.shape == (32, 64, 3)
    assert np.abs(shown - expected).max() <= 8  # of the encoding; colours of a palette are near
    assert np.abs((shown - expected).mean()) < 1


def test_sixteen_bit_colours_have_their_right_values(tmp_path):
    colours = COLOUR.astype(np.uint16) * 257
    for ending in ("png", "tif"):
        cv2.imwrite(str(tmp_path / f"image.{ending}"), colours[..., ::-1])
        shown = simplejpeg.decode_jpeg(read_as_jpeg(tmp_path / f"image.{ending}"))
        assert np.abs(shown.astype(int) - COLOUR).max() <= 6


@pytest.mark.parametrize("values", [RAMP * 2 - 1, RAMP * 1e6, np.full_like(RAMP, np.nan)])
def test_values_without_a_known_range_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "image.tif")
    with pytest.raises(InputError, match="8 bits per channel"):
        read_as_jpeg(tmp_path / "image.tif")


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


@pytest.mark.parametrize(
    ("kind", "orientation"), [*(("jpeg", number) for number in range(2, 9)), ("png", 6), ("webp", 3)]
)
def test_turned_images_become_upright(picture, tmp_path, kind, orientation):
    path = tmp_path / f"image.{kind}"
    Image.fromarray(picture).save(path, exif=turned(orientation), quality=95)
    upright = ImageOps.exif_transpose(Image.open(path))
    shown = Image.open(io.BytesIO(read_as_jpeg(path)))
    assert shown.size == upright.size == ((60, 30) if orientation > 4 else (30, 60))
    assert ORIENTATION not in shown.getexif()
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(upright)).max() < 20


def test_jpegs_that_need_no_turn_are_taken_byte_for_byte(picture, tmp_path):
    path = tmp_path / "image.jpg"
    for exif in (turned(1), turned(9), b"Exif\0\0broken"):
        Image.fromarray(picture).save(path, exif=exif)
        assert read_as_jpeg(path) == path.read_bytes()


def test_images_too_large_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # to write it
    Image.new("1", (20_000, 20_000)).save(tmp_path / "image.png")
    monkeypatch.undo()
    with open(tmp_path / "image.jpg", "wb") as file:
        file.truncate(101 * 10**6)
    for name, reason in (("image.png", "100 million pixels"), ("image.jpg", "101 MB")):
        with pytest.raises(InputError, match=reason) as caught:
            read_as_jpeg(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_programs_are_not_started_for_what_claims_to_be_a_photo(tmp_path):
    (tmp_path / "image.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(InputError, match="cannot be read"):
        read_as_jpeg(tmp_path / "image.png")


def test_an_image_is_found_under_another_ending(tmp_path):
    for name in ("a.PNG", "b.jpg", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "c.jpg").symlink_to("nowhere")
    assert find_image(tmp_path / "a.jpg") == tmp_path / "a.PNG"
    assert find_image(tmp_path / "b.png") == tmp_path / "b.png"
    assert find_image(tmp_path / "c.png") is None


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
    (tmp_path / "a" / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / ".hidden").mkdir()
    folders = [tmp_path, tmp_path / "a", tmp_path / "b", tmp_path / "raw", tmp_path / "a" / "deep"]
    (tmp_path / "a" / "loop").symlink_to("loop")
    assert list(folders_to_look_in(tmp_path)) == folders
    assert not list(folders_to_look_in(tmp_path / "file"))
