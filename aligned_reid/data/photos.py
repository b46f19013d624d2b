"""From one's own photos, a folder for each person or a CSV file, to the layout that --data_path takes.

A folder: `<person>/<photo>` with the camera in the photo's name (`c1_x.jpg`, `x_cam2.png`, `0001_c3s1_x.jpg`), or
`<person>/<camera>/<photo>`. A CSV file: the columns path (relative to the file), person and camera.
"""

import csv
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aligned_reid.data import layout
from aligned_reid.data.layout import Namer, NewImage, Parts, check_paths, read_as_jpeg, write_data_set
from aligned_reid.errors import InputError

NAMES_NAME = "names.json"  # which number stands for which person and which camera
COLUMNS = ("path", "person", "camera")

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
# c<digits> or cam<digits> as a word of its own, or before Market-1501's sequence: 0001_c1s1_000151_01.jpg
_CAMERA = re.compile(r"(?<![a-z0-9])(?:c|cam)([0-9]+)(?=s[0-9]|[^a-z0-9]|$)", re.IGNORECASE)
_HOW = (
    "write it into the file's name (c1_001.jpg, 001_cam2.jpg), make a sub-folder for each camera "
    "(<person>/<camera>/001.jpg), or give a CSV file with path,person,camera"
)


class Photo(NamedTuple):
    """One photo: its file, what the source calls it, who it shows, and which camera took it."""

    file: Path
    original: str
    person: str
    camera: str


def prepare_photos(
    source: str | Path,
    save_dir: str | Path,
    test_share: float = 0.5,
    seed: int = 1,
    log: Callable[[str], None] = print,
) -> Path:
    """Copy the photos under their new names, with partitions.pkl, ori_to_new_im_name.pkl and names.json.

    `source`: the folder or the CSV file; it is only read. Persons and cameras are numbered from 1 in sorted order
    (numbers by value). `test_share` of the persons, drawn with `seed` among those whom two cameras saw, are for the
    test; `log` gets a line about the others. New names depend on neither. When interrupted, the same call goes on.
    Returns `save_dir`, which --data_path takes. Raises InputError when the source is not there, cannot be used or has a
    photo that cannot be read, and when `save_dir` cannot be written.
    """
    source, save_dir = Path(source).expanduser(), Path(save_dir).expanduser()
    if not 0.0 < test_share <= 1.0:
        raise InputError(f"--test_share {test_share:g} is no share of the persons, above 0 and at most 1")
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed {seed} is not a whole number from 0 to {2**32 - 1}")
    check_paths(source, save_dir)
    photos = read_folder(source) if source.is_dir() else read_table(source)
    _check(source, save_dir, photos)

    persons, cameras = numbered({photo.person for photo in photos}), numbered({photo.camera for photo in photos})
    photos.sort(key=lambda photo: (persons[photo.person], cameras[photo.camera], photo.original))
    new_image = Namer()
    images = {
        new_image(photo.original, persons[photo.person], cameras[photo.camera]): photo for photo in photos
    }  # in order
    files = {image.original: photo.file for image, photo in images.items()}
    parts = divide(images, test_share, seed, log)
    names = {
        kind: {str(number): name for name, number in numbers.items()}
        for kind, numbers in (("persons", persons), ("cameras", cameras))
    }
    return write_data_set(
        save_dir,
        parts,
        lambda image: read_as_jpeg(files[image.original]),
        # As large a share for validation as Market-1501 has.
        math.ceil(len({image.new_name[:8] for image in parts.trainval}) * layout.NUM_VAL_IDS / 751),
        {NAMES_NAME: (json.dumps(names, indent=2, ensure_ascii=False) + "\n").encode()},
    )


def numbered(names: Collection[str]) -> dict[str, int]:
    """Each name's number, from 1 in sorted order; names that are numbers come first and by value."""
    order = sorted(names, key=lambda name: (not is_number(name), int(name) if is_number(name) else 0, name))
    return {name: number for number, name in enumerate(order, start=1)}


def is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def find_photos(path: str | Path) -> Path | None:
    """The path itself where it looks like a source of photos: a folder of two persons or more, or a CSV file."""
    path = Path(path)
    try:
        if path.is_dir():
            folders = [child for child in _children(path) if child.is_dir() and not (child / "partitions.pkl").exists()]
            return path if sum(any(_photos_of(child)) for child in folders) >= 2 else None
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader([file.readline(1000)]), [])
        return path if set(COLUMNS) <= {column.strip().lower() for column in header} else None
    except (OSError, UnicodeDecodeError, csv.Error, InputError):
        return None


def prepare_command(source: Path) -> str:
    """The command that prepares what `find_photos` found, into a folder beside it."""
    return layout.prepare_command("prepare_photos.py", source, f"{source.resolve().stem}_prepared")


def read_folder(source: Path) -> list[Photo]:
    """The photos of a folder with one sub-folder for each person. Raises InputError where a camera cannot be told."""
    photos, examples = [], {}
    for child in _children(source):
        if _is_photo(child):
            raise InputError(f"{child} is in no person's folder: give each person a sub-folder of {source}")
        for file, folder in _photos_of(child) if child.is_dir() else ():
            examples[folder is not None] = file
            camera = camera_of(file) if folder is None else folder
            photos.append(Photo(file, file.relative_to(source).as_posix(), child.name, camera))
    if len(examples) == 2:
        raise InputError(
            f"{examples[True]} is in a sub-folder for its camera and {examples[False]} is not: do all in one way"
        )
    return photos


