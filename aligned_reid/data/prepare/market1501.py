"""Preparing the original Market-1501 (Zheng et al., ICCV 2015), a zip file or a folder."""

import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from aligned_reid.data.prepare import sources
from aligned_reid.data.prepare.jpeg import as_jpeg, read_as_jpeg
from aligned_reid.data.prepare.layout import Row, write_table
from aligned_reid.data.prepare.sources import IMAGE_ENDINGS, check_paths, describe_skipped, kind_of
from aligned_reid.data.transforms import check_num_bytes
from aligned_reid.errors import InputError

TRAIN = "bounding_box_train"
PARTS = {TRAIN: "trainval", "bounding_box_test": "gallery", "query": "query", "gt_bbox": "multi_query"}
JUNK_ID = -1  # detections that fit no person well; the protocol ignores them. Distractors, id 0, are kept

_ORIGINAL_NAME = re.compile(r"(-1|[0-9]{1,8})_c([0-9]{1,4})s[0-9]+_.*")


def prepare_market1501(source: str | Path, save_dir: str | Path, log: Callable[[str], None] = print) -> Path:
    """Write the data set, with new image names and partitions.pkl, into `save_dir`, and return that.

    `source`: the zip file, the folder, or a folder around it; it is only read. `log` receives a line about files that
    are not images. If interrupted, repeat the call to resume. Raises InputError if the source is missing, damaged or
    not Market-1501, or `save_dir` cannot be written.
    """
    source, save_dir = check_paths(source, save_dir)
    try:
        root = _find_root(source)
    except OSError as error:
        raise InputError(f"cannot read --source {source}: {error.strerror}") from error
    except Exception as error:  # zipfile raises errors of many types for damaged files
        raise InputError(f"--source {source} is not a zip file, or is cut off; download it again") from error
    if root is None:
        raise InputError(
            f"--source {source} holds no {TRAIN}/; give the original Market-1501 zip, or the folder it unpacks to"
        )
    return write_table(save_dir, _make_table(source, root, log), lambda original: _read(root / original))


def find_raw_market1501(path: str | Path) -> Path | None:
    """The zip file or root folder of the original Market-1501 that the path is or contains, else None."""
    try:
        root = _find_root(Path(path))
    except Exception:  # zipfile raises errors of many types for other files
        return None
    return Path(path) if isinstance(root, zipfile.Path) else root


def _find_root(path: Path) -> Path | zipfile.Path | None:
    """The folder that holds bounding_box_train, in a folder or in a zip file."""
    if path.is_dir():
        return next((root for root in sources.folders_to_look_in(path) if os.path.isdir(root / TRAIN)), None)
    archive = zipfile.ZipFile(path)
    for info in archive.filelist:
        info.filename = info.filename.replace("\\", "/")  # which some Windows programs write
    archive.NameToInfo = {info.filename: info for info in archive.filelist}
    matches = (re.match(rf"((?:[^/]+/)*?){TRAIN}/", name) for name in archive.namelist())
    prefixes = {match[1] for match in matches if match and not match[1].startswith("__MACOSX/")}
    return zipfile.Path(archive, min(prefixes, key=len)) if prefixes else None


def _read(file: Path | zipfile.Path) -> bytes:
    """An image as a JPEG file; from a zip file, no more is unpacked than the entry declares."""
    if isinstance(file, Path):
        return read_as_jpeg(file)
    name = f"{file.at} in {file.root.filename}"
    num_bytes = file.root.getinfo(file.at).file_size
    check_num_bytes(name, num_bytes)
    try:
        with file.open("rb") as entry:
            content = entry.read(num_bytes + 1)
    except Exception as error:  # zipfile raises errors of many types for damaged and encrypted files
        raise InputError(f"{file.root.filename} is damaged at {file.at}; download it again") from error
    return as_jpeg(name, content)


def _make_table(source: Path, root: Path | zipfile.Path, log: Callable[[str], None]) -> list[Row]:
    """Order folders as in PARTS and names alphabetically. Multi-query images without a query are left out."""
    rows: list[Row] = []
    query_pairs: set[tuple[int, int]] = set()
    skipped: Counter[str] = Counter()
    for folder, part in PARTS.items():
        num_before = len(rows)
        files: list[Path | zipfile.Path] = [*(root / folder).iterdir()] if (root / folder).is_dir() else []
        for file in sorted(files, key=lambda file: file.name):
            kind = kind_of(file)
            if kind not in IMAGE_ENDINGS:
                skipped[kind] += 1
                continue
            match = _ORIGINAL_NAME.fullmatch(file.name)
            if match is None:
                raise InputError(f"{source}: {folder}/{ascii(file.name)[1:-1]} is not an image name of Market-1501")
            pair = person_id, camera = int(match[1]), int(match[2])
            if part == "query":
                query_pairs.add(pair)
            if person_id != JUNK_ID and (part != "multi_query" or pair in query_pairs):
                rows.append(Row(f"{folder}/{file.name}", person_id, camera, part))
        if len(rows) == num_before and part != "multi_query":  # gt_bbox may be missing
            found = f" ({describe_skipped(skipped)})" if skipped else ""
            raise InputError(f"{source} has no images in {folder}/{found}; unpack or download it again")
    if skipped:
        log(describe_skipped(skipped))
    return rows
