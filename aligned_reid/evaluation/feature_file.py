"""Features in a file, so that they are made once and evaluated anywhere: features.h5, or anybody's .npz or .mat."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from aligned_reid.errors import InputError

Array = NDArray[Any]
FORMATS = (".h5", ".hdf5", ".npz", ".mat")
ROWS_PER_CHECK = 4096
MADE_BY = "made_by"  # attribute: what model and settings made the features, as JSON
DONE = "num_done"  # attribute of a file that is being written: its first rows, which are whole


@dataclass(frozen=True)
class FeatureTable:
    """Features of N images and what is known of each; arrays may lie in a mapped file."""

    source: str
    global_feat: Array  # [N, D]
    local_feat: Array | None  # [N, H, d]
    person_ids: NDArray[np.int64]  # [N]
    cameras: NDArray[np.int64]  # [N]
    marks: NDArray[np.int64]  # [N]: 0 query, 1 gallery, 2 multi-query
    image_names: list[str] | None  # N
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.person_ids)

    def name_of(self, row: int) -> str:
        return self.image_names[row] if self.image_names else f"row {row} (counted from 0)"


def read_features(path: str | Path, *, default_mark: int | None = None) -> FeatureTable:
    """The features in a .h5, .npz or .mat file: fields global [N, D], local [N, H, d] (may be missing), person_id [N],
    camera [N], mark [N] and image_name [N] (may be missing).

    An h5 file's features stay in the file and are mapped. default_mark: of a file without marks; None refuses it.
    Raises InputError, with the file, where there is none, it is cut off, a field is missing or of another length, or a
    feature is NaN or infinite.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: features are read from {', '.join(FORMATS)} files")
    if not path.is_file():
        raise InputError(f"no feature file at {path}")
    made_by: Mapping[str, Any] = {}
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as content:
                fields: dict[str, Any] = dict(content)
        elif path.suffix == ".mat":
            fields = read_mat(path)
        else:
            fields, made_by = read_h5(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, KeyError) as error:
        raise InputError(f"{path} is no {path.suffix} file, or it is cut off ({first_line(error)})") from error
    return make_table(str(path), fields, made_by, default_mark)


def read_h5(path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    with h5py.File(path, "r") as file:
        if DONE in file.attrs:
            raise ValueError(f"its extraction was interrupted after {file.attrs[DONE]} images: run it again to go on")
        fields = {name: read_dataset(path, file[name]) for name in file}
        return fields, json.loads(file.attrs.get(MADE_BY, "{}"))


def read_dataset(path: Path, dataset: h5py.Dataset) -> Array:
    """Mapped where its bytes lie in one piece, as those of `FeatureWriter` do; else read."""
    offset = dataset.id.get_offset()
    if offset is None or dataset.size == 0 or dataset.dtype.kind not in "fiu":
        return dataset[()]
    return np.memmap(path, dataset.dtype, "r", offset, dataset.shape)


def read_mat(path: Path) -> dict[str, Any]:
    """Vectors are rows or columns in MATLAB; version 7.3 of the format is HDF5, with all axes the other way round."""
    from scipy.io import loadmat

    if h5py.is_hdf5(path):
        with h5py.File(path, "r") as file:
            fields = {name: np.asarray(file[name]).T for name in file if isinstance(file[name], h5py.Dataset)}
    else:
        try:
            content = loadmat(path)
        except Exception as error:  # what is cut off makes the reader fail in any way
            raise ValueError(first_line(error)) from error
        fields = {name: value for name, value in content.items() if not name.startswith("__")}
    vectors = ("person_id", "camera", "mark", "image_name")
    return {name: np.ravel(value) if name in vectors else value for name, value in fields.items()}


def make_table(
    source: str, fields: Mapping[str, Any], made_by: Mapping[str, Any], default_mark: int | None
) -> FeatureTable:
    """Check the fields of a file and put them together."""
    for name in ("global", "person_id", "camera"):
        if name not in fields:
            raise InputError(f"{source} has no field {name}; it has {', '.join(sorted(fields)) or 'none'}")
    global_feat, local_feat = fields["global"], fields.get("local")
    if global_feat.ndim != 2 or 0 in global_feat.shape:
        raise InputError(f"{source}: global has to be [N, D], and is {list(global_feat.shape)}")
    num = len(global_feat)
    if local_feat is not None and (local_feat.ndim != 3 or len(local_feat) != num):
        raise InputError(f"{source}: local has to be [{num}, H, d], as global is, and is {list(local_feat.shape)}")
    if "mark" not in fields and default_mark is None:
        raise InputError(f"{source} has no field mark (0 query, 1 gallery, 2 multi-query)")
    columns = {"mark": np.full(num, default_mark), **fields}
    for name in ("person_id", "camera", "mark", "image_name"):
        if name in columns and np.shape(columns[name]) != (num,):
            raise InputError(
                f"{source}: {name} has to be [{num}], as global is, and is {list(np.shape(columns[name]))}"
            )
    names = [as_text(name) for name in fields["image_name"]] if "image_name" in fields else None
    person_ids, cameras, marks = (as_integers(source, name, columns[name]) for name in ("person_id", "camera", "mark"))
    table = FeatureTable(source, global_feat, local_feat, person_ids, cameras, marks, names, made_by)
    check_finite(table, "global", global_feat)
    if local_feat is not None:
        check_finite(table, "local", local_feat)
    return table


def as_integers(source: str, name: str, values: Array) -> NDArray[np.int64]:
    values = np.asarray(values)
    if values.dtype.kind not in "iuf" or not np.array_equal(values, np.round(values)):
        raise InputError(f"{source}: {name} has to hold whole numbers")
    return values.astype(np.int64)


def as_text(name: Any) -> str:
    """h5py gives bytes, MATLAB's cells arrays of one string."""
    name = name.item() if isinstance(name, np.ndarray) and name.size == 1 else name
    return name.decode() if isinstance(name, bytes) else str(name)


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
                same = file.attrs[MADE_BY] == made and [as_text(name) for name in file["image_name"]] == list(
                    image_names
                )
                same = same and all(file[name].shape[1:] == shape for name, shape in self.shapes.items())
                return int(file.attrs[DONE]) if same and set(self.shapes) <= set(file) else 0
        except (OSError, KeyError, RuntimeError):
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
            file.attrs[MADE_BY] = made
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
