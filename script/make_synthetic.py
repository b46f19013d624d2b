"""Draw a data set of synthetic pedestrians: python script/make_synthetic.py --save_dir drawn"""

import argparse
import shlex
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.cli import OneLineParser, parse_path, run_command
from aligned_reid.data.partitions import GALLERY, MULTI_QUERY, QUERY, read_partitions
from aligned_reid.synthetic.make import make_synthetic


def parse_arguments() -> argparse.Namespace:
    """The command line of make_synthetic.py."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--save_dir", type=parse_path, required=True, help="a new folder; if interrupted, run again to resume"
    )
    parser.add_argument("--num_ids", type=int, default=300, help="identities; three quarters are for training")
    parser.add_argument("--num_cameras", type=int, default=6, help="cameras; each sees every identity")
    parser.add_argument("--images_per_camera", type=int, default=4, help="images of each identity under each camera")
    parser.add_argument("--seed", type=int, default=1, help="same seed and package versions: same bytes")
    return parser.parse_args()


def main() -> None:
    """Draw; print the counts and the next command."""
    save_dir = make_synthetic(**vars(parse_arguments()))
    partitions = read_partitions(save_dir / "partitions.pkl")
    num_marked = Counter(partitions.test_marks)
    print(
        f"trainval    {len(partitions.trainval_im_names):6,} images, {len(partitions.trainval_ids2labels)} identities"
    )
    for part, mark in (("query", QUERY), ("gallery", GALLERY), ("multi-query", MULTI_QUERY)):
        print(f"{part:<11} {num_marked[mark]:6,} images")
    print(f"next: python script/train.py --data_path={shlex.quote(str(save_dir))} --pretrained=none")


if __name__ == "__main__":
    run_command(main)
