"""A cache of decoded images: one .npy file, memory-mapped by all processes of a machine and reused by later runs.

`<name>.npy` holds the pixels of all images one after the other, uint8 [number of bytes]. `<name>.json` holds the key
(which images, decoded by which libraries) and each image's height and width; it is written last, so that an interrupted
build leaves no cache that looks complete.
"""

from __future__ import annotations

import errno
import json
import math
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

    Only the file's name is sent to worker processes; each of them maps the file when it reads its first image.
    """

    def __init__(self, path: Path, key: str, resized: bool) -> None:
        self.path, self.key, self.resized = path, key, resized
        self._pixels: Any = None  # uint8 [number of bytes], once mapped

    def __getitem__(self, index: int) -> np.ndarray:
        if self._pixels is None:
            self.map()
        return self._pixels[self._starts[index] : self._starts[index + 1]].reshape(self._shapes[index])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "key": self.key, "resized": self.resized, "_pixels": None}

    def map(self) -> None:
        """Map the file. Raises InputError if it is missing, damaged, or has another key."""
        try:
            index = json.loads(self.path.with_suffix(".json").read_bytes())
            pixels = np.load(self.path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            self._shapes = [(height, width, 3) for height, width in index["shapes"]]
            self._starts = np.cumsum([0, *map(math.prod, self._shapes)]).tolist()
            if index["key"] != self.key or pixels.dtype != np.uint8 or pixels.shape != (self._starts[-1],):
                raise ValueError
        except Exception as error:  # of many types if the file is damaged
            reason = "is damaged, or holds other images or those of other versions of the decoding libraries"
            raise InputError(f"image cache {self.path} {reason}; start the run again to rebuild it") from error
        self._pixels = pixels


def open_cache(
    images_dir: str,
    image_names: Sequence[str],
    size: tuple[int, int] | None,
    folders: Sequence[Path],
    say: Callable[[str], None],
) -> ImageCache:
    """The cache of these images in the first of `folders` that has it or can be written to; built there if needed.

    size: (height, width) to resize images to, None to keep their original size. Other processes that open the cache
    meanwhile wait until it is built. `say` gets lines for the log. Raises InputError if no folder can be written to,
    the disk is full, or an image cannot be decoded.
    """
    paths = [f"{images_dir}/{name}" for name in image_names]
    try:
        files = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, paths)]
    except OSError as error:
        raise InputError(f"image {error.filename} cannot be read: {error.strerror}") from None
    key = _digest(json.dumps([size, simplejpeg.__version__, cv2.__version__, list(image_names), files]))
    kind = "original" if size is None else f"{size[0]}x{size[1]}"
    for folder in folders:
        cache = ImageCache(folder / f"{kind}-{_digest('/'.join(image_names))[:12]}.npy", key, resized=size is not None)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with hold(cache.path, "--cache", wait=True):
                _build_unless_valid(cache, paths, size, say)
            return cache
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(f"--cache true: the disk of {folder} is full; make room or leave it out") from None
            say(f"no image cache in {folder}: {error.strerror}")
    raise InputError(f"--cache true: cannot write to any of {', '.join(map(str, folders))}")


def _build_unless_valid(
    cache: ImageCache, paths: Sequence[str], size: tuple[int, int] | None, say: Callable[[str], None]
) -> None:
    if cache.path.exists():
        try:
            cache.map()
        except InputError:
            say(f"image cache {cache.path} is damaged or out of date; rebuilding it")
        else:
            say(f"image cache {cache.path} holds {len(paths):,} images")
            return

    def read(path: str) -> np.ndarray:
        image = decode_image(path)
        return resize_image(image, size) if size else image

    start, index_path = time.monotonic(), cache.path.with_suffix(".json")
    shapes: list[tuple[int, ...]] = []
    with replacing(cache.path) as file, ThreadPoolExecutor() as pool:  # decoding and resizing release Python's lock
        _write_header(file, 0)
        for first in range(0, len(paths), IMAGES_AT_A_TIME):
            for image in pool.map(read, paths[first : first + IMAGES_AT_A_TIME]):
                file.write(image.tobytes())
                shapes.append(image.shape)
        file.seek(0)
        _write_header(file, sum(map(math.prod, shapes)))
        index_path.unlink(missing_ok=True)
    write_file(index_path, json.dumps({"key": cache.key, "shapes": [shape[:2] for shape in shapes]}).encode())
    megabytes, seconds = cache.path.stat().st_size / 1e6, time.monotonic() - start
    say(f"image cache {cache.path}: {len(paths):,} images, {megabytes:,.0f} MB, in {seconds:.1f}s")


def _write_header(file: BinaryIO, num_bytes: int) -> None:
    """The start of a .npy file; numpy leaves room for any number, so that it can be written again."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (num_bytes,)})


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=32).hexdigest()
