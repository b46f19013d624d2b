"""Decoded images in one memory-mapped file, which all processes of a machine share and later runs find again."""

import errno
import json
import mmap
import os
import shutil
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg  # type: ignore[import-untyped]
from tqdm import tqdm

from aligned_reid.data.transforms import decode_image, resize_image
from aligned_reid.errors import InputError
from aligned_reid.lock import hold

# A file is: MAGIC, key, number of images, its size in bytes, a digest of all this and the index; then the index, int64
# [N, 3] of offset, height and width; then pixels, from a whole page on. An image that cannot be decoded has height 0.
MAGIC = b"REIDIMG1"
HEADER = struct.Struct("<8s32sqq32s")
PAGE = 4096
CHUNK = 64  # images that a thread decodes at a time
NO_WRITING = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)  # there, for this user


class CacheContent(NamedTuple):
    """What a cache holds: images of a folder, resized to (height, width), or as they are where `size` is None."""

    images_dir: str
    image_names: list[str]
    size: tuple[int, int] | None

    @property
    def file_name(self) -> str:
        """One file for each list of names and size; a later version of the images takes the place of the former."""
        kind = "original" if self.size is None else f"{self.size[0]}x{self.size[1]}"
        return f"{kind}-{_digest('/'.join(self.image_names).encode()).hex()[:12]}.images"

    def key(self) -> bytes:
        """A digest of all that the pixels depend on: names, sizes and dates of the images, and who decodes them."""
        made_by = [MAGIC.decode(), self.size, simplejpeg.__version__, cv2.__version__]
        dates = [_size_and_date(f"{self.images_dir}/{name}") for name in self.image_names]
        return _digest(json.dumps([made_by, self.image_names, dates]).encode())

    def read(self, index: int) -> np.ndarray | None:
        """The image as the cache keeps it; None where it cannot be decoded, which is the loader's to report."""
        try:
            image = decode_image(f"{self.images_dir}/{self.image_names[index]}")
        except InputError:
            return None
        return image if self.size is None else resize_image(image, self.size)

    def num_bytes(self, pool: ThreadPoolExecutor) -> int:
        """The size of the cache's file; of images at their own size, from their headers."""
        start = _start_of_pixels(len(self.image_names))
        if self.size is not None:
            return start + len(self.image_names) * self.size[0] * self.size[1] * 3
        paths = [f"{self.images_dir}/{name}" for name in self.image_names]
        return start + sum(pool.map(_decoded_bytes, paths, chunksize=CHUNK))


class ImageCache:
    """Images of an open cache: `self[index]` is uint8 [h, w, 3], read-only, or None where it holds none.

    What travels to another process is the file's name; it is mapped there at the first image.
    """

    def __init__(self, path: Path, key: bytes) -> None:
        self.path, self.key = path, key
        self._pixels: np.ndarray | None = None
        self._index: list[list[int]] = []

    def __getitem__(self, index: int) -> np.ndarray | None:
        pixels = self._map() if self._pixels is None else self._pixels
        offset, height, width = self._index[index]
        if height == 0:
            return None
        return pixels[offset : offset + height * width * 3].reshape(height, width, 3)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "key": self.key, "_pixels": None, "_index": []}

    def _map(self) -> np.ndarray:
        """Map the file. Raises InputError where it is not, or no more, what was opened."""
        try:
            with open(self.path, "rb") as file:
                index = _read_index(file, self.key)
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise InputError(f"image cache {self.path} {error}; start again to build it anew") from None
        self._index, self._pixels = index.tolist(), np.frombuffer(mapped, dtype=np.uint8)
        return self._pixels


def open_cache(
    content: CacheContent, folders: Sequence[Path], say: Callable[[str], None], show_progress: bool = True
) -> ImageCache:
    """The cache of `content` in the first of `folders` that has it, else built in the first that can be written to.

    Processes that come while one builds wait for it. `say` gets a line on what was found, is wrong, or was built.
    Raises InputError where no folder can be written to or its disk has no room.
    """
    key = content.key()
    for path in (folder / content.file_name for folder in folders):
        if _defect_of(path, key) is None:
            say(f"image cache {path} holds {len(content.image_names):,} images")
            return ImageCache(path, key)
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with hold(folder / content.file_name, "--cache", wait=True):
                _build_unless_there(folder / content.file_name, key, content, say, show_progress)
                return ImageCache(folder / content.file_name, key)
        except OSError as error:
            if error.errno not in NO_WRITING:
                raise
            say(f"no image cache in {folder}: {error.strerror}")
    raise InputError(f"--cache true: none of {', '.join(map(str, folders))} can be written to")


