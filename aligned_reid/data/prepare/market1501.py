"""From the original Market-1501 (Zheng et al., ICCV 2015), a zip or a folder, to the layout that --data_path takes."""

import lzma
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from aligned_reid.data.partitions import write_atomically
from aligned_reid.data.prepare import layout
from aligned_reid.data.prepare.layout import (
    IMAGE_ENDINGS,
    NUM_VAL_IDS,
    Namer,
    NewImage,
    Parts,
    as_jpeg,
    check_num_bytes,
    check_paths,
    describe_passed_over,
    ending_of,
    read_as_jpeg,
    write_data_set,
)
from aligned_reid.errors import InputError

TRAIN, TEST, QUERY_FOLDER, MULTI_QUERY_FOLDER = "bounding_box_train", "bounding_box_test", "query", "gt_bbox"

_ORIGINAL_NAME = re.compile(r"(-1|[0-9]+)_c([0-9]+)s[0-9]+_.*")
JUNK_ID = -1  # detections that fit no person well; the protocol ignores them. Id 0 are distractors, which stay


class _FolderSource:
    """The original data set as a folder; `root` holds bounding_box_train."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def entries(self, folder: str) -> list[tuple[str, str]]:
        """What is in one folder of the data set, sorted: names and kinds; [] when there is no such folder."""
        if not (self.root / folder).is_dir():
            return []
        with os.scandir(self.root / folder) as entries:
            return sorted((entry.name, self._kind(entry)) for entry in entries)

    def _kind(self, entry: os.DirEntry[str]) -> str:
        if entry.is_symlink() and not os.path.exists(entry):
            return "dangling links"
        if entry.is_file():
            return ending_of(entry.name)
        return "folders" if entry.is_dir() else "special files"

    def read(self, original: str) -> bytes:
        """The image `folder/name` as a JPEG file."""
        return read_as_jpeg(self.root / original)


class _ZipSource:
    """The original data set in a zip file; `prefix`, "" or ending in "/", comes before bounding_box_train."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str) -> None:
        self.archive = archive
        self.prefix = prefix
        self.infos = {_slashed(info.filename): info for info in archive.infolist()}

    def entries(self, folder: str) -> list[tuple[str, str]]:
        """What is in one folder of the data set, sorted: names and kinds; [] when there is no such folder."""
        start = f"{self.prefix}{folder}/"
        names = [name[len(start) :] for name in self.infos if name.startswith(start)]
        return sorted({(name.split("/")[0], "folders" if "/" in name else ending_of(name)) for name in names if name})

    def read(self, original: str) -> bytes:
        """The image `folder/name` as a JPEG file; its checksum is checked, and no more is unpacked than it declares."""
        info = self.infos[self.prefix + original]
        name = f"{original} in {self.archive.filename}"
        check_num_bytes(name, info.file_size)
        with self.archive.open(info) as file:
            return as_jpeg(name, file.read(info.file_size + 1))


_Source = _FolderSource | _ZipSource


def is_raw_market1501(path: str | Path) -> bool:
    """Whether the path is the original Market-1501: a zip with it, its root folder, or the folder around that."""
    return find_raw_market1501(path) is not None


def find_raw_market1501(path: str | Path) -> Path | None:
    """The zip or root folder of the original Market-1501 that the path is or directly contains, None without one."""
    path = Path(path)
    try:
        if path.is_dir():
            return _folder_root(path)
        with zipfile.ZipFile(path) as archive:
            return None if _zip_prefix(archive) is None else path
    except (OSError, zipfile.BadZipFile):
        return None


def prepare_command(raw: Path) -> str:
    """The command that prepares what `find_raw_market1501` found, into a folder beside it."""
    return layout.prepare_command("prepare_market1501.py", raw, "market1501")


def _folder_root(path: Path) -> Path | None:
    return next((root for root in layout.folders_to_look_in(path) if (root / TRAIN).is_dir()), None)


def _slashed(name: str) -> str:
    """The name of a zip's entry with the separators that the format asks for; some Windows programs write others."""
    return name.replace("\\", "/")


