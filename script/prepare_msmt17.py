"""Prepare the original MSMT17, unpacked: python script/prepare_msmt17.py --source MSMT17_V1 --save_dir msmt17"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.cli import OneLineParser, parse_path, run_command
from aligned_reid.data.prepare.layout import describe
from aligned_reid.data.prepare.msmt17 import prepare_msmt17


def main() -> None:
    """Prepare the data set, print its counts and the command that trains on it."""
    parser = OneLineParser(
        allow_abbrev=False, description="Copy MSMT17 into the layout of --data_path. The source is only read."
    )
    add = parser.add_argument
    add("--source", type=parse_path, required=True, help="the folder with list_train.txt, version 1 or 2")
    add("--save_dir", type=parse_path, required=True, help="a new folder; if interrupted, run again to resume")
    print(describe(prepare_msmt17(**vars(parser.parse_args())), dataset="msmt17"))


if __name__ == "__main__":
    run_command(main)
