"""From a JPEG to the network's input: golden vectors, the same pixels as PIL, and damaged files."""

import io
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from conftest import GOLDEN, refusal
from PIL import Image

from aligned_reid.data.transforms import (
    IM_MEAN,
    IM_STD,
    MEAN_COLOR,
    decode_image,
    erase_rectangle,
    normalize_images,
    pad_and_crop,
    preprocess,
    random_crop,
    resize_image,
)

VECTORS = np.load(GOLDEN / "preprocess.npz")
GOLDEN_IMAGES = [name for name in VECTORS.files if f"{name}_processed" in VECTORS.files]


def scene(height: int = 128, width: int = 64, seed: int = 0) -> np.ndarray:
    """A smooth random picture, uint8 [height, width, 3]."""
    coarse = np.random.RandomState(seed).randint(0, 256, (9, 5, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(image: np.ndarray, mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture
def write(tmp_path):
    def write_file(content: bytes) -> Path:
        path = tmp_path / "00000001_0001_00000000.jpg"
        path.write_bytes(content)
        return path

    return write_file


@pytest.mark.parametrize("name", GOLDEN_IMAGES)
@pytest.mark.parametrize(("mirror", "suffix"), [(False, "_processed"), (True, "_processed_mirrored")])
def test_preprocess_equals_the_reference(name, mirror, suffix):
    image = VECTORS[name]
    before = image.copy()
    result = preprocess(image, size=(256, 128), mirror=mirror)
    assert result.dtype == torch.float32 and result.is_contiguous()
    np.testing.assert_allclose(result.numpy(), VECTORS[name + suffix], rtol=0, atol=1e-6)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("size", [(256, 128), (128, 64), (7, 5)])
def test_normalize_images_follows_the_formula_in_channels_last(size):
    images = torch.from_numpy(np.random.RandomState(1).randint(0, 256, (3, *size, 3)).astype(np.uint8))
    before = images.clone()
    with torch.inference_mode():
        normalize_images(images)
    weight = torch.ones(1, requires_grad=True)
    (normalize_images(images) * weight).sum().backward()  # it can train after inference mode
    assert weight.grad is not None
    result = normalize_images(images)
    expected = (images.double() / 255 - torch.tensor(IM_MEAN).double()) / torch.tensor(IM_STD).double()
    assert result.shape == (3, 3, *size) and result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result.double(), expected.permute(0, 3, 1, 2), rtol=0, atol=1e-6)
    assert torch.equal(images, before)


def test_preprocess_and_normalize_images_agree_to_the_bit():
    images = [resize_image(VECTORS[name], (256, 128)) for name in GOLDEN_IMAGES]
    batch = normalize_images(torch.from_numpy(np.stack(images)))
    for name, result in zip(GOLDEN_IMAGES, batch, strict=True):
        assert torch.equal(preprocess(VECTORS[name]), result)


def test_random_crop_keeps_its_bounds_and_reaches_the_edges():
    rows, columns = np.mgrid[0:40, 0:20]
    image = np.stack([rows, columns, rows], axis=2).astype(np.uint8)
    random = Random(0)
    crops = [random_crop(image, 0.5, random) for _ in range(2000)]
    assert {crop.shape[0] for crop in crops} == set(range(20, 40))
    assert {crop.shape[1] for crop in crops} == set(range(10, 20))
    assert min(crop[0, 0, 0] for crop in crops) == 0 and max(crop[-1, 0, 0] for crop in crops) == 39
    assert min(crop[0, 0, 1] for crop in crops) == 0 and max(crop[0, -1, 1] for crop in crops) == 19
    for crop in crops[:20]:
        top, left = crop[0, 0, :2]
        assert np.array_equal(crop, image[top : top + crop.shape[0], left : left + crop.shape[1]])
    assert np.array_equal(random_crop(image, 1.0, random), image)


TURNED = Image.Exif()
TURNED[0x0112] = 6  # an orientation, which is ignored as in PIL
OPTIONS = [{}, {"quality": 30}, {"subsampling": 0, "quality": 95}, {"progressive": True}, {"restart_marker_rows": 1}]


@pytest.mark.parametrize("options", [*OPTIONS, {"exif": TURNED}])
@pytest.mark.parametrize("size", [(128, 64), (91, 53)])
def test_decoded_pixels_are_pils(write, options, size):
    path = write(jpeg(scene(*size), **options))
    decoded = decode_image(path)
    assert decoded.dtype == np.uint8 and decoded.shape == (*size, 3)
    assert np.array_equal(decoded, np.asarray(Image.open(path).convert("RGB")))
    assert np.array_equal(decode_image(str(path)), decoded)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_become_rgb(write, mode):
    path = write(jpeg(scene(), mode))
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert np.abs(decode_image(path).astype(int) - expected).max() <= (mode == "CMYK")


def test_bytes_after_the_image_and_padding_before_a_marker_are_ignored(write):
    content = jpeg(scene())
    expected = decode_image(write(content))
    for end in (b"\xff\xd9\0\0\0", b"\xff\xd9" + b"camera maker's note" * 10, b"\0\0\0\0\xff\xd9"):
        assert np.array_equal(decode_image(write(content[:-2] + end)), expected)


def with_stray_bytes(content: bytes, marker: bytes) -> bytes:
    return content.replace(marker, b"\0stray" + marker, 1)


def test_stray_bytes_in_the_header_and_an_unknown_revision_are_ignored(write):
    content = jpeg(scene())
    expected = decode_image(write(content))
    odd = [with_stray_bytes(content, marker) for marker in (b"\xff\xdb", b"\xff\xc0", b"\xff\xc4", b"\xff\xda")]
    for other in (*odd, content.replace(b"JFIF\0\1", b"JFIF\0\7")):
        decoded = decode_image(write(other))
        assert np.array_equal(decoded, expected) and decoded.flags.writeable


def undecodable(path: Path) -> str:
    message = refusal(decode_image, path)
    assert str(path) in message
    return message


def test_stray_bytes_do_not_hide_other_damage(write):
    content = bytearray(with_stray_bytes(jpeg(scene()), b"\xff\xda"))
    assert "is cut off" in undecodable(write(content[: len(content) - 40]))
    content[content.index(b"\xff\xdb")] = 0  # without its quantization table nothing decodes it
    assert "cannot be decoded" in undecodable(write(content))
    content = bytearray(jpeg(scene()))
    content[content.rindex(b"\xff\xc4")] = 0  # a lost Huffman table is not filled in
    assert "cannot be decoded" in undecodable(write(content))


def test_missing_empty_huge_and_other_files_are_named(write, tmp_path):
    assert "is missing" in undecodable(tmp_path / "none.jpg")
    assert "cannot be read" in undecodable(tmp_path)
    assert "is empty" in undecodable(write(b""))
    assert "is not a JPEG file" in undecodable(write(b"<html>404</html>"))
    Image.fromarray(scene()).save(tmp_path / "image.png")
    assert "is not a JPEG file" in undecodable(tmp_path / "image.png")
    content = bytearray(jpeg(scene()))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = (60_000).to_bytes(2, "big") * 2  # refused before decoding
    assert "100 million pixels" in refusal(decode_image, write(content))
    assert "cannot be decoded" in undecodable(write(b"\xff\xd8" + b"nothing of a JPEG" * 20))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_image_is_named(write, share, progressive):
    content = jpeg(scene(), progressive=progressive, quality=90)
    undecodable(write(content[: int(len(content) * share)]))
    assert "is cut off" in undecodable(write(content[: len(content) - 40]))
    noise = jpeg(np.random.RandomState(0).randint(0, 256, (128, 64, 3)).astype(np.uint8), quality=90)
    undecodable(write(noise[: len(noise) // 2] + b"\xff\xd9"))  # a regular end, but too early


def test_pad_and_crop_shifts_by_at_most_its_pixels():
    image = scene(32, 16)
    padded = np.pad(image, ((3, 3), (3, 3), (0, 0)))
    shifted = {padded[down : 32 + down, right : 16 + right].tobytes() for down in range(7) for right in range(7)}
    moved = set()
    for seed in range(200):
        own = image.copy()
        pad_and_crop(own, 3, Random(seed))
        moved.add(own.tobytes())
    assert moved <= shifted
    assert len(moved) > 40  # of 49


def test_erasing_fills_one_rectangle_within_the_limits():
    image = np.full((64, 32, 3), 7, dtype=np.uint8)
    for seed in range(50):
        erased = image.copy()
        erase_rectangle(erased, Random(seed))
        changed = (erased != image).any(2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        height, width = len(rows), len(columns)
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert height * width == changed.sum()
        assert 0.01 < height * width / (64 * 32) < 0.45
        assert 0.2 < height / width < 5
        assert (erased[changed] == MEAN_COLOR).all()