def _build_unless_there(
    path: Path, key: bytes, content: CacheContent, say: Callable[[str], None], show_progress: bool
) -> None:
    defect = _defect_of(path, key)  # again: another process may have built it meanwhile
    if defect is None:
        return
    if path.exists():
        say(f"image cache {path} {defect}: it is built anew")
    for left_over in path.parent.glob(f".{path.name}.*.tmp"):
        left_over.unlink(missing_ok=True)
    start = time.monotonic()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with ThreadPoolExecutor() as pool:
            _check_room(path.parent, content.num_bytes(pool))
            num_missing = _write(temporary, key, content, pool, show_progress)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"--cache true: {path.parent} is full ({error.strerror}); make room or leave it out") from None
    finally:
        temporary.unlink(missing_ok=True)
    without = f"without {num_missing:,} that cannot be decoded, " if num_missing else ""
    seconds = time.monotonic() - start
    size = path.stat().st_size
    say(f"image cache {path}: {len(content.image_names):,} images, {without}{size / 1e6:,.0f} MB, in {seconds:.1f}s")


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InputError(
            f"--cache true needs {num_bytes / 1e6:,.1f} MB in {folder}, where {free / 1e6:,.1f} MB are free: "
            "make room or leave it out"
        )


def _write(path: Path, key: bytes, content: CacheContent, pool: ThreadPoolExecutor, show_progress: bool) -> int:
    """Write the whole file; returns the number of images that could not be decoded."""
    num_images = len(content.image_names)
    index = np.zeros((num_images, 3), dtype=np.int64)
    with open(path, "wb") as file, _progress(num_images, show_progress) as bar:
        offset = file.seek(_start_of_pixels(num_images))
        for number, image in enumerate(_decoded(content, pool)):
            if image is not None:
                index[number] = offset, *image.shape[:2]
                file.write(image.data)
                offset += image.nbytes
            bar.update()
        file.truncate(offset)  # longer than what is written where there is no pixel at all
        file.seek(0)
        file.write(_header(key, num_images, offset, index.tobytes()) + index.tobytes())
        file.flush()
        os.fsync(file.fileno())
    return int((index[:, 1] == 0).sum())


def _progress(total: int, shown: bool) -> tqdm:
    return tqdm(total=total, desc="image cache", unit="im", leave=False, disable=None if shown else True)


def _decoded(content: CacheContent, pool: ThreadPoolExecutor) -> Iterator[np.ndarray | None]:
    """All images in order, decoded by threads (decoding and resizing leave Python's lock), a bounded number ahead."""
    num_images = len(content.image_names)
    waiting: deque[Future[list[np.ndarray | None]]] = deque()
    for start in range(0, num_images, CHUNK):
        chunk = range(start, min(start + CHUNK, num_images))
        waiting.append(pool.submit(lambda indices: [content.read(index) for index in indices], chunk))
        if len(waiting) > 2 * (os.cpu_count() or 1):
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def _header(key: bytes, num_images: int, num_bytes: int, index: bytes) -> bytes:
    digest = _digest(HEADER.pack(MAGIC, key, num_images, num_bytes, b"") + index)
    return HEADER.pack(MAGIC, key, num_images, num_bytes, digest)


def _read_index(file: Any, key: bytes) -> np.ndarray:
    """The index [N, 3] of an open cache file. Raises ValueError that says what is wrong with it."""
    header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise ValueError("is damaged")
    _, written_key, num_images, num_bytes, _ = HEADER.unpack(header)
    if os.fstat(file.fileno()).st_size != num_bytes or not 0 <= _start_of_pixels(num_images) <= num_bytes:
        raise ValueError("is damaged")
    index = file.read(num_images * 3 * 8)
    if header != _header(written_key, num_images, num_bytes, index):
        raise ValueError("is damaged")
    if written_key != key:
        raise ValueError("is of other images, or was made by other versions of the decoding libraries")
    return np.frombuffer(index, dtype=np.int64).reshape(num_images, 3)


def _defect_of(path: Path, key: bytes) -> str | None:
    """What is wrong with a cache file; None where nothing is."""
    try:
        with open(path, "rb") as file:
            _read_index(file, key)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _start_of_pixels(num_images: int) -> int:
    return -(-(HEADER.size + num_images * 3 * 8) // PAGE) * PAGE


def _size_and_date(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _decoded_bytes(path: str) -> int:
    """What an image takes when it is decoded, by its header; 0 where that cannot be read."""
    try:
        with open(path, "rb") as file:
            height, width = simplejpeg.decode_jpeg_header(file.read())[:2]
    except (OSError, ValueError):
        return 0
    return height * width * 3


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=32).digest()
