"""Find the photos in a folder that are nearest to a photo."""

from __future__ import annotations

import argparse

from aligned_reid.cli import parse_path
from aligned_reid.commands.common import BadImages, make_parser, note, open_model, print_json, print_table
from aligned_reid.errors import InputError

VERDICTS = {True: "likely", False: "uncertain", None: "-"}


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
    from aligned_reid.data.prepare.sources import shown
    from aligned_reid.inference import Gallery
    from aligned_reid.preflight import check_save_file

    if arguments.html:
        check_save_file(arguments.html, "--html", ".html")
    reid, bad = open_model(arguments), BadImages()
    gallery = Gallery.open(arguments.gallery, reid, note, bad)
    answers = gallery.search(arguments.photos, arguments.k, bad if len(arguments.photos) > 1 else None)
    found = [(query, hits) for query, hits in zip(arguments.photos, answers, strict=True) if hits]
    if arguments.html and found:
        from aligned_reid.inference.pages import write_search_page

        write_search_page(arguments.html, *found[0])
    if arguments.json:
        queries = [
            {"photo": str(query), "hits": [{**hit._asdict(), "path": str(hit.path)} for hit in hits]}
            for query, hits in found
        ]
        print_json({"threshold": reid.threshold, "queries": queries})
    else:
        for query, hits in found:
            print(f"{shown(query)}: nearest of {len(gallery):,} photos in {shown(arguments.gallery)}")
            rows = enumerate(hits, start=1)
            cells = [[str(n), f"{hit.distance:.3f}", VERDICTS[hit.same_person], shown(hit.path)] for n, hit in rows]
            print_table(["", "distance", "same person", "photo"], cells)
    bad.check()
    if not found:
        raise InputError(f"{shown(arguments.gallery)} has no other photo than {shown(arguments.photos[0])}")
