"""From CUHK03 (Li et al., CVPR 2014), new protocol (Zhong et al., CVPR 2017), to the layout that --data_path takes.

cuhk-03.mat holds the images; cuhk03_new_protocol_config_<kind>.mat, of the re-ranking's authors, which of them is in
which part: 767 identities to train on, 700 for the test. kind: labeled (boxes drawn by hand) or detected.
"""

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aligned_reid.data.prepare import layout
from aligned_reid.data.prepare.layout import (
    MAX_BYTES,
    NUM_VAL_IDS,
    Namer,
    NewImage,
    Parts,
    check_paths,
    encode_jpeg,
    find_image,
    read_as_jpeg,
    write_data_set,
)
from aligned_reid.errors import InputError

KINDS = ("labeled", "detected")
IMAGES_FILE = "cuhk-03.mat"

# Pair of cameras, person among those of the pair, camera of the two, which of the person's ten images.
_NAME = re.compile(r"([0-9]+)_([0-9]+)_([0-9]+)_([0-9]+)\.png")
_AGAIN = "download it again"


class Protocol(NamedTuple):
    """Which image is in which part: its name, person and camera [N], and the rows of each part, from 0."""

    names: list[str]
    person_ids: list[int]
    cameras: list[int]
    train: list[int]
    query: list[int]
    gallery: list[int]


def prepare_cuhk03(source: str | Path, save_dir: str | Path, kind: str) -> Path:
    """Write the images as JPEGs of quality 95 under their new names, with partitions.pkl and ori_to_new_im_name.pkl.

    `source`: the folder with the protocol file and either cuhk-03.mat (or the folder around it) or images_<kind>/ with
    the images extracted from it; it is only read. When interrupted, the same call goes on. Returns `save_dir`. Raises
    InputError when the source is not there, incomplete, damaged or no CUHK03, and when `save_dir` cannot be written.
    """
    source, save_dir = Path(source).expanduser(), Path(save_dir).expanduser()
    if kind not in KINDS:
        raise InputError(f"--kind {kind} is neither {' nor '.join(KINDS)}")
    check_paths(source, save_dir)
    config = _find(source, _config_name(kind))
    if config is None:
        raise InputError(f"--source {source} has no {_config_name(kind)}; it comes with the re-ranking authors' code")
    protocol = read_protocol(config)
    new_image = Namer()

    def named(rows: list[int]) -> list[NewImage]:
        images = ((protocol.names[row], protocol.person_ids[row], protocol.cameras[row]) for row in rows)
        return [new_image(*image) for image in images]

    parts = Parts(named(protocol.train), named(protocol.gallery), named(protocol.query))
    with ExitStack() as stack:
        read = _open_images(source, kind, stack)
        return write_data_set(save_dir, parts, read, NUM_VAL_IDS)


def find_raw_cuhk03(path: str | Path) -> Path | None:
    """The folder itself where it, or a folder in it, holds cuhk-03.mat or a file of the new protocol; else None."""
    path = Path(path)
    try:
        return path if any(_find(path, name) for name in (IMAGES_FILE, *map(_config_name, KINDS))) else None
    except OSError:
        return None


def prepare_command(raw: Path) -> str:
    """The command that prepares what `find_raw_cuhk03` found, into a folder beside it."""
    return layout.prepare_command("prepare_cuhk03.py", raw, "cuhk03_labeled", " --kind labeled")


def _config_name(kind: str) -> str:
    return f"cuhk03_new_protocol_config_{kind}.mat"


def _find(source: Path, name: str) -> Path | None:
    """A file or folder in the source or in a folder of it."""
    return next((place / name for place in layout.folders_to_look_in(source) if (place / name).exists()), None)


def read_protocol(path: Path) -> Protocol:
    """Read a file of the new protocol, whose rows count from 1. Raises InputError where it makes no sense."""
    from scipy.io import loadmat

    try:
        content = loadmat(path)
    # scipy raises NotImplementedError for the HDF5 format, and whatever a cut-off file leads it to.
    except Exception as error:
        raise InputError(f"{path} is damaged or no MATLAB file; {_AGAIN}") from error
    names = [str(cell.ravel()[0]) if isinstance(cell, np.ndarray) and cell.size else str(cell)
             for cell in _field(path, content, "filelist")]  # fmt: skip
    numbers = {name: _whole_numbers(path, content, name) for name in ("labels", "camId")}
    for name, values in numbers.items():
        if len(values) != len(names):
            raise InputError(f"{path}: {len(values)} {name} for {len(names)} names in filelist; {_AGAIN}")
    rows = {}
    for part in ("train", "query", "gallery"):
        rows[part] = _whole_numbers(path, content, f"{part}_idx")
        if not rows[part] or min(rows[part]) < 1 or max(rows[part]) > len(names):
            raise InputError(f"{path}: {part}_idx is empty, or not all of it is from 1 to {len(names)}; {_AGAIN}")
        rows[part] = [row - 1 for row in rows[part]]
    persons = numbers["labels"]
    common = {persons[row] for row in rows["train"]} & {persons[row] for row in rows["query"] + rows["gallery"]}
    if common:
        raise InputError(f"{path}: person {min(common)} is in training and in the test; {_AGAIN}")
    return Protocol(names, persons, numbers["camId"], **rows)


def _field(path: Path, content: dict[str, Any], name: str) -> np.ndarray:
    if name not in content:
        raise InputError(f"{path} has no {name}: it is no file of the new protocol")
    return np.asarray(content[name]).ravel()


def _whole_numbers(path: Path, content: dict[str, Any], name: str) -> list[int]:
    values = _field(path, content, name)
    if values.dtype.kind not in "iuf" or (values != np.floor(values)).any() or (values < 0).any():
        raise InputError(f"{path}: {name} is not a list of whole numbers; {_AGAIN}")
    return [int(value) for value in values]


def _open_images(source: Path, kind: str, stack: ExitStack) -> Callable[[NewImage], bytes]:
    """What reads an image by its name in filelist, from extracted files where they are there, else cuhk-03.mat."""
    folder, file = _find(source, f"images_{kind}"), _find(source, IMAGES_FILE)
    if folder is not None:
        return lambda image: read_as_jpeg(find_image(folder / image.original) or folder / image.original)
    if file is None:
        raise InputError(f"--source {source} has neither {IMAGES_FILE} nor images_{kind}/")
    import h5py

    try:
        opened = stack.enter_context(h5py.File(file))
        pairs = [opened[cell] for cell in opened[kind][()].ravel()]
        cells = [pair[()] for pair in pairs]  # each [10, number of persons], references to images
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{file} is damaged or not CUHK03's, with images under {kind}; {_AGAIN}") from error

    def read(image: NewImage) -> bytes:
        return encode_jpeg(_pixels(file, opened, cells, image.original))

    return read


def _pixels(file: Path, opened: Any, cells: list[np.ndarray], name: str) -> np.ndarray:
    """One image, uint8 [h, w, 3]; MATLAB's arrays come with their axes in reverse order."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(f"{ascii(name)[:100]} in filelist is no image name of CUHK03, such as 1_001_1_01.png")
    pair, person, _, number = (int(field) - 1 for field in match.groups())
    try:
        if min(pair, person, number) < 0:
            raise IndexError
        cell = opened[cells[pair][number, person]]
        if cell.nbytes > MAX_BYTES:
            raise ValueError
        pixels = cell[()].T
    except (OSError, IndexError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{file} is damaged at {name}, or not complete; {_AGAIN}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise InputError(f"{file} has no image {name}: the protocol is of another version, or the file is damaged")
    return pixels
