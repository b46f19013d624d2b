"""From a JPEG to the network's input: golden vectors, the same pixels as PIL, and damaged files."""

import io
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from aligned_reid import InputError
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

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "preprocess.npz")
GOLDEN_IMAGES = [name for name in GOLDEN.files if f"{name}_processed" in GOLDEN.files]


def scene(height: int = 128, width: int = 64, seed: int = 0) -> np.ndarray:
    """A smooth random picture, uint8 [height, width, 3]."""
    coarse = np.random.RandomState(seed).randint(0, 256, (9, 5, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(image: np.ndarray | Image.Image, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture
def write(tmp_path):
    def write_file(content: bytes) -> Path:
        path = tmp_path / "00000001_0001_00000000.jpg"
        path.write_bytes(content)
        return path

    return write_file


# Numbers


@pytest.mark.parametrize("name", GOLDEN_IMAGES)
@pytest.mark.parametrize(("mirror", "suffix"), [(False, "_processed"), (True, "_processed_mirrored")])
def test_preprocess_equals_the_reference(name, mirror, suffix):
    image = GOLDEN[name]
    before = image.copy()
    result = preprocess(image, size=(256, 128), mirror=mirror)
    assert result.dtype == torch.float32 and result.is_contiguous()
    np.testing.assert_allclose(result.numpy(), GOLDEN[name + suffix], rtol=0, atol=1e-6)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("size", [(256, 128), (128, 64), (7, 5)])
def test_normalize_images_follows_the_formula_in_channels_last(size):
    images = torch.from_numpy(np.random.RandomState(1).randint(0, 256, (3, *size, 3)).astype(np.uint8))
    before = images.clone()
    result = normalize_images(images)
    expected = (images.double() / 255 - torch.tensor(IM_MEAN).double()) / torch.tensor(IM_STD).double()
    assert result.shape == (3, 3, *size) and result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result.double(), expected.permute(0, 3, 1, 2), rtol=0, atol=1e-6)
    assert torch.equal(images, before)


def test_normalize_images_can_train_after_inference_mode():
    images = torch.zeros(2, 9, 11, 3, dtype=torch.uint8)
    with torch.inference_mode():
        normalize_images(images)
    weight = torch.ones(1, requires_grad=True)
    (normalize_images(images) * weight).sum().backward()
    assert weight.grad is not None


def test_preprocess_and_normalize_images_agree_to_the_bit():
    images = [resize_image(GOLDEN[name], (256, 128)) for name in GOLDEN_IMAGES]
    batch = normalize_images(torch.from_numpy(np.stack(images)))
    for name, result in zip(GOLDEN_IMAGES, batch, strict=True):
        assert torch.equal(preprocess(GOLDEN[name]), result)


def test_resize():
    image = scene(20, 10)
    assert resize_image(image, (20, 10)) is image
    assert resize_image(image, (40, 30)).shape == (40, 30, 3)


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


# Files


@pytest.mark.parametrize(
    "options",
    [{}, {"quality": 30}, {"subsampling": 0, "quality": 95}, {"progressive": True}, {"restart_marker_rows": 1}],
)
@pytest.mark.parametrize("size", [(128, 64), (91, 53)])
def test_decoded_pixels_are_pils(write, options, size):
    path = write(jpeg(scene(*size), **options))
    decoded = decode_image(path)
    assert decoded.dtype == np.uint8 and decoded.shape == (*size, 3)
    assert np.array_equal(decoded, np.asarray(Image.open(path).convert("RGB")))
    assert np.array_equal(decode_image(str(path)), decoded)


def test_colors_are_in_rgb_order(write):
    red = np.zeros((16, 16, 3), dtype=np.uint8)
    red[..., 0] = 255
    assert (decode_image(write(jpeg(red, quality=95)))[8, 8] > (200, -1, -1)).all()
    assert decode_image(write(jpeg(red, quality=95)))[8, 8, 2] < 50


def test_gray_becomes_rgb(write):
    decoded = decode_image(write(jpeg(Image.fromarray(scene()).convert("L"))))
    assert decoded.shape == (128, 64, 3)
    assert np.array_equal(decoded[..., 0], decoded[..., 1]) and np.array_equal(decoded[..., 0], decoded[..., 2])


def test_exif_orientation_is_ignored_as_in_pil(write):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write(jpeg(scene(), exif=exif))
    assert np.array_equal(decode_image(path), np.asarray(Image.open(path)))


def test_bytes_after_the_image_are_ignored(write):
    content = jpeg(scene())
    expected = decode_image(write(content))
    assert np.array_equal(decode_image(write(content + b"\0" * 3)), expected)
    assert np.array_equal(decode_image(write(content + b"camera maker's note" * 10)), expected)


def test_padding_before_a_marker_is_ignored(write):
    content = jpeg(scene())
    path = write(content[:-2] + b"\0\0\0\0" + content[-2:])
    assert np.array_equal(decode_image(path), np.asarray(Image.open(path)))


def with_stray_bytes(content: bytes, marker: bytes) -> bytes:
    place = content.index(marker)
    return content[:place] + b"\0stray" + content[place:]


@pytest.mark.parametrize("marker", [b"\xff\xdb", b"\xff\xc0", b"\xff\xc4", b"\xff\xda"])
def test_stray_bytes_in_the_header_are_ignored(write, marker):
    content = jpeg(scene())
    expected = decode_image(write(content))
    decoded = decode_image(write(with_stray_bytes(content, marker)))
    assert np.array_equal(decoded, expected) and decoded.flags.writeable


def test_an_unknown_revision_of_the_format_is_accepted(write):
    content = jpeg(scene())
    expected = decode_image(write(content))
    assert np.array_equal(decode_image(write(content.replace(b"JFIF\0\1", b"JFIF\0\7"))), expected)


def test_stray_bytes_do_not_hide_other_damage(write):
    content = with_stray_bytes(jpeg(scene()), b"\xff\xda")
    assert "is cut off" in refusal(write(content[: len(content) - 40]))
    place = content.index(b"\xff\xdb")  # without its quantization table nothing decodes it
    assert "cannot be decoded" in refusal(write(content[:place] + b"\0" + content[place + 1 :]))


def test_huge_dimensions_are_refused_before_decoding(write):
    content = bytearray(jpeg(scene()))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = (60_000).to_bytes(2, "big") * 2
    with pytest.raises(InputError, match="more than 100 million pixels"):
        decode_image(write(bytes(content)), check_size=True)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        decode_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_empty_and_other_files_are_named(write, tmp_path):
    assert "is missing" in refusal(tmp_path / "none.jpg")
    assert "cannot be read" in refusal(tmp_path)
    assert "is empty" in refusal(write(b""))
    assert "is not a JPEG file" in refusal(write(b"<html>404</html>"))
    png = io.BytesIO()
    Image.fromarray(scene()).save(png, "PNG")
    assert "is not a JPEG file" in refusal(write(png.getvalue()))
    assert "cannot be decoded" in refusal(write(b"\xff\xd8" + b"nothing of a JPEG" * 20))


def test_cmyk_becomes_rgb(write):
    path = write(jpeg(Image.fromarray(scene()).convert("CMYK")))
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert np.abs(decode_image(path).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_image_is_named(write, share, progressive):
    content = jpeg(scene(), progressive=progressive, quality=90)
    refusal(write(content[: int(len(content) * share)]))
    assert "is cut off" in refusal(write(content[: len(content) - 40]))


def test_an_image_that_ends_early_is_refused(write):
    content = jpeg(np.random.RandomState(0).randint(0, 256, (128, 64, 3)).astype(np.uint8), quality=90)
    refusal(write(content[: len(content) // 2] + b"\xff\xd9"))


def test_pad_and_crop_shifts_by_at_most_its_pixels():
    image = scene(32, 16)
    moved = set()
    for seed in range(200):
        own = image.copy()
        pad_and_crop(own, 3, Random(seed))
        moved.add(own.tobytes())
    places = {}
    for down in range(-3, 4):
        for right in range(-3, 4):
            padded = np.pad(image, ((3, 3), (3, 3), (0, 0)))
            places[padded[3 - down : 35 - down, 3 - right : 19 - right].tobytes()] = (down, right)
    assert moved <= set(places)
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


def test_a_lost_huffman_table_is_not_filled_in(write):
    content = bytearray(jpeg(scene()))
    content[content.rindex(b"\xff\xc4")] = 0
    with pytest.raises(InputError, match="cannot be decoded"):
        decode_image(write(bytes(content)))
