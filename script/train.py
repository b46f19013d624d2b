"""Train and evaluate AlignedReID, or only evaluate with --only_test true: python script/train.py --data_path=..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from aligned_reid.cli import run_command
from aligned_reid.config import Config


def main() -> None:
    config = Config.from_arguments()
    from aligned_reid.run import run  # importing torch takes seconds; a mistyped flag is reported before

    run(config)


if __name__ == "__main__":
    run_command(main)
