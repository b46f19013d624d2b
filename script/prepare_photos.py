"""Prepare your own photos for training: python script/prepare_photos.py --source photos --save_dir prepared

--source is one of
  a folder with a sub-folder for each person; the camera is in the photo's name (c1_001.jpg, 001_cam2.png,
    0001_c3s1_000151_01.jpg) or is a sub-folder: <person>/<camera>/001.jpg
  a folder with train/, query/ and gallery/, each like the one above, or with person and camera in the photos' names
    (0001_c3s1_000151_01.jpg); this split is kept
  a CSV file whose first row is path,person,camera; paths are relative to the file, persons and cameras may have any
    names; with a fourth column part (train, query, gallery) this split is kept
JPEGs are copied as they are; other images become JPEGs of quality 95. The source is only read.
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.cli import OneLineParser, parse_path, run_command
from aligned_reid.data.partitions import read_partitions
from aligned_reid.data.prepare.layout import describe
from aligned_reid.data.prepare.photos import prepare_photos


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", type=parse_path, required=True, help="a folder with a sub-folder for each person, or a CSV file"
    )
    parser.add_argument(
        "--save_dir", type=parse_path, required=True, help="a new folder; if interrupted, run again to resume"
    )
    parser.add_argument(
        "--test_share",
        type=float,
        default=0.5,
        help="share of the persons for the test, above 0 and at most 1 (default: 0.5)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="random seed for test persons and query photos (default: 1)"
    )
    parser.add_argument(
        "--cameras",
        choices=("known", "none"),
        default="known",
        help="none: each photo of a person counts as taken by a different camera (default: known)",
    )
    return parser.parse_args()


def main() -> None:
    """Prepare; print the counts and the next command."""
    save_dir = prepare_photos(**vars(parse_arguments()))
    print(describe(read_partitions(save_dir / "partitions.pkl")))
    print(f"next: python script/train.py --data_path={shlex.quote(str(save_dir))}")


if __name__ == "__main__":
    run_command(main)
