"""Preparing the original Market-1501 (Zheng et al., ICCV 2015), a zip file or a folder."""

import lzma
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from aligned_reid.data.prepare import sources
from aligned_reid.data.prepare.jpeg import as_jpeg, check_num_bytes, read_as_jpeg
from aligned_reid.data.prepare.layout import Row, write_table
from aligned_reid.data.prepare.sources import IMAGE_ENDINGS, check_paths, describe_skipped, ending_of, kind_of
from aligned_reid.errors import InputError

TRAIN = "bounding_box_train"
PARTS = {TRAIN: "trainval", "bounding_box_test": "gallery", "query": "query", "gt_bbox": "multi_query"}
JUNK_ID = -1  # detections that fit no person well; the protocol ignores them. Distractors, id 0, are kept

_ORIGINAL_NAME = re.compile(r"(-1|[0-9]+)_c([0-9]+)s[0-9]+_.*")


class _Source(NamedTuple):
    """The original data set: {folder: {name: kind}} of what its folders hold, and a function that reads a JPEG file."""

    kinds: dict[str, dict[str, str]]
    read: Callable[[str], bytes]


def prepare_market1501(source: str | Path, save_dir: str | Path, log: Callable[[str], None] = print) -> Path:
    """Write the data set, with new image names and partitions.pkl, into `save_dir`, and return that.

    `source`: the zip file, the folder, or a folder around it; it is only read. `log` receives a line about files that
    are not images. If interrupted, repeat the call to resume. Raises InputError if the source is missing, damaged or
    not Market-1501, or `save_dir` cannot be written.
    """
    source, save_dir = Path(source).expanduser(), Path(save_dir).expanduser()
    check_paths(source, save_dir)
    try:
        with _open(source) as opened:
            return write_table(save_dir, _make_table(source, opened.kinds, log), opened.read)
    except zipfile.BadZipFile as error:
        raise InputError(f"--source {source} is not a zip file, or is cut off; download it again") from error
    except OSError as error:
        raise InputError(f"cannot read --source {source}: {error.strerror}") from error


def find_raw_market1501(path: str | Path) -> Path | None:
    """The zip file or root folder of the original Market-1501 that the path is or contains, else None."""
    path = Path(path)
    try:
        if path.is_dir():
            return _find_root(path)
        with zipfile.ZipFile(path) as archive:
            return None if _find_prefix(archive) is None else path
    except (OSError, zipfile.BadZipFile):
        return None


def prepare_command(raw: Path) -> str:
    """The command that prepares what `find_raw_market1501` found, into a folder beside it."""
    return sources.prepare_command("prepare_market1501.py", raw, "market1501")


@contextmanager
def _open(path: Path) -> Iterator[_Source]:
    """Open a zip file or folder. Raises InputError if it does not contain Market-1501."""
    if path.is_dir():
        root = _find_root(path)
        if root is not None:
            kinds = {folder: _kinds_in_folder(root / folder) for folder in PARTS}
            yield _Source(kinds, lambda original: read_as_jpeg(root / original))
            return
    else:
        with zipfile.ZipFile(path) as archive:
            prefix = _find_prefix(archive)
            if prefix is not None:
                names = {_slashed(info.filename): info for info in archive.infolist()}
                kinds = {folder: _kinds_in_zip(names, f"{prefix}{folder}/") for folder in PARTS}
                yield _Source(kinds, lambda original: _read_entry(archive, names[prefix + original], original))
                return
    raise InputError(
        f"--source {path} holds no {TRAIN}/; give the original Market-1501 zip, or the folder it unpacks to"
    )


def _find_root(path: Path) -> Path | None:
    return next((root for root in sources.folders_to_look_in(path) if os.path.isdir(root / TRAIN)), None)


def _find_prefix(archive: zipfile.ZipFile) -> str | None:
    """What precedes bounding_box_train in the names of a zip file: "" or a path that ends in "/"."""
    matches = (re.match(rf"((?:[^/]+/)*?){TRAIN}/", _slashed(name)) for name in archive.namelist())
    prefixes = {match[1] for match in matches if match and not match[1].startswith("__MACOSX/")}
    return min(prefixes, key=len, default=None)


def _slashed(name: str) -> str:
    return name.replace("\\", "/")  # which some Windows programs write into zip files


def _kinds_in_folder(folder: Path) -> dict[str, str]:
    folders, files = sources.list_folder(folder)
    return {**dict.fromkeys(folders, "folders"), **{name: kind_of(folder / name) for name in files}}


def _kinds_in_zip(names: dict[str, zipfile.ZipInfo], start: str) -> dict[str, str]:
    inner = (name.removeprefix(start) for name in names if name.startswith(start) and name != start)
    return {name.split("/")[0]: "folders" if "/" in name else ending_of(name) for name in inner}


def _read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo, original: str) -> bytes:
    """An image in a zip file as a JPEG file; no more is unpacked than the entry declares."""
    name = f"{original} in {archive.filename}"
    check_num_bytes(name, info.file_size)
    try:
        with archive.open(info) as file:
            content = file.read(info.file_size + 1)
    # zipfile raises RuntimeError for an encrypted entry, NotImplementedError for an unknown compression.
    except (OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        raise InputError(f"{archive.filename} is damaged at {original}; download it again") from error
    return as_jpeg(name, content)


def _make_table(source: Path, kinds: dict[str, dict[str, str]], log: Callable[[str], None]) -> list[Row]:
    """Order folders as in PARTS and names alphabetically. Multi-query images without a query are left out."""
    rows: list[Row] = []
    query_pairs: set[tuple[int, int]] = set()
    skipped: Counter[str] = Counter()
    for folder, part in PARTS.items():
        num_before = len(rows)
        for name, kind in sorted(kinds[folder].items()):
            if kind not in IMAGE_ENDINGS:
                skipped[kind] += 1
                continue
            match = _ORIGINAL_NAME.fullmatch(name)
            if match is None:
                raise InputError(f"{source}: {folder}/{ascii(name)[1:-1]} is not an image name of Market-1501")
            pair = person_id, camera = int(match[1]), int(match[2])
            if part == "query":
                query_pairs.add(pair)
            if person_id != JUNK_ID and (part != "multi_query" or pair in query_pairs):
                rows.append(Row(f"{folder}/{name}", person_id, camera, part))
        if len(rows) == num_before and part != "multi_query":  # gt_bbox may be missing
            found = f" ({describe_skipped(skipped)})" if skipped else ""
            raise InputError(f"{source} has no images in {folder}/{found}; unpack or download it again")
    if skipped:
        log(describe_skipped(skipped))
    return rows
