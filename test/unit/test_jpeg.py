"""Any image file as an upright JPEG: modes, orientation, and images that are refused."""

import io
import warnings
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import simplejpeg
from conftest import refusal
from PIL import Image, ImageOps

from aligned_reid.data.prepare.jpeg import decode_upright, encode_jpeg, read_as_jpeg


@pytest.fixture
def picture() -> np.ndarray:
    """A smooth picture, which JPEG preserves."""
    rows, columns = np.mgrid[0:60, 0:30]
    return np.stack([rows * 4, columns * 8, rows + columns], axis=-1).astype(np.uint8)


ORIENTATION = 0x0112  # EXIF's tag


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def test_jpegs_without_a_valid_orientation_are_copied_whatever_their_name(picture, tmp_path):
    for name in ("a.jpg", "b.png"):
        for exif in (b"", turned(1), turned(9), b"Exif\0\0broken"):
            Image.fromarray(picture).save(tmp_path / name, "JPEG", exif=exif)
            assert read_as_jpeg(tmp_path / name) == (tmp_path / name).read_bytes()


def test_reading_in_threads_leaves_the_filters_of_warnings_alone(picture):
    content = encode_jpeg(picture)
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: decode_upright("a.jpg", content), range(1000)))
    assert warnings.filters == before


@pytest.mark.parametrize("kind", ["png", "bmp", "webp"])
def test_other_images_become_jpegs(picture, tmp_path, kind):
    path = tmp_path / f"image.{kind}"
    Image.fromarray(picture).save(path, lossless=True)
    jpeg = read_as_jpeg(path)
    assert jpeg == encode_jpeg(picture)
    assert np.abs(simplejpeg.decode_jpeg(jpeg).astype(int) - picture).max() < 12
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.quantization[0][0] == 2  # of quality 95: the standard's 16 times a tenth


RAMP = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(32, axis=0)
GRAY = np.rint(255 * RAMP).astype(np.uint8)
COLOR = np.stack([GRAY, 255 - GRAY, GRAY // 2], axis=-1)
ALPHA = GRAY[:, ::-1]
RGBA = np.dstack([COLOR, ALPHA])
PALETTE = Image.fromarray(COLOR).quantize(200)


def wide(values: np.ndarray, dtype: str) -> Image.Image:
    return Image.fromarray(np.rint(values).astype(dtype))


# Ending, image, how it is saved, and the expected values in 8 bits.
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
    "palette": ("png", PALETTE, {}, COLOR),
    "palette, a color transparent": ("png", PALETTE, {"transparency": 3}, COLOR),
    "palette, half transparent": ("png", PALETTE, {"transparency": bytes(range(200))}, COLOR),
    "palette, bmp": ("bmp", PALETTE, {}, COLOR),
    "gray, transparent": ("png", Image.fromarray(np.stack([GRAY, ALPHA], axis=-1)), {}, GRAY),
    "transparent": ("png", Image.fromarray(RGBA), {}, COLOR),
    "transparent, webp": ("webp", Image.fromarray(RGBA), {"lossless": True, "exact": True}, COLOR),
    "transparent, tiff": ("tif", Image.fromarray(RGBA), {}, COLOR),
    "CMYK": ("tif", Image.fromarray(COLOR).convert("CMYK"), {}, COLOR),
    "CMYK, jpeg": ("jpg", Image.fromarray(COLOR).convert("CMYK"), {"quality": 95}, COLOR),
    "gray, jpeg": ("jpg", Image.fromarray(GRAY), {"quality": 95}, GRAY),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_converted_to_8_bit_rgb(tmp_path, mode):
    ending, image, options, expected = MODES[mode]
    image.save(tmp_path / f"image.{ending}", **options)
    shown = simplejpeg.decode_jpeg(read_as_jpeg(tmp_path / f"image.{ending}"))
    assert shown.shape == (32, 64, 3)
    loss = shown - np.reshape(expected, (32, 64, -1)).astype(np.float64)
    assert np.abs(loss).max() <= 8 and np.abs(loss.mean()) < 1


def test_16_bit_colors_lose_their_low_byte(tmp_path):
    colors = COLOR.astype(np.uint16) * 257
    for ending in ("png", "tif"):
        cv2.imwrite(str(tmp_path / f"image.{ending}"), colors[..., ::-1])
        shown = simplejpeg.decode_jpeg(read_as_jpeg(tmp_path / f"image.{ending}"))
        assert np.abs(shown.astype(int) - COLOR).max() <= 6


@pytest.mark.parametrize("values", [RAMP * 2 - 1, RAMP * 1e6, np.full_like(RAMP, np.nan)])
def test_values_of_unknown_range_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "image.tif")
    assert "8 bits per channel" in refusal(read_as_jpeg, tmp_path / "image.tif")


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_turned_images_become_upright(picture, tmp_path, kind, orientation):
    path = tmp_path / f"image.{kind}"
    Image.fromarray(picture).save(path, exif=turned(orientation), quality=95)
    upright = ImageOps.exif_transpose(Image.open(path))
    shown = Image.open(io.BytesIO(read_as_jpeg(path)))
    assert shown.size == upright.size == ((60, 30) if orientation > 4 else (30, 60))
    assert ORIENTATION not in shown.getexif()
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(upright)).max() < 20


def test_images_that_are_too_large_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # to write it
    Image.new("1", (20_000, 20_000)).save(tmp_path / "image.png")
    monkeypatch.undo()
    with open(tmp_path / "image.jpg", "wb") as file:
        file.truncate(101 * 10**6)
    for name, reason in (("image.png", "100 million pixels"), ("image.jpg", "101 MB")):
        message = refusal(read_as_jpeg, tmp_path / name)
        assert reason in message and name in message


def test_postscript_is_refused_without_running_a_program(tmp_path):
    (tmp_path / "image.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert "image.png is damaged or not" in refusal(read_as_jpeg, tmp_path / "image.png")


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "webp"])
def test_damaged_images_are_named(picture, tmp_path, kind):
    path = tmp_path / f"image.{kind}"
    Image.fromarray(picture).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    message = refusal(read_as_jpeg, path)
    assert str(path) in message and ("cut off" in message or "damaged" in message)
    path.write_bytes(b"")
    assert "empty" in refusal(read_as_jpeg, path)
    path.unlink()
    assert "is missing" in refusal(read_as_jpeg, path)
