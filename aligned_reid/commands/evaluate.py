"""Evaluate saved features, without a model or images.

--features takes the output of the command extract, or any .h5, .npz or .mat file with the fields global [N, D],
person_id, camera, mark (0 query, 1 gallery, 2 multi-query; each [N]) and, optionally, local [N, H, d] and image_name.
The fields of pytorch_result.mat work too: query_f, query_label, query_cam, and the same for gallery and mquery. Images
of person -1 are junk and left out.
"""

import argparse
import json
import sys

from aligned_reid.cli import OneLineParser, parse_bool, parse_path
from aligned_reid.flags import parse_local_distance


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--features",
        type=parse_path,
        required=True,
        help="file with the queries, and with gallery images unless --gallery has them",
    )
    add("--gallery", type=parse_path, nargs="+", default=[], help="more files with gallery images")
    add("--save_file", type=parse_path, help="results, as JSON (default: like --features, with .results.json)")
    add("--json", action="store_true", help="print the results as JSON, and the log on standard error")
    add(
        "--normalize_feature",
        type=parse_bool,
        help="scale features to unit length: true or false (default: as trained)",
    )
    add(
        "--use_local_distance",
        type=parse_local_distance,
        help="true, false or auto (default: auto, if all files have local features)",
    )
    add("--re_ranked", type=parse_bool, default=True, help="also evaluate re-ranked distances (default: true)")
    add("--k1", type=int, default=20, help="neighbors in re-ranking (default: 20)")
    add("--k2", type=int, default=6, help="neighbors averaged in query expansion (default: 6)")
    add("--lambda_value", type=float, default=0.3, help="weight of the original distance (default: 0.3)")
    add("--multi_query_pool", choices=["average", "max"], default="", help="also evaluate pooled queries (default: no)")
    arguments = parser.parse_args()
    if arguments.save_file is None:
        arguments.save_file = arguments.features.parent / f"{arguments.features.stem}.results.json"
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from aligned_reid.evaluation.protocol import EvaluationSettings
    from aligned_reid.evaluation.saved import evaluate_files
    from aligned_reid.files import write_file
    from aligned_reid.lock import hold
    from aligned_reid.preflight import check_save_file

    check_save_file(arguments.save_file, "--save_file", ".json")
    given = vars(arguments)
    options = {name: given[name] for name in ("re_ranked", "k1", "k2", "lambda_value", "multi_query_pool")}
    console = sys.stderr if arguments.json else sys.stdout
    with hold(arguments.save_file, "--save_file"):
        results = evaluate_files(
            [arguments.features, *arguments.gallery],
            EvaluationSettings(**options),
            lambda line: print(line, file=console),
            state=arguments.save_file.with_name(arguments.save_file.name + ".part.npz"),
            normalize_feature=arguments.normalize_feature,
            use_local=arguments.use_local_distance,
        )
        text = json.dumps(results, indent=2) + "\n"
        write_file(arguments.save_file, text.encode())
    if arguments.json:
        print(text, end="")
