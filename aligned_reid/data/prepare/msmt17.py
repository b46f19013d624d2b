"""From the original MSMT17 (Wei et al., CVPR 2018), unpacked, to the layout that --data_path takes.

Lists name the images of each part, a line `0000/0000_000_01_0303morning_0015_0.jpg 0` for each: its path, whose third
field is the camera, and its person. Version 2 (blurred faces) has the same lists and other names of the image folders.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aligned_reid.data.prepare import layout
from aligned_reid.data.prepare.layout import (
    NUM_VAL_IDS,
    Namer,
    NewImage,
    Parts,
    check_paths,
    find_image,
    read_as_jpeg,
    write_data_set,
)
from aligned_reid.errors import InputError

TRAIN_LISTS = ("list_train.txt", "list_val.txt")
GALLERY_LIST, QUERY_LIST = "list_gallery.txt", "list_query.txt"
IMAGE_FOLDERS = (("train", "test"), ("mask_train_v2", "mask_test_v2"))  # of versions 1 and 2

_LINE = re.compile(r"(?P<path>(?:[^/\s]+/)*[0-9]+_[0-9]+_(?P<camera>[0-9]+)_[^/\s]*)\s+(?P<person>[0-9]+)")


class _Listed(NamedTuple):
    """One line of a list, checked: the image's path in the source, its person as that list counts, and its camera."""

    path: str
    person: int
    camera: int


def prepare_msmt17(source: str | Path, save_dir: str | Path) -> Path:
    """Copy the images under their new names and write partitions.pkl and ori_to_new_im_name.pkl into `save_dir`.

    `source`: the folder with the lists, of version 1 or 2, or the folder around it; it is only read. trainval is
    list_train.txt and list_val.txt together. These two share their identities, so that the official val part cannot
    measure how unseen people are found; ours is made of NUM_VAL_IDS identities of trainval, as for Market-1501. The
    test lists count persons from 0 again; their ids follow those of training. When interrupted, the same call goes on.
    Returns `save_dir`. Raises InputError when the source is not there, incomplete or no MSMT17, and when `save_dir`
    cannot be written.
    """
    source, save_dir = Path(source).expanduser(), Path(save_dir).expanduser()
    check_paths(source, save_dir)
    root = find_raw_msmt17(source)
    if root is None:
        raise InputError(
            f"--source {source} holds no {TRAIN_LISTS[0]} with a folder train/ or mask_train_v2/ beside it; "
            "give the folder that MSMT17 unpacks to"
        )
    train_folder, test_folder = _image_folders(root)
    train = [image for name in TRAIN_LISTS for image in _read_list(root, name, train_folder)]
    gallery = _read_list(root, GALLERY_LIST, test_folder)
    query = _read_list(root, QUERY_LIST, test_folder)
    first_test_id = 1 + max(image.person for image in train)
    new_image = Namer()

    def named(images: Sequence[_Listed], first_id: int) -> list[NewImage]:
        return [new_image(image.path, first_id + image.person, image.camera) for image in images]

    parts = Parts(named(train, 0), named(gallery, first_test_id), named(query, first_test_id))
    return write_data_set(save_dir, parts, lambda image: read_as_jpeg(root / image.original), NUM_VAL_IDS)


def find_raw_msmt17(path: str | Path) -> Path | None:
    """The root folder of an unpacked MSMT17 that the path is or directly contains, None without one."""
    try:
        roots = layout.folders_to_look_in(Path(path))
        return next((root for root in roots if (root / TRAIN_LISTS[0]).is_file() and _image_folders(root)[0]), None)
    except OSError:
        return None


def prepare_command(raw: Path) -> str:
    """The command that prepares what `find_raw_msmt17` found, into a folder beside it."""
    return layout.prepare_command("prepare_msmt17.py", raw, "msmt17")


def _image_folders(root: Path) -> tuple[str, str]:
    """The folders of training and test images as the source spells them; two empty names where it has neither pair."""
    present = {child.name.lower(): child.name for child in root.iterdir()}
    for train, test in IMAGE_FOLDERS:
        if train in present:
            return present[train], present.get(test, test)
    return "", ""


def _read_list(root: Path, name: str, folder: str) -> list[_Listed]:
    """The images of one list, which are in `folder`. Raises InputError that names the line where one is not."""
    try:
        lines = (root / name).read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        raise InputError(f"{root} has no {name}; it is incomplete, unpack or download it again") from None
    except OSError as error:
        raise InputError(f"cannot read {root / name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{root / name} is no list of images; unpack or download it again") from error
    images = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise InputError(f"{root / name}, line {number}: {ascii(line)[:100]} is no image of MSMT17 and its person")
        path = Path(folder, match["path"])
        file = find_image(root / path)
        if file is None:
            raise InputError(f"{root / name}, line {number}: there is no {path}; unpack or download the set again")
        original = path.with_name(file.name).as_posix()
        images.append(_Listed(original, int(match["person"]), int(match["camera"])))
    if not images:
        raise InputError(f"{root / name} is empty; unpack or download the set again")
    return images
