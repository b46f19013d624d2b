"""Prepare the original Market-1501: python script/prepare_market1501.py --source Market.zip --save_dir market1501"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.cli import OneLineParser, parse_path, run_command
from aligned_reid.data.prepare.layout import describe
from aligned_reid.data.prepare.market1501 import prepare_market1501


def main() -> None:
    """Prepare the data set, print its counts and the command that trains on it."""
    parser = OneLineParser(
        allow_abbrev=False, description="Copy Market-1501 into the layout of --data_path. The source is only read."
    )
    add = parser.add_argument
    add("--source", type=parse_path, required=True, help="Market-1501-v15.09.15.zip, or the folder it unpacks to")
    add("--save_dir", type=parse_path, required=True, help="a new folder; if interrupted, run again to resume")
    print(describe(prepare_market1501(**vars(parser.parse_args()))))


if __name__ == "__main__":
    run_command(main)
