"""Feature files: extracted once, evaluated anywhere. Writes .h5, reads .h5, .npz and .mat."""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from aligned_reid.data.partitions import GALLERY, MULTI_QUERY, QUERY
from aligned_reid.device.cpu import available_memory
from aligned_reid.errors import InputError
from aligned_reid.evaluation.formats import (
    DONE,
    MADE_BY,
    Opened,
    Stored,
    as_text,
    is_plain_float,
    open_h5,
    open_mat,
    open_npz,
)
from aligned_reid.files import check_room

Array = NDArray[Any]
READERS = {".h5": open_h5, ".hdf5": open_h5, ".npz": open_npz, ".mat": open_mat}
# The other common layout, pytorch_result.mat, has one array for each part: query_f, query_label, query_cam, ...
PARTS = {"query": QUERY, "gallery": GALLERY, "mquery": MULTI_QUERY}
PART_FIELDS = {"f": "global", "label": "person_id", "cam": "camera"}
NAMES_SHOWN = 12  # fields that a message lists
ROWS_PER_CHECK = 4096


@dataclass(frozen=True)
class FeatureTable:
    """Labels of N images and their features, which may be mapped from the file."""

    source: str
    global_feat: Array  # [N, D]
    local_feat: Array | None  # [N, H, d]
    person_ids: NDArray[np.int64]  # [N]
    cameras: NDArray[np.int64]  # [N]
    marks: NDArray[np.int64]  # [N]: 0 query, 1 gallery, 2 multi-query; images with other marks are ignored
    image_names: list[str] | None  # N
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.person_ids)


def read_features(path: str | Path, *, default_mark: int | None = None, local: bool = True) -> FeatureTable:
    """Read a .h5, .npz or .mat file. Contiguous features in an .h5 file are mapped, others are read.

    Fields: global [N, D], local [N, H, d] (optional), person_id [N], camera [N], mark [N], image_name [N] (optional);
    or query_f [Q, D], query_label [Q], query_cam [Q], and the same for gallery and mquery. Labels may be rows or
    columns. default_mark: for files without marks; None refuses them. local: whether to read local features.

    Raises InputError if the file is missing or damaged, does not fit into memory, a field is missing or has the wrong
    type or shape, or a feature is not finite.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: features are read from {', '.join(READERS)} files")
    if not path.is_file():
        raise InputError(f"no feature file at {path}")
    with damage_as_input_error(path):
        opened = reader(path)
        parts = [part for part in PARTS if f"{part}_f" in opened.arrays]
        if parts and "global" not in opened.arrays:
            return read_parts(path, opened, parts)
        return read_table(str(path), opened, default_mark, local)


@contextlib.contextmanager
def damage_as_input_error(path: str | Path) -> Iterator[None]:
    """Turn any exception of the libraries into InputError: damaged files make them fail in many ways."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is damaged, cut off or of another format ({reason})") from error


def read_table(source: str, opened: Opened, default_mark: int | None, local: bool) -> FeatureTable:
    """Read and check the labels, then the features."""
    arrays = opened.arrays
    for name in ("global", "person_id", "camera"):
        if name not in arrays:
            known = sorted(opened.names) or ["none"]
            more = [f"{len(known) - NAMES_SHOWN} more"] if len(known) > NAMES_SHOWN else []
            fields_there = ", ".join(known[:NAMES_SHOWN] + more)
            raise InputError(f"{source} has no field {name}, or is cut off before it; it has {fields_there}")
    if "mark" not in arrays and default_mark is None:
        raise InputError(f"{source} has no field mark (0 query, 1 gallery, 2 multi-query)")
    labels = {
        name: read_integers(source, name, arrays[name]) for name in ("person_id", "camera", "mark") if name in arrays
    }
    num = len(labels["person_id"])
    labels.setdefault("mark", np.full(num, default_mark))
    names = read_names(source, arrays["image_name"]) if "image_name" in arrays else None
    for name, values in {**labels, "image_name": names}.items():
        if values is not None and len(values) != num:
            raise InputError(f"{source}: {name} has to be [{num}], as person_id is, and is [{len(values)}]")
    feats = {}
    for name, shape in {"global": "[{}, D]", "local": "[{}, H, d]"}.items():
        if name in arrays and (local or name == "global"):
            feats[name] = read_feature(source, name, arrays[name])
            if feats[name].ndim != shape.count(",") + 1 or len(feats[name]) != num or 0 in feats[name].shape:
                wanted = shape.format(num)
                raise InputError(
                    f"{source}: {name} has to be {wanted}, as person_id is, and is {list(feats[name].shape)}"
                )
            check_finite(source, name, feats[name], names)
    return FeatureTable(
        source,
        feats["global"],
        feats.get("local"),
        labels["person_id"],
        labels["camera"],
        labels["mark"],
        names,
        opened.made_by,
    )


def read_array(source: str, name: str, stored: Stored) -> Array:
    needed, free = 2 * stored.num_bytes, available_memory()  # the libraries make a copy
    if needed > free:
        raise InputError(
            f"{source}: reading {name} takes {needed / 1e9:,.2f} GB of memory and {free / 1e9:,.2f} GB are free: save "
            "it in an .h5 file, neither chunked nor compressed, which is mapped and not read"
        )
    return np.asanyarray(stored.read())


