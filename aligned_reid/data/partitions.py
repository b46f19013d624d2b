"""partitions.pkl, which assigns images to the parts of a data set: reading, writing, splitting."""

import dataclasses
import pickle
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aligned_reid.data.plain_pickle import load_plain
from aligned_reid.errors import InputError
from aligned_reid.files import write_file

QUERY, GALLERY, MULTI_QUERY = 0, 1, 2  # values in val_marks and test_marks

_IMAGE_NAME = re.compile(r"([0-9]{8})_([0-9]{4})_([0-9]{8})\.jpg")


class ImageName(NamedTuple):
    """The numbers in an image's name: person, camera, and index among the images of both (from 0)."""

    person_id: int
    camera: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which is not needed


def parse_image_name(name: str) -> ImageName:
    """`00000002_0001_00000000.jpg` -> ImageName(2, 1, 0). Raises InputError with the name if it does not parse."""
    match = _IMAGE_NAME.fullmatch(name)
    if match is None:
        raise InputError(f"image name {ascii(name)[:100]} is not {{person:08d}}_{{camera:04d}}_{{index:08d}}.jpg")
    return ImageName(*map(int, match.groups()))


def format_image_name(person_id: int, camera: int, index: int) -> str:
    """(2, 1, 0) -> `00000002_0001_00000000.jpg`. Raises InputError if a number has too many digits."""
    name = f"{person_id:08d}_{camera:04d}_{index:08d}.jpg"
    parse_image_name(name)
    return sys.intern(name)  # one object in memory and in pickles, however often it is made


@dataclasses.dataclass(frozen=True)
class Partitions:
    """The parts of a data set, under the keys of partitions.pkl.

    train and val are trainval split by identity; test has other identities. `*_ids2labels` maps person id -> class
    label (0 ... number of identities - 1). Marks: 0 query, 1 gallery, 2 multi-query.
    """

    trainval_im_names: list[str]
    trainval_ids2labels: dict[int, int]
    train_im_names: list[str]
    train_ids2labels: dict[int, int]
    val_im_names: list[str]
    val_marks: list[int]
    test_im_names: list[str]
    test_marks: list[int]


_KEYS = tuple(field.name for field in dataclasses.fields(Partitions))


def build_partitions(
    trainval: Sequence[str],
    query: Sequence[str],
    gallery: Sequence[str],
    multi_query: Sequence[str] = (),
    num_val_ids: int = 100,
) -> Partitions:
    """Partitions of a new data set from its image names; test_im_names has the order query, multi-query, gallery."""
    train, val_query, val_gallery = split_train_val(trainval, num_val_ids)
    return Partitions(
        trainval_im_names=list(trainval),
        trainval_ids2labels=_labels_of(trainval),
        train_im_names=train,
        train_ids2labels=_labels_of(train),
        val_im_names=val_query + val_gallery,
        val_marks=[QUERY] * len(val_query) + [GALLERY] * len(val_gallery),
        test_im_names=[*query, *multi_query, *gallery],
        test_marks=[QUERY] * len(query) + [MULTI_QUERY] * len(multi_query) + [GALLERY] * len(gallery),
    )


def _labels_of(image_names: Iterable[str]) -> dict[int, int]:
    ids = sorted({parse_image_name(name).person_id for name in image_names})
    return {person_id: label for label, person_id in enumerate(ids)}


def split_train_val(
    image_names: Sequence[str], num_val_ids: int, seed: int | None = 1
) -> tuple[list[str], list[str], list[str]]:
    """Split by identity: `num_val_ids` random identities that have a query become the validation set.

    For each validation identity, one random image per camera becomes a query, unless that leaves no image of another
    camera in the gallery. The split is exactly the reference implementation's, so that scores on val are comparable.
    Returns (train_im_names, val_query_im_names, val_gallery_im_names), each in shuffled order.
    """
    random_state = np.random.RandomState(seed)
    names = list(image_names)
    random_state.shuffle(names)
    images_of: dict[int, list[str]] = {}
    for name in names:
        images_of.setdefault(parse_image_name(name).person_id, []).append(name)
    ids = sorted(images_of)
    random_state.shuffle(ids)

    query: set[str] = set()
    gallery: set[str] = set()
    num_left = num_val_ids
    for person_id in ids:
        if num_left <= 0:
            break
        id_query, id_gallery = _query_and_gallery(images_of[person_id])
        if id_query:
            query.update(id_query)
            gallery.update(id_gallery)
            num_left -= 1
    train = [name for name in names if name not in query and name not in gallery]
    return train, [name for name in names if name in query], [name for name in names if name in gallery]