def camera_of(file: Path) -> str:
    """The camera that a file's name tells, "1" for c1, c01, cam1. Raises InputError where it tells none or several."""
    cameras = sorted({int(number) for number in _CAMERA.findall(file.stem)})
    if len(cameras) != 1:
        told = f"several cameras ({', '.join(map(str, cameras))})" if cameras else "no camera"
        raise InputError(f"{told} can be told from the name of {file}: {_HOW}")
    return str(cameras[0])


def _children(folder: Path) -> list[Path]:
    """What is in a folder, sorted; hidden files and what macOS leaves in archives are nothing."""
    try:
        return sorted(child for child in folder.iterdir() if not child.name.startswith((".", "__MACOSX")))
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from error


def _photos_of(person: Path) -> Iterator[tuple[Path, str | None]]:
    """The photos in a person's folder, each with the name of the sub-folder that it is in, None without one."""
    for child in _children(person):
        if _is_photo(child):
            yield child, None
        for file in _children(child) if child.is_dir() else ():
            if file.is_dir():
                raise InputError(f"{file} is too deep: photos are at <person>/<photo> or <person>/<camera>/<photo>")
            if _is_photo(file):
                yield file, child.name


def _is_photo(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and path.is_file()


def read_table(source: Path) -> list[Photo]:
    """The photos of a CSV file with the columns path, person and camera. Raises InputError that names a bad row.

    Rows are counted as an editor counts lines: the header is row 1.
    """
    try:
        with open(source, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [column.strip().lower() for column in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        raise InputError(f"cannot read --source {source}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--source {source} is neither a folder nor a CSV file in UTF-8: {error}") from error
    for column in COLUMNS:
        if header.count(column) != 1:
            found = "two columns" if column in header else "no column"
            raise InputError(f"{source} has {found} {column}; its first row has to be {','.join(COLUMNS)}")
    places = [header.index(column) for column in COLUMNS]
    photos: list[Photo] = []
    seen: dict[Path, int] = {}
    for number, row in rows:
        cells = [row[place].strip() if place < len(row) else "" for place in places]
        for column, cell in zip(COLUMNS, cells, strict=True):
            if not cell:
                raise InputError(f"{source}, row {number}: no {column}")
        original, person, camera = cells
        path = source.parent / Path(original).expanduser()
        if not path.is_file():
            raise InputError(f"{source}, row {number}: there is no file {path}")
        first = seen.setdefault(path.resolve(), number)
        if first != number:
            raise InputError(f"{source}, row {number}: {original} is in row {first} already; remove one of them")
        photos.append(Photo(path, original, person, camera))
    return photos


def _check(source: Path, save_dir: Path, photos: Sequence[Photo]) -> None:
    """Raise InputError unless the photos can be trained and tested on, and none lies where new ones will be."""
    if not photos:
        kinds = ", ".join(sorted(suffix[1:] for suffix in _SUFFIXES))
        what = f"no photos ({kinds}) in sub-folders for persons" if source.is_dir() else "no rows"
        raise InputError(f"--source {source} has {what}")
    images_dir = (save_dir / layout.IMAGES_NAME).resolve()
    for photo in photos:
        if photo.file.resolve().parent == images_dir:
            raise InputError(f"{photo.file} is where the new images will be; take another --save_dir")
    persons, cameras = {photo.person for photo in photos}, {photo.camera for photo in photos}
    if len(persons) < 2:
        raise InputError(f"--source {source} shows one person only ({min(persons)}); it takes two to tell apart")
    if len(cameras) < 2:
        raise InputError(
            f"--source {source} is of one camera only ({min(cameras)}); the test looks for each person in other cameras"
        )


def divide(images: dict[NewImage, Photo], test_share: float, seed: int, log: Callable[[str], None]) -> Parts:
    """Divide persons into training and test, and each test person's photos into queries and gallery."""
    images_of: dict[str, dict[str, list[NewImage]]] = defaultdict(lambda: defaultdict(list))  # person, camera
    for image, photo in images.items():
        images_of[photo.person][photo.camera].append(image)
    able = [person for person, by_camera in images_of.items() if len(by_camera) > 1]
    unable = [person for person, by_camera in images_of.items() if len(by_camera) == 1]
    if not able:
        raise InputError("no person was seen by two cameras, and the test looks for each person in other cameras")
    if unable:
        log(f"persons seen by one camera only, which are for training: {len(unable)} (the first is {unable[0]})")
    wanted = max(1, round(test_share * len(images_of)))
    if wanted > len(able):
        log(
            f"--test_share {test_share:g} would be {wanted} persons; {len(able)} were seen by two cameras and are taken"
        )
    most = len(images_of) - 1 if test_share < 1.0 else len(images_of)  # somebody is left to train on
    random = np.random.RandomState(seed)
    tested = {able[index] for index in random.permutation(len(able))[: min(wanted, most)]}
    query: list[NewImage] = []
    for person in images_of:
        if person in tested:
            query += choose_queries(images_of[person], random)
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
