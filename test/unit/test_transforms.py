"""From a JPEG to the network's input: golden vectors, the same pixels as PIL, and damaged files."""

import io
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
    decode_jpeg,
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
    result = normalize_images(images)
    (result * torch.ones(1, requires_grad=True)).sum().backward()  # it can train after inference mode
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
    assert min(crop[0, 0, 0] for crop in crops) == min(crop[0, 0, 1] for crop in crops) == 0
    assert max(crop[-1, 0, 0] for crop in crops) == 39 and max(crop[0, -1, 1] for crop in crops) == 19
    for crop in crops[:20]:
        top, left = crop[0, 0, :2]
        assert np.array_equal(crop, image[top : top + crop.shape[0], left : left + crop.shape[1]])
    assert np.array_equal(random_crop(image, 1.0, random), image)


TURNED = Image.Exif()
TURNED[0x0112] = 6  # an orientation, which is ignored as in PIL
OPTIONS = [{}, {"quality": 30}, {"subsampling": 0, "quality": 95}, {"progressive": True}, {"restart_marker_rows": 1}]


@pytest.mark.parametrize("options", [*OPTIONS, {"exif": TURNED}])
@pytest.mark.parametrize("size", [(128, 64), (91, 53)])
def test_decoded_pixels_are_pils(options, size):
    content = jpeg(scene(*size), **options)
    decoded = decode_jpeg("a.jpg", content)
    assert decoded.dtype == np.uint8 and decoded.shape == (*size, 3)
    assert np.array_equal(decoded, np.asarray(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_become_rgb(mode):
    content = jpeg(scene(), mode)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_allclose(decode_jpeg("a.jpg", content), expected, rtol=0, atol=mode == "CMYK")


def with_stray_bytes(content: bytes, marker: bytes) -> bytes:
    return content.replace(marker, b"\0stray" + marker, 1)


def test_stray_bytes_padding_and_an_unknown_revision_are_ignored():
    content = jpeg(scene())
    expected = decode_jpeg("a.jpg", content)
    ends = (b"\xff\xd9\0\0\0", b"\xff\xd9" + b"camera maker's note" * 10, b"\0\0\0\0\xff\xd9")
    odd = [content[:-2] + end for end in ends]
    odd += [with_stray_bytes(content, marker) for marker in (b"\xff\xdb", b"\xff\xc0", b"\xff\xc4", b"\xff\xda")]
    for other in (*odd, content.replace(b"JFIF\0\1", b"JFIF\0\7")):
        decoded = decode_jpeg("a.jpg", other)
        assert np.array_equal(decoded, expected) and decoded.flags.writeable


def undecodable(content: bytes) -> str:
    message = refusal(decode_jpeg, "a.jpg", bytes(content))
    assert "a.jpg" in message
    return message


def test_stray_bytes_do_not_hide_other_damage():
    content = bytearray(with_stray_bytes(jpeg(scene()), b"\xff\xda"))
    assert "is cut off" in undecodable(content[:-40])
    content[content.index(b"\xff\xdb")] = 0  # without its quantization table nothing decodes it
    assert "cannot be decoded" in undecodable(content)
    content = bytearray(jpeg(scene()))
    content[content.rindex(b"\xff\xc4")] = 0  # a lost Huffman table is not filled in
    assert "cannot be decoded" in undecodable(content)
    assert "cannot be decoded" in undecodable(b"\xff\xd8" + b"nothing of a JPEG" * 20)


def test_missing_empty_huge_and_other_files_are_named(tmp_path):
    content = bytearray(jpeg(scene()))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = (60_000).to_bytes(2, "big") * 2  # refused before decoding
    path = tmp_path / "a.jpg"
    for written, reason in (
        (None, "missing"),
        (b"", "empty"),
        (b"<html>404</html>", "not a JPEG file"),
        (content, "100 million pixels"),
        (b"\xff\xd8" + b"nothing of a JPEG" * 20, "cannot be decoded"),
    ):
        if written is not None:
            path.write_bytes(written)
        message = refusal(decode_image, path)
        assert reason in message and str(path) in message
    assert "cannot be read" in refusal(decode_image, tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_image_is_named(share, progressive):
    content = jpeg(scene(), progressive=progressive, quality=90)
    undecodable(content[: int(len(content) * share)])
    assert "is cut off" in undecodable(content[:-40])
    noise = jpeg(np.random.RandomState(0).randint(0, 256, (128, 64, 3)).astype(np.uint8), quality=90)
    undecodable(noise[: len(noise) // 2] + b"\xff\xd9")  # a regular end, but too early


def test_pad_and_crop_shifts_by_at_most_its_pixels():
    padded = np.pad(scene(32, 16), ((3, 3), (3, 3), (0, 0)))
    shifted = {padded[down : 32 + down, right : 16 + right].tobytes() for down in range(7) for right in range(7)}
    images = [scene(32, 16).copy() for _ in range(200)]
    for seed, image in enumerate(images):
        pad_and_crop(image, 3, Random(seed))
    moved = {image.tobytes() for image in images}
    assert moved <= shifted and len(moved) > 40  # of 49


def test_erasing_fills_one_rectangle_within_the_limits():
    for seed in range(50):
        erased = np.full((64, 32, 3), 7, dtype=np.uint8)
        erase_rectangle(erased, Random(seed))
        changed = (erased != 7).any(2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        height, width = len(rows), len(columns)
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert height * width == changed.sum()
        assert 0.01 < height * width / (64 * 32) < 0.45
        assert 0.2 < height / width < 5
        assert (erased[changed] == MEAN_COLOR).all()
