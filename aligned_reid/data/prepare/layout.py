"""The layout that --data_path takes, written: what the preparations of all data sets share.

images/ holds the images under `{person:08d}_{camera:04d}_{index:08d}.jpg`, ori_to_new_im_name.pkl says which of the
source's images each of them is, and partitions.pkl, written last, which image is in which part.
"""

import errno
import io
import math
import os
import pickle
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg  # type: ignore[import-untyped]
from PIL import Image, ImageOps
from tqdm import tqdm

from aligned_reid.data.partitions import (
    GALLERY,
    MULTI_QUERY,
    QUERY,
    Partitions,
    build_partitions,
    format_image_name,
    write_atomically,
    write_partitions,
)
from aligned_reid.data.transforms import JPEG_START, MAX_PIXELS, decode_jpeg, too_large
from aligned_reid.errors import InputError
from aligned_reid.lock import hold

NUM_VAL_IDS = 100  # of Market-1501's 751 identities; the reference takes as many of every set
IMAGES_NAME, NAME_MAP, PARTITIONS_NAME = "images", "ori_to_new_im_name.pkl", "partitions.pkl"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff")  # and in capitals
JPEG_QUALITY = 95  # of images that are no upright JPEG in their source
MAX_BYTES = 100 * 10**6  # of an image file

_ORIENTATION = 0x0112  # EXIF's tag
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # Pillow would run Ghostscript for others, such as EPS


class NewImage(NamedTuple):
    """One image to copy: what the source calls it, and its name in images/."""

    original: str
    new_name: str


class Parts(NamedTuple):
    """The images of a data set, part by part, in the order in which they are copied."""

    trainval: Sequence[NewImage]
    gallery: Sequence[NewImage]
    query: Sequence[NewImage]
    multi_query: Sequence[NewImage] = ()


class Namer:
    """Names images: each person's under each camera are counted in the order in which they come."""

    def __init__(self) -> None:
        self.num_images: Counter[tuple[int, int]] = Counter()

    def __call__(self, original: str, person_id: int, camera: int) -> NewImage:
        pair = person_id, camera
        image = NewImage(original, format_image_name(person_id, camera, self.num_images[pair]))
        self.num_images[pair] += 1
        return image


def check_paths(source: Path, save_dir: Path) -> None:
    """Raise InputError unless the source exists and nothing would be written into it."""
    if not source.exists():
        raise InputError(f"--source {source} does not exist")
    images_dir = (save_dir / IMAGES_NAME).resolve()
    if source.is_dir() and source.resolve() in (images_dir, *images_dir.parents):
        raise InputError(f"--save_dir {save_dir} is in the source {source}, which stays as it is; take another one")


def write_data_set(
    save_dir: Path,
    parts: Parts,
    read: Callable[[NewImage], bytes],
    num_val_ids: int,
    other_files: Mapping[str, bytes] | None = None,
    write: Callable[[Path, bytes], None] = write_atomically,
) -> Path:
    """Write the data set; returns `save_dir`.

    `read` gives an image's bytes, a JPEG file; other_files are written beside images/, before partitions.pkl; `write`
    writes a file whole or not at all. When interrupted, the same call goes on: what is there already and right is not
    written again. Raises InputError when an image of the source is used twice, `save_dir` holds another data set, is
    written by another process or cannot be written, and what `read` raises.
    """
    images = [image for part in parts for image in part]
    new_names = {image.original: image.new_name for image in images}
    if len(new_names) < len(images):
        [(twice, _)] = Counter(image.original for image in images).most_common(1)
        raise InputError(f"the source has {ascii(twice)[1:-1]} twice: an image is in one part, once")
    _make_folder(save_dir / IMAGES_NAME)
    with hold(save_dir, "--save_dir"):
        _clear_images_dir(save_dir / IMAGES_NAME, images)
        name_map = pickle.dumps(new_names, protocol=2)
        _retire_partitions(save_dir, name_map)
        for image in _progress(images):
            _write_if_new(save_dir / IMAGES_NAME / image.new_name, read(image), write)
        for name, content in {NAME_MAP: name_map, **(other_files or {})}.items():
            _write_if_new(save_dir / name, content, write)
        names = {part: [image.new_name for image in images] for part, images in parts._asdict().items()}
        write_partitions(save_dir / PARTITIONS_NAME, build_partitions(**names, num_val_ids=num_val_ids))
    return save_dir


