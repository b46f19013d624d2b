"""Preparing the original MSMT17 (Wei et al., CVPR 2018), unpacked.

Lists name the images of each part, with lines like `0000/0000_000_01_0303morning_0015_0.jpg 0`: the path, whose third
field is the camera, and the person. Version 2 (blurred faces) has the same lists and other names of image folders.
"""

import os
import re
from pathlib import Path

from aligned_reid.data.prepare import sources
from aligned_reid.data.prepare.jpeg import read_as_jpeg
from aligned_reid.data.prepare.layout import Row, write_table
from aligned_reid.data.prepare.sources import check_paths, find_image
from aligned_reid.errors import InputError

TRAIN_LIST = "list_train.txt"
IMAGE_FOLDERS = (("train", "test"), ("mask_train_v2", "mask_test_v2"))  # of versions 1 and 2

_LINE = re.compile(r"(?P<path>(?:[^/\s]+/)*[0-9]+_[0-9]+_(?P<camera>[0-9]{1,4})_[^/\s]*)\s+(?P<person>[0-9]{1,8})")


def prepare_msmt17(source: str | Path, save_dir: str | Path) -> Path:
    """Write the data set, with new image names and partitions.pkl, into `save_dir`, and return that.

    `source`: the folder with the lists, of version 1 or 2, or a folder around it; it is only read. trainval joins
    list_train.txt and list_val.txt. Because these two share identities, the official val part cannot measure how well
    unseen people are found; ours has NUM_VAL_IDS identities of trainval, as for Market-1501. The test lists count
    persons from 0 again; their ids follow those of training. If interrupted, repeat the call to resume. Raises
    InputError if the source is missing, incomplete or not MSMT17, or `save_dir` cannot be written.
    """
    source, save_dir = check_paths(source, save_dir)
    root = find_raw_msmt17(source)
    if root is None:
        raise InputError(
            f"--source {source} holds no {TRAIN_LIST} with a folder train/ or mask_train_v2/ beside it; "
            "give the folder that MSMT17 unpacks to"
        )
    train, test = _image_folders(root)
    rows = [*_read_list(root, TRAIN_LIST, train, "trainval"), *_read_list(root, "list_val.txt", train, "trainval")]
    first_test_id = 1 + max(row.person_id for row in rows)
    for part in ("gallery", "query"):
        listed = _read_list(root, f"list_{part}.txt", test, part)
        rows += [row._replace(person_id=first_test_id + row.person_id) for row in listed]
    return write_table(save_dir, rows, lambda original: read_as_jpeg(root / original))


def find_raw_msmt17(path: str | Path) -> Path | None:
    """The root folder of an unpacked MSMT17 that the path is or contains, else None."""
    roots = sources.folders_to_look_in(Path(path))
    return next((root for root in roots if os.path.isfile(root / TRAIN_LIST) and _image_folders(root)[0]), None)


def _image_folders(root: Path) -> tuple[str, str]:
    """The folders of training and test images, as the source spells them; empty names if there are none."""
    present = {name.lower(): name for name in sources.list_folder(root)[0]}
    for train, test in IMAGE_FOLDERS:
        if train in present:
            return present[train], present.get(test, test)
    return "", ""


def _read_list(root: Path, name: str, folder: str, part: str) -> list[Row]:
    """The images of a list, which are in `folder`. Raises InputError with the line if one is missing."""
    try:
        lines = (root / name).read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise InputError(f"cannot read {root / name}: {error.strerror}; unpack or download the set again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{root / name} is not a list of images; unpack or download it again") from error
    rows = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise InputError(f"{root / name}, line {number}: {ascii(line)[:100]} is not an MSMT17 image and its person")
        path = Path(folder, match["path"])
        file = find_image(root / path)
        if file is None:
            raise InputError(f"{root / name}, line {number}: {path} is missing; unpack or download the set again")
        rows.append(Row(path.with_name(file.name).as_posix(), int(match["person"]), int(match["camera"]), part))
    if not rows:
        raise InputError(f"{root / name} is empty; unpack or download the set again")
    return rows
