"""Checks of a data set before a run: every image can be decoded, and queries have matches in the gallery."""

from collections.abc import Iterable, Sequence

import numpy as np

from aligned_reid.data.dataset import ReidData, find_defects
from aligned_reid.data.partitions import GALLERY, QUERY
from aligned_reid.data.transforms import decode_image
from aligned_reid.errors import InputError


def check_images(data: ReidData, image_names: Iterable[str]) -> None:
    """Raise InputError, with the first bad image and the number of them, unless every image can be decoded.

    32,000 images of 128 x 64 pixels take one to two seconds on two cores.
    """
    names = list(dict.fromkeys(image_names))
    defects = find_defects([data.images_dir / name for name in names], decode_image)
    if defects:
        first, number = next(iter(defects.values())), len(defects)
        raise InputError(f"{first}; missing or damaged images: {number:,} of {len(names):,}; prepare the data again")


def check_protocol(
    person_ids: Sequence[int] | np.ndarray, cameras: Sequence[int] | np.ndarray, marks: Sequence[int] | np.ndarray
) -> None:
    """Raise InputError unless some query (mark 0) has a gallery image (1) of its person from another camera.

    person_ids, cameras, marks: one per image, [N]. A query without such a match is not scored.
    """
    need = "each query person must also be in the gallery, seen by another camera"
    images = list(zip(person_ids, cameras, marks, strict=True))
    queries, gallery = ({image[:2] for image in images if image[2] == mark} for mark in (QUERY, GALLERY))
    if not queries or not gallery:
        raise InputError(f"there are no {'gallery' if queries else 'query'} images in the test part: {need}")
    if len({camera for _, camera in queries | gallery}) == 1:
        raise InputError(f"all test images come from one camera: {need}")
    cameras_of: dict[int, set[int]] = {}
    for person_id, camera in gallery:
        cameras_of.setdefault(person_id, set()).add(camera)
    if not any(cameras_of.get(person_id, set()) - {camera} for person_id, camera in queries):
        raise InputError(f"no query has a match in the gallery: {need}")
