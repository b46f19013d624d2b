"""Prepare your own photos for training: python script/prepare_photos.py --source photos --save_dir prepared

--source is one of
  a folder with a sub-folder for each person, whose photos have the camera in their names (c1_001.jpg, 001_cam2.png,
    0001_c3s1_000151_01.jpg), or are in a sub-folder for each camera: <person>/<camera>/001.jpg
  a folder with train/, query/ and gallery/, each like the one above, or with photos that have person and camera in
    their names (0001_c3s1_000151_01.jpg); this division is kept
  a CSV file whose first row is path,person,camera; paths are relative to the file, persons and cameras any names;
    with a fourth column part (train, query, gallery), this division is kept
JPEGs are copied as they are; other images become JPEGs of quality 95. The source is only read.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.cli import OneLineParser, parse_path, run_command
from aligned_reid.data.prepare.layout import describe
from aligned_reid.data.prepare.photos import prepare_photos


def main() -> None:
    """Prepare the data set, print its counts and the command that trains on it."""
    parser = OneLineParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--source", type=parse_path, required=True, help="a folder with a sub-folder for each person, or a CSV file")
    add("--save_dir", type=parse_path, required=True, help="a new folder; if interrupted, run again to resume")
    add("--test_share", type=float, default=0.5, help="share of persons to test, above 0, at most 1 (default: 0.5)")
    add("--seed", type=int, default=1, help="draws the test persons and their query photos (default: 1)")
    add(
        "--cameras",
        choices=("known", "none"),
        default="known",
        help="none: each photo of a person counts as taken by a different camera (default: known)",
    )
    print(describe(prepare_photos(**vars(parser.parse_args()))))


if __name__ == "__main__":
    run_command(main)
