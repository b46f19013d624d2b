"""Reading one's own photos, from folders or a CSV file: the person in each, and the camera that took it.

Folders: `<person>/<photo>` or `<photo>` with the camera (and the person before it) in the photo's name (`c1_x.jpg`,
`x_cam2.png`, `0001_c3s1_x.jpg`), `<person>/<camera>/<photo>` or `<camera>/<person>/<photo>`; each of these also below
folders for the parts of a fixed division (`train`, `query`, `gallery`). A CSV file: the columns path (relative to the
file), person, camera and, for a fixed division, part.
"""

import codecs
import csv
import io
import itertools
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from aligned_reid.data.prepare.layout import PARTITIONS_NAME
from aligned_reid.data.prepare.sources import IMAGE_ENDINGS, describe_skipped, ending_of, kind_of, shown
from aligned_reid.errors import InputError

JUNK = "-1"  # Market-1501's name for detections that show no person well; the protocol ignores them
PARTS = {  # names of folders, or in the column part, and the part they stand for
    **dict.fromkeys(("train", "val", "train_all", "trainval", "bounding_box_train", "image_train"), "trainval"),
    **dict.fromkeys(("query", "probe", "image_query"), "query"),
    **dict.fromkeys(("gallery", "test", "bounding_box_test", "image_test"), "gallery"),
    **dict.fromkeys(("multi-query", "multi_query", "gt_bbox"), "multi_query"),
}

_CONTENTS = ("JPEG", "PNG", "BMP", "WEBP")  # of files with other endings; raw photos look like TIFF
# c, cam or camera with digits, as a separate word or before Market-1501's sequence: 0001_c3s1_000151_01.jpg
_CAMERA = re.compile(r"(?<![a-z0-9])(?:c|cam|camera)([0-9]+)(?=s[0-9]|[^a-z0-9]|$)", re.IGNORECASE)
_CAMERA_NAME = re.compile(r"(?:(c|cam|camera)[ _-]?)?0*([0-9]+)(?:\.0*)?", re.IGNORECASE)
_WHOLE_NUMBER = re.compile(r"^([0-9]+)\.0*$")
_LEADING_ZEROS = re.compile(r"(?<![0-9])0+(?=[0-9])")


class Photo(NamedTuple):
    """A photo: its file and name in the source, its person, its camera ("" if unknown) and part ("" if undivided)."""

    file: Path
    original: str
    person: str
    camera: str
    part: str = ""


def read_photos(source: Path, with_cameras: bool = True, log: Callable[[str], None] = print) -> list[Photo]:
    """The photos of a folder or a CSV file, without junk, with one spelling for each person and camera.

    Without cameras, the photos of each person have the cameras "1", "2", ... in the order of their names.
    """
    photos = read_folder(source, log) if source.is_dir() else read_table(source)
    persons = _spellings(source, "persons", {photo.person for photo in photos})
    photos = [photo._replace(person=persons[photo.person]) for photo in photos]
    if with_cameras:
        unknown = next((photo.file for photo in photos if not photo.camera), None)
        if unknown:
            raise InputError(
                f"no camera, or several, for {unknown}: name photos like c1_001.jpg or 001_cam2.jpg, make a sub-folder "
                "for each camera (<person>/<camera>/001.jpg), give a CSV file with a column camera, or do without "
                "cameras: --cameras none"
            )
        cameras = _spellings(source, "cameras", {photo.camera for photo in photos})
        photos = [photo._replace(camera=cameras[photo.camera]) for photo in photos]
    else:
        photos.sort(key=lambda photo: photo.original)
        numbers: dict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))
        photos = [photo._replace(camera=str(next(numbers[photo.person]))) for photo in photos]
    kept = [photo for photo in photos if photo.person != JUNK]
    if len(kept) < len(photos):
        log(f"skipped as junk, person {JUNK}: {len(photos) - len(kept):,} photos")
    return kept


def _spellings(source: Path, what: str, names: Collection[str]) -> dict[str, str]:
    """The spelling to use for each name. Raises InputError for two that could be the same, such as Anna and anna.

    Certainly the same are Unicode forms of a name, surrounding blanks, leading zeros, 1.0 and 1; of cameras also upper
    and lower case, and c1, cam1, camera1 and 1.
    """

    def key(name: str) -> str:
        match = _CAMERA_NAME.fullmatch(name)
        if what == "cameras":
            return match[2] if match else name.lower()
        return match[2] if match and match[1] is None else name

    cleaned = {name: _WHOLE_NUMBER.sub(r"\1", unicodedata.normalize("NFC", name).strip()) for name in names}
    chosen: dict[str, str] = {}
    similar: dict[str, str] = {}
    for name in sorted(cleaned.values()):
        spelling = chosen.setdefault(key(name), name)
        other = similar.setdefault(_LEADING_ZEROS.sub("", " ".join(spelling.casefold().split())), spelling)
        if other != spelling:
            raise InputError(f"{source} has the {what} {other!r} and {spelling!r}; if they are one, rename one of them")
    return {name: chosen[key(clean)] for name, clean in cleaned.items()}


