"""Group the photos in a folder by person, without labels or cameras."""

from __future__ import annotations

import argparse
import csv
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aligned_reid.cli import parse_path
from aligned_reid.commands.common import BadImages, make_parser, note, open_model, print_json, print_table
from aligned_reid.errors import InputError

if TYPE_CHECKING:
    from aligned_reid.inference.gallery import Group

ROWS_SHOWN = 20


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("group", __doc__, "photos/ --model exp/first --csv persons.csv")
    parser.add_argument("folder", type=parse_path, help="the folder of photos, with its folders")
    parser.add_argument(
        "--threshold", type=float, help="largest mean distance within a person (default: that of the weights)"
    )
    parser.add_argument("--csv", type=parse_path, metavar="FILE", help="write path,person of each photo")
    parser.add_argument("--html", type=parse_path, metavar="FILE", help="write a page with the groups")
    parser.add_argument(
        "--copy_to", type=parse_path, metavar="DIR", help="copy the photos into a folder for each person"
    )
    arguments = parser.parse_args()
    if arguments.threshold is not None and not arguments.threshold > 0:  # NaN too
        parser.error("--threshold is a distance above 0")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from aligned_reid.data.prepare.sources import shown
    from aligned_reid.files import write_file
    from aligned_reid.inference import Gallery
    from aligned_reid.inference.pages import thumbnail_folder, write_group_page
    from aligned_reid.preflight import check_save_file, make_empty

    for flag in ("csv", "html"):
        if file := getattr(arguments, flag):
            check_save_file(file, f"--{flag}", f".{flag}")
    for flag in ("html", "copy_to"):  # both write images
        if target := getattr(arguments, flag):
            check_outside(target, arguments.folder, f"--{flag}")
    if arguments.html and not arguments.html.exists():
        make_empty(thumbnail_folder(arguments.html), "--html")  # whose photos thumbnails could overwrite
    if arguments.copy_to:
        make_empty(arguments.copy_to, "--copy_to")
    bad = BadImages()
    gallery = Gallery.open(arguments.folder, open_model(arguments), note, bad)
    groups = gallery.group(arguments.threshold)
    if arguments.csv:
        write_file(arguments.csv, table_of(groups, arguments.csv.absolute().parent))
    if arguments.html:
        write_group_page(arguments.html, groups)
    if arguments.copy_to:
        copy_groups(groups, arguments.folder, arguments.copy_to)
    if arguments.json:
        print_json([{"person": group.person, "paths": [str(path) for path in group.paths]} for group in groups])
    else:
        print(f"{len(gallery):,} photos of {len(groups):,} persons")
        rows = [[str(group.person), str(len(group.paths)), shown(group.paths[0])] for group in groups[:ROWS_SHOWN]]
        print_table(["person", "photos", "the first"], rows)
        if len(groups) > ROWS_SHOWN:
            print(f"and {len(groups) - ROWS_SHOWN:,} more; --csv writes all of them")
    bad.check()


def table_of(groups: Sequence[Group], folder: Path) -> bytes:
    """A CSV file with path,person, paths relative to its folder: `aligned-reid prepare photos` reads it."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["path", "person"])
    writer.writerows([os.path.relpath(path, folder), group.person] for group in groups for path in group.paths)
    return text.getvalue().encode("utf-8", "surrogateescape")


def check_outside(target: Path, source: Path, flag: str) -> None:
    """Raise InputError if the target is in the source, whose photos would then include what is written."""
    if source.resolve() in target.resolve().parents:
        raise InputError(f"{flag} {target} is inside {source}: choose a place outside it")


def copy_groups(groups: Sequence[Group], source: Path, target: Path) -> None:
    """Copy each photo to <target>/<person>/<its path in the source>."""
    for group in groups:
        for path in group.paths:
            copy = target / f"{group.person:05d}" / path.relative_to(source)
            try:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)
            except OSError as error:
                raise InputError(f"cannot copy {path} to {copy}: {error.strerror}") from error
