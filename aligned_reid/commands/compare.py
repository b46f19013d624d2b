"""Say whether two photos show one person, and how far apart they are."""

from __future__ import annotations

from aligned_reid.cli import parse_path
from aligned_reid.commands.common import make_parser, open_model, print_json


def main() -> None:
    parser = make_parser("compare", __doc__, "a.jpg b.jpg --model exp/first")
    parser.add_argument("photos", nargs=2, type=parse_path, metavar="PHOTO")
    parser.add_argument(
        "--save_file", type=parse_path, help="a picture of the alignment: .png or .svg (needs matplotlib)"
    )
    arguments = parser.parse_args()
    from aligned_reid.preflight import check_save_file

    if arguments.save_file:
        check_save_file(arguments.save_file, "--save_file", ".png", ".svg")
    pair = open_model(arguments).compare(*arguments.photos)
    if arguments.save_file:
        pair.save(arguments.save_file)
    if arguments.json:
        names = ("distance", "local_distance", "path", "threshold", "same_person", "measured_on", "match_rate")
        print_json(
            {"photos": [str(path) for path in arguments.photos], **{name: getattr(pair, name) for name in names}}
        )
        return
    print(pair)
    if pair.local_distance is not None:
        print(f"aligned distance of the stripes: {pair.local_distance:.2f}")
