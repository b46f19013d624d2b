"""From a JPEG file to the network's input: decode, crop, resize (uint8, in workers), normalize (on the device)."""

import io
import math
import os
import re
from functools import lru_cache
from pathlib import Path
from random import Random

import cv2
import numpy as np
import simplejpeg  # type: ignore[import-untyped]
import torch
from PIL import Image
from torch import Tensor

from aligned_reid.errors import InputError

IM_MEAN = (0.486, 0.459, 0.408)  # ImageNet's, as rounded by the reference; R, G, B of images in [0, 1]
IM_STD = (0.229, 0.224, 0.225)
MEAN_COLOR = tuple(round(255 * value) for value in IM_MEAN)
JPEG_START = b"\xff\xd8"
MAX_BYTES = 100_000_000  # per image file
MAX_PIXELS = 100_000_000  # per image: 300 MB of memory


def decode_image(path: str | Path) -> np.ndarray:
    """Decode a JPEG file to uint8 [h, w, 3], RGB, with the same pixels as PIL. Gray images become RGB.

    Raises InputError with the path if the file cannot be read, is cut off or not a JPEG, or has more than MAX_PIXELS.
    """
    content = read_content(path)
    if content[:2] != JPEG_START:
        raise InputError(f"image {path} is not a JPEG file")
    return decode_jpeg(path, content)


def read_content(path: str | Path) -> bytes:
    """The bytes of an image file. Raises InputError if it is missing, unreadable, empty or larger than MAX_BYTES."""
    try:
        # Path.open takes as long as decoding a small image; a buffer has no use for a file that is read at once.
        with open(path, "rb", buffering=0) as file:
            check_num_bytes(path, os.fstat(file.fileno()).st_size)
            content = file.read()
    except FileNotFoundError:
        raise InputError(f"image {path} is missing") from None
    except OSError as error:
        raise InputError(f"image {path} cannot be read: {error.strerror}") from error
    if not content:
        raise InputError(f"image {path} is empty")
    return content


