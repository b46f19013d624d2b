"""Writing the folder that --data_path takes, from a table of images; common to all preparations.

images/ holds the images as `{person:08d}_{camera:04d}_{index:08d}.jpg`, ori_to_new_im_name.pkl maps the source's names
to these, and partitions.pkl, written last, divides them into parts.
"""

import os
import pickle
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from aligned_reid.cli import command_line
from aligned_reid.data.partitions import (
    GALLERY,
    MULTI_QUERY,
    QUERY,
    Partitions,
    build_partitions,
    format_image_name,
    read_partitions,
    write_partitions,
)
from aligned_reid.errors import InputError
from aligned_reid.files import write_file
from aligned_reid.lock import hold

NUM_VAL_IDS = 100  # of Market-1501's 751 identities; the reference uses the same number for every data set
IMAGES_NAME, NAME_MAP, PARTITIONS_NAME = "images", "ori_to_new_im_name.pkl", "partitions.pkl"


class Row(NamedTuple):
    """One image of a source: its name there, its person and camera, and its part.

    Parts are trainval, gallery, query and multi_query.
    """

    original: str
    person_id: int
    camera: int
    part: str


def write_table(
    save_dir: Path,
    rows: Iterable[Row],
    read: Callable[[str], bytes],
    num_val_ids: int = NUM_VAL_IDS,
    other_files: Mapping[str, bytes] | None = None,
    counts: str = "",
) -> Path:
    """Write the data set of a table, whose rows give the order of images; see `write_folder`.

    Raises InputError if an image occurs twice.
    """
    num_images: Counter[tuple[int, int]] = Counter()
    new_names: dict[str, str] = {}
    parts: dict[str, list[str]] = {"trainval": [], "gallery": [], "query": [], "multi_query": []}
    for original, person_id, camera, part in rows:
        if original in new_names:
            raise InputError(f"the source has {ascii(original)[1:-1]} twice; an image belongs to one part, once")
        new_names[original] = format_image_name(person_id, camera, num_images[person_id, camera])
        num_images[person_id, camera] += 1
        parts[part].append(new_names[original])
    partitions = {PARTITIONS_NAME: build_partitions(**parts, num_val_ids=num_val_ids)}
    return write_folder(save_dir, new_names, read, partitions, other_files, counts)


def write_folder(
    save_dir: Path,
    new_names: Mapping[str, str],
    read: Callable[[str], bytes | Path],
    partitions: Mapping[str, Partitions],
    other_files: Mapping[str, bytes] | None = None,
    counts: str = "",
) -> Path:
    """Write the images, the name map, `other_files` and then `partitions` into `save_dir`, and return it.

    new_names: original name -> name in images/. read: original name -> a JPEG file's content, or its path if it is to
    be linked; called once for each image, in order. counts: a line to print on stderr before the progress. An
    interrupted call can be repeated: only missing and different files are written. Raises InputError if `save_dir`
    holds another data set, is being written by another process or cannot be written.
    """
    images_dir = save_dir / IMAGES_NAME
    name_map = pickle.dumps(dict(new_names), protocol=2)
    try:
        images_dir.mkdir(parents=True, exist_ok=True)
        with hold(save_dir, "--save_dir"):
            _check_images_dir(images_dir, set(new_names.values()))
            if not _holds(save_dir / NAME_MAP, name_map):  # existing partitions describe other images
                (save_dir / PARTITIONS_NAME).unlink(missing_ok=True)
            for name, content in {**(other_files or {}), NAME_MAP: name_map}.items():
                _write(save_dir / name, content)
            if counts:
                print(counts, file=sys.stderr, flush=True)
            for original in _show_progress(new_names):
                _write(images_dir / new_names[original], read(original))
            for name, value in partitions.items():
                write_partitions(save_dir / name, value)
    except OSError as error:
        place = error.filename or save_dir
        raise InputError(
            f"cannot write {place}: {error.strerror}; make room or choose another --save_dir, then run it again"
        ) from error
    return save_dir


def check_unused(save_dir: Path, name: str, content: bytes) -> None:
    """Raise InputError if the folder holds anything but the data set that its file `name` identifies by `content`."""
    try:
        with hold(save_dir, "--save_dir"):
            present = {entry for entry in os.listdir(save_dir) if not entry.startswith(".")}
    except OSError:  # there is none, or writing into it reports the reason
        return
    if present - {IMAGES_NAME} and not _holds(save_dir / name, content):
        raise InputError(
            f"--save_dir {save_dir} holds something else, or a data set made with other settings ({min(present)}); "
            "choose a new folder"
        )


def _check_images_dir(images_dir: Path, names: set[str]) -> None:
    """Delete temporary files of an interrupted run; raise InputError if there are images that are not in `names`."""
    present = os.listdir(images_dir)
    for name in present:
        if name.startswith(".") and name.endswith(".tmp"):
            (images_dir / name).unlink()
    foreign = {name for name in present if name.lower().endswith(".jpg") and not name.startswith(".")} - names
    if foreign:
        raise InputError(f"{images_dir} holds images of another data set ({min(foreign)}); choose another --save_dir")


def _write(path: Path, content: bytes | Path) -> None:
    """Write a file, or link it, unless it has this content already."""
    if isinstance(content, bytes):
        if not _holds(path, content):
            write_file(path, content)
    elif not path.exists() or not (path.samefile(content) or _holds(path, content.read_bytes())):
        path.unlink(missing_ok=True)
        try:
            os.link(os.path.realpath(content), path)
        except OSError:  # another file system, or one without hard links
            write_file(path, content.read_bytes())


def _holds(path: Path, content: bytes) -> bool:
    return path.exists() and path.stat().st_size == len(content) and path.read_bytes() == content


def _show_progress(names: Mapping[str, str]) -> Iterator[str]:
    """Yield the names; on stderr, a progress bar on a terminal, otherwise up to ten lines."""
    if sys.stderr.isatty():
        yield from tqdm(names, desc="Writing", unit=" images")
        return
    step = max(1, -(-len(names) // 10))
    for num_done, name in enumerate(names, start=1):
        yield name
        if num_done % step == 0 or num_done == len(names):
            print(f"wrote {num_done:,} of {len(names):,} images", file=sys.stderr, flush=True)


def describe(save_dir: Path, dataset: str = "") -> str:
    """The counts of a prepared data set, a line for each part, and the command that trains on it."""
    partitions = read_partitions(save_dir / PARTITIONS_NAME)
    num_marks = Counter(partitions.test_marks)
    lines = [
        ("trainval", len(partitions.trainval_im_names), f", {len(partitions.trainval_ids2labels)} identities"),
        ("train", len(partitions.train_im_names), f", {len(partitions.train_ids2labels)} identities"),
        ("val", len(partitions.val_im_names), ""),
        ("query", num_marks[QUERY], ""),
        ("gallery", num_marks[GALLERY], ""),
        ("multi-query", num_marks[MULTI_QUERY], ""),
    ]
    counts = "".join(f"{part:<11} {num_images:6,} images{identities}\n" for part, num_images, identities in lines)
    flags = f"--dataset={dataset} " if dataset else ""
    return f"{counts}next: {command_line('train')} {flags}--data_path={shlex.quote(str(save_dir))}"
