"""Write the features of a data set's test part, or of any folder of images, to a file.

Takes all flags of the command train; --model_weight_file is needed, and --data_path or --images. The command evaluate
evaluates the file of a data set. If interrupted, run the same command again to resume.
"""

import argparse

from aligned_reid.cli import OneLineParser, parse_path
from aligned_reid.config import Config


def main() -> None:
    parser = OneLineParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save_file", type=parse_path, required=True, help="the file to write, e.g. features.h5")
    parser.add_argument("--images", type=parse_path, help="a folder of images, of persons and cameras not known")
    own, others = parser.parse_known_args()
    config = Config.from_arguments([*others, "--only_test=true"])
    if own.images and config.data_path:
        parser.error("give --data_path or --images, not both")
    from aligned_reid.run import run_extraction  # torch takes seconds to import

    run_extraction(config, own.save_file, own.images)
