"""A cache of decoded images: one .npy file, memory-mapped by all processes of a machine and reused by later runs.

`<name>.npy` holds the pixels of all images one after the other, uint8 [number of bytes]. `<name>.json` holds the key
(which images, decoded by which libraries) and each image's height and width; it is written last, so that an interrupted
build leaves no cache that looks complete.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import simplejpeg  # type: ignore[import-untyped]

from aligned_reid.data.transforms import decode_image, resize_image
from aligned_reid.errors import InputError
from aligned_reid.files import replacing, write_file
from aligned_reid.lock import hold

IMAGES_AT_A_TIME = 256  # decoded, and kept in memory until they are written


class ImageCache:
    """An open cache: `self[index]` is uint8 [h, w, 3], read-only, without a copy.

    size: (height, width) of the images, None if they have their original sizes.
    Only the file's name is sent to worker processes; each of them maps the file when it reads its first image.
    """

    def __init__(self, path: Path, key: str, size: tuple[int, int] | None) -> None:
        self.path, self.key, self.size = path, key, size

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "images"}

    @functools.cached_property
    def images(self) -> list[np.ndarray]:
        """Views of the mapped file. Raises InputError if it is missing, damaged, or has another key."""
        try:
            index = json.loads(self.path.with_suffix(".json").read_bytes())
            pixels = np.load(self.path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            ends = np.cumsum([3 * height * width for height, width in index["shapes"]])
            if index["key"] != self.key or pixels.dtype != np.uint8 or pixels.shape != (ends[-1],):
                raise ValueError
            parts = np.split(pixels, ends[:-1])
            return [part.reshape(*shape, 3) for part, shape in zip(parts, index["shapes"], strict=True)]
        except Exception as error:  # of many types if the file is damaged
            reason = "is damaged, or holds other images or those of other versions of the decoding libraries"
            raise InputError(f"image cache {self.path} {reason}; start the run again to rebuild it") from error


def open_cache(
    images_dir: str,
    image_names: Sequence[str],
    size: tuple[int, int] | None,
    folders: Sequence[Path],
    say: Callable[[str], None],
) -> ImageCache:
    """The cache of these images in the first of `folders` that has it or can be written to; built there if needed.

    size: (height, width) to resize images to, None to keep their original size. Other processes that open the cache
    meanwhile wait until it is built. `say` gets lines for the log. Raises InputError if no folder can be written to, or
    an image cannot be decoded.
    """
    paths = [f"{images_dir}/{name}" for name in image_names]
    try:
        files = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, paths)]
    except OSError as error:
        raise InputError(f"image {error.filename} cannot be read: {error.strerror}") from None
    key = _digest(json.dumps([size, simplejpeg.__version__, cv2.__version__, list(image_names), files]))
    kind = "original" if size is None else f"{size[0]}x{size[1]}"
    for folder in folders:
        cache = ImageCache(folder / f"{kind}-{_digest('/'.join(image_names))[:12]}.npy", key, size)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with hold(cache.path, "--cache", wait=True):
                _build_unless_valid(cache, paths, say)
            return cache
        except OSError as error:
            say(f"no image cache in {folder}: {error.strerror}")
    raise InputError(f"--cache true: cannot write to any of {', '.join(map(str, folders))}")


def _build_unless_valid(cache: ImageCache, paths: Sequence[str], say: Callable[[str], None]) -> None:
    if cache.path.exists():
        try:
            say(f"image cache {cache.path} holds {len(cache.images):,} images")
            return
        except InputError:
            say(f"image cache {cache.path} is damaged or out of date; rebuilding it")

    def read(path: str) -> np.ndarray:
        image = decode_image(path)
        return resize_image(image, cache.size) if cache.size else image

    start, index_path = time.monotonic(), cache.path.with_suffix(".json")
    shapes = []
    with replacing(cache.path) as file, ThreadPoolExecutor() as pool:  # decoding and resizing release Python's lock
        _write_header(file, 0)
        for first in range(0, len(paths), IMAGES_AT_A_TIME):
            for image in pool.map(read, paths[first : first + IMAGES_AT_A_TIME]):
                file.write(image.tobytes())
                shapes.append(image.shape[:2])
        file.seek(0)
        _write_header(file, sum(3 * height * width for height, width in shapes))
        index_path.unlink(missing_ok=True)
    write_file(index_path, json.dumps({"key": cache.key, "shapes": shapes}).encode())
    megabytes, seconds = cache.path.stat().st_size / 1e6, time.monotonic() - start
    say(f"image cache {cache.path}: {len(paths):,} images, {megabytes:,.0f} MB, in {seconds:.1f}s")


def _write_header(file: BinaryIO, num_bytes: int) -> None:
    """The start of a .npy file; numpy leaves room for any number, so that it can be written again."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (num_bytes,)})


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=32).hexdigest()
