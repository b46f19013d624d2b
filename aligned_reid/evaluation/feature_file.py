"""Features in a file, so that they are made once and evaluated anywhere: features.h5, or anybody's .npz or .mat."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import mmap
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from aligned_reid.data.partitions import GALLERY, MULTI_QUERY, QUERY
from aligned_reid.data.plain_pickle import load_plain
from aligned_reid.device import available_memory
from aligned_reid.errors import InputError

Array = NDArray[Any]
FORMATS = (".h5", ".hdf5", ".npz", ".mat")
FIELDS = ("global", "local", "person_id", "camera", "mark", "image_name")
# pytorch_result.mat, the other common layout, has the parts apart: query_f, query_label, query_cam, gallery_f, ...
PARTS = {"query": QUERY, "gallery": GALLERY, "mquery": MULTI_QUERY}
PART_FIELDS = {"f": "global", "label": "person_id", "cam": "camera"}
WANTED = {*FIELDS, *(f"{part}_{ending}" for part in PARTS for ending in PART_FIELDS)}
MAT_ARRAY, MAT_COMPRESSED = 14, 15  # types of data in MATLAB's format 5
MAT_TYPES = {*range(1, 8), 9, *range(12, 19)}
MAT_FLAGS = (6, 8)  # type and size of an array's first element
NAMES_SHOWN = 12  # of a file's fields, if one is missing
ROWS_PER_CHECK = 4096
MADE_BY = "made_by"  # attribute: what model and settings made the features, as JSON
DONE = "num_done"  # attribute of a file that is being written: its first rows, which are whole


class Field(NamedTuple):
    """An array in a file that has not been read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # object if it is not an array of numbers or text
    num_bytes: int  # in memory; 0 if it is mapped
    read: Callable[[], Any]


class Opened(NamedTuple):
    """All names in a file, and the fields among them that are wanted."""

    names: Sequence[str | bytes]
    fields: Mapping[str, Field]
    made_by: Mapping[str, Any]


Feat = TypeVar("Feat", Array, Field)


@dataclass(frozen=True)
class FeatureTable(Generic[Feat]):
    """Labels of N images and their features: fields of a file, or arrays, which may be mapped."""

    source: str
    global_feat: Feat  # [N, D]
    local_feat: Feat | None  # [N, H, d]
    person_ids: NDArray[np.int64]  # [N]
    cameras: NDArray[np.int64]  # [N]
    marks: NDArray[np.int64]  # [N]: 0 query, 1 gallery, 2 multi-query; images with other marks are left out
    image_names: list[str] | None  # N
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.person_ids)

    def name_of(self, row: int) -> str:
        return self.image_names[row] if self.image_names else f"row {row} (counted from 0)"


def open_features(path: str | Path, *, default_mark: int | None = None) -> FeatureTable[Field]:
    """Read and check the labels of a .h5, .npz or .mat file; `load_features` reads the features.

    Fields: global [N, D], local [N, H, d] (optional), person_id [N], camera [N], mark [N], image_name [N] (optional);
    or query_f [Q, D], query_label [Q], query_cam [Q], and the same of gallery and mquery. Labels may be rows or
    columns. default_mark: of a file without marks; None refuses it.

    Raises InputError if there is no such file, it is damaged, or a field is missing or has the wrong type or shape.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"{path}: features are read from {', '.join(FORMATS)} files")
    if not path.is_file():
        raise InputError(f"no feature file at {path}")
    with damage_as_input_error(path):
        opened = {".npz": open_npz, ".mat": open_mat}.get(suffix, open_h5)(path)
    parts = [part for part in PARTS if f"{part}_f" in opened.fields]
    if parts and "global" not in opened.fields:
        return join_parts(path, opened, parts)
    return make_table(str(path), opened, default_mark)


def load_features(table: FeatureTable[Field], *, local: bool = True) -> FeatureTable[Array]:
    """The table with its features read, or mapped if they lie in an h5 file in one piece. local: local features too.

    Raises InputError if a feature is NaN or infinite, the file is damaged, or the features do not fit into memory.
    """
    global_feat = read_field(table.source, "global", table.global_feat)
    check_finite(table, "global", global_feat)
    local_feat = None
    if local and table.local_feat is not None:
        local_feat = read_field(table.source, "local", table.local_feat)
        check_finite(table, "local", local_feat)
    return dataclasses.replace(table, global_feat=global_feat, local_feat=local_feat)  # type: ignore[arg-type, return-value]


@contextlib.contextmanager
def damage_as_input_error(path: str | Path) -> Iterator[None]:
    """InputError for whatever the libraries raise: a damaged file makes them fail in any way."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} is damaged, cut off or of another format ({first_line(error)})") from error