def find_photos(path: str | Path) -> Path | None:
    """The path if it looks like a source of photos: at least two folders with photos, or a CSV file."""
    path = Path(path)
    if path.is_file():
        return path if path.suffix.lower() == ".csv" else None
    try:
        tops = {levels[0] for file, levels in _files_below(path) if levels and ending_of(file.name) in IMAGE_ENDINGS}
    except InputError:
        return None
    return path if len([top for top in tops if not (path / top / PARTITIONS_NAME).exists()]) > 1 else None


def read_folder(source: Path, log: Callable[[str], None]) -> list[Photo]:
    """The photos in the folders of a source. Raises InputError if a person cannot be determined."""
    found: list[tuple[Path, tuple[str, ...]]] = []
    skipped: Counter[str] = Counter()
    for file, levels in _files_below(source):
        if _is_photo(file):
            found.append((file, levels))
        else:
            skipped[kind_of(file)] += 1
    if not found:
        others = f" ({describe_skipped(skipped)})" if skipped else ""
        raise InputError(f"--source {source} has no photos ({', '.join(IMAGE_ENDINGS)}) in folders for persons{others}")
    if skipped:
        log(describe_skipped(skipped))
    placed = _split_off_parts(found, log)
    examples = {len(levels): file for _, file, levels in placed}
    depth = max(examples)
    if len(examples) > 1 or depth > 2:
        raise InputError(
            f"{examples[depth]} is too deep, or not as deep as {examples[min(examples)]}: put all photos at "
            "<person>/<photo>, or all at <person>/<camera>/<photo>"
        )
    camera_first = _is_camera_first(source, *({levels[level] for _, _, levels in placed} for level in range(depth)))
    photos = []
    for part, file, levels in placed:
        person, *place = levels[::-1] if camera_first else levels or (person_of(file),)
        camera = place[0] if place else camera_of(file)
        photos.append(Photo(file, file.relative_to(source).as_posix(), person, camera, part))
    return photos


def _files_below(folder: Path, levels: tuple[str, ...] = ()) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The files below a source, sorted, each with the names of its folders; hidden folders are left out."""
    try:
        children = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from error
    for child in children:
        if not child.is_dir():
            yield child, levels
        elif not child.name.startswith((".", "__MACOSX")):  # macOS adds __MACOSX to archives
            inner = (*levels, child.name)
            if len(inner) > 2 + (inner[0].lower() in PARTS):
                raise InputError(f"{child} is too deep: photos are at <person>/<photo> or <person>/<camera>/<photo>")
            yield from _files_below(child, inner)


def _is_photo(path: Path) -> bool:
    """Whether a file is a photo by its ending, or else by its content."""
    kind = ending_of(path.name)
    if kind == "hidden" or not path.is_file():
        return False
    if kind in IMAGE_ENDINGS:
        return True
    try:
        with Image.open(path, formats=_CONTENTS):
            return True
    except Exception:  # Pillow raises errors of many types for other files
        return False


def _split_off_parts(
    found: Sequence[tuple[Path, tuple[str, ...]]], log: Callable[[str], None]
) -> list[tuple[str, Path, tuple[str, ...]]]:
    """For each photo, its part ("" without a division), its file, and its folders below that of the part.

    A source is divided if all its folders, or those of two parts, have names of parts.
    """
    tops = {levels[0] if levels else "" for _, levels in found}
    parts = {top: PARTS[top.lower()] for top in sorted(tops) if top.lower() in PARTS}
    if len(parts) < len(tops) and len(set(parts.values())) < 2:
        return [("", file, levels) for file, levels in found]
    for file, levels in found:
        if not levels or levels[0] not in parts:
            raise InputError(f"{file} is in none of the parts {', '.join(sorted(parts))}; move it into one, or away")
    whole = next((top for top in parts if top.lower() in ("train_all", "trainval")), None)
    for top in [top for top in parts if whole and top.lower() in ("train", "val")]:
        log(f"{top} is skipped because {whole} holds its photos too")
        del parts[top]
    return [(parts[levels[0]], file, levels[1:]) for file, levels in found if levels[0] in parts]


def _is_camera_first(source: Path, *names: Collection[str]) -> bool:
    """Whether the outer folders are cameras; `names` are those of each level. Raises InputError if that is unclear."""
    like_cameras = [all((match := _CAMERA_NAME.fullmatch(name)) and match[1] for name in level) for level in names]
    if not any(like_cameras) and (len(names) < 2 or len(names[0]) >= len(names[1])):
        return False
    if like_cameras in ([True, False], [False, True]):
        return like_cameras[0]
    counts = " with ".join(f"{len(level)} ({min(level)}, ...)" for level in names)
    raise InputError(
        f"the folders of {source} may be persons or cameras: {counts}; make them <person>/<camera>/<photo> and call "
        "cameras cam1, cam2, ..., and persons otherwise, or give a CSV file with path,person,camera"
    )


def person_of(file: Path) -> str:
    """The person in a file's name, which precedes the camera: "0002" for 0002_c1s1_000451_03.jpg."""
    camera = _CAMERA.search(file.stem)
    person = file.stem[: camera.start()].rstrip(" ._-") if camera else ""
    if not person:
        raise InputError(f"no person in the name of {file}: put the photos of each person into a folder")
    return person


