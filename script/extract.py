"""Write the features of a data set's test part to a file: python script/extract.py --save_file features.h5 ...

Takes all flags of script/train.py; --data_path and --model_weight_file are needed. script/evaluate.py evaluates the
file. If interrupted, run the same command again to resume.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.cli import OneLineParser, parse_path, run_command
from aligned_reid.config import Config


def parse_arguments() -> tuple[Path, Config]:
    parser = OneLineParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save_file", type=parse_path, required=True, help="the file to write, e.g. features.h5")
    own, others = parser.parse_known_args()
    return own.save_file, Config.from_arguments([*others, "--only_test=true"])


def main() -> None:
    save_file, config = parse_arguments()
    from aligned_reid.run import run_extraction  # torch takes seconds to import

    run_extraction(config, save_file)


if __name__ == "__main__":
    run_command(main)
