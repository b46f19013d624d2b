"""Prepare the original Market-1501 (a zip or a folder) for training; see --help."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.data.layout import describe
from aligned_reid.data.market1501 import prepare_market1501
from aligned_reid.data.partitions import read_partitions
from aligned_reid.errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse, with one line for a wrong flag."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Copy Market-1501 into the layout that --data_path takes. The source is only read.")
    parser.add_argument("--source", required=True, help="Market-1501-v15.09.15.zip, or the folder it unpacks to")
    parser.add_argument("--save_dir", required=True, help="a new folder; when interrupted, run again to go on")
    return parser.parse_args()


def main() -> int:
    """Prepare, print the counts and the command to go on with; the exit status is 2 for a user's mistake."""
    try:
        arguments = parse_arguments()
        save_dir = prepare_market1501(arguments.source, arguments.save_dir)
        print(describe(read_partitions(save_dir / "partitions.pkl")))
        print(f"next: python script/train.py --data_path={shlex.quote(str(save_dir))}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again and it goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