def check_num_bytes(name: str | Path, num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise InputError(f"image {name} has {num_bytes / 1e6:,.0f} MB; the limit is {MAX_BYTES // 10**6} MB")


def decode_jpeg(path: str | Path, content: bytes) -> np.ndarray:
    """`decode_image` for a file that was already read; `path` is for the message."""
    # simplejpeg decodes 1.5 times as fast as OpenCV. Like PIL and unlike OpenCV, it ignores the EXIF orientation.
    try:
        height, width = simplejpeg.decode_jpeg_header(content)[:2]
        if height * width > MAX_PIXELS:
            raise InputError(too_large(path))
        return simplejpeg.decode_jpeg(content, colorspace="RGB")
    except InputError:
        raise
    except ValueError as error:
        reason = str(error)
    pixels_lost = "premature end" in reason.lower() or ("Corrupt" in reason and "extraneous bytes" not in reason)
    # simplejpeg refuses what other decoders accept, such as stray bytes between header segments.
    if not pixels_lost and not _is_segment_lost(content, reason):
        try:
            with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
                return np.array(image.convert("RGB"))
        except Exception as error:  # Pillow raises errors of many types for broken files
            reason = "premature end" if "truncated" in str(error) else reason
    if "premature end" in reason.lower():
        raise InputError(f"image {path} is cut off")
    raise InputError(f"image {path} cannot be decoded: {' '.join(reason.split())[:100]}")


def _is_segment_lost(content: bytes, reason: str) -> bool:
    """Whether the extraneous bytes of libjpeg's `reason` are a header segment whose marker is damaged, such as a table.

    Decoders then use standard tables, and the pixels are wrong. A segment is two bytes and then its own length.
    """
    match = re.search(r"(\d+) extraneous bytes before marker 0x(\w\w)", reason)
    if match is None:
        return False
    num_bytes, marker = int(match[1]), bytes([0xFF, int(match[2], 16)])
    length = (num_bytes - 2).to_bytes(4, "big", signed=True)[2:]
    ends = [found.start() for found in re.finditer(re.escape(marker), content)]
    return any(content[end - num_bytes :][2:4] == length for end in ends if end >= num_bytes)


def too_large(path: str | Path) -> str:
    return f"image {path} has more than {MAX_PIXELS // 10**6} million pixels"


def random_crop(image: np.ndarray, crop_ratio: float, random: Random) -> np.ndarray:
    """A random part of an image [h, w, 3], as a view; its height and width are random shares in [crop_ratio, 1]."""
    height, width = image.shape[:2]
    crop_height = max(1, int(height * random.uniform(crop_ratio, 1)))
    crop_width = max(1, int(width * random.uniform(crop_ratio, 1)))
    top = random.randint(0, height - crop_height)
    left = random.randint(0, width - crop_width)
    return image[top : top + crop_height, left : left + crop_width]


def pad_and_crop(image: np.ndarray, pixels: int, random: Random) -> None:
    """Shift an image [h, w, 3] in place by up to `pixels` in each direction; the uncovered border becomes black."""
    height, width = image.shape[:2]
    down, right = random.randint(-pixels, pixels), random.randint(-pixels, pixels)
    kept = image[max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)].copy()
    image[:] = 0
    image[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = kept


def erase_rectangle(image: np.ndarray, random: Random) -> None:
    """Fill a random rectangle of an image [h, w, 3] with the mean color, in place: 2 to 40 % of it, aspect 0.3 to 3.3.

    Zhong et al., "Random Erasing Data Augmentation", arXiv:1708.04896, algorithm 1. After a hundred rectangles that do
    not fit, the image is left unchanged.
    """
    height, width = image.shape[:2]
    for _ in range(100):
        area = random.uniform(0.02, 0.4) * height * width
        aspect = random.uniform(0.3, 1 / 0.3)
        high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < high < height and 0 < wide < width:
            top, left = random.randint(0, height - high), random.randint(0, width - wide)
            image[top : top + high, left : left + wide] = MEAN_COLOR
            return


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 [h, w, 3] to [height, width, 3], bilinear without antialiasing as in the reference."""
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def resize_into(slot: np.ndarray, image: np.ndarray, mirror: bool = False) -> None:
    """Write an image [h, w, 3], resized and then mirrored, into `slot` [height, width, 3], contiguous memory."""
    height, width = slot.shape[:2]
    if mirror:
        cv2.flip(resize_image(image, (height, width)), 1, dst=slot)
    else:
        cv2.resize(image, (width, height), dst=slot, interpolation=cv2.INTER_LINEAR)


def normalize_images(images: Tensor, memory_format: torch.memory_format = torch.channels_last) -> Tensor:
    """(image / 255 - IM_MEAN) / IM_STD for uint8 [N, H, W, 3] on any device -> float32 [N, 3, H, W].

    Rows are processed as vectors of W * 3 values: broadcasting over an innermost axis of 3 is several times slower.
    """
    num_images, height, width, _ = images.shape
    mean, inverse_std = _mean_and_inverse_std(width, images.device)
    rows = images.reshape(num_images, height, width * 3).to(torch.float32)
    rows.sub_(mean).mul_(inverse_std)
    return rows.view(num_images, height, width, 3).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)


@lru_cache(maxsize=8)
def _mean_and_inverse_std(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """255 * IM_MEAN and 1 / (255 * IM_STD), repeated for a row of pixels [W * 3]."""
    mean = 255 * torch.tensor(IM_MEAN, dtype=torch.float64).repeat(width)
    inverse_std = 1 / (255 * torch.tensor(IM_STD, dtype=torch.float64).repeat(width))
    return mean.to(device, torch.float32), inverse_std.to(device, torch.float32)


def preprocess(image: np.ndarray, size: tuple[int, int] = (256, 128), mirror: bool = False) -> Tensor:
    """One image as the network's input: uint8 [h, w, 3], RGB -> float32 [3, height, width]."""
    resized = resize_image(image, size)
    batch = torch.from_numpy(np.ascontiguousarray(resized[:, ::-1] if mirror else resized)[None])
    return normalize_images(batch)[0].contiguous()
