"""From the original Market-1501 (Zheng et al., ICCV 2015), a zip or a folder, to the layout that --data_path takes."""

import os
import re
import zipfile
import zlib
from pathlib import Path

from aligned_reid.data import layout
from aligned_reid.data.layout import NUM_VAL_IDS, Namer, NewImage, Parts, check_paths, is_jpeg_name, write_data_set
from aligned_reid.data.partitions import write_atomically
from aligned_reid.errors import InputError

TRAIN, TEST, QUERY_FOLDER, MULTI_QUERY_FOLDER = "bounding_box_train", "bounding_box_test", "query", "gt_bbox"

_ORIGINAL_NAME = re.compile(r"(-1|[0-9]+)_c([0-9]+)s[0-9]+_.*\.jpg")
_JUNK_ID = -1  # detections that fit no person well; the protocol ignores them. Id 0 are distractors, which stay


class _FolderSource:
    """The original data set as a folder; `root` holds bounding_box_train."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def image_names(self, folder: str) -> list[str]:
        """The names in one folder of the data set, sorted; [] when there is no such folder."""
        if not (self.root / folder).is_dir():
            return []
        with os.scandir(self.root / folder) as entries:
            return sorted(entry.name for entry in entries if is_jpeg_name(entry.name) and entry.is_file())

    def read(self, original: str) -> bytes:
        """The bytes of the image `folder/name`."""
        return (self.root / original).read_bytes()


class _ZipSource:
    """The original data set in a zip file; `prefix`, "" or ending in "/", comes before bounding_box_train."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str) -> None:
        self.archive = archive
        self.prefix = prefix

    def image_names(self, folder: str) -> list[str]:
        """The names in one folder of the data set, sorted; [] when there is no such folder."""
        start = f"{self.prefix}{folder}/"
        names = {entry[len(start) :] for entry in self.archive.namelist() if entry.startswith(start)}
        return sorted(name for name in names if "/" not in name and is_jpeg_name(name))

    def read(self, original: str) -> bytes:
        """The bytes of the image `folder/name`, their checksum checked."""
        return self.archive.read(self.prefix + original)


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


def _zip_prefix(archive: zipfile.ZipFile) -> str | None:
    matches = (re.match(rf"((?:[^/]+/)*?){TRAIN}/", name) for name in archive.namelist())
    prefixes = {match[1] for match in matches if match and not match[1].startswith("__MACOSX/")}
    return min(prefixes, key=len, default=None)


def prepare_market1501(source: str | Path, save_dir: str | Path) -> Path:
    """Copy the images under their new names and write partitions.pkl and ori_to_new_im_name.pkl into `save_dir`.

    `source`: the zip, the folder, or the folder around it; it is only read. When interrupted, the same call goes on:
    images are written whole or not at all, and partitions.pkl last. Returns `save_dir`, which --data_path takes.
    Raises InputError when the source is not there, damaged or no Market-1501, or `save_dir` cannot be written.
    """
    source, save_dir = Path(source).expanduser(), Path(save_dir).expanduser()
    check_paths(source, save_dir)
    if source.is_dir():
        root = _folder_root(source)
        if root is None:
            raise InputError(_no_market1501(source))
        return _prepare(_FolderSource(root), source, save_dir)
    try:
        with zipfile.ZipFile(source) as archive:
            prefix = _zip_prefix(archive)
            if prefix is None:
                raise InputError(_no_market1501(source))
            return _prepare(_ZipSource(archive, prefix), source, save_dir)
    except zipfile.BadZipFile as error:
        raise InputError(f"--source {source} is no zip file, or is cut off; download it again") from error
    except OSError as error:
        raise InputError(f"cannot read --source {source}: {error.strerror}") from error


def _no_market1501(source: Path) -> str:
    return f"--source {source} holds no {TRAIN}/; give the original Market-1501 zip, or the folder it unpacks to"


def _prepare(source: _Source, source_path: Path, save_dir: Path) -> Path:
    parts = _plan(source, source_path)
    return write_data_set(
        save_dir,
        Parts(parts[TRAIN], parts[TEST], parts[QUERY_FOLDER], parts[MULTI_QUERY_FOLDER]),
        lambda image: _read(source, source_path, image),
        NUM_VAL_IDS,
        write=write_atomically,
    )


def _plan(source: _Source, source_path: Path) -> dict[str, list[NewImage]]:
    """What to copy to which name, per folder. The folders' order and the sorted names give each image its index."""
    new_image = Namer()
    query_pairs: set[tuple[int, int]] = set()
    parts: dict[str, list[NewImage]] = {}
    for folder in (TRAIN, TEST, QUERY_FOLDER, MULTI_QUERY_FOLDER):
        parts[folder] = []
        for name in source.image_names(folder):
            match = _ORIGINAL_NAME.fullmatch(name)
            if match is None:
                raise InputError(f"{source_path}: {folder}/{ascii(name)[1:-1]} is no image name of Market-1501")
            pair = person_id, camera = int(match[1]), int(match[2])
            if person_id == _JUNK_ID or (folder == MULTI_QUERY_FOLDER and pair not in query_pairs):
                continue
            if folder == QUERY_FOLDER:
                query_pairs.add(pair)
            parts[folder].append(new_image(f"{folder}/{name}", person_id, camera))
        if not parts[folder] and folder != MULTI_QUERY_FOLDER:  # gt_bbox may be left out
            raise InputError(f"{source_path} has no images in {folder}/; it is incomplete, unpack or download it again")
    return parts


def _read(source: _Source, source_path: Path, image: NewImage) -> bytes:
    try:
        return source.read(image.original)
    except OSError as error:
        raise InputError(f"cannot read {image.original} in {source_path}: {error.strerror}") from error
    # zipfile raises RuntimeError for an encrypted entry, NotImplementedError for an unknown compression.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise InputError(f"{source_path} is damaged at {image.original}; download it again") from error
