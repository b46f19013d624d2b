"""Any image file as upright pixels, or as an upright JPEG file."""

import io
import math
import warnings
from pathlib import Path

import numpy as np
import simplejpeg  # type: ignore[import-untyped]
from PIL import Image, ImageOps

from aligned_reid.data.transforms import JPEG_START, MAX_PIXELS, decode_jpeg, read_content, too_large
from aligned_reid.errors import InputError

_ORIENTATION = 0x0112  # EXIF tag
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # Pillow would run Ghostscript for others, such as EPS

# PIL warns of damaged metadata, and of sizes that MAX_PIXELS limits. Images are read in threads, where catch_warnings
# can leave all warnings of the process switched off.
warnings.filterwarnings("ignore", module="PIL")


def read_as_jpeg(path: Path) -> bytes:
    """`as_jpeg` of a file. Raises InputError as `read_content` does, too."""
    return as_jpeg(path, read_content(path))


def as_jpeg(name: str | Path, content: bytes) -> bytes:
    """An image file as a JPEG file: unchanged if it is an upright JPEG, otherwise `decode_upright` and encoded.

    Every image is decoded. Raises InputError as `decode_upright` does.
    """
    pixels = decode_upright(name, content)
    if content[:2] == JPEG_START and not _is_turned(content):
        return content
    return encode_jpeg(pixels)


def decode_upright(name: str | Path, content: bytes) -> np.ndarray:
    """An image file as uint8 [h, w, 3], RGB, turned upright by its EXIF orientation; of an animation, the first frame.

    The content decides the file type, not the name. Upright JPEGs have the pixels of `decode_jpeg`. Raises InputError
    with the name if it is damaged, too large or not an image.
    """
    if content[:2] == JPEG_START:
        pixels = decode_jpeg(name, content)
        if not _is_turned(content):
            return pixels
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise Image.DecompressionBombError
            return to_rgb(name, ImageOps.exif_transpose(image))
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(too_large(name)) from error
    except Exception as error:  # Pillow raises errors of many types for broken files
        raise InputError(f"image {name} is damaged or not a JPEG, PNG, BMP, WebP or TIFF file") from error


def _is_turned(jpeg: bytes) -> bool:
    """Whether EXIF says that the image must be turned or mirrored. Unreadable EXIF data is ignored."""
    try:
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
            return image.getexif().get(_ORIENTATION) in range(2, 9)
    except Exception:  # Pillow raises errors of many types for broken files
        return False


def to_rgb(name: str | Path, image: Image.Image) -> np.ndarray:
    """An image in any Pillow mode as uint8 [h, w, 3]. Transparency is dropped; stored colors are kept.

    16-bit values are divided by 257. Modes I and F do not define white: it is the first of 1 (F only), 255 and 65535
    that no value exceeds by more than 5 %. Raises InputError for larger or negative values and NaN.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        image.info.pop("transparency", None)
        return np.asarray(image.convert("RGB"))
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    whites = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    white = next((white for white in whites if high <= 1.05 * white), 0)
    if not low >= -0.05 * white or not white:  # NaN too
        raise InputError(f"image {name} has values from {low:g} to {high:g}; save it with 8 bits per channel")
    gray = np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)


def encode_jpeg(image: np.ndarray) -> bytes:
    """uint8 [h, w, 3], RGB, as a JPEG file of quality 95 without chroma subsampling."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), 95, "RGB", "444")
