"""Joining prepared data sets into one, with identities and cameras kept apart."""

import dataclasses
import os
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aligned_reid.data.partitions import Partitions, format_image_name, parse_image_name, read_partitions
from aligned_reid.data.prepare.layout import IMAGES_NAME, NAME_MAP, PARTITIONS_NAME, check_unused, write_folder
from aligned_reid.data.prepare.sources import check_paths
from aligned_reid.errors import InputError


def prepare_joined(sources: Sequence[str | Path], save_dir: str | Path) -> Path:
    """Join prepared folders in `save_dir`, and return that. Images are hard links, or copies if links are impossible.

    The persons and cameras of each set are numbered after those of the sets before it. trainval, train and val hold
    the images of all sets. partitions.pkl has the test part of the first set; partitions_<folder's name>.pkl, one for
    each set, has the same training parts and that set's test. If interrupted, repeat the call to resume. Raises
    InputError if a source is not a prepared data set or is given twice, if two have the same name, if the numbers do
    not fit into image names, and if `save_dir` holds anything else.
    """
    folders, save_dir = [Path(os.path.expanduser(source)) for source in sources], Path(os.path.expanduser(save_dir))
    names = _check_sources(folders, save_dir)
    new_names: dict[str, str] = {}
    files: dict[str, Path] = {}
    parts: dict[str, Partitions] = {}
    first_person = first_camera = 0
    for name, folder in zip(names, folders, strict=True):
        own = read_partitions(folder / PARTITIONS_NAME)
        listed = (own.trainval_im_names, own.train_im_names, own.val_im_names, own.test_im_names)
        images = {image: parse_image_name(image) for names_of_part in listed for image in names_of_part}
        renamed = {
            old: format_image_name(first_person + image.person_id, first_camera + image.camera, image.index)
            for old, image in images.items()
        }
        new_names |= {f"{name}/{old}": new for old, new in renamed.items()}
        files |= {f"{name}/{old}": folder / IMAGES_NAME / old for old in renamed}
        parts[name] = _renumber(own, renamed, first_person)
        first_person += 1 + max([image.person_id for image in images.values()] + [*own.trainval_ids2labels], default=0)
        first_camera += 1 + max((image.camera for image in images.values()), default=0)

    def read(original: str) -> Path:
        if not files[original].is_file():
            raise InputError(f"image {files[original]} is missing; prepare that data set again")
        return files[original]

    check_unused(save_dir, NAME_MAP, pickle.dumps(new_names, protocol=2))
    partitions = {f"partitions_{name}.pkl": _join(parts, name) for name in names}
    partitions[PARTITIONS_NAME] = _join(parts, names[0])
    return write_folder(save_dir, new_names, read, partitions)


def _check_sources(folders: Sequence[Path], save_dir: Path) -> list[str]:
    """The name of each source, that of its folder."""
    if len(folders) < 2:
        raise InputError("--sources needs two or more prepared data sets")
    for folder in folders:
        check_paths(folder, save_dir)
        if not (folder / IMAGES_NAME).is_dir() or not (folder / PARTITIONS_NAME).is_file():
            raise InputError(f"--sources: {folder} has no images/ or no {PARTITIONS_NAME}; prepare it first")
    (place, most), *_ = Counter(folder.resolve() for folder in folders).most_common(1)
    if most > 1:
        raise InputError(f"--sources has {place} twice")
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    (name, most), *_ = Counter(names).most_common(1)
    if most > 1:
        raise InputError(f"--sources has two folders called {name}; rename one, or give a symbolic link to it")
    return names


def _renumber(own: Partitions, new_names: Mapping[str, str], first_person: int) -> Partitions:
    changed: dict[str, Any] = {}
    for name, value in vars(own).items():
        if name.endswith("_im_names"):
            changed[name] = [new_names[image] for image in value]
        elif name.endswith("_ids2labels"):
            changed[name] = {first_person + person_id: label for person_id, label in value.items()}
    return dataclasses.replace(own, **changed)


def _join(sets: Mapping[str, Partitions], test: str) -> Partitions:
    """The training parts of all sets, labels counted on from set to set, with the test part of the set `test`."""
    joined = Partitions([], {}, [], {}, [], [], sets[test].test_im_names, sets[test].test_marks)
    for own in sets.values():
        for name in ("trainval_im_names", "train_im_names", "val_im_names", "val_marks"):
            getattr(joined, name).extend(getattr(own, name))
        for name in ("trainval_ids2labels", "train_ids2labels"):
            labels = getattr(joined, name)
            labels.update({person_id: label + len(labels) for person_id, label in getattr(own, name).items()})
    return joined
