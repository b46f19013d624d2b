"""Preparing one's own photos: numbers for names, and the division into parts."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from aligned_reid.data.prepare.jpeg import read_as_jpeg
from aligned_reid.data.prepare.layout import IMAGES_NAME, NUM_VAL_IDS, Row, write_table
from aligned_reid.data.prepare.photo_source import Photo, read_photos
from aligned_reid.data.prepare.sources import check_paths
from aligned_reid.errors import InputError

MAX_CAMERAS = 9_999  # by the digits in an image's name


def prepare_photos(
    source: str | Path,
    save_dir: str | Path,
    test_share: float = 0.5,
    seed: int = 1,
    cameras: str = "known",
    log: Callable[[str], None] = print,
    *,
    dry_run: bool = False,
) -> Path:
    """Write the data set, with names.json (which number stands for whom), into `save_dir`, and return that.

    `source`: the folder or CSV file; it is only read. Persons and cameras are numbered from 1 in sorted order (numbers
    by value). A division in the source is kept. Otherwise `test_share` of the persons, drawn with `seed` among those
    seen by two cameras, are for the test; image names depend on neither. With `cameras` "none", each photo of a person
    counts as taken by a different camera. `log` receives a line about each photo or option that is not used as given;
    with `dry_run` also the counts, and nothing is written. If interrupted, repeat the call to resume. Raises
    InputError if the source cannot be used or a photo in it cannot be read, and if `save_dir` cannot be written.
    """
    if not 0.0 < test_share <= 1.0:
        raise InputError(f"--test_share {test_share:g} is not above 0 and at most 1: it is a share of the persons")
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed {seed} is not a whole number from 0 to {2**32 - 1}")
    if cameras not in ("known", "none"):
        raise InputError(f"--cameras {cameras} is neither known nor none")
    source, save_dir = check_paths(source, save_dir)
    photos = read_photos(source, cameras == "known", log)
    _check(source, save_dir, photos)
    person_ids = numbered({photo.person for photo in photos})
    camera_ids = numbered({photo.camera for photo in photos})
    photos.sort(key=lambda photo: (person_ids[photo.person], camera_ids[photo.camera], photo.original))
    if photos[0].part:
        log("the division of the source is kept; --test_share and --seed do not apply")
        photos = _keep_division(source, photos, log)
    else:
        photos = _divide(photos, test_share, seed, log, cameras == "known")
    counts = describe_division(photos, cameras == "known")
    if dry_run:
        log(counts)
        return save_dir
    files = {photo.original: photo.file for photo in photos}
    rows = [Row(photo.original, person_ids[photo.person], camera_ids[photo.camera], photo.part) for photo in photos]
    num_train_ids = len({row.person_id for row in rows if row.part == "trainval"})
    num_val_ids = math.ceil(num_train_ids * NUM_VAL_IDS / 751)  # Market-1501's share
    names = {"names.json": names_file(persons=person_ids, cameras=camera_ids if cameras == "known" else {})}
    return write_table(save_dir, rows, lambda original: read_as_jpeg(files[original]), num_val_ids, names, counts)


def names_file(**numbers: dict[str, int]) -> bytes:
    """The content of names.json: for each kind, the names by their numbers."""
    by_number = {kind: {str(number): name for name, number in ids.items()} for kind, ids in numbers.items()}
    # A byte that is not UTF-8 becomes a JSON escape, which os.fsencode turns into the byte again.
    return (json.dumps(by_number, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def numbered(names: Collection[str]) -> dict[str, int]:
    """Each name's number, from 1 in sorted order; names that are numbers come first, by value."""

    def key(name: str) -> tuple[bool, int, str, str]:
        is_number = name.isascii() and name.isdigit()
        digits = name.lstrip("0") if is_number else ""
        return not is_number, len(digits), digits, name

    return {name: number for number, name in enumerate(sorted(names, key=key), start=1)}


def describe_division(photos: Sequence[Photo], with_cameras: bool) -> str:
    """The counts in one line: `312 photos of 40 persons by 3 cameras: trainval 156 of 20 persons, query ...`."""
    persons: dict[str, list[str]] = {}  # one entry a photo
    for part in ("trainval", "query", "gallery", "multi_query"):
        persons[part] = [photo.person for photo in photos if photo.part == part]
    parts = [f"{part} {len(names):,} of {len(set(names)):,} persons" for part, names in persons.items() if names]
    cameras = f" by {len({photo.camera for photo in photos}):,} cameras" if with_cameras else ""
    num_persons = len({photo.person for photo in photos})
    return f"{len(photos):,} photos of {num_persons:,} persons{cameras}: {', '.join(parts)}"


