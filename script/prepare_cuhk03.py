"""Prepare CUHK03, new protocol: python script/prepare_cuhk03.py --source cuhk03 --kind labeled --save_dir prepared"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.cli import OneLineParser, parse_path, run_command
from aligned_reid.data.prepare.cuhk03 import KINDS, prepare_cuhk03
from aligned_reid.data.prepare.layout import describe


def main() -> None:
    """Prepare the data set, print its counts and the command that trains on it."""
    parser = OneLineParser(
        allow_abbrev=False, description="Write CUHK03 in the layout of --data_path. The source is only read."
    )
    add = parser.add_argument
    add(
        "--source",
        type=parse_path,
        required=True,
        help="the folder with cuhk-03.mat (or images_<kind>/) and the protocol's .mat files",
    )
    add("--save_dir", type=parse_path, required=True, help="a new folder; if interrupted, run again to resume")
    add("--kind", required=True, choices=KINDS, help="boxes drawn by hand (labeled) or detected")
    arguments = parser.parse_args()
    print(describe(prepare_cuhk03(**vars(arguments)), dataset=f"cuhk03_{arguments.kind}"))


if __name__ == "__main__":
    run_command(main)