def read_field(source: str, name: str, stored: Field) -> Array:
    """The field's values, labels as [N]; features that torch cannot take as they are become float32."""
    needed, free = 2 * stored.num_bytes, available_memory()  # the libraries copy, and so does another order of axes
    if needed > free:
        raise InputError(
            f"{source}: reading {name} takes {needed / 1e9:,.2f} GB of memory and {free / 1e9:,.2f} GB are free: save "
            "it in an .h5 file, neither chunked nor compressed, which is mapped and not read"
        )
    with damage_as_input_error(source):
        values = np.asanyarray(stored.read())
        if values.size != math.prod(stored.shape):
            raise ValueError(f"{name} is not whole")
        if name not in ("global", "local"):
            return values.reshape(-1)
        if not is_plain_float(values.dtype):
            values = values.astype(np.float32, casting="same_kind")
        return np.require(values, requirements="C")


def is_plain_float(dtype: np.dtype[Any]) -> bool:
    return dtype.isnative and dtype.name in ("float16", "float32", "float64")


def open_h5(path: Path, turned: bool = False) -> Opened:
    """turned: version 7.3 of MATLAB's format, which is HDF5 with all axes the other way round."""
    with h5py.File(path, "r") as file:
        if DONE in file.attrs:
            raise InputError(f"{path}: its extraction was interrupted after {file.attrs[DONE]} images: run it again")
        names = list(file)
        fields = {name: h5_field(path, file[name], turned) for name in WANTED.intersection(names)}
        return Opened(names, fields, dict(json.loads(file.attrs.get(MADE_BY, "{}"))))


def h5_field(path: Path, item: Any, turned: bool) -> Field:
    """Mapped if its bytes lie in one piece, as those of `FeatureWriter` do."""
    if not isinstance(item, h5py.Dataset):
        return Field((), np.dtype(object), 0, lambda: None)
    name, shape, dtype, offset = item.name, item.shape or (), item.dtype, item.id.get_offset()
    if offset is not None and not turned and item.size and is_plain_float(dtype):
        return Field(shape, dtype, 0, lambda: np.memmap(path, dtype, "r", offset, shape))

    def read() -> Any:
        with h5py.File(path, "r") as file:
            return file[name][()].T if turned else file[name][()]

    return Field(shape[::-1] if turned else shape, dtype, math.prod(shape) * dtype.itemsize, read)


def open_npz(path: Path) -> Opened:
    with zipfile.ZipFile(path) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        fields = {name: npz_field(path, archive, members[name]) for name in WANTED.intersection(members)}
    return Opened(list(members), fields, {})


