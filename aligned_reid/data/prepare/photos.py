"""From one's own photos to the layout that --data_path takes: numbers for names, and the division into parts."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from aligned_reid.data.prepare import layout
from aligned_reid.data.prepare.layout import Namer, NewImage, Parts, check_paths, read_as_jpeg, write_data_set
from aligned_reid.data.prepare.photo_source import Photo, read_photos
from aligned_reid.errors import InputError

NAMES_NAME = "names.json"  # which number stands for which person and which camera
MAX_CAMERAS = 9_999  # four digits in an image's name
JUNK = "-1"  # Market-1501's name for detections that show no person well; the protocol ignores them


def prepare_photos(
    source: str | Path,
    save_dir: str | Path,
    test_share: float = 0.5,
    seed: int = 1,
    cameras: str = "known",
    log: Callable[[str], None] = print,
) -> Path:
    """Copy the photos under their new names, with partitions.pkl, ori_to_new_im_name.pkl and names.json.

    `source`: the folder or the CSV file; it is only read. Persons and cameras are numbered from 1 in sorted order
    (numbers by value). A division that the source has is kept. Otherwise `test_share` of the persons, drawn with `seed`
    among those seen by two cameras, are for the test. New names depend on neither. With `cameras` "none", each photo of
    a person counts as taken by a different camera. `log` gets a line about whatever is not used as one would expect.
    When interrupted, the same call resumes. Returns `save_dir`, which --data_path takes. Raises InputError if the
    source cannot be used or has a photo that cannot be read, and if `save_dir` cannot be written.
    """
    source, save_dir = Path(source).expanduser(), Path(save_dir).expanduser()
    if not 0.0 < test_share <= 1.0:
        raise InputError(f"--test_share {test_share:g} is not above 0 and at most 1: it is a share of the persons")
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed {seed} is not a whole number from 0 to {2**32 - 1}")
    if cameras not in ("known", "none"):
        raise InputError(f"--cameras {cameras} is neither known nor none")
    check_paths(source, save_dir)
    with_cameras = cameras == "known"
    photos = _without_junk(read_photos(source, with_cameras, log), log)
    if not with_cameras:
        photos = _number_photos(photos)
    _check(source, save_dir, photos, with_cameras)

    person_ids = numbered({photo.person for photo in photos})
    camera_ids = numbered({photo.camera for photo in photos})
    photos.sort(key=lambda photo: (person_ids[photo.person], camera_ids[photo.camera], photo.original))
    new_image = Namer()
    images = {
        new_image(photo.original, person_ids[photo.person], camera_ids[photo.camera]): photo for photo in photos
    }  # in order
    files = {image.original: photo.file for image, photo in images.items()}
    if photos[0].part:
        log("the division of the source is kept; --test_share and --seed do not apply")
        parts = keep_division(source, images, log)
    else:
        parts = divide(images, test_share, seed, log, with_cameras)
    names = {
        kind: {str(number): name for name, number in numbers.items()}
        for kind, numbers in (("persons", person_ids), ("cameras", camera_ids if with_cameras else {}))
    }
    return write_data_set(
        save_dir,
        parts,
        lambda image: read_as_jpeg(files[image.original]),
        # As large a share for validation as Market-1501 has.
        math.ceil(len({image.new_name[:8] for image in parts.trainval}) * layout.NUM_VAL_IDS / 751),
        # A byte that is not UTF-8 becomes an escape of JSON, which os.fsencode makes a byte again.
        {NAMES_NAME: (json.dumps(names, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")},
    )


def numbered(names: Collection[str]) -> dict[str, int]:
    """Each name's number, from 1 in sorted order; names that are numbers come first and by value."""
    order = sorted(names, key=lambda name: (not is_number(name), int(name) if is_number(name) else 0, name))
    return {name: number for number, name in enumerate(order, start=1)}


def is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _without_junk(photos: Sequence[Photo], log: Callable[[str], None]) -> list[Photo]:
    kept = [photo for photo in photos if photo.person != JUNK]
    if len(kept) < len(photos):
        log(f"passed over as junk, person {JUNK}: {len(photos) - len(kept):,} photos")
    return kept


def _number_photos(photos: Sequence[Photo]) -> list[Photo]:
    """The photos with a different camera for each one of a person, from "1" in the order of their names."""
    num_photos: Counter[str] = Counter()
    numbered_photos = []
    for photo in sorted(photos, key=lambda photo: photo.original):
        num_photos[photo.person] += 1
        numbered_photos.append(photo._replace(camera=str(num_photos[photo.person])))
    return numbered_photos


