"""Draw the embedded data set of generated pedestrians."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.cli import OneLineParser, parse_path, run_command
from aligned_reid.data.prepare.layout import describe
from aligned_reid.synthetic.make import make_synthetic


def main() -> None:
    """Draw the data set, print its counts and the command that trains on it."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--save_dir", type=parse_path, required=True, help="a new folder; if interrupted, run again to resume")
    add("--num_ids", type=int, default=300, help="identities; three quarters are for training")
    add("--num_cameras", type=int, default=6, help="cameras; each sees every identity")
    add("--images_per_camera", type=int, default=4, help="images of each identity under each camera")
    add("--seed", type=int, default=1, help="the same seed and package versions give the same bytes")
    print(describe(make_synthetic(**vars(parser.parse_args()))), "--pretrained=none")


if __name__ == "__main__":
    run_command(main)
