"""Preparing CUHK03 (Li et al., CVPR 2014) under the new protocol (Zhong et al., CVPR 2017).

cuhk-03.mat holds the images; cuhk03_new_protocol_config_<kind>.mat, from the authors of re-ranking, says which image is
in which part: 767 identities for training, 700 for the test. kind: labeled (boxes drawn by hand) or detected.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from aligned_reid.data.prepare import sources
from aligned_reid.data.prepare.jpeg import encode_jpeg, read_as_jpeg
from aligned_reid.data.prepare.layout import Row, write_table
from aligned_reid.data.prepare.sources import check_paths, find_image
from aligned_reid.errors import InputError

KINDS = ("labeled", "detected")
IMAGES_FILE = "cuhk-03.mat"
CONFIG_NAME = "cuhk03_new_protocol_config_{}.mat"

# Pair of cameras, person within the pair, camera within the pair, number of the image among the person's ten.
_NAME = re.compile(r"0*([1-9][0-9]{0,7})_0*([1-9][0-9]{0,7})_[12]_0*([1-9][0-9]{0,7})\.png")
_DAMAGED = (OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError)  # what h5py raises


def prepare_cuhk03(source: str | Path, save_dir: str | Path, kind: str) -> Path:
    """Write the data set, with images as JPEGs of quality 95 and partitions.pkl, into `save_dir`, and return that.

    `source`: the folder with the protocol file and either cuhk-03.mat (or a folder with it) or images_<kind>/ with
    images extracted from it; it is only read. If interrupted, repeat the call to resume. Raises InputError if the
    source is missing, incomplete, damaged or not CUHK03, or `save_dir` cannot be written.
    """
    if kind not in KINDS:
        raise InputError(f"--kind {kind} is not one of {', '.join(KINDS)}")
    source, save_dir = check_paths(source, save_dir)
    config = _find(source, CONFIG_NAME.format(kind))
    if config is None:
        raise InputError(f"--source {source} has no {CONFIG_NAME.format(kind)}; it comes with the re-ranking code")
    rows = read_protocol(config)
    with _open_images(source, kind) as read:
        return write_table(save_dir, rows, read)


def find_raw_cuhk03(path: str | Path) -> Path | None:
    """The path if cuhk-03.mat or a file of the new protocol is in it or in a folder of it, else None."""
    names = (IMAGES_FILE, *map(CONFIG_NAME.format, KINDS))
    return Path(path) if any(_find(Path(path), name) for name in names) else None


def _find(source: Path, name: str) -> Path | None:
    """A file or folder in the source or in a folder of it."""
    paths = (folder / name for folder in sources.folders_to_look_in(source))
    return next((path for path in paths if os.path.exists(path)), None)


def read_protocol(path: Path) -> list[Row]:
    """The table in a file of the new protocol, which counts rows from 1. Raises InputError if it is not consistent."""
    from scipy.io import loadmat

    try:
        content = loadmat(path)
    except Exception as error:  # scipy raises errors of many types for cut-off files
        raise InputError(f"{path} is damaged or not a MATLAB file; download it again") from error
    try:
        cells = np.asarray(content.get("filelist", ())).ravel()
        names = [str(cell.ravel()[0]) if isinstance(cell, np.ndarray) and cell.size else str(cell) for cell in cells]
        persons, cameras = (_whole_numbers(content, name) for name in ("labels", "camId"))
        indices = {part: _whole_numbers(content, f"{part}_idx") for part in ("train", "gallery", "query")}
        if not len(names) == len(persons) == len(cameras):
            raise ValueError(f"{len(persons)} labels and {len(cameras)} camId for {len(names)} names in filelist")
        for part, rows in indices.items():
            if not rows or min(rows) < 1 or max(rows) > len(names):
                raise ValueError(f"{part}_idx is empty or not within 1 to {len(names)}")
    except ValueError as error:
        raise InputError(f"{path} is not a file of the new protocol: {error}; download it again") from error
    table = [
        Row(names[row - 1], persons[row - 1], cameras[row - 1], "trainval" if part == "train" else part)
        for part, rows in indices.items()
        for row in rows
    ]
    of_training = {row.person_id for row in table if row.part == "trainval"}
    both = of_training & {row.person_id for row in table if row.part != "trainval"}
    if both:
        raise InputError(f"{path}: person {min(both)} is in training and in the test; download it again")
    return table


def _whole_numbers(content: dict[str, Any], name: str) -> list[int]:
    values = np.asarray(content.get(name)).ravel()
    if values.dtype.kind not in "iuf" or not ((values == np.floor(values)) & (values >= 0) & (values < 2**31)).all():
        raise ValueError(f"{name} is not a list of whole numbers")
    return [int(value) for value in values]


@contextmanager
def _open_images(source: Path, kind: str) -> Iterator[Callable[[str], bytes]]:
    """A function that reads an image by its name in filelist as a JPEG file, from images_<kind>/ or cuhk-03.mat."""
    folder, file = _find(source, f"images_{kind}"), _find(source, IMAGES_FILE)
    if folder is not None:
        yield lambda name: read_as_jpeg(find_image(folder / name) or folder / name)
        return
    if file is None:
        raise InputError(f"--source {source} has neither {IMAGES_FILE} nor images_{kind}/")
    import h5py

    try:
        opened = h5py.File(file)  # MATLAB 7.3
        pairs = [opened[reference][()] for reference in opened[kind][()].ravel()]  # each [10, persons], references
    except _DAMAGED as error:
        raise InputError(f"{file} is damaged or not CUHK03 with images under {kind}; download it again") from error
    with opened:
        yield lambda name: encode_jpeg(_read_pixels(opened, pairs, name))


def _read_pixels(opened: Any, pairs: list[np.ndarray], name: str) -> np.ndarray:
    """One image, uint8 [h, w, 3]; MATLAB stores axes in reverse order."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(f"{ascii(name)[:100]} in filelist is not an image name of CUHK03, such as 1_001_1_01.png")
    pair, person, number = (int(field) - 1 for field in match.groups())
    try:
        pixels = opened[pairs[pair][number, person]][()].T
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise ValueError
    except _DAMAGED as error:
        raise InputError(f"{opened.filename} has no image {name}, or is damaged there; download it again") from error
    return pixels