def ending_of(name: str) -> str:
    """The kind of a file by its name: its ending in small letters, "hidden", or "no ending"."""
    return "hidden" if name.startswith(".") else os.path.splitext(name)[1].lower() or "no ending"


def find_image(path: Path) -> Path | None:
    """The file, or else the one beside it that differs in an image's ending only; None without either."""
    endings = (ending for small in IMAGE_ENDINGS for ending in (small, small.upper()))
    candidates = (path, *(path.with_suffix(ending) for ending in endings))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def describe_passed_over(kinds: Mapping[str, int]) -> str:
    """`passed over as not images: 1 dangling links, 2 .db`, from how many there are of each kind."""
    counts = ", ".join(f"{number:,} {ascii(kind)[1:-1]}" for kind, number in sorted(kinds.items()))
    return f"passed over as not images: {counts}"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _clear_images_dir(images_dir: Path, images: Sequence[NewImage]) -> None:
    """Clear what an interrupted run left half-written, refuse a folder that holds another data set."""
    try:
        present = os.listdir(images_dir)
        for name in present:
            if name.startswith(".") and name.endswith(".tmp"):
                (images_dir / name).unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(images_dir, error) from error
    foreign = {name for name in present if ending_of(name) == ".jpg"} - {image.new_name for image in images}
    if foreign:
        raise InputError(f"{images_dir} holds images of another data set ({min(foreign)}); take another --save_dir")


def _retire_partitions(save_dir: Path, name_map: bytes) -> None:
    """Remove the partitions of a former preparation whose names meant other images: they would outlive its images."""
    try:
        if (save_dir / NAME_MAP).exists() and not _holds(save_dir / NAME_MAP, name_map):
            (save_dir / PARTITIONS_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(save_dir, error) from error


def _write_if_new(path: Path, content: bytes, write: Callable[[Path, bytes], None]) -> None:
    """Write a file unless it holds just this. Comparing costs less than writing and needs no record of what is done."""
    try:
        if not _holds(path, content):
            write(path, content)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except FileNotFoundError:
        return False


def _cannot_write(path: Path, error: OSError) -> InputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"no space left for {path}; make room and run the same command again, it goes on from here")
    return InputError(f"cannot write {path}: {error.strerror}")


