"""Readers of feature files: what is in an .h5, .npz or .mat file, without reading it whole."""

from __future__ import annotations

import functools
import json
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from aligned_reid.errors import InputError

MADE_BY = "made_by"  # attribute: model and settings that made the features, as JSON
DONE = "num_done"  # attribute of a file that is still being written: how many of its first rows are complete
MAT_ARRAY, MAT_COMPRESSED = 14, 15  # data types in MATLAB's format 5
MAT_TYPES = {*range(1, 8), 9, *range(12, 19)}
MAT_FLAGS = (6, 8)  # type and size of an array's first element
MAT_COMPLEX, MAT_COMPLEX_PARTS = 0x0800, 5  # a bit of the flags, and the elements that an array then has


class Stored(NamedTuple):
    """An array in a file."""

    num_bytes: int  # in memory; 0 if it is mapped
    read: Callable[[], Any]


class Opened(NamedTuple):
    names: Sequence[str]
    arrays: Mapping[str, Stored]
    made_by: Mapping[str, Any]


def open_h5(path: Path) -> Opened:
    with h5py.File(path, "r") as file:
        if DONE in file.attrs:
            raise InputError(f"{path}: its extraction was interrupted after {file.attrs[DONE]} images: run it again")
        names = list(file)
        arrays = {name: h5_array(path, file[name]) for name in names if isinstance(name, str)}
        return Opened([as_text(name) or "" for name in names], arrays, dict(json.loads(file.attrs.get(MADE_BY, "{}"))))


def h5_array(path: Path, item: Any) -> Stored:
    """Mapped if it is contiguous, as FeatureWriter writes it."""
    if not isinstance(item, h5py.Dataset):
        return Stored(0, lambda: None)
    name, shape, dtype, offset = item.name, item.shape or (), item.dtype, item.id.get_offset()
    if offset is not None and item.size and is_plain_float(dtype):
        return Stored(0, lambda: np.memmap(path, dtype, "r", offset, shape))

    def read() -> Any:
        with h5py.File(path, "r") as file:
            return file[name][()]

    return Stored(math.prod(shape) * dtype.itemsize, read)


def is_plain_float(dtype: np.dtype[Any]) -> bool:
    """Whether torch takes it as it is."""
    return dtype.isnative and dtype.name in ("float16", "float32", "float64")


def as_text(name: Any) -> str | None:
    """h5py returns bytes, MATLAB's cells are arrays of one string; None for anything else."""
    name = name.item() if isinstance(name, np.ndarray) and name.size == 1 else name
    name = name.decode(errors="backslashreplace") if isinstance(name, bytes) else name
    return name if isinstance(name, str) else None


def open_npz(path: Path) -> Opened:
    """Arrays of objects are not unpickled: they become None."""

    def read(name: str) -> Any:
        with zipfile.ZipFile(path) as archive, archive.open(name) as file:
            readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            dtype = readers[np.lib.format.read_magic(file)](file)[2]
        if dtype.hasobject:
            return None
        with zipfile.ZipFile(path) as archive, archive.open(name) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    with zipfile.ZipFile(path) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
    arrays = {name.removesuffix(".npy"): Stored(size, functools.partial(read, name)) for name, size in sizes.items()}
    return Opened(list(arrays), arrays, {})


def open_mat(path: Path) -> Opened:
    """Cells, sparse arrays and other MATLAB types that are not full arrays become arrays of objects."""
    from scipy.io import loadmat, whosmat

    if h5py.is_hdf5(path):
        raise InputError(f"{path} is in MATLAB's format 7.3: save it with -v7 instead, or as .npz or .h5")
    check_mat(path)

    def stored(name: str, shape: tuple[int, ...], kind: str) -> Stored:
        type_name = {"logical": "bool", "char": "str"}.get(kind, kind)
        size = np.dtype(type_name if type_name in np.sctypeDict else "object").itemsize
        return Stored(math.prod(shape) * size, lambda: loadmat(path, variable_names=[name])[name])

    arrays = {name: stored(name, shape, kind) for name, shape, kind in whosmat(path)}
    return Opened(list(arrays), arrays, {})


def check_mat(path: Path) -> None:
    """Raise ValueError for damage that would crash scipy's reader of MATLAB's format 5."""
    with open(path, "rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    tag = {b"IM": "<II", b"MI": ">II"}.get(bytes(content[126:128]))
    if tag:  # format 4 has none
        check_elements(content, 128, len(content), tag)


def check_elements(content: memoryview, place: int, end: int, tag: str) -> int:
    """Check that elements of known types fill `content` from `place` to `end`, and return how many.

    tag: how type and size are stored.
    """
    number = 0
    while place < end:
        number += 1
        kind, size = struct.unpack_from(tag, content, place)
        place += 8
        if kind >> 16:  # a small element: its size is in the upper half, its data in place of the size
            kind, size = kind & 0xFFFF, 0
        if place + size > end or kind not in MAT_TYPES:
            raise ValueError(f"an element of type {kind} and {size} bytes")
        if kind == MAT_COMPRESSED:
            check_compressed(content[place : place + size])
        elif kind == MAT_ARRAY and size:
            if struct.unpack_from(tag, content, place) != MAT_FLAGS:
                raise ValueError("an array does not begin with its flags")
            num_parts = check_elements(content, place, place + size, tag)
            if struct.unpack_from(tag, content, place + 8)[0] & MAT_COMPLEX and num_parts < MAT_COMPLEX_PARTS:
                raise ValueError("complex numbers without imaginary parts")
        place += size + (-size % 8 if kind != MAT_COMPRESSED else 0)
    return number


def check_compressed(content: bytes | memoryview) -> None:
    """Raise zlib.error or ValueError unless `content` is complete; inflates 1 MB at a time."""
    stream = zlib.decompressobj()
    while content:
        stream.decompress(content, 2**20)
        content = stream.unconsumed_tail
    if not stream.eof:
        raise ValueError("a compressed variable is cut off")
