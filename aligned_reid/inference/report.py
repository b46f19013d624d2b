"""The report of a test: a folder with index.html that opens from the disk, without a network or a server.

index.html holds the figures and charts. data.js has each query's nearest images by each distance, as numbers, so that a
browser reads thousands of queries at once and draws the rows that are seen. images/ has a thumbnail of each image once.
pairs/ has the alignments of PAIR_QUERIES queries a file, read when one of them is opened: stripe costs in steps of
1 / 255 and the path, from which the page draws the picture. Drawing all beforehand would take hours and gigabytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aligned_reid.config import Config
from aligned_reid.data.dataset import TestImages, open_data
from aligned_reid.data.partitions import MULTI_QUERY
from aligned_reid.data.prepare.sources import shown
from aligned_reid.data.transforms import decode_image
from aligned_reid.device import available_memory
from aligned_reid.distance import normalize
from aligned_reid.errors import InputError
from aligned_reid.evaluation.evaluate import load_for_test, settle_test
from aligned_reid.evaluation.extract import FeatureSet
from aligned_reid.evaluation.features import read_features
from aligned_reid.evaluation.kernels import in_threads
from aligned_reid.evaluation.protocol import TITLES, EvaluationSettings, LabelArrays
from aligned_reid.evaluation.saved import MATRIX_BYTES, join, matrix_bytes, read_tables
from aligned_reid.evaluation.verification import DECIDING_RATE, verification_curve
from aligned_reid.files import write_file
from aligned_reid.inference.charts import cmc_chart, histogram_chart, roc_chart, training_charts
from aligned_reid.inference.findings import Findings, Split, find
from aligned_reid.inference.grid import Grid, make_grid, pairs_of
from aligned_reid.inference.html import data_uri, thumbnail, write_page
from aligned_reid.preflight import make_empty
from aligned_reid.run import CONFIG_NAME, run_extraction
from aligned_reid.weights import CHECKPOINT_NAME, SAFETENSORS_NAME, digest_of, read_weight_file

FEATURES_NAME = "features.h5"
PAGE_NAME, DATA_NAME = "index.html", "data.js"
PAIR_QUERIES = 32  # queries whose alignments stand in one file
WORST = 200  # queries in a single file


class Test(NamedTuple):
    """A test whose features are known."""

    features: FeatureSet  # of N images, as the test compares them
    split: Split
    names: list[str]  # N
    images_dir: Path
    source: Path
    training_log: str  # empty if unknown

    @property
    def stripes(self) -> int:
        return 0 if self.features.local_feat is None else self.features.local_feat.shape[1]


def write_report(
    source: str | Path,
    out_dir: str | Path,
    *,
    data_path: str | Path | None = None,
    re_ranked: bool = True,
    device: str = "auto",
    single_file: bool = False,
    log: Callable[[str], None] = print,
) -> Path:
    """Write the report of a run folder or a feature file; returns the path of its page.

    source: a run folder, whose test images are extracted into its features.h5 unless that is there and of these
    weights; or a feature file. data_path: the prepared data set of the images; a run folder names its own. single_file:
    one page with the WORST queries and all they need. Raises InputError if something is missing or too large, and if
    out_dir holds anything but an earlier report.
    """
    out_dir = Path(out_dir)
    make_empty(out_dir, "--out", ours=PAGE_NAME)  # else images/ of a data set could be overwritten
    test = open_test(Path(source), data_path, device, log)
    check_size(test, re_ranked)
    findings = find(test.features, test.split, EvaluationSettings(re_ranked=re_ranked), log)
    queries = list(range(len(test.split.query_ids)))
    if single_file:
        worst_first = [math.inf if ap is None else ap for ap in findings.ap["global"]]  # without a match: last
        queries = sorted(queries, key=worst_first.__getitem__)[:WORST]
    grid = make_grid(findings, test.split, test.names, queries, test.stripes)
    inlined = None
    try:
        if single_file:
            inlined = data_in_page(test, grid)
        else:
            (out_dir / PAGE_NAME).touch()  # the same command can be repeated in the folder if this one is interrupted
            write_files(out_dir, test, grid)
    except OSError as error:
        raise InputError(f"cannot write {error.filename or out_dir}: {error.strerror}") from error
    write_page(out_dir / PAGE_NAME, "report.html", inlined=inlined, **page_values(test, findings, queries))
    return out_dir / PAGE_NAME


def open_test(source: Path, data_path: str | Path | None, device: str, log: Callable[[str], None]) -> Test:
    """The features and labels that `write_report` is given, and where their images are."""
    training_log = ""
    features_path = source
    if not source.exists():
        raise InputError(f"{shown(source)} does not exist; give a run folder or a feature file")
    if source.is_dir():
        data_path = data_path or data_path_of(source)
        features_path = extract_run(source, data_path, device, log)
        if (source / "log.txt").is_file():
            training_log = (source / "log.txt").read_text(encoding="utf-8", errors="replace")
    elif data_path is None:
        raise InputError(f"{source}: --data_path has to name the data set whose features these are, for its images")
    data = open_data(data_path)
    tables, local = read_tables([features_path], None, log)
    names = tables[0].image_names
    if names is None:
        raise InputError(f"{features_path} has no field image_name, which the pictures need")
    features, labels = join(tables, local)
    if tables[0].made_by.get("normalize_feature"):
        features = FeatureSet(*(feat if feat is None else normalize(feat) for feat in features))  # type: ignore[arg-type]
    return Test(features, Split.of(labels), names, data.images_dir, source, training_log)


def data_path_of(run_dir: Path) -> str:
    """The data set that a run was trained on or tested on."""
    try:
        return str(json.loads((run_dir / CONFIG_NAME).read_text(encoding="utf-8"))["data_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        advice = "give a run folder, or a feature file and --data_path"
        raise InputError(f"{run_dir} has no readable {CONFIG_NAME}: {advice}") from error


def extract_run(run_dir: Path, data_path: str | Path, device: str, log: Callable[[str], None]) -> Path:
    """The run's feature file, extracted now unless it is there and of the run's weights and test images."""
    path = run_dir / FEATURES_NAME
    weights = run_dir if (run_dir / CHECKPOINT_NAME).is_file() else run_dir / SAFETENSORS_NAME
    config = Config.of(data_path=str(data_path), model_weight_file=str(weights), device=device, only_test=True)
    if not (path.is_file() and is_of(path, config)):
        run_extraction(config, path, log=log)
    return path


def is_of(features_path: Path, config: Config) -> bool:
    """Whether a feature file is of the weights and of the test images that the config names."""
    content, unshown = read_weight_file(config.model_weight_file), list[str]()
    model, _ = load_for_test(settle_test(config, content, unshown.append), content, unshown.append)
    table = read_features(features_path)
    images = TestImages(open_data(config.data_path), include_multi_query=MULTI_QUERY in table.marks)
    if (table.made_by.get("weights"), table.image_names) != (digest_of(model.state_dict()), images.image_names):
        return False
    return all(np.array_equal(getattr(images, name), getattr(table, name)) for name in LabelArrays._fields)


def check_size(test: Test, re_ranked: bool) -> None:
    """Raise InputError if the distance matrices do not fit into memory."""
    num_query, num_gallery = len(test.split.query_ids), len(test.split.gallery_ids)
    if 0 in (num_query, num_gallery):
        raise InputError(f"{test.source} has no {'gallery images' if num_query else 'queries'}; both are needed")
    matrices = matrix_bytes(num_query, num_gallery, re_ranked and test.stripes > 0)
    if matrices > min(MATRIX_BYTES, available_memory()):
        advice = "use --re_ranked false" if re_ranked and test.stripes else "report on fewer queries"
        raise InputError(f"{test.source}: the distances take {matrices / 1e9:,.1f} GB of memory: {advice}")


def read_thumbnail(test: Test, row: int) -> bytes:
    return thumbnail(decode_image(test.images_dir / test.names[row]))


def write_files(out_dir: Path, test: Test, grid: Grid) -> None:
    """Everything beside the page: thumbnails, the grid's data, and alignments."""
    for folder in ("images", "pairs"):
        (out_dir / folder).mkdir(exist_ok=True)

    def write_thumbnail(number: int) -> None:
        (out_dir / "images" / f"{number}.jpg").write_bytes(read_thumbnail(test, grid.rows[number]))

    def write_script(path: Path, function: str, *values: Any) -> None:
        arguments = ",".join(json.dumps(value, separators=(",", ":")) for value in values)
        write_file(path, f"{function}({arguments})\n".encode())

    in_threads(write_thumbnail, range(len(grid.rows)))
    local_feat = test.features.local_feat
    num_queries = len(grid.data["queries"])
    for number, first in enumerate(range(0, num_queries, PAIR_QUERIES)):
        if local_feat is not None:
            chosen = range(first, min(first + PAIR_QUERIES, num_queries))
            write_script(out_dir / "pairs" / f"{number}.js", "addPairs", number, pairs_of(grid, local_feat, chosen))
    write_script(out_dir / DATA_NAME, "showReport", {**grid.data, "pairQueries": PAIR_QUERIES})