def _progress(images: Sequence[NewImage]) -> Iterator[NewImage]:
    """The images, one by one, with a bar on a terminal and ten plain lines otherwise (both on stderr)."""
    if sys.stderr.isatty():
        yield from tqdm(images, desc="Copying", unit=" images")
        return
    step = max(1, -(-len(images) // 10))
    for num_done, image in enumerate(images, start=1):
        yield image
        if num_done % step == 0 or num_done == len(images):
            print(f"copied {num_done:,} of {len(images):,} images", file=sys.stderr, flush=True)


def read_as_jpeg(path: Path) -> bytes:
    """`as_jpeg` of a file. Raises InputError also when it is missing, cannot be read or has more than MAX_BYTES."""
    try:
        check_num_bytes(path, path.stat().st_size)
        return as_jpeg(path, path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"image {path} is missing") from None
    except OSError as error:
        raise InputError(f"image {path} cannot be read: {error.strerror}") from error


def check_num_bytes(name: str | Path, num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise InputError(f"image {name} has {num_bytes / 1e6:,.0f} MB; {MAX_BYTES // 10**6} are the most")


def as_jpeg(name: str | Path, content: bytes) -> bytes:
    """An image file as a JPEG file: byte for byte if it is an upright one, else turned upright, at JPEG_QUALITY.

    Its content says what it is, not its `name`. It is decoded in any case. Raises InputError with the name when it is
    empty, damaged, too large or not an image.
    """
    if not content:
        raise InputError(f"image {name} is empty")
    if content[:2] == JPEG_START:
        decode_jpeg(name, content, check_size=True)
        if not _is_turned(content):
            return content
    try:
        with _open(content) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise Image.DecompressionBombError
            return encode_jpeg(to_rgb(name, ImageOps.exif_transpose(image)))
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(too_large(name)) from error
    except Exception as error:  # Pillow raises errors of many types for broken files
        raise InputError(
            f"image {name} is damaged, or of a kind that cannot be read: JPEG, PNG, BMP, WebP and most TIFF files can"
        ) from error


@contextmanager
def _open(content: bytes) -> Iterator[Image.Image]:
    """Open an image with Pillow, without its warnings about what it reads all the same."""
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        yield image


def _is_turned(jpeg: bytes) -> bool:
    """Whether the camera noted that the image has to be turned or mirrored. A note that cannot be read is none."""
    try:
        with _open(jpeg) as image:
            return image.getexif().get(_ORIENTATION) in range(2, 9)
    except Exception:  # Pillow raises errors of many types for broken files
        return False


def to_rgb(name: str | Path, image: Image.Image) -> np.ndarray:
    """An image of any of Pillow's modes as uint8 [h, w, 3]. Transparency is dropped: colours are as they are stored.

    16-bit values are divided by 257. 32-bit and floating-point modes do not say which value is white: it is the first
    of 1 (floating point only), 255 and 65535 that no value exceeds by more than 5 %. Raises InputError for larger
    values, negative ones and NaN.
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
    """uint8 [h, w, 3], RGB, as a JPEG file at JPEG_QUALITY with colours at full resolution."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), JPEG_QUALITY, "RGB", "444")


def folders_to_look_in(path: Path) -> Iterator[Path]:
    """A folder, those in it, and those in these, for a set may be unpacked into more folders; nothing for a file."""
    if not path.is_dir():
        return
    yield path
    children = _folders_in(path)
    yield from children
    for child in children:
        yield from _folders_in(child)


def _folders_in(folder: Path) -> list[Path]:
    """Sorted; without hidden ones and what macOS adds to archives, and none if the folder cannot be read."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                entry.name for entry in entries if (os.path.isdir(entry) if entry.is_symlink() else entry.is_dir())
            )
    except OSError:
        return []
    return [folder / name for name in names if not name.startswith((".", "__MACOSX"))]


def prepare_command(script: str, source: Path, name: str, flags: str = "") -> str:
    """The command that prepares `source` into a folder beside it, called `name` unless the source itself is."""
    source = Path(os.path.abspath(source))  # "." has no name and nothing beside it
    name = f"{name}_prepared" if name == source.name else name
    paths = f"--source {shlex.quote(str(source))} --save_dir {shlex.quote(str(source.parent / name))}"
    return f"python script/{script} {paths}{flags}"


def describe(partitions: Partitions) -> str:
    """The counts of a prepared data set, a line for each part."""
    num_marks = Counter(partitions.test_marks)
    lines = [
        ("trainval", len(partitions.trainval_im_names), f", {len(partitions.trainval_ids2labels)} identities"),
        ("train", len(partitions.train_im_names), f", {len(partitions.train_ids2labels)} identities"),
        ("val", len(partitions.val_im_names), ""),
        ("query", num_marks[QUERY], ""),
        ("gallery", num_marks[GALLERY], ""),
        ("multi-query", num_marks[MULTI_QUERY], ""),
    ]
    return "\n".join(f"{part:<11} {num_images:6,} images{identities}" for part, num_images, identities in lines)
