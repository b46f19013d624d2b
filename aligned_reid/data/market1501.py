"""From the original Market-1501 (Zheng et al., ICCV 2015), a zip or a folder, to the layout that --data_path takes."""

import errno
import os
import pickle
import re
import shlex
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from aligned_reid.data.partitions import build_partitions, format_image_name, write_atomically, write_partitions
from aligned_reid.errors import InputError

TRAIN, TEST, QUERY_FOLDER, MULTI_QUERY_FOLDER = "bounding_box_train", "bounding_box_test", "query", "gt_bbox"
NUM_VAL_IDS = 100

_ORIGINAL_NAME = re.compile(r"(-1|[0-9]+)_c([0-9]+)s[0-9]+_.*\.jpg")
_JUNK_ID = -1  # detections that fit no person well; the protocol ignores them. Id 0 are distractors, which stay


class _Image(NamedTuple):
    """One image to copy: where it is in the source, and its name in images/."""

    folder: str
    name: str
    new_name: str


class _FolderSource:
    """The original data set as a folder; `root` holds bounding_box_train."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def image_names(self, folder: str) -> list[str]:
        """The names in one folder of the data set, sorted; [] when there is no such folder."""
        if not (self.root / folder).is_dir():
            return []
        with os.scandir(self.root / folder) as entries:
            return sorted(entry.name for entry in entries if _is_image(entry.name) and entry.is_file())

    def read(self, folder: str, name: str) -> bytes:
        """The bytes of one image."""
        return (self.root / folder / name).read_bytes()


class _ZipSource:
    """The original data set in a zip file; `prefix`, "" or ending in "/", comes before bounding_box_train."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str) -> None:
        self.archive = archive
        self.prefix = prefix

    def image_names(self, folder: str) -> list[str]:
        """The names in one folder of the data set, sorted; [] when there is no such folder."""
        start = f"{self.prefix}{folder}/"
        names = {entry[len(start) :] for entry in self.archive.namelist() if entry.startswith(start)}
        return sorted(name for name in names if "/" not in name and _is_image(name))

    def read(self, folder: str, name: str) -> bytes:
        """The bytes of one image, their checksum checked."""
        return self.archive.read(f"{self.prefix}{folder}/{name}")


_Source = _FolderSource | _ZipSource


def _is_image(name: str) -> bool:
    """Every *.jpg, `.jpg.jpg` too, but no hidden file; Thumbs.db and the like are none."""
    return name.endswith(".jpg") and not name.startswith(".")


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
    source, save_dir = shlex.quote(str(raw)), shlex.quote(str(raw.parent / "market1501"))
    return f"python script/prepare_market1501.py --source {source} --save_dir {save_dir}"


def _folder_root(path: Path) -> Path | None:
    candidates = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
    return next((root for root in candidates if (root / TRAIN).is_dir()), None)


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
    if not source.exists():
        raise InputError(f"--source {source} does not exist")
    if source.is_dir():
        if source.resolve() in (save_dir.resolve(), *save_dir.resolve().parents):
            raise InputError(f"--save_dir {save_dir} is in the source {source}, which stays as it is; take another one")
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
    images = [image for part in parts.values() for image in part]
    images_dir = save_dir / "images"
    _make_images_dir(images_dir, images)
    for image in _progress(images):
        _write_if_new(images_dir / image.new_name, _read(source, source_path, image))
    new_names = {f"{image.folder}/{image.name}": image.new_name for image in images}
    _write_if_new(save_dir / "ori_to_new_im_name.pkl", pickle.dumps(new_names, protocol=2))
    names = {folder: [image.new_name for image in part] for folder, part in parts.items()}
    partitions = build_partitions(
        trainval=names[TRAIN],
        query=names[QUERY_FOLDER],
        gallery=names[TEST],
        multi_query=names[MULTI_QUERY_FOLDER],
        num_val_ids=NUM_VAL_IDS,
    )
    write_partitions(save_dir / "partitions.pkl", partitions)
    return save_dir


def _plan(source: _Source, source_path: Path) -> dict[str, list[_Image]]:
    """What to copy to which name, per folder. The folders' order and the sorted names give each image its index."""
    num_images: Counter[tuple[int, int]] = Counter()
    query_pairs: set[tuple[int, int]] = set()
    parts: dict[str, list[_Image]] = {}
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
            parts[folder].append(_Image(folder, name, format_image_name(person_id, camera, num_images[pair])))
            num_images[pair] += 1
        if not parts[folder] and folder != MULTI_QUERY_FOLDER:  # gt_bbox may be left out
            raise InputError(f"{source_path} has no images in {folder}/; it is incomplete, unpack or download it again")
    return parts


def _make_images_dir(images_dir: Path, images: Sequence[_Image]) -> None:
    """Make the folder, clear what an interrupted run left half-written, refuse one that holds another data set."""
    try:
        images_dir.mkdir(parents=True, exist_ok=True)
        present = os.listdir(images_dir)
        for name in present:
            if name.startswith(".") and name.endswith(".tmp"):
                (images_dir / name).unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(images_dir, error) from error
    foreign = {name for name in present if _is_image(name)} - {image.new_name for image in images}
    if foreign:
        raise InputError(f"{images_dir} holds images of another data set ({min(foreign)}); take another --save_dir")


def _read(source: _Source, source_path: Path, image: _Image) -> bytes:
    try:
        return source.read(image.folder, image.name)
    except OSError as error:
        raise InputError(f"cannot read {image.folder}/{image.name} in {source_path}: {error.strerror}") from error
    # zipfile raises RuntimeError for an encrypted entry, NotImplementedError for an unknown compression.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise InputError(f"{source_path} is damaged at {image.folder}/{image.name}; download it again") from error


def _write_if_new(path: Path, content: bytes) -> None:
    """Write a file unless it holds just this. Comparing costs less than writing and needs no record of what is done."""
    try:
        if not _holds(path, content):
            write_atomically(path, content)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except FileNotFoundError:
        return False


def _cannot_write(path: Path, error: OSError) -> InputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"no space left for {path}; make room and run the same command again, it goes on from here")
    return InputError(f"cannot write {path}: {error.strerror}")


def _progress(images: Sequence[_Image]) -> Iterator[_Image]:
    """The images, one by one, with a bar on a terminal and ten plain lines otherwise (both on stderr)."""
    if sys.stderr.isatty():
        yield from tqdm(images, desc="Copying", unit=" images")
        return
    step = max(1, -(-len(images) // 10))
    for num_done, image in enumerate(images, start=1):
        yield image
        if num_done % step == 0 or num_done == len(images):
            print(f"copied {num_done:,} of {len(images):,} images", file=sys.stderr, flush=True)
