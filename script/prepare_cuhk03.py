"""Prepare CUHK03, new protocol: python script/prepare_cuhk03.py --source cuhk03 --kind labeled --save_dir prepared"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.cli import OneLineParser, parse_path, run_command
from aligned_reid.data.partitions import read_partitions
from aligned_reid.data.prepare.cuhk03 import KINDS, prepare_cuhk03
from aligned_reid.data.prepare.layout import describe


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(
        allow_abbrev=False, description="Copy CUHK03 into the layout that --data_path takes. The source is only read."
    )
    add = parser.add_argument
    add(
        "--source",
        type=parse_path,
        required=True,
        help="folder with cuhk-03.mat (or images_<kind>/) and the .mat files of the protocol",
    )
    add("--save_dir", type=parse_path, required=True, help="a new folder; if interrupted, run again to resume")
    add("--kind", required=True, choices=KINDS, help="boxes drawn by hand (labeled) or by a detector")
    return parser.parse_args()


def main() -> None:
    """Prepare; print the counts and the next command."""
    arguments = parse_arguments()
    save_dir = prepare_cuhk03(**vars(arguments))
    print(describe(read_partitions(save_dir / "partitions.pkl")))
    name = f"cuhk03_{arguments.kind}"
    print(f"next: python script/train.py --dataset={name} --data_path={shlex.quote(str(save_dir))}")


if __name__ == "__main__":
    run_command(main)