def data_in_page(test: Test, grid: Grid) -> dict[str, Any]:
    """What write_files writes, for a page that holds everything."""
    local_feat = test.features.local_feat
    chosen = range(len(grid.data["queries"]))
    pairs = {} if local_feat is None else pairs_of(grid, local_feat, chosen)
    thumbnails = in_threads(lambda row: data_uri(read_thumbnail(test, row)), grid.rows)
    return {**grid.data, "pairQueries": len(chosen), "pairs": pairs, "thumbnails": thumbnails}


def page_values(test: Test, findings: Findings, queries: list[int]) -> dict[str, Any]:
    """The values of templates/report.html, without the grid's data."""
    curves = {name: verification_curve(findings.pairs[name]) for name in sorted(findings.pairs)}
    thresholds = {name: (curve["at_fmr"][DECIDING_RATE] or {}).get("threshold") for name, curve in curves.items()}
    histograms = [
        histogram_chart(f"{TITLES[name]} of pairs from different cameras", findings.pairs[name], thresholds[name])
        for name in curves
    ]
    order = [name for name in reversed(TITLES) if name in findings.scores]
    cameras = sorted({camera for pair in findings.rank1 for camera in pair})
    return {
        "source": shown(test.source),
        "num_query": len(test.split.query_ids),
        "num_gallery": len(test.split.gallery_ids),
        "num_shown": len(queries),
        "scores": [(TITLES[name], findings.scores[name]) for name in order],
        "curves": [(TITLES[name], curve) for name, curve in curves.items()],
        "plots": [cmc_chart(findings.cmc), roc_chart(curves), *histograms],
        "training": training_charts(test.training_log),
        "cameras": cameras,
        "rank1": findings.rank1,
        "people": np.unique(test.split.query_ids).tolist(),
        "query_cameras": np.unique(test.split.query_cams).tolist(),
    }