def _check(source: Path, save_dir: Path, photos: Sequence[Photo]) -> None:
    """Raise InputError unless one can train and test on the photos, and no photo would be overwritten."""
    images_dir = os.path.realpath(save_dir / IMAGES_NAME)
    for photo in photos:
        if os.path.dirname(os.path.realpath(photo.file)) == images_dir:
            raise InputError(f"{photo.file} is where the new images will be; choose another --save_dir")
    persons, cameras = {photo.person for photo in photos}, {photo.camera for photo in photos}
    if len(persons) < 2:
        raise InputError(f"--source {source} shows one person only ({min(persons, default='none')}); two are needed")
    if len(cameras) > MAX_CAMERAS:
        raise InputError(
            f"--source {source} has {len(cameras):,} cameras (with --cameras none: photos of one person); the limit is "
            f"{MAX_CAMERAS:,}"
        )


def _keep_division(source: Path, photos: Sequence[Photo], log: Callable[[str], None]) -> list[Photo]:
    """The photos without unused multi-query photos. Raises InputError unless one can test on the source's parts."""
    parts: dict[str, list[Photo]] = defaultdict(list)
    for photo in photos:
        parts[photo.part].append(photo)
    for name in ("query", "gallery"):
        if not parts[name]:
            raise InputError(
                f"--source {source} is divided into parts, but has no photos for {name}: add a part {name}, or give an "
                "undivided source, from which test persons are drawn"
            )
    tested = {photo.person for photo in parts["query"] + parts["gallery"]}
    both = sorted(tested & {photo.person for photo in parts["trainval"]})
    if both:
        raise InputError(f"--source {source}: persons in training and test: {len(both):,} (the first is {both[0]})")
    cameras: dict[str, set[str]] = defaultdict(set)
    for photo in parts["gallery"]:
        cameras[photo.person].add(photo.camera)
    unanswered = [photo for photo in parts["query"] if not cameras[photo.person] - {photo.camera}]
    if len(unanswered) == len(parts["query"]):
        raise InputError(f"--source {source}: the gallery has no query's person under another camera")
    if unanswered:
        log(f"queries without their person in the gallery under another camera, which do not count: {len(unanswered)}")
    # As in Market-1501, a query is pooled over multi-query photos of its person and camera.
    queries = {(photo.person, photo.camera) for photo in parts["query"]}
    return [photo for photo in photos if photo.part != "multi_query" or (photo.person, photo.camera) in queries]


def _divide(
    photos: Sequence[Photo], test_share: float, seed: int, log: Callable[[str], None], with_cameras: bool
) -> list[Photo]:
    """Divide persons into training and test, and each test person's photos into queries and gallery."""
    photos_of: dict[str, dict[str, list[Photo]]] = defaultdict(lambda: defaultdict(list))  # by person, camera
    for photo in photos:
        photos_of[photo.person][photo.camera].append(photo)
    able = [person for person, by_camera in photos_of.items() if len(by_camera) > 1]
    unable = [person for person, by_camera in photos_of.items() if len(by_camera) == 1]
    one, two = ("seen by one camera", "seen by two cameras") if with_cameras else ("in one photo", "in two photos")
    if not able:
        hint = "; with --cameras none, two photos are enough" if with_cameras else ""
        raise InputError(f"no person was {two}, and the test looks for each person again{hint}")
    if unable:
        log(f"persons {one} only, which are for training: {len(unable)} (the first is {unable[0]})")
    wanted = max(1, round(test_share * len(photos_of)))
    if wanted > len(able):
        log(f"--test_share {test_share:g} would be {wanted} persons; {len(able)} were {two} and are taken")
    most = len(photos_of) - 1 if test_share < 1.0 else len(photos_of)  # at least one person is left to train on
    random = np.random.RandomState(seed)
    tested = {able[index] for index in random.permutation(len(able))[: min(wanted, most)]}
    queries: set[Photo] = set()
    for person, by_camera in photos_of.items():
        if person in tested and with_cameras:
            queries.update(choose_queries(by_camera, random))
        elif person in tested:  # one photo per camera would be all photos but one
            queries.update(list(by_camera.values())[random.randint(len(by_camera))])
    return [
        photo._replace(part="query" if photo in queries else "gallery" if photo.person in tested else "trainval")
        for photo in photos
    ]


def choose_queries(by_camera: dict[str, list[Photo]], random: np.random.RandomState) -> list[Photo]:
    """One photo per camera, unless the gallery would then hold none of that person under another camera."""
    queries = {camera: photos[random.randint(len(photos))] for camera, photos in by_camera.items()}
    num_gallery = {camera: len(photos) - 1 for camera, photos in by_camera.items()}
    for camera in by_camera:
        if not any(number for other, number in num_gallery.items() if other != camera):
            del queries[camera]
            num_gallery[camera] += 1
    return list(queries.values())
