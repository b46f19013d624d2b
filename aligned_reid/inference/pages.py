"""Pages of a search and of groups: the photos found, each a link to its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aligned_reid.data.prepare.sources import shown
from aligned_reid.errors import InputError
from aligned_reid.evaluation.kernels import in_threads
from aligned_reid.inference.gallery import Group, Hit
from aligned_reid.inference.html import data_uri, thumbnail, write_page
from aligned_reid.inference.images import read_image


class Photo(NamedTuple):
    """What the pages show of a photo."""

    name: str
    address: str  # of its file
    thumbnail: str | None  # an address; None if the photo cannot be read


def write_search_page(path: str | Path, query: Path, hits: Sequence[Hit]) -> None:
    """Write one page with everything in it: a photo and what was found for it."""
    shown_query, *photos = in_threads(photo_in_page, [query, *(hit.path for hit in hits)])
    write_page(Path(path), "search.html", query=shown_query, hits=list(zip(hits, photos, strict=True)))


def thumbnail_folder(page: Path) -> Path:
    """The folder beside a page of groups that holds its thumbnails."""
    return page.with_name(f"{page.stem}_images")


def write_group_page(path: str | Path, groups: Sequence[Group]) -> None:
    """Write a page with the photos of each group, and the thumbnails into the page's `thumbnail_folder`."""
    path = Path(path)
    folder = thumbnail_folder(path)
    photos = [photo for group in groups for photo in group.paths]

    def write_thumbnail(number: int) -> Photo:
        file = folder / f"{number}.jpg"
        jpeg = read_thumbnail(photos[number])
        if jpeg is not None:
            file.write_bytes(jpeg)
        return link(photos[number], None if jpeg is None else f"{folder.name}/{file.name}")

    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()  # says whose the thumbnails are, should this be interrupted
        written = iter(in_threads(write_thumbnail, range(len(photos))))
    except OSError as error:
        raise InputError(f"cannot write {error.filename or folder}: {error.strerror}") from error
    shown_groups = [(group.person, [next(written) for _ in group.paths]) for group in groups]
    write_page(path, "group.html", groups=shown_groups, num_photos=len(photos))


def photo_in_page(path: Path) -> Photo:
    jpeg = read_thumbnail(path)
    return link(path, None if jpeg is None else data_uri(jpeg))


def link(path: Path, address: str | None) -> Photo:
    return Photo(shown(path), path.absolute().as_uri(), address)


def read_thumbnail(path: Path) -> bytes | None:
    """None if the photo cannot be read: the others are still shown."""
    try:
        return thumbnail(read_image(path, shown(path)))
    except InputError:
        return None