def read_feature(source: str, name: str, stored: Stored) -> Array:
    """Features that torch does not take as they are become float32."""
    values = read_array(source, name, stored)
    if values.dtype.kind not in "fiub":
        raise InputError(f"{source}: {name} has to be a full array of real numbers (not text, cells, sparse, a group)")
    if not is_plain_float(values.dtype):
        values = values.astype(np.float32, casting="same_kind" if values.dtype.kind == "f" else "unsafe")
    return np.require(values, requirements="C")


def read_integers(source: str, name: str, stored: Stored) -> NDArray[np.int64]:
    values = read_array(source, name, stored).reshape(-1)
    if values.dtype.kind in "iufb":
        with np.errstate(invalid="ignore"):
            integers = values.astype(np.int64)
        if np.array_equal(integers, values):
            return integers
    raise InputError(f"{source}: {name} has to hold whole numbers")


def read_names(source: str, stored: Stored) -> list[str] | None:
    """None unless all are text: names are only used in messages."""
    values = read_array(source, "image_name", stored)
    names = [as_text(name) for name in values.reshape(-1).tolist()]
    return [name for name in names if name is not None] if None not in names else None


def check_finite(source: str, name: str, feat: Array, image_names: list[str] | None) -> None:
    """Raise InputError with the first image whose features are not finite."""
    for first in range(0, len(feat), ROWS_PER_CHECK):
        block = feat[first : first + ROWS_PER_CHECK].reshape(len(feat[first : first + ROWS_PER_CHECK]), -1)
        with np.errstate(over="ignore", invalid="ignore"):
            suspects = np.flatnonzero(~np.isfinite(block.sum(axis=1, dtype=np.float64)))
        for row in suspects:
            if not np.isfinite(block[row]).all():
                image = image_names[first + row] if image_names else f"row {first + row} (counted from 0)"
                raise InputError(f"{source}: {name} features of {image} hold NaN or infinity")


def read_parts(path: Path, opened: Opened, parts: Sequence[str]) -> FeatureTable:
    """One table of query_f, query_label and query_cam, and of the other parts."""
    tables = []
    for part in parts:
        stored = {name: f"{part}_{ending}" for ending, name in PART_FIELDS.items()}
        arrays = {name: opened.arrays[other] for name, other in stored.items() if other in opened.arrays}
        source = f"{path} (global: {part}_f, person_id: {part}_label, camera: {part}_cam)"
        tables.append(read_table(source, opened._replace(arrays=arrays), PARTS[part], local=False))
        check_partner(tables[0], tables[-1])
    feats, ids, cameras, marks = (
        np.concatenate([getattr(table, name) for table in tables])
        for name in ("global_feat", "person_ids", "cameras", "marks")
    )
    return FeatureTable(str(path), feats, None, ids, cameras, marks, None)


def check_partner(first: FeatureTable, other: FeatureTable) -> None:
    """Raise InputError unless both tables' features can be compared: same width and, if known, same model."""
    if first.global_feat.shape[1] != other.global_feat.shape[1]:
        widths = f"{first.global_feat.shape[1]} and {other.global_feat.shape[1]}"
        raise InputError(f"{first.source} and {other.source} have global features of different widths: {widths}")
    if first.local_feat is not None and other.local_feat is not None:
        shapes = [list(feat.shape[1:]) for feat in (first.local_feat, other.local_feat)]
        if shapes[0] != shapes[1]:
            raise InputError(f"{first.source} and {other.source} have local features of different shapes: {shapes}")
    for name in first.made_by.keys() & other.made_by.keys():
        if first.made_by[name] != other.made_by[name]:
            values = f"{name}: {first.made_by[name]} and {other.made_by[name]}"
            raise InputError(
                f"{first.source} and {other.source} were made in different ways ({values}): extract both alike"
            )


class FeatureWriter:
    """Writes features.h5 block by block in a .part file next to it, and resumes an interrupted one.

    Rows are written in order; after each block all earlier rows are complete. `finish` renames the file into place.
    """

    def __init__(
        self,
        path: Path,
        image_names: Sequence[str],
        labels: Mapping[str, Array],
        made_by: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """labels: person_id, camera, mark, each [N]; shapes: of one image's global and, if wanted, local feature."""
        self.path, self.part = path, path.with_name(path.name + ".part")
        made = json.dumps(dict(made_by), sort_keys=True)
        fields = {name: np.asarray(values, np.int64) for name, values in labels.items()}
        fields["image_name"] = np.array([os.fsencode(name) for name in image_names])
        self.num_done = self.find_done(made, fields, shapes)
        if self.num_done:
            return
        with h5py.File(self.part, "w") as file:
            check_room(path, 4 * len(image_names) * sum(math.prod(shape) for shape in shapes.values()))
            for name, shape in shapes.items():
                file.create_dataset(name, (len(image_names), *shape), np.float32)
            for name, values in fields.items():
                file[name] = values
            file.attrs[MADE_BY] = np.bytes_(made.encode())  # a str is stored in a heap, whose damage hangs HDF5
            file.attrs[DONE] = 0

    def find_done(self, made: str, fields: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> int:
        """How many rows an interrupted run with the same model, settings and images has written; else 0."""
        try:
            with h5py.File(self.part, "r") as file:
                same = as_text(file.attrs[MADE_BY]) == made and set(file) == {*fields, *shapes}
                same = same and all(np.array_equal(file[name], values) for name, values in fields.items())
                same = same and all(file[name].shape[1:] == shape for name, shape in shapes.items())
                return int(file.attrs[DONE]) if same else 0
        except Exception:  # damaged in any way
            return 0

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
