"""What must hold of a data set before hours are spent on it: whole images, and queries that the gallery can answer."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np

from aligned_reid.data.dataset import ReidData
from aligned_reid.data.partitions import GALLERY, QUERY, write_atomically
from aligned_reid.data.transforms import decode_image
from aligned_reid.errors import InputError

_STAMP_NAME = ".checked_images"
_CHUNK = 64  # images a thread takes at a time


def check_images(data: ReidData, image_names: Iterable[str]) -> None:
    """Raise InputError, with the first bad image and the number of them, unless every image decodes to its end.

    Each image is decoded once in its life: a stamp file (in the data folder, or in the user's cache folder when that is
    read-only) remembers its name, size and modification time. Several processes may check at the same time.
    """
    names = list(dict.fromkeys(image_names))
    fingerprints = {name: _fingerprint(data.images_dir / name) for name in names}
    stamps = _read_stamps(data.root)
    unknown = [name for name in names if fingerprints[name] not in stamps]
    chunks = [unknown[start : start + _CHUNK] for start in range(0, len(unknown), _CHUNK)]
    with ThreadPoolExecutor() as pool:
        defects = [
            defect for some in pool.map(lambda chunk: _defects(data.images_dir, chunk), chunks) for defect in some
        ]
    if defects:
        verb = "is" if len(defects) == 1 else "are"
        raise InputError(
            f"{defects[0]}; {len(defects):,} of {len(names):,} images {verb} missing or damaged: prepare the data again"
        )
    if unknown:
        _write_stamps(data.root, stamps | {fingerprints[name] for name in unknown})


def _defects(images_dir: Path, names: Sequence[str]) -> list[str]:
    defects = []
    for name in names:
        try:
            decode_image(images_dir / name, check_size=True)
        except InputError as error:
            defects.append(str(error))
    return defects


def _fingerprint(path: Path) -> str:
    """A digest of name, size and modification time; "" for a file that is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return blake2b(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode(), digest_size=10).hexdigest()


def _stamp_files(root: Path) -> list[Path]:
    """Where the stamps may be: in the data folder, or in the user's cache under a name made from the folder's path."""
    files = [root / _STAMP_NAME]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache):  # without a home directory the tilde stays
        digest = blake2b(os.fsencode(root.resolve()), digest_size=10).hexdigest()
        files.append(Path(cache) / "aligned_reid" / f"checked_images_{digest}")
    return files


def _read_stamps(root: Path) -> set[str]:
    """The fingerprints of all images that were found whole."""
    stamps: set[str] = set()
    for file in _stamp_files(root):
        try:
            stamps.update(file.read_text(encoding="ascii").split())
        except (OSError, UnicodeDecodeError):
            continue
    return stamps


def _write_stamps(root: Path, stamps: set[str]) -> None:
    """Remember the fingerprints where one may write. Nowhere is no error: the next run checks again."""
    content = "".join(f"{stamp}\n" for stamp in sorted(stamps)).encode("ascii")
    for file in _stamp_files(root):
        try:
            if file.name != _STAMP_NAME:
                file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, content)
            return
        except OSError:
            continue


def check_protocol(
    person_ids: Sequence[int] | np.ndarray, cameras: Sequence[int] | np.ndarray, marks: Sequence[int] | np.ndarray
) -> None:
    """Raise InputError unless some query (mark 0) has an image of its person in the gallery (1) under another camera.

    person_ids, cameras, marks: one for each image, [N]. Queries without such a match count nowhere, as in the protocol.
    """
    need = "the protocol needs each query person in the gallery, seen by another camera"
    images = [
        (int(person_id), int(camera), int(mark))
        for person_id, camera, mark in zip(person_ids, cameras, marks, strict=True)
        if mark in (QUERY, GALLERY)
    ]
    queries = {(person_id, camera) for person_id, camera, mark in images if mark == QUERY}
    gallery = {(person_id, camera) for person_id, camera, mark in images if mark == GALLERY}
    if not queries or not gallery:
        raise InputError(f"the test images hold no {'gallery' if queries else 'query'}: {need}")
    if len({camera for _, camera in queries | gallery}) == 1:
        raise InputError(f"all test images come from one camera: {need}")
    cameras_of: dict[int, set[int]] = {}
    for person_id, camera in gallery:
        cameras_of.setdefault(person_id, set()).add(camera)
    if not any(cameras_of.get(person_id, set()) - {camera} for person_id, camera in queries):
        raise InputError(f"no query has a match in the gallery: {need}")
