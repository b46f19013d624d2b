"""Prepare the original Market-1501: python script/prepare_market1501.py --source Market.zip --save_dir market1501"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.cli import OneLineParser, parse_path, run_command
from aligned_reid.data.partitions import read_partitions
from aligned_reid.data.prepare.layout import describe
from aligned_reid.data.prepare.market1501 import prepare_market1501


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(
        allow_abbrev=False,
        description="Copy Market-1501 into the layout that --data_path takes. The source is only read.",
    )
    add = parser.add_argument
    add("--source", type=parse_path, required=True, help="Market-1501-v15.09.15.zip, or the folder it unpacks to")
    add("--save_dir", type=parse_path, required=True, help="a new folder; if interrupted, run again to resume")
    return parser.parse_args()


def main() -> None:
    """Prepare; print the counts and the next command."""
    save_dir = prepare_market1501(**vars(parse_arguments()))
    print(describe(read_partitions(save_dir / "partitions.pkl")))
    print(f"next: python script/train.py --data_path={shlex.quote(str(save_dir))}")


if __name__ == "__main__":
    run_command(main)