def _zip_prefix(archive: zipfile.ZipFile) -> str | None:
    matches = (re.match(rf"((?:[^/]+/)*?){TRAIN}/", _slashed(name)) for name in archive.namelist())
    prefixes = {match[1] for match in matches if match and not match[1].startswith("__MACOSX/")}
    return min(prefixes, key=len, default=None)


def prepare_market1501(source: str | Path, save_dir: str | Path, log: Callable[[str], None] = print) -> Path:
    """Copy the images under their new names and write partitions.pkl and ori_to_new_im_name.pkl into `save_dir`.

    `source`: the zip, the folder, or a folder around it; it is only read. `log` gets a line about what is not an image
    by its name. When interrupted, the same call goes on: images are written whole or not at all, and partitions.pkl
    last. Returns `save_dir`, which --data_path takes.
    Raises InputError when the source is not there, damaged or no Market-1501, or `save_dir` cannot be written.
    """
    source, save_dir = Path(source).expanduser(), Path(save_dir).expanduser()
    check_paths(source, save_dir)
    if source.is_dir():
        root = _folder_root(source)
        if root is None:
            raise InputError(_no_market1501(source))
        return _prepare(_FolderSource(root), source, save_dir, log)
    try:
        with zipfile.ZipFile(source) as archive:
            prefix = _zip_prefix(archive)
            if prefix is None:
                raise InputError(_no_market1501(source))
            return _prepare(_ZipSource(archive, prefix), source, save_dir, log)
    except zipfile.BadZipFile as error:
        raise InputError(f"--source {source} is no zip file, or is cut off; download it again") from error
    except OSError as error:
        raise InputError(f"cannot read --source {source}: {error.strerror}") from error


def _no_market1501(source: Path) -> str:
    return f"--source {source} holds no {TRAIN}/; give the original Market-1501 zip, or the folder it unpacks to"


def _prepare(source: _Source, source_path: Path, save_dir: Path, log: Callable[[str], None]) -> Path:
    parts = _plan(source, source_path, log)
    return write_data_set(
        save_dir,
        Parts(parts[TRAIN], parts[TEST], parts[QUERY_FOLDER], parts[MULTI_QUERY_FOLDER]),
        lambda image: _read(source, source_path, image),
        NUM_VAL_IDS,
        write=write_atomically,
    )


def _plan(source: _Source, source_path: Path, log: Callable[[str], None]) -> dict[str, list[NewImage]]:
    """What to copy to which name, per folder. The folders' order and the sorted names give each image its index."""
    new_image = Namer()
    query_pairs: set[tuple[int, int]] = set()
    passed_over: Counter[str] = Counter()
    parts: dict[str, list[NewImage]] = {}
    for folder in (TRAIN, TEST, QUERY_FOLDER, MULTI_QUERY_FOLDER):
        parts[folder] = []
        for name, kind in source.entries(folder):
            if kind not in IMAGE_ENDINGS:
                passed_over[kind] += 1
                continue
            match = _ORIGINAL_NAME.fullmatch(name)
            if match is None:
                raise InputError(f"{source_path}: {folder}/{ascii(name)[1:-1]} is no image name of Market-1501")
            pair = person_id, camera = int(match[1]), int(match[2])
            if person_id == JUNK_ID or (folder == MULTI_QUERY_FOLDER and pair not in query_pairs):
                continue
            if folder == QUERY_FOLDER:
                query_pairs.add(pair)
            parts[folder].append(new_image(f"{folder}/{name}", person_id, camera))
        if not parts[folder] and folder != MULTI_QUERY_FOLDER:  # gt_bbox may be left out
            found = f" ({describe_passed_over(passed_over)})" if passed_over else ""
            raise InputError(
                f"{source_path} has no images in {folder}/{found}; it is incomplete, unpack or download it again"
            )
    if passed_over:
        log(describe_passed_over(passed_over))
    return parts


def _read(source: _Source, source_path: Path, image: NewImage) -> bytes:
    try:
        return source.read(image.original)
    except OSError as error:
        raise InputError(f"cannot read {image.original} in {source_path}: {error.strerror or error}") from error
    # zipfile raises RuntimeError for an encrypted entry, NotImplementedError for an unknown compression.
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        raise InputError(f"{source_path} is damaged at {image.original}; download it again") from error
