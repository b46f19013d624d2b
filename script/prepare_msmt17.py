"""Prepare the original MSMT17, unpacked: python script/prepare_msmt17.py --source MSMT17_V1 --save_dir msmt17"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.cli import OneLineParser, parse_path, run_command
from aligned_reid.data.partitions import read_partitions
from aligned_reid.data.prepare.layout import describe
from aligned_reid.data.prepare.msmt17 import prepare_msmt17


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(
        allow_abbrev=False, description="Copy MSMT17 into the layout that --data_path takes. The source is only read."
    )
    parser.add_argument(
        "--source", type=parse_path, required=True, help="folder with list_train.txt, MSMT17 version 1 or 2"
    )
    parser.add_argument(
        "--save_dir", type=parse_path, required=True, help="a new folder; if interrupted, run again to resume"
    )
    return parser.parse_args()


def main() -> None:
    """Prepare; print the counts and the next command."""
    save_dir = prepare_msmt17(**vars(parse_arguments()))
    print(describe(read_partitions(save_dir / "partitions.pkl")))
    print(f"next: python script/train.py --dataset=msmt17 --data_path={shlex.quote(str(save_dir))}")


if __name__ == "__main__":
    run_command(main)
