"""Write a report of a run or of saved features: a folder with index.html, which opens without a network.

Scores, charts, and each query with what was found for it. A run's features are extracted into its features.h5 first,
unless they are there already.
"""

import argparse
from pathlib import Path

from aligned_reid.cli import OneLineParser, parse_bool, parse_path

EXAMPLES = """
examples:
  aligned-reid report exp/first
  aligned-reid report features.h5 --data_path market1501 --out report
"""


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(
        prog="aligned-reid report",
        allow_abbrev=False,
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", type=parse_path, help="a run folder, or a feature file")
    add("--out", type=parse_path, metavar="FOLDER", help="the folder to write (default: report beside the features)")
    add("--data_path", type=parse_path, help="the data set of the images (default: the run's)")
    add("--device", default="auto", help="for a run: auto, npu, cuda or cpu (default: auto)")
    add("--re_ranked", type=parse_bool, default=True, help="also re-ranked distances: true or false (default: true)")
    add("--single_file", action="store_true", help="one page that holds all it needs, of the 200 worst queries")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from aligned_reid.inference.report import write_report

    source: Path = arguments.source
    page = write_report(
        source,
        arguments.out or (source if source.is_dir() else source.parent) / "report",
        data_path=arguments.data_path,
        re_ranked=arguments.re_ranked,
        device=arguments.device,
        single_file=arguments.single_file,
    )
    print(f"report: {page.absolute().as_uri()}")