def _check(source: Path, save_dir: Path, photos: Sequence[Photo], with_cameras: bool) -> None:
    """Raise InputError unless the photos can be trained and tested on, and none lies where new ones will be."""
    images_dir = (save_dir / layout.IMAGES_NAME).resolve()
    for photo in photos:
        if photo.file.resolve().parent == images_dir:
            raise InputError(f"{photo.file} is where the new images will be; take another --save_dir")
    persons, cameras = {photo.person for photo in photos}, {photo.camera for photo in photos}
    if len(persons) < 2:
        raise InputError(f"--source {source} shows one person only ({min(persons, default='none')}); it takes two")
    if len(cameras) > MAX_CAMERAS:
        what = "cameras; if each photo has its own, use --cameras none" if with_cameras else "photos of one person"
        raise InputError(f"--source {source} has {len(cameras):,} {what}; an image's name has room for {MAX_CAMERAS:,}")
    if len(cameras) < 2 and with_cameras:
        raise InputError(
            f"--source {source} is of one camera only ({min(cameras)}); the test looks for each person in other "
            "cameras, or in all other photos with --cameras none"
        )


def keep_division(source: Path, images: Mapping[NewImage, Photo], log: Callable[[str], None]) -> Parts:
    """The parts that the source says. Raises InputError if they cannot be tested on or training has test persons."""
    parts: dict[str, list[NewImage]] = {name: [] for name in Parts._fields}
    for image, photo in images.items():
        parts[photo.part].append(image)
    for name in ("query", "gallery"):
        if not parts[name]:
            raise InputError(
                f"--source {source} is divided into parts, but has no photos for {name}: add a part {name}, or take a "
                "source that is not divided, and test persons are drawn"
            )
    tested = {images[image].person for image in (*parts["query"], *parts["gallery"])}
    both = sorted(tested & {images[image].person for image in parts["trainval"]})
    if both:
        raise InputError(
            f"--source {source}: persons in training and test: {len(both):,} (the first is {both[0]}); a person is "
            "either trained on or searched for"
        )
    cameras: dict[str, set[str]] = defaultdict(set)
    for image in parts["gallery"]:
        cameras[images[image].person].add(images[image].camera)
    unanswered = [image for image in parts["query"] if not cameras[images[image].person] - {images[image].camera}]
    if len(unanswered) == len(parts["query"]):
        raise InputError(f"--source {source}: the gallery has no query's person under another camera")
    if unanswered:
        log(f"queries without their person in the gallery under another camera, which do not count: {len(unanswered)}")
    # As in Market-1501, a query is pooled over photos of its person and camera, and others are of no use.
    places = {image.new_name[:13] for image in parts["query"]}
    parts["multi_query"] = [image for image in parts["multi_query"] if image.new_name[:13] in places]
    return Parts(**parts)


def divide(
    images: Mapping[NewImage, Photo], test_share: float, seed: int, log: Callable[[str], None], with_cameras: bool
) -> Parts:
    """Divide persons into training and test, and each test person's photos into queries and gallery."""
    images_of: dict[str, dict[str, list[NewImage]]] = defaultdict(lambda: defaultdict(list))  # person, camera
    for image, photo in images.items():
        images_of[photo.person][photo.camera].append(image)
    able = [person for person, by_camera in images_of.items() if len(by_camera) > 1]
    unable = [person for person, by_camera in images_of.items() if len(by_camera) == 1]
    one, two = ("seen by one camera", "seen by two cameras") if with_cameras else ("in one photo", "in two photos")
    if not able:
        hint = "; with --cameras none, two photos are enough" if with_cameras else ""
        raise InputError(f"no person was {two}, and the test looks for each person again{hint}")
    if unable:
        log(f"persons {one} only, which are for training: {len(unable)} (the first is {unable[0]})")
    wanted = max(1, round(test_share * len(images_of)))
    if wanted > len(able):
        log(f"--test_share {test_share:g} would be {wanted} persons; {len(able)} were {two} and are taken")
    most = len(images_of) - 1 if test_share < 1.0 else len(images_of)  # somebody is left to train on
    random = np.random.RandomState(seed)
    tested = {able[index] for index in random.permutation(len(able))[: min(wanted, most)]}
    query: list[NewImage] = []
    for person in images_of:
        if person in tested and with_cameras:
            query += choose_queries(images_of[person], random)
        elif person in tested:  # one photo per camera would be all photos but one
            query += list(images_of[person].values())[random.randint(len(images_of[person]))]
    chosen = set(query)
    return Parts(
        trainval=[image for image, photo in images.items() if photo.person not in tested],
        gallery=[image for image, photo in images.items() if photo.person in tested and image not in chosen],
        query=query,
    )


def choose_queries(by_camera: dict[str, list[NewImage]], random: np.random.RandomState) -> list[NewImage]:
    """One photo per camera, unless the gallery would then hold none of that person under another camera."""
    query = {camera: images[random.randint(len(images))] for camera, images in by_camera.items()}
    num_gallery = {camera: len(images) - 1 for camera, images in by_camera.items()}
    for camera in by_camera:
        if not any(number for other, number in num_gallery.items() if other != camera):
            del query[camera]
            num_gallery[camera] += 1
    return list(query.values())
