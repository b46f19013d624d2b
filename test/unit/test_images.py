"""Whatever a user calls an image, and what only looks like one."""

import numpy as np
import pytest
import torch
from conftest import refusal
from PIL import Image

from aligned_reid import InputError
from aligned_reid.data.prepare.sources import find_images, shown
from aligned_reid.data.transforms import decode_image
from aligned_reid.inference.images import cut_boxes, read_image

RED = np.full((40, 20, 3), (200, 10, 30), np.uint8)


OTHER_FORMS = {
    "PIL": Image.fromarray(RED),
    "palette": Image.fromarray(RED).quantize(4),
    "transparent": Image.fromarray(np.dstack([RED, RED[..., 0]])),
    "bgr with transparency": np.dstack([RED[..., ::-1], RED[..., :1]]),
    "bgr": np.ascontiguousarray(RED[..., ::-1]),
    "array of floats": RED / 255,
    "16 bits": RED.astype(np.uint16) * 257,
    "tensor, channels first": torch.from_numpy(RED).permute(2, 0, 1),
    "tensor of floats": torch.from_numpy(RED).permute(2, 0, 1) / 255,
    "tensor, channels last": torch.from_numpy(RED),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_every_form_gives_the_same_pixels(form):
    pixels = read_image(OTHER_FORMS[form], "x", bgr="bgr" in form)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert np.array_equal(pixels, RED)


def test_gray_arrays_become_rgb():
    for gray in (RED[..., 0], RED[..., :1], torch.from_numpy(RED[..., 0]), torch.from_numpy(RED[None, :, :, 0])):
        assert np.array_equal(read_image(gray, "x"), np.repeat(RED[..., :1], 3, axis=2))


@pytest.mark.parametrize("name", ["人 物.png", "two words.png", "two\nlines.png", "<b>&.png"])
def test_files_of_any_name_are_read(tmp_path, name):
    Image.fromarray(RED).save(tmp_path / name)
    assert np.array_equal(read_image(tmp_path / name, "x"), RED)


def test_unusual_files_are_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    second = Image.new("RGB", (20, 40))
    Image.fromarray(np.rot90(RED)).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(RED).save(tmp_path / "animated.webp", save_all=True, append_images=[second], lossless=True)
    Image.fromarray(RED).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    for image in (*tmp_path.iterdir(), Image.open(tmp_path / "turned.png")):
        np.testing.assert_allclose(read_image(image, "x"), RED, rtol=0, atol=3)


def test_files_are_read_and_refused_as_test_images_are(tiny_data, tmp_path):
    path = next((tiny_data / "images").iterdir())
    assert np.array_equal(read_image(path, "x"), decode_image(path))
    bad = tmp_path / "bad.jpg"
    assert "missing" in refusal(read_image, bad, "x")
    assert "folder" in refusal(read_image, tmp_path, "x")
    for content, word in ((b"", "empty"), (path.read_bytes()[:800], "cut off"), (b"notes", "damaged or not")):
        bad.write_bytes(content)
        message = refusal(read_image, bad, "bad.jpg")
        assert word in message and "bad.jpg" in message


def test_more_than_100_megapixels_are_refused(tmp_path):
    large = Image.new("1", (10_001, 10_000))
    large.save(tmp_path / "large.png")
    for image in (tmp_path / "large.png", large, np.broadcast_to(np.uint8(0), (10_001, 10_000, 3))):
        assert "100 million" in refusal(read_image, image, "x")


BAD_ARRAYS = {
    "1 x 1": RED[:1, :1],
    "shape": np.zeros((2, 40, 20, 3), np.uint8),
    "int64": RED.astype(np.int64),
    "10 to 200": RED.astype(np.float32),
    "nan": np.full((40, 20, 3), np.nan),
    "NoneType": None,
}


@pytest.mark.parametrize("word", BAD_ARRAYS)
def test_bad_arrays_are_refused_in_one_line(word):
    assert word in refusal(read_image, BAD_ARRAYS[word], "x")


def test_boxes_are_cut_at_the_borders():
    frame = np.arange(40 * 20 * 3).reshape(40, 20, 3).astype(np.uint8)
    parts = cut_boxes(frame, torch.tensor([[2.0, 4.0, 10.0, 24.0], [-5.0, -5.0, 100.0, 10.0]]), "frame")
    assert np.array_equal(parts[0], frame[4:24, 2:10]) and np.array_equal(parts[1], frame[:10])
    assert cut_boxes(frame, [], "frame") == []
    for wrong in ([(1, 2, 3)], [(1, 2, 3, 4), (1, 2)], ["left"]):
        assert "4" in refusal(cut_boxes, frame, wrong, "frame")


@pytest.mark.parametrize(
    ("box", "word"),
    [((30, 0, 50, 20), "outside"), ((5, 5, 5, 20), "empty"), ((9, 5, 5, 20), "empty"), ((0, 0, np.nan, 9), "empty")],
)
def test_a_box_that_shows_nothing_is_named(box, word):
    good, bad = cut_boxes(RED, [(0, 0, 20, 40), box], "frame")
    assert good.shape == RED.shape
    assert isinstance(bad, InputError) and word in str(bad) and "box 1" in str(bad)


def test_images_are_found_below_a_folder(tmp_path):
    for name in ("b/2.JPG", "a.png", ".hidden/c.jpg", "b/notes.txt", ".d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    images, others = find_images(tmp_path)
    assert [path.name for path in images] == ["a.png", "2.JPG"] and [path.name for path in others] == ["notes.txt"]
    assert "not a folder" in refusal(find_images, tmp_path / "gone")


def test_names_are_shown_on_one_line():
    assert shown("照片/a b\n\x1b[1m\udcff.jpg") == r"照片/a b\n\x1b[1m\udcff.jpg"
