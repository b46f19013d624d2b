"""The index of a folder of images: their features in one HDF5 file, kept between calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from aligned_reid.data.prepare.sources import shown
from aligned_reid.errors import InputError
from aligned_reid.evaluation.extract import BATCH_SIZE
from aligned_reid.evaluation.formats import DONE, MADE_BY
from aligned_reid.files import check_room
from aligned_reid.inference.reid import ReID
from aligned_reid.lock import hold
from aligned_reid.preflight import can_write
from aligned_reid.weights import first_line

HIDDEN_FOLDER = ".aligned_reid"
ROWS_PER_CHUNK = 256
END_OF_NAME = b"\0"  # the only byte that no path has

State = tuple[int, int]  # size and date (in nanoseconds) of a file, which tell whether it has changed


class Rows(NamedTuple):
    """N rows of an index. A changed file has several rows with its name, of which the last counts."""

    names: list[bytes]  # relative to the folder
    states: list[State]
    feat: np.ndarray  # float32 [N, D], global features

    def pick(self, places: Sequence[int]) -> Rows:
        if list(places) == list(range(len(self.names))):
            return self  # without a copy of the features
        return Rows([self.names[one] for one in places], [self.states[one] for one in places], self.feat[list(places)])


def open_index(
    folder: Path,
    names: Sequence[bytes],
    reid: ReID,
    log: Callable[[str], None],
    on_error: Callable[[str], None],
) -> Rows:
    """The images of a folder that can be used, with their features: from the index or, if new or changed, computed.

    names: of the images, relative to the folder. What was computed stays in the index if the call is interrupted.
    on_error gets a line for each image that cannot be used.
    """
    path = place_of_index(folder, reid.digest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with hold(path, "--gallery", wait=True):
            rows = read_index(path, reid.digest, log)
            states = states_of(folder, names)
            place = {name: number for number, name in enumerate(rows.names)}
            known = [name for name in states if name in place and rows.states[place[name]] == states[name]]
            if len(rows.names) > 2 * len(known) + ROWS_PER_CHUNK:  # most rows are of changed or vanished files
                rows = rows.pick([place[name] for name in known])
                place = {name: number for number, name in enumerate(rows.names)}
                path.unlink(missing_ok=True)
                append_rows(path, reid.digest, rows)
            new = [name for name in states if name not in set(known)]
            computed = list(add_images(path, folder, {name: states[name] for name in new}, reid, on_error))
    except OSError as error:
        raise InputError(f"cannot write the index {shown(path)}: {error.strerror or first_line(error)}") from error
    parts = [rows.pick([place[name] for name in known]), *computed]
    if len(parts) == 1:
        return parts[0]
    return Rows(
        [name for part in parts for name in part.names],
        [state for part in parts for state in part.states],
        np.concatenate([part.feat for part in parts if len(part.feat)] or [rows.feat]),
    )


def add_images(
    path: Path, folder: Path, states: dict[bytes, State], reid: ReID, on_error: Callable[[str], None]
) -> list[Rows]:
    """Compute the features of files and append them to the index, a batch at a time."""
    names = list(states)
    paths = [folder / os.fsdecode(name) for name in names]
    added: list[Rows] = []
    for feats in reid.embed([(one, shown(one)) for one in paths], on_error=on_error):
        first = BATCH_SIZE * len(added)
        feat = feats.global_feat.numpy()
        batch = Rows(names[first : first + len(feat)], [states[one] for one in names[first : first + len(feat)]], feat)
        added.append(batch.pick(np.flatnonzero(np.isfinite(feat).all(axis=1)).tolist()))
        append_rows(path, reid.digest, added[-1])
    return added


def place_of_index(folder: Path, digest: str) -> Path:
    """The index file for a folder and a model: in a hidden folder beside the images, else in the user's cache."""
    name = f"features-{digest[:12]}.h5"
    hidden = folder / HIDDEN_FOLDER
    if can_write(hidden if hidden.is_dir() else folder):
        return hidden / name
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "aligned_reid" / blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest() / name


def read_index(path: Path, digest: str, log: Callable[[str], None]) -> Rows:
    """The rows of an index; no rows if there is none. A damaged one is removed, which log gets a line about."""
    empty = Rows([], [], np.empty((0, 0), np.float32))
    if not path.is_file():
        if others := sorted(path.parent.glob("features-*.h5")):
            log(f"{shown(others[0])} is of another model or other settings: all images are computed")
        return empty
    try:
        with h5py.File(path, "r") as file:
            if bytes(file.attrs[MADE_BY]).decode() != digest:
                raise ValueError("it is of another model")
            num_rows, num_bytes = file.attrs[DONE].tolist()
            names = file["name"][:num_bytes].tobytes().split(END_OF_NAME)[:-1]
            states = [(num_bytes, date) for num_bytes, date in file["state"][:num_rows].tolist()]
            feat = file["global"][:num_rows]
        if not len(names) == len(states) == len(feat) == num_rows or not np.isfinite(feat.sum(axis=1)).all():
            raise ValueError("rows are missing")
        return Rows(names, states, feat)
    except Exception as error:  # a damaged file makes the library fail in many ways
        log(f"index {shown(path)} is damaged or cut off ({first_line(error)}): it is built again")
        path.unlink()
        return empty


def append_rows(path: Path, digest: str, rows: Rows) -> None:
    """Append rows to an index, or start one. The attribute DONE is written last: it says how far the file is valid."""
    if not rows.names:
        return
    columns: dict[str, np.ndarray] = {
        "name": np.frombuffer(b"".join(name + END_OF_NAME for name in rows.names), np.uint8),
        "state": np.array(rows.states, np.int64),
        "global": rows.feat,
    }
    # HDF5 allocates whole chunks, and stores some data of its own.
    check_room(path, 2**20 + sum(values.nbytes for values in columns.values()) + ROWS_PER_CHUNK * rows.feat[0].nbytes)
    with h5py.File(path, "a") as file:
        if DONE not in file.attrs:
            for name, values in columns.items():
                chunk = (2**16,) if name == "name" else (ROWS_PER_CHUNK, values.shape[1])
                file.create_dataset(name, (0, *chunk[1:]), values.dtype, chunks=chunk, maxshape=(None, *chunk[1:]))
            file.attrs[MADE_BY] = np.bytes_(digest.encode())
            file.attrs[DONE] = np.zeros(2, np.int64)
        num_rows, num_bytes = file.attrs[DONE].tolist()
        for name, values in columns.items():
            first = num_bytes if name == "name" else num_rows
            file[name].resize(first + len(values), axis=0)
            file[name][first:] = values
        file.flush()
        file.attrs[DONE] = np.array([num_rows + len(rows.names), num_bytes + len(columns["name"])], np.int64)


def states_of(folder: Path, names: Sequence[bytes]) -> dict[bytes, State]:
    """The state of each file; files that have vanished meanwhile are left out."""
    states = {}
    for name in names:
        try:
            found = os.stat(os.path.join(os.fsencode(folder), name))
        except OSError:
            continue
        states[name] = (found.st_size, found.st_mtime_ns)
    return states
