"""`aligned-reid prepare <kind>`: for each kind of source a function that writes the folder that --data_path takes."""

import argparse
import shlex
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter

from aligned_reid.cli import OneLineParser, command_line, parse_path
from aligned_reid.commands import run_from
from aligned_reid.data.prepare.layout import describe

KINDS = {
    "photos": ("prepare:photos", "your own photos, in folders for persons or listed in a CSV file"),
    "market1501": ("prepare:market1501", "Market-1501"),
    "msmt17": ("prepare:msmt17", "MSMT17, version 1 or 2"),
    "cuhk03": ("prepare:cuhk03", "CUHK03, new protocol"),
    "joined": ("prepare:joined", "several prepared data sets as one"),
    "synthetic": ("prepare:synthetic", "people drawn by a program"),
}
EXAMPLES = """
examples:
  aligned-reid prepare photos --source photos --save_dir mine --dry_run
  aligned-reid prepare market1501 --source Market.zip --save_dir market1501
"""
PHOTOS = """Prepare your own photos for training.

--source is one of
  a folder with a sub-folder for each person, whose photos have the camera in their names (c1_001.jpg, 001_cam2.png,
    0001_c3s1_000151_01.jpg), or are in a sub-folder for each camera: <person>/<camera>/001.jpg
  a folder with train/, query/ and gallery/, each like the one above, or with photos that have person and camera in
    their names (0001_c3s1_000151_01.jpg); this division is kept
  a CSV file whose first row is path,person,camera; paths are relative to the file, persons and cameras any names;
    with a fourth column part (train, query, gallery), this division is kept
JPEGs are copied as they are; other images become JPEGs of quality 95. The source is only read.
"""


def main() -> None:
    run_from(KINDS, "Make the folder that --data_path takes.", EXAMPLES)


def make_parser(description: str, source: str = "", formatter: type = argparse.HelpFormatter) -> OneLineParser:
    """A parser with --save_dir and, if its help is given, --source."""
    parser = OneLineParser(allow_abbrev=False, description=description, formatter_class=formatter)
    if source:
        parser.add_argument("--source", type=parse_path, required=True, help=source)
    save_dir = "a new folder; if interrupted, run again to resume"
    parser.add_argument("--save_dir", type=parse_path, required=True, help=save_dir)
    return parser


def photos() -> None:
    from aligned_reid.data.prepare.photos import prepare_photos

    source = "a folder with a sub-folder for each person, or a CSV file"
    parser = make_parser(PHOTOS, source, RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--test_share", type=float, default=0.5, help="share of persons to test, above 0, at most 1 (default: 0.5)")
    add("--seed", type=int, default=1, help="draws the test persons and their query photos (default: 1)")
    add(
        "--cameras",
        choices=("known", "none"),
        default="known",
        help="none: each photo of a person counts as taken by a different camera (default: known)",
    )
    add("--dry_run", action="store_true", help="only count persons, cameras and photos; write nothing")
    options = parser.parse_args()
    save_dir = prepare_photos(**vars(options))
    print("nothing is written (--dry_run)" if options.dry_run else describe(save_dir))


def market1501() -> None:
    from aligned_reid.data.prepare.market1501 import prepare_market1501

    parser = make_parser(
        "Copy Market-1501 into the layout of --data_path. The source is only read.",
        "Market-1501-v15.09.15.zip, or the folder it unpacks to",
    )
    print(describe(prepare_market1501(**vars(parser.parse_args()))))


def msmt17() -> None:
    from aligned_reid.data.prepare.msmt17 import prepare_msmt17

    parser = make_parser(
        "Copy MSMT17 into the layout of --data_path. The source is only read.",
        "the folder with list_train.txt, version 1 or 2",
    )
    print(describe(prepare_msmt17(**vars(parser.parse_args())), dataset="msmt17"))


def cuhk03() -> None:
    from aligned_reid.data.prepare.cuhk03 import KINDS as BOXES
    from aligned_reid.data.prepare.cuhk03 import prepare_cuhk03

    parser = make_parser(
        "Write CUHK03 in the layout of --data_path. The source is only read.",
        "the folder with cuhk-03.mat (or images_<kind>/) and the protocol's .mat files",
    )
    parser.add_argument("--kind", required=True, choices=BOXES, help="boxes drawn by hand (labeled) or detected")
    options = parser.parse_args()
    print(describe(prepare_cuhk03(**vars(options)), dataset=f"cuhk03_{options.kind}"))


def joined() -> None:
    """Join, and print also the commands that test on each set."""
    from aligned_reid.data.prepare.joined import prepare_joined

    parser = make_parser(
        "Join prepared data sets, identities kept apart. Images are hard links where that is possible."
    )
    sources = "prepared folders; the first one's test is used"
    parser.add_argument("--sources", type=parse_path, nargs="+", required=True, help=sources)
    options = parser.parse_args()
    print(describe(prepare_joined(**vars(options)), dataset="joined"))
    for source in options.sources:
        flags = f"--only_test=true --model_weight_file=RUN --data_path={shlex.quote(str(source))}"
        print(f"test on {source}: {command_line('train')} {flags}")


def synthetic() -> None:
    from aligned_reid.synthetic.make import make_synthetic

    parser = make_parser("Draw a data set of generated pedestrians.", formatter=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--num_ids", type=int, default=300, help="identities; three quarters are for training")
    add("--num_cameras", type=int, default=6, help="cameras; each sees every identity")
    add("--images_per_camera", type=int, default=4, help="images of each identity under each camera")
    add("--seed", type=int, default=1, help="the same seed and package versions give the same bytes")
    print(describe(make_synthetic(**vars(parser.parse_args()))), "--pretrained=none")