def camera_of(file: Path) -> str:
    """The camera in a file's name, "1" for c1, c01, cam1; "" if there is none or several."""
    cameras = {int(number) for number in _CAMERA.findall(file.stem)}
    return str(cameras.pop()) if len(cameras) == 1 else ""


def read_table(source: Path) -> list[Photo]:
    """The photos of a CSV file with the columns path, person and perhaps camera and part.

    Raises InputError with the row that is wrong. Rows are counted like lines in an editor.
    """
    header, rows = _read_rows(source)
    for column in ("path", "person"):
        if header.count(column) != 1:
            raise InputError(
                f"{source} has {header.count(column)} columns {column}; its first row must be path,person,camera"
            )
    photos: list[Photo] = []
    seen: dict[Path, int] = {}
    for number, row in rows:
        cells = dict(zip(header, map(str.strip, row), strict=False))
        for column in ("path", "person", "part"):
            if column in header and not cells.get(column):
                raise InputError(f"{source}, row {number}: no {column}")
        part = cells.get("part", "").lower()
        if part and part not in PARTS:
            raise InputError(f"{source}, row {number}: part {part!r} is not train, query, gallery or multi-query")
        path = _find_file(source.parent, cells["path"])
        if path is None:
            raise InputError(f"{source}, row {number}: there is no file {shown(source.parent / cells['path'])}")
        earlier = seen.setdefault(path.resolve(), number)
        if earlier != number:
            raise InputError(f"{source}, row {number}: {path} is already in row {earlier}; remove one of them")
        photos.append(Photo(path, cells["path"], cells["person"], cells.get("camera", ""), PARTS.get(part, "")))
    if not photos:
        raise InputError(f"--source {source} has no rows below the columns' names")
    return photos


def _read_rows(source: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The columns' names in lower case, and the rows of a CSV file that are not empty, with their lines' numbers.

    Spreadsheets write empty rows, and one with the separator (`sep=;`), before the columns' names.
    """
    try:
        content = source.read_bytes()
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # "Unicode text" of spreadsheets
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
        first = text.lstrip().partition("\n")[0].strip('" \r')
        named = len(first) == 5 and first.lower().startswith("sep=")
        separator = first[4] if named else max(",;\t", key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        rows = [(reader.line_num, row) for row in reader if "".join(row).strip()]
        rows = rows[1:] if named else rows
        header = [name.strip().lower() for name in rows[0][1]] if rows else []
        return header, rows[1:]
    except OSError as error:
        raise InputError(f"cannot read --source {source}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        reason = str(error)
        if isinstance(error, UnicodeDecodeError):
            line = error.object.count(b"\n", 0, error.start) + 1
            reason = f"line {line} has the byte {error.object[error.start]:#x}; save it in UTF-8"
        raise InputError(f"--source {source} is neither a folder nor a CSV file in UTF-8: {reason}") from error


def _find_file(folder: Path, original: str) -> Path | None:
    """The file of a row, which may be written with backslashes or in another Unicode form than the file's name."""
    slashed = original.replace("\\", "/")
    for form in (original, slashed, unicodedata.normalize("NFC", slashed), unicodedata.normalize("NFD", slashed)):
        path = os.path.join(folder, os.path.expanduser(form))
        if os.path.isfile(path):
            return Path(path)
    return None
