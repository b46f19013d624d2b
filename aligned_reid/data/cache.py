"""A cache of decoded images: one .npy file, memory-mapped by all processes of a machine and reused by later runs.

`<name>.npy` holds the pixels of all images one after the other, uint8 [number of bytes]. `<name>.json` holds the key
(which images, decoded by which libraries) and each image's height and width; it is written last, so that an interrupted
build leaves no cache that looks complete.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg  # type: ignore[import-untyped]

from aligned_reid.data.transforms import decode_image, resize_image
from aligned_reid.errors import InputError
from aligned_reid.files import write_file
from aligned_reid.lock import hold

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)


class ImageCache:
    """An open cache: `self[index]` is uint8 [h, w, 3], read-only, without a copy.

    Only the file's name is sent to worker processes; each of them maps the file when it reads its first image.
    """

    def __init__(self, path: Path, key: str, resized: bool) -> None:
        self.path, self.key, self.resized = path, key, resized
        self._pixels: Any = None  # [number of bytes], once mapped

    def __getitem__(self, index: int) -> np.ndarray:
        if self._pixels is None:
            try:
                self.map()
            except Exception as error:  # json and numpy fail in many ways if a file is damaged
                reason = " ".join(str(error).split())
                raise InputError(f"image cache {self.path}: {reason}; start the run again to rebuild it") from error
        return self._pixels[self._starts[index] : self._starts[index + 1]].reshape(self._shapes[index])

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "key": self.key, "resized": self.resized, "_pixels": None}

    def map(self) -> None:
        """Map the file. Raises an exception of any kind if it is missing, damaged, or has another key."""
        content = json.loads(self.path.with_suffix(".json").read_bytes())
        if not isinstance(content, dict) or content.get("key") != self.key:
            raise ValueError("it has other images, or was made by other versions of the decoding libraries")
        pixels = np.load(self.path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        self._shapes = [(height, width, 3) for height, width in content["shapes"]]
        self._starts = _starts_of(content["shapes"])
        if pixels.dtype != np.uint8 or pixels.shape != (self._starts[-1],):
            raise ValueError("the file is damaged")
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
            if error.errno in DISK_FULL:
                raise InputError(f"--cache true: the disk of {folder} is full; make room or leave it out") from None
            if error.errno not in NOT_WRITABLE:
                raise
            say(f"no image cache in {folder}: {error.strerror}")
    raise InputError(f"--cache true: cannot write to any of {', '.join(map(str, folders))}")


def _build_unless_valid(
    cache: ImageCache, paths: Sequence[str], size: tuple[int, int] | None, say: Callable[[str], None]
) -> None:
    path, index_path = cache.path, cache.path.with_suffix(".json")
    if index_path.exists():
        try:
            cache.map()
        except Exception as error:
            say(f"image cache {path}: {' '.join(str(error).split())}; rebuilding it")
        else:
            say(f"image cache {path} holds {len(paths):,} images")
            return
    start = time.monotonic()
    temporary = path.with_name(f".{path.name}.tmp")  # perhaps left by a killed process: this one holds the lock
    try:
        shapes = _write_pixels(temporary, paths, size)
        index_path.unlink(missing_ok=True)
        temporary.replace(path)
        write_file(index_path, json.dumps({"key": cache.key, "shapes": shapes}).encode())
    finally:
        temporary.unlink(missing_ok=True)
    megabytes, seconds = path.stat().st_size / 1e6, time.monotonic() - start
    say(f"image cache {path}: {len(paths):,} images, {megabytes:,.0f} MB, in {seconds:.1f}s")


def _write_pixels(path: Path, paths: Sequence[str], size: tuple[int, int] | None) -> list[tuple[int, int]]:
    """Write the .npy file; returns each image's height and width."""
    with ThreadPoolExecutor() as pool:  # decoding and resizing release Python's global lock
        # Images at their original size are decoded twice, which takes less than a second for Market-1501.
        shapes = [size] * len(paths) if size else list(pool.map(lambda path: decode_image(path).shape[:2], paths))
        starts = _starts_of(shapes)
        pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(starts[-1],))
        if hasattr(os, "posix_fallocate"):  # without it, a full disk would kill the process when it writes to the map
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

        def write(index: int) -> None:
            image = decode_image(paths[index])
            pixels[starts[index] : starts[index + 1]] = (resize_image(image, size) if size else image).reshape(-1)

        list(pool.map(write, range(len(paths))))  # raises what a thread has raised
    pixels.flush()
    return shapes


def _starts_of(shapes: Sequence[Sequence[int]]) -> list[int]:
    """The first byte of each image, and the end of the last."""
    starts: list[int] = np.cumsum([0, *(height * width * 3 for height, width in shapes)]).tolist()
    return starts


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=32).hexdigest()
