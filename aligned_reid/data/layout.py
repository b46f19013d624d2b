"""The layout that --data_path takes, written: what the preparations of all data sets share.

images/ holds the images under `{person:08d}_{camera:04d}_{index:08d}.jpg`, ori_to_new_im_name.pkl says which of the
source's images each of them is, and partitions.pkl, written last, which image is in which part.
"""

import errno
import io
import os
import pickle
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg  # type: ignore[import-untyped]
from PIL import Image
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
from aligned_reid.data.transforms import decode_image
from aligned_reid.errors import InputError

NUM_VAL_IDS = 100  # of Market-1501's 751 identities; the reference takes as many of every set
IMAGES_NAME, NAME_MAP, PARTITIONS_NAME = "images", "ori_to_new_im_name.pkl", "partitions.pkl"
JPEG_QUALITY = 95  # of images that are no JPEG in their source


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
    written again. Raises InputError when an image of the source is used twice, `save_dir` holds another data set or
    cannot be written, and what `read` raises.
    """
    images = [image for part in parts for image in part]
    new_names = {image.original: image.new_name for image in images}
    if len(new_names) < len(images):
        [(twice, _)] = Counter(image.original for image in images).most_common(1)
        raise InputError(f"the source has {ascii(twice)[1:-1]} twice: an image is in one part, once")
    _make_images_dir(save_dir / IMAGES_NAME, images)
    name_map = pickle.dumps(new_names, protocol=2)
    _retire_partitions(save_dir, name_map)
    for image in _progress(images):
        _write_if_new(save_dir / IMAGES_NAME / image.new_name, read(image), write)
    for name, content in {NAME_MAP: name_map, **(other_files or {})}.items():
        _write_if_new(save_dir / name, content, write)
    names = {part: [image.new_name for image in images] for part, images in parts._asdict().items()}
    write_partitions(save_dir / PARTITIONS_NAME, build_partitions(**names, num_val_ids=num_val_ids))
    return save_dir


def is_jpeg_name(name: str) -> bool:
    """Every *.jpg, `.jpg.jpg` too, but no hidden file; Thumbs.db and the like are none."""
    return name.endswith(".jpg") and not name.startswith(".")


def _make_images_dir(images_dir: Path, images: Sequence[NewImage]) -> None:
    """Make the folder, clear what an interrupted run left half-written, refuse one that holds another data set."""
    try:
        images_dir.mkdir(parents=True, exist_ok=True)
        present = os.listdir(images_dir)
        for name in present:
            if name.startswith(".") and name.endswith(".tmp"):
                (images_dir / name).unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(images_dir, error) from error
    foreign = {name for name in present if is_jpeg_name(name)} - {image.new_name for image in images}
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
    """An image file as a JPEG file: byte for byte where it is one, else (PNG, BMP, WebP, ...) at JPEG_QUALITY.

    The image is decoded in either case. Raises InputError with its path when it is missing, damaged or no image.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"image {path} is missing") from None
    except OSError as error:
        raise InputError(f"image {path} cannot be read: {error.strerror}") from error
    if content[:2] == b"\xff\xd8":
        decode_image(path)
        return content
    try:
        with Image.open(io.BytesIO(content)) as image:
            return encode_jpeg(np.asarray(image.convert("RGB")))
    # Pillow has no common error: a broken file can raise any of these, SyntaxError for a PNG among them.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = "empty" if not content else "damaged, or no image file"
        raise InputError(f"image {path} is {reason}") from error


def encode_jpeg(image: np.ndarray) -> bytes:
    """uint8 [h, w, 3], RGB, as a JPEG file at JPEG_QUALITY with colours at full resolution."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), JPEG_QUALITY, "RGB", "444")


def folders_to_look_in(path: Path) -> list[Path]:
    """A folder and those directly in it, for a set may be unpacked into one more folder; [] for a file."""
    if not path.is_dir():
        return []
    return [path, *sorted(child for child in path.iterdir() if child.is_dir())]


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
