"""Find the photos in a folder that are nearest to a photo."""

from __future__ import annotations

import argparse
from pathlib import Path

from aligned_reid.cli import parse_path
from aligned_reid.commands.photos import BadImages, make_parser, note, open_model, print_json, print_table, verdict
from aligned_reid.errors import InputError


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("search", __doc__, "photo.jpg --gallery photos/ --model exp/first")
    parser.add_argument("photos", nargs="+", type=parse_path, metavar="PHOTO", help="one photo, or several")
    parser.add_argument("--gallery", type=parse_path, required=True, help="the folder to search in, with its folders")
    parser.add_argument("--k", type=int, default=10, help="hits for each photo (default: 10)")
    parser.add_argument("--html", type=parse_path, metavar="FILE", help="write a page with the hits of one photo")
    arguments = parser.parse_args()
    if arguments.k < 1:
        parser.error("--k is 1 or more")
    if arguments.html and len(arguments.photos) > 1:
        parser.error("--html shows the hits of one photo; give one")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from aligned_reid.inference import Gallery
    from aligned_reid.inference.images import shown
    from aligned_reid.preflight import check_save_file

    if arguments.html:
        check_save_file(arguments.html, "--html")
    reid, bad = open_model(arguments), BadImages()
    queries = usable(arguments.photos, bad)
    gallery = Gallery.open(arguments.gallery, reid, note, bad)
    answers = gallery.search(queries, arguments.k)
    if arguments.html:
        from aligned_reid.inference.pages import write_search_page

        write_search_page(arguments.html, queries[0], answers[0])
    if arguments.json:
        found = [[{**hit._asdict(), "path": str(hit.path)} for hit in hits] for hits in answers]
        pairs = zip(queries, found, strict=True)
        print_json({"threshold": reid.threshold, "queries": [{"photo": str(q), "hits": hits} for q, hits in pairs]})
    else:
        for query, hits in zip(queries, answers, strict=True):
            print(f"{shown(query)}: nearest of {len(gallery):,} photos in {shown(arguments.gallery)}")
            rows = enumerate(hits, start=1)
            cells = [[str(n), f"{hit.distance:.3f}", verdict(hit.same_person), shown(hit.path)] for n, hit in rows]
            print_table(["", "distance", "same person", "photo"], cells)
    bad.check()


def usable(photos: list[Path], bad: BadImages) -> list[Path]:
    """The photos that can be read; `bad` gets the others. Raises InputError if there are none."""
    from aligned_reid.inference.images import read_image, shown

    good = []
    for path in photos:
        try:
            read_image(path, shown(path))
            good.append(path)
        except InputError as error:
            if len(photos) == 1:
                raise
            bad(str(error))
    if not good:
        raise InputError(f"none of the {len(photos)} photos can be used")
    return good
