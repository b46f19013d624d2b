"""A cache of decoded images: one .npy file, memory-mapped by all processes of a machine and reused by later runs.

`<name>.npy` holds the pixels of all images one after the other, uint8 [number of bytes]. `<name>.json` holds the key
(which images, decoded by which libraries) and each image's height and width. The pixels are renamed into place before
the JSON file is, so an interrupted build leaves no cache that looks complete.
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

from aligned_reid.data.partitions import write_atomically
from aligned_reid.data.transforms import decode_image, resize_image
from aligned_reid.errors import InputError
from aligned_reid.lock import hold

NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)


class ImageCache:
    """An open cache: `self[index]` is uint8 [h, w, 3], read-only, without a copy.

    Only the file's name is sent to worker processes; each of them maps the file when it reads the first image.
    """

    def __init__(self, path: Path, key: str, resized: bool) -> None:
        self.path, self.key, self.resized = path, key, resized
        self._pixels: np.ndarray | None = None

    def __getitem__(self, index: int) -> np.ndarray:
        if self._pixels is None:
            try:
                self._pixels, self._shapes, self._starts = _map_cache(self.path, self.key)
            except (OSError, ValueError) as error:
                raise InputError(f"image cache {self.path} {error}; start the run again to rebuild it") from None
        height, width = self._shapes[index]
        start = self._starts[index]
        return self._pixels[start : start + height * width * 3].reshape(height, width, 3)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "key": self.key, "resized": self.resized, "_pixels": None}


def open_cache(
    images_dir: str,
    image_names: Sequence[str],
    size: tuple[int, int] | None,
    folders: Sequence[Path],
    say: Callable[[str], None],
) -> ImageCache:
    """The cache of these images in the first of `folders` that has it or can be written to; built there if needed.

    size: (height, width) to resize images to, None to keep their original size. Other processes that open the cache
    meanwhile wait until it is built. `say` is called with a line for the log. Raises InputError if no folder is
    writable, the disk is full, or an image cannot be decoded.
    """
    paths = [f"{images_dir}/{name}" for name in image_names]
    try:
        files = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, paths)]
    except OSError as error:
        raise InputError(f"image {error.filename} cannot be read: {error.strerror}") from None
    made_by = [size, simplejpeg.__version__, cv2.__version__]
    key = _digest(json.dumps([made_by, list(image_names), files]))
    kind = "original" if size is None else f"{size[0]}x{size[1]}"
    file_name = f"{kind}-{_digest('/'.join(image_names))[:12]}.npy"
    for folder in folders:
        path = folder / file_name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with hold(path, "--cache", wait=True):
                _open_or_build(path, key, paths, size, say)
            return ImageCache(path, key, resized=size is not None)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(f"--cache true: the disk of {folder} is full; make room or leave it out") from None
            if error.errno not in NOT_WRITABLE:
                raise
            say(f"no image cache in {folder}: {error.strerror}")
    raise InputError(f"--cache true: cannot write to any of {', '.join(map(str, folders))}")


def _open_or_build(
    path: Path, key: str, paths: Sequence[str], size: tuple[int, int] | None, say: Callable[[str], None]
) -> None:
    try:
        _map_cache(path, key)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        say(f"image cache {path} {error}; rebuilding it")
    else:
        say(f"image cache {path} holds {len(paths):,} images")
        return
    for left_over in path.parent.glob(f".{path.name}.*.tmp"):  # of a killed process; we hold the lock
        left_over.unlink()
    start = time.monotonic()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        shapes = _write_pixels(temporary, paths, size)
        path.with_suffix(".json").unlink(missing_ok=True)
        temporary.replace(path)
        content = json.dumps({"key": key, "shapes": shapes})
        write_atomically(path.with_suffix(".json"), content.encode())
    finally:
        temporary.unlink(missing_ok=True)
    megabytes, seconds = path.stat().st_size / 1e6, time.monotonic() - start
    say(f"image cache {path}: {len(paths):,} images, {megabytes:,.0f} MB, in {seconds:.1f}s")


def _write_pixels(path: Path, paths: Sequence[str], size: tuple[int, int] | None) -> list[tuple[int, int]]:
    """Write the .npy file; returns each image's height and width."""
    with ThreadPoolExecutor() as pool:  # decoding and resizing release Python's global lock
        # At their original size, images are decoded twice: it costs less than a second per 32,000 images of 128 x 64.
        shapes = [size] * len(paths) if size else list(pool.map(lambda path: decode_image(path).shape[:2], paths))
        starts = _starts_of(shapes)
        pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(starts[-1],))
        if hasattr(os, "posix_fallocate"):  # writing to a memory map of a file on a full disk would kill the process
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)

        def write(index: int) -> None:
            image = decode_image(paths[index])
            pixels[starts[index] : starts[index + 1]] = (resize_image(image, size) if size else image).reshape(-1)

        for _ in pool.map(write, range(len(paths))):
            pass
    pixels.flush()
    return shapes


def _map_cache(path: Path, key: str) -> tuple[np.ndarray, list[list[int]], list[int]]:
    """Pixels, shapes and starts. Raises OSError or ValueError if the cache is missing, damaged or of another key."""
    content = json.loads(path.with_suffix(".json").read_bytes())
    if not isinstance(content, dict) or content.get("key") != key:
        raise ValueError("holds other images, or was made by other versions of the decoding libraries")
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        starts = _starts_of(content["shapes"])
    except FileNotFoundError:
        raise
    except Exception:  # numpy and the shapes fail in many ways if a file is damaged
        raise ValueError("is damaged") from None
    if pixels.dtype != np.uint8 or pixels.shape != (starts[-1],):
        raise ValueError("is damaged")
    return pixels, content["shapes"], starts


def _starts_of(shapes: Sequence[Sequence[int]]) -> list[int]:
    """The first byte of each image, and the end of the last."""
    return np.cumsum([0, *(height * width * 3 for height, width in shapes)]).tolist()


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=32).hexdigest()