def npz_field(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Field:
    with archive.open(member) as file:
        shape, dtype = read_npy_header(file)
        num_bytes = member.file_size - file.tell()
    if not dtype.hasobject and num_bytes != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{member.filename} does not hold as many numbers as it declares")

    def read() -> Any:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            if not dtype.hasobject:
                return np.lib.format.read_array(file, allow_pickle=False)
            read_npy_header(file)
            return load_objects(path, file.read())

    return Field(shape, dtype, num_bytes, read)


def read_npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
    return shape, dtype


def load_objects(path: Path, content: bytes) -> Array:
    """The text and numbers in a pickled array of objects; nothing in the pickle is run."""
    try:
        return np.array(load_plain(content), dtype=object)
    except ValueError as error:
        raise InputError(
            f"{path}: image_name holds objects that are not text, and is not read ({error}): save it as "
            "np.array(names, dtype=str)"
        ) from error


def open_mat(path: Path) -> Opened:
    """Cells, sparse arrays and other MATLAB types that are not full arrays become fields of type object."""
    from scipy.io import loadmat, whosmat

    if h5py.is_hdf5(path):
        return open_h5(path, turned=True)

    def mat_field(name: str, shape: tuple[int, ...], kind: str) -> Field:
        type_name = {"logical": "bool", "char": "str"}.get(kind, kind)
        dtype = np.dtype(type_name if type_name in np.sctypeDict else "object")
        num_bytes = math.prod(shape) * dtype.itemsize
        return Field(shape, dtype, num_bytes, lambda: loadmat(path, variable_names=[name])[name])

    check_mat(path)
    content = whosmat(path)
    return Opened([entry[0] for entry in content], {entry[0]: mat_field(*entry) for entry in content}, {})


def check_mat(path: Path) -> None:
    """Raise ValueError for damage that would crash scipy's reader of MATLAB's format 5."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        tag = {b"IM": "<II", b"MI": ">II"}.get(content[126:128])
        if tag:  # format 4 has none
            check_elements(memoryview(content), 128, len(content), tag)


def check_elements(content: memoryview, place: int, end: int, tag: str) -> None:
    """Elements fill `content` from `place` to `end`, and are of known types; tag: how type and size are stored."""
    while place < end:
        kind, size = struct.unpack_from(tag, content, place)
        place += 8
        if kind >> 16:  # a small element: its size in the upper half, its data in place of the size
            kind, size = kind & 0xFFFF, 0
        if place + size > end or kind not in MAT_TYPES:
            raise ValueError(f"an element of type {kind} and {size} bytes")
        if kind == MAT_COMPRESSED:
            inflate(content[place : place + size])
        elif kind == MAT_ARRAY and size:
            if struct.unpack_from(tag, content, place) != MAT_FLAGS:
                raise ValueError("an array does not begin with its flags")
            check_elements(content, place, place + size, tag)
        place += size + (-size % 8 if kind != MAT_COMPRESSED else 0)


def inflate(content: bytes | memoryview) -> None:
    """Raise zlib.error or ValueError unless `content` is whole; it is not kept, however large it is inflated."""
    stream = zlib.decompressobj()
    while content:
        stream.decompress(content, 2**20)
        content = stream.unconsumed_tail
    if not stream.eof:
        raise ValueError("a compressed variable is cut off")


def join_parts(path: Path, opened: Opened, parts: Sequence[str]) -> FeatureTable[Field]:
    """One table of query_f, query_label and query_cam, and of the other parts."""
    tables = []
    for part in parts:
        names = {name: f"{part}_{ending}" for ending, name in PART_FIELDS.items()}
        fields = {name: opened.fields[stored] for name, stored in names.items() if stored in opened.fields}
        source = f"{path} (global: {part}_f, person_id: {part}_label, camera: {part}_cam)"
        tables.append(make_table(source, opened._replace(fields=fields), PARTS[part]))
        check_partner(tables[0], tables[-1])
    ids, cameras, marks = (
        np.concatenate([getattr(table, name) for table in tables]) for name in ("person_ids", "cameras", "marks")
    )
    feats = [table.global_feat for table in tables]
    joined = Field(
        (sum(map(len, tables)), feats[0].shape[1]),
        np.result_type(*(feat.dtype for feat in feats)),
        sum(math.prod(feat.shape) * feat.dtype.itemsize for feat in feats),
        lambda: np.concatenate([feat.read() for feat in feats]),
    )
    return FeatureTable(str(path), joined, None, ids, cameras, marks, None)


def make_table(source: str, opened: Opened, default_mark: int | None) -> FeatureTable[Field]:
    """Check the fields of a file, read its labels and put all together."""
    fields = opened.fields
    for name in ("global", "person_id", "camera"):
        if name not in fields:
            known = sorted(ascii(other).removeprefix("b")[1:-1] for other in opened.names) or ["none"]
            more = [f"{len(known) - NAMES_SHOWN} more"] if len(known) > NAMES_SHOWN else []
            fields_there = ", ".join(known[:NAMES_SHOWN] + more)
            raise InputError(f"{source} has no field {name}, or is cut off before it; it has {fields_there}")
    if "mark" not in fields and default_mark is None:
        raise InputError(f"{source} has no field mark (0 query, 1 gallery, 2 multi-query)")
    for name in ("global", "local"):
        if name in fields and fields[name].dtype.kind not in "fiub":
            raise InputError(
                f"{source}: {name} has to be a full array of real numbers (not text, cells, sparse, a group)"
            )
    global_feat, local_feat = fields["global"], fields.get("local")
    if len(global_feat.shape) != 2 or 0 in global_feat.shape:
        raise InputError(f"{source}: global has to be [N, D], and is {list(global_feat.shape)}")
    num = global_feat.shape[0]
    if local_feat is not None and (len(local_feat.shape) != 3 or local_feat.shape[0] != num or 0 in local_feat.shape):
        raise InputError(f"{source}: local has to be [{num}, H, d], as global is, and is {list(local_feat.shape)}")
    for name in ("person_id", "camera", "mark", "image_name"):
        if name in fields and math.prod(fields[name].shape) != num:
            raise InputError(f"{source}: {name} has to be [{num}], as global is, and is {list(fields[name].shape)}")
    person_ids, cameras, marks = (
        read_integers(source, name, fields[name]) if name in fields else np.full(num, default_mark)
        for name in ("person_id", "camera", "mark")
    )
    names = read_names(source, fields["image_name"]) if "image_name" in fields else None
    return FeatureTable(source, global_feat, local_feat, person_ids, cameras, marks, names, opened.made_by)


def read_integers(source: str, name: str, stored: Field) -> NDArray[np.int64]:
    if stored.dtype.kind in "iufb":
        values = read_field(source, name, stored)
        with np.errstate(invalid="ignore"):
            integers = values.astype(np.int64)
        if np.array_equal(integers, values):
            return integers
    raise InputError(f"{source}: {name} has to hold whole numbers")


def read_names(source: str, stored: Field) -> list[str] | None:
    """None if they are not text: they are for messages only."""
    if stored.dtype.kind not in "SUO":
        return None
    names = [as_text(name) for name in read_field(source, "image_name", stored).tolist()]
    return [name for name in names if name is not None] if None not in names else None


def as_text(name: Any) -> str | None:
    """h5py gives bytes, MATLAB's cells arrays of one string; None if it is neither."""
    name = name.item() if isinstance(name, np.ndarray) and name.size == 1 else name
    name = name.decode(errors="backslashreplace") if isinstance(name, bytes) else name
    return name if isinstance(name, str) else None


def check_finite(table: FeatureTable, name: str, feat: Array) -> None:
    """Raise InputError with the images whose features are not numbers."""
    for first in range(0, len(feat), ROWS_PER_CHECK):
        block = feat[first : first + ROWS_PER_CHECK].reshape(len(feat[first : first + ROWS_PER_CHECK]), -1)
        with np.errstate(over="ignore", invalid="ignore"):
            suspects = np.flatnonzero(~np.isfinite(block.sum(axis=1, dtype=np.float64)))
        bad = [first + int(row) for row in suspects if not np.isfinite(block[row]).all()]
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise InputError(f"{table.source}: {name} features of {table.name_of(bad[0])}{more} hold NaN or infinity")


def check_partner(first: FeatureTable, other: FeatureTable) -> None:
    """Raise InputError unless both tables' features can be compared: one width, and where that is known one model."""
    if first.global_feat.shape[1] != other.global_feat.shape[1]:
        widths = f"{first.global_feat.shape[1]} and {other.global_feat.shape[1]}"
        raise InputError(f"{first.source} and {other.source} have global features of different widths: {widths}")
    if first.local_feat is not None and other.local_feat is not None:
        shapes = [list(table.local_feat.shape[1:]) for table in (first, other) if table.local_feat is not None]
        if shapes[0] != shapes[1]:
            raise InputError(f"{first.source} and {other.source} have local features of different shapes: {shapes}")
    for name in first.made_by.keys() & other.made_by.keys():
        if first.made_by[name] != other.made_by[name]:
            values = f"{name}: {first.made_by[name]} and {other.made_by[name]}"
            raise InputError(
                f"{first.source} and {other.source} were made in different ways ({values}): extract both alike"
            )


class FeatureWriter:
    """A features.h5 that grows block by block in a file beside it, and goes on where an earlier one was stopped.

    Rows are written in order; after each block all earlier ones are whole, whatever happens then. `finish` renames the
    file into place, over a former one.
    """

    def __init__(
        self, path: Path, image_names: Sequence[str], labels: Mapping[str, Array], made_by: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:  # fmt: skip
        """labels: person_id, camera, mark, each [N]; shapes: of one image's global and, where wanted, local feature.

        Raises InputError where the disk has no room for the file.
        """
        self.path, self.part = path, path.with_name(path.name + ".part")
        self.num_images, self.shapes = len(image_names), dict(shapes)
        made = json.dumps(dict(made_by), sort_keys=True)
        self.num_done = self.find_done(made, image_names)
        if self.num_done == 0:
            self.check_disk()
            self.begin(image_names, labels, made)

    def find_done(self, made: str, image_names: Sequence[str]) -> int:
        """How many rows an interrupted run of the same model, settings and images has left; 0 where none fits."""
        try:
            with h5py.File(self.part, "r") as file:
                same = as_text(file.attrs[MADE_BY]) == made and [as_text(name) for name in file["image_name"]] == list(
                    image_names
                )
                same = same and all(file[name].shape[1:] == shape for name, shape in self.shapes.items())
                return int(file.attrs[DONE]) if same and set(self.shapes) <= set(file) else 0
        except Exception:  # damaged in any way
            return 0

    def check_disk(self) -> None:
        needed = self.num_images * (sum(4 * int(np.prod(shape)) for shape in self.shapes.values()) + 64)
        self.part.unlink(missing_ok=True)
        free = shutil.disk_usage(self.path.absolute().parent).free
        if free < needed:
            sizes = f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} free"
            raise InputError(f"{self.path}: {sizes}; make room, or choose another folder")

    def begin(self, image_names: Sequence[str], labels: Mapping[str, Array], made: str) -> None:
        with h5py.File(self.part, "w") as file:
            for name, shape in self.shapes.items():
                file.create_dataset(name, (self.num_images, *shape), np.float32)
            for name, values in labels.items():
                file[name] = np.asarray(values, np.int64)
            file["image_name"] = np.array([name.encode() for name in image_names])
            file.attrs[MADE_BY] = np.bytes_(made.encode())  # a str would lie in a heap, whose damage hangs HDF5
            file.attrs[DONE] = 0

    def write(self, first: int, blocks: Mapping[str, Array]) -> None:
        """Rows first, first + 1, ... of the named features; `first` is `num_done`."""
        with h5py.File(self.part, "r+") as file:
            for name, block in blocks.items():
                file[name][first : first + len(block)] = block
            file.flush()
            self.num_done = first + len(next(iter(blocks.values())))
            file.attrs[DONE] = self.num_done

    def finish(self) -> None:
        with h5py.File(self.part, "r+") as file:
            del file.attrs[DONE]
        self.part.replace(self.path)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