def _query_and_gallery(names: list[str]) -> tuple[list[str], list[str]]:
    """Split one identity's images: the first of each camera is a query, the rest gallery."""
    camera_of = {name: parse_image_name(name).camera for name in names}
    first_of_camera: dict[int, str] = {}
    for name in names:
        first_of_camera.setdefault(camera_of[name], name)
    query = [first_of_camera[camera] for camera in sorted(first_of_camera)]
    gallery = [name for name in names if name not in query]
    # A query without a match moves to the gallery. The query after it is then skipped: the reference removes from the
    # list that it iterates over, and the published splits depend on that.
    position = 0
    while position < len(query):
        if all(camera_of[name] == camera_of[query[position]] for name in gallery):
            gallery.append(query.pop(position))
        position += 1
    return query, gallery


def write_partitions(path: str | Path, partitions: Partitions) -> None:
    """Write partitions.pkl atomically, in protocol 2, which Python 2 and the reference implementation can read."""
    content = pickle.dumps(vars(partitions), protocol=2)
    try:
        write_file(Path(path), content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def read_partitions(path: str | Path) -> Partitions:
    """Read a partition file written by any version of Python. The file need not be trusted: nothing in it is run.

    Raises InputError if it cannot be read, is damaged, contains anything but plain data, lacks a key, or holds values
    that do not fit together.
    """
    value = load_plain(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a dict with {', '.join(_KEYS)}")
    missing = [key for key in _KEYS if key not in value]
    if missing:
        raise InputError(f"{path} has no {', '.join(missing)}; prepare the data again")
    partitions = Partitions(**{key: _check_field(path, key, value[key]) for key in _KEYS})
    for part in ("trainval", "train", "val", "test"):
        _check_part(path, partitions, part)
    return partitions


def _check_field(path: str | Path, key: str, value: Any) -> Any:
    """The value of one key as Partitions holds it. Raises InputError if it has the wrong type."""
    if key.endswith("_im_names"):
        if isinstance(value, list | tuple):
            names = [name.decode("latin1") if isinstance(name, bytes) else name for name in value]
            if all(isinstance(name, str) for name in names):
                return names
        raise InputError(f"{path}: {key} is not a list of image names")
    if key.endswith("_marks"):
        if isinstance(value, list | tuple) and all(type(mark) is int and mark in (0, 1, 2) for mark in value):
            return list(value)
        raise InputError(f"{path}: {key} is not a list of 0 (query), 1 (gallery) and 2 (multi-query)")
    if isinstance(value, dict) and all(type(number) is int for pair in value.items() for number in pair):
        return value
    raise InputError(f"{path}: {key} is not a dict of person id to label")


def _check_part(path: str | Path, partitions: Partitions, part: str) -> None:
    """Raise InputError unless names parse, each has a mark, and each person has one of the labels 0, 1, 2, ..."""
    names = getattr(partitions, f"{part}_im_names")
    try:
        ids = {parse_image_name(name).person_id for name in names}
    except InputError as error:
        raise InputError(f"{path}: {part}_im_names: {error}") from error
    if part in ("val", "test"):
        marks = getattr(partitions, f"{part}_marks")
        if len(marks) != len(names):
            raise InputError(f"{path}: {len(marks)} {part}_marks for {len(names)} {part}_im_names")
        return
    labels = getattr(partitions, f"{part}_ids2labels")
    unlabelled = sorted(ids - labels.keys())
    if unlabelled:
        raise InputError(f"{path}: {part}_ids2labels has no label for person {unlabelled[0]}")
    if sorted(labels.values()) != list(range(len(labels))):
        raise InputError(f"{path}: the labels in {part}_ids2labels are not 0 to {len(labels) - 1}, each once")
