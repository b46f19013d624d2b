"""Join prepared data sets into one: python script/prepare_joined.py --sources market1501 msmt17 --save_dir joined"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.cli import OneLineParser, parse_path, run_command
from aligned_reid.data.prepare.joined import prepare_joined
from aligned_reid.data.prepare.layout import describe


def main() -> None:
    """Join, print the counts, the command that trains on the join, and those that test on each set."""
    parser = OneLineParser(
        allow_abbrev=False,
        description="Join prepared data sets, identities kept apart. Images are hard links where that is possible.",
    )
    add = parser.add_argument
    add("--sources", type=parse_path, nargs="+", required=True, help="prepared folders; the first one's test is used")
    add("--save_dir", type=parse_path, required=True, help="a new folder; if interrupted, run again to resume")
    arguments = parser.parse_args()
    print(describe(prepare_joined(**vars(arguments)), dataset="joined"))
    for source in arguments.sources:
        flags = f"--only_test=true --model_weight_file=RUN --data_path={shlex.quote(str(source))}"
        print(f"test on {source}: python script/train.py {flags}")


if __name__ == "__main__":
    run_command(main)
