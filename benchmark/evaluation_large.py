"""Time and memory of streamed evaluation by gallery size, up to Market-1501 with 500,000 distractors.

    python benchmark/evaluation_large.py [--galleries=1000,4000,16000,64000,256000,516000] [--re_rank_up_to=64000]
        [--local=true] [--folder=/tmp] [--figure=docs/evaluation_scale.png] [--tables output.txt ...]

Random features of 3,368 queries, 15,913 gallery images (Market-1501's numbers) and distractors are written to
features.h5 in a temporary folder (up to 6.4 GB with local features), and evaluated as script/evaluate.py does. The
published code needs whole matrices and cannot run at these sizes. Memory is the process's peak without mapped files,
with Python and its libraries. --tables only draws the figure from the output of earlier runs.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aligned_reid.cli import parse_bool, parse_ints
from aligned_reid.evaluation import rank, re_rank_features
from aligned_reid.evaluation.features import FeatureWriter, read_features
from aligned_reid.evaluation.streaming import LargeSet, rank_streamed, re_rank_streamed

NUM_QUERY, NUM_MARKET, NUM_PEOPLE, NUM_CAMERAS = 3368, 15913, 750, 6
JUNK_SHARE = 0.17  # share of Market-1501's gallery images that are distractors
NOISE = 4.0
SHAPES = {"global": (2048,), "local": (8, 128)}
ROWS_PER_BLOCK = 8192
SAMPLE_SECONDS = 0.05


def write_features(path: Path, num_gallery: int, local: bool) -> None:
    """Write queries, then gallery images: people in several views, and distractors that are all different."""
    rng = np.random.default_rng(0)
    num = NUM_QUERY + num_gallery
    ids = rng.integers(1, NUM_PEOPLE + 1, num)
    ids[NUM_QUERY:][rng.random(num_gallery) < JUNK_SHARE] = 0
    ids[NUM_QUERY + NUM_MARKET :] = 0
    labels = {"person_id": ids, "camera": rng.integers(0, NUM_CAMERAS, num)}
    labels["mark"] = (np.arange(num) >= NUM_QUERY).astype(np.int64)
    shapes = {name: shape for name, shape in SHAPES.items() if local or name == "global"}
    centres = {name: rng.standard_normal((NUM_PEOPLE + 1, *shape), np.float32) for name, shape in shapes.items()}
    writer = FeatureWriter(path, [f"{row:08d}.jpg" for row in range(num)], labels, {"weights": "made up"}, shapes)
    for first in range(0, num, ROWS_PER_BLOCK):
        people = ids[first : first + ROWS_PER_BLOCK]
        block = {}
        for name, centre in centres.items():
            feat = NOISE * rng.standard_normal((len(people), *shapes[name]), np.float32)
            feat += np.where((people > 0).reshape(-1, *[1] * len(shapes[name])), centre[people], 0)
            block[name] = feat / np.linalg.norm(feat, axis=-1, keepdims=True)
        writer.write(first, block)
    writer.finish()


def anonymous_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return float(status.split("RssAnon:")[1].split()[0]) / 1024


def measure(function: Callable[..., Any], *given: Any) -> tuple[float, float, Any]:
    """Seconds, peak megabytes, result."""
    peak, stop = [anonymous_megabytes()], threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], anonymous_megabytes())

    thread = threading.Thread(target=sample)
    thread.start()
    start = time.perf_counter()
    result = function(*given)
    seconds = time.perf_counter() - start
    stop.set()
    thread.join()
    return seconds, peak[0], result


def compare_with_matrices(data: LargeSet, state: Path) -> None:
    """At the smallest size the streamed scores are held against those of whole matrices."""
    query, *gallery = [piece.get(slice(0, piece.num_images)) for piece in data.global_pieces]
    labels = (data.query_ids, data.gallery_ids, data.query_cams, data.gallery_cams)
    whole = rank(re_rank_features(query, torch.cat(gallery)), *labels)
    streamed = re_rank_streamed(data, 20, 6, 0.3, state)["global_re_ranked"]
    assert abs(streamed.mean_ap - whole.mean_ap) < 1e-6, (streamed.mean_ap, whole.mean_ap)


def measure_size(folder: Path, num_gallery: int, local: bool, re_rank: bool) -> list[tuple[str, float, float]]:
    """Measurements at one gallery size: name, seconds, megabytes."""
    path, state = folder / "features.h5", folder / "state.npz"
    write_features(path, num_gallery, local)
    rows = []
    for name, with_local in (("global", False), ("local, global + local", True))[: 1 + local]:
        seconds, megabytes, _ = measure(lambda with_local=with_local: rank_streamed(open_set(path, with_local)))
        rows.append((name, seconds, megabytes))
    if re_rank:
        seconds, megabytes, _ = measure(lambda: re_rank_streamed(open_set(path, False), 20, 6, 0.3, state))
        rows.append(("global, re-ranked", seconds, megabytes))
    if num_gallery <= ROWS_PER_BLOCK:
        compare_with_matrices(open_set(path, False), state)
    path.unlink()
    return rows


def open_set(path: Path, local: bool) -> LargeSet:
    """As script/evaluate.py opens it: every feature is read once and checked."""
    return LargeSet.of([read_features(path)], normalize_feature=False, local=local)


def read_rows(printed: str) -> list[tuple[int, str, float, float]]:
    """The rows of tables printed by measure_sizes."""
    rows = []
    for line in printed.splitlines():
        gallery, *others = [cell.strip() for cell in line.strip("| ").split("|")]
        if gallery.replace(",", "").isdecimal() and len(others) == 4:
            rows.append((int(gallery.replace(",", "")), others[0], float(others[2]), float(others[3])))
    return rows


def draw(rows: list[tuple[int, str, float, float]], path: Path) -> None:
    """Plot seconds and memory by gallery size, one line per distance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for name in dict.fromkeys(row[1] for row in rows):
        sizes, _, seconds, megabytes = zip(*sorted(row for row in rows if row[1] == name), strict=True)
        axes[0].loglog(sizes, seconds, "o-", label=name)
        axes[1].semilogx(sizes, np.array(megabytes) / 1024, "o-", label=name)
    for axis, title in zip(axes, ("seconds", "GB besides mapped pages"), strict=True):
        axis.set_xlabel("gallery images")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[1].set_ylim(bottom=0)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def measure_sizes(
    galleries: Sequence[int], re_rank_up_to: int, local: bool, parent: str | None = None, figure: Path | None = None
) -> None:
    """Measure each gallery size and print a table; plot it to `figure`."""
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {NUM_QUERY} queries")
    print("| gallery | distance | published | ours, s | ours, MB |")
    print("| --- | --- | --- | --- | --- |")
    rows = []
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        for num_gallery in galleries:
            re_rank = num_gallery <= re_rank_up_to
            for name, seconds, megabytes in measure_size(Path(folder), num_gallery, local, re_rank):
                print(f"| {num_gallery:,} | {name} | - | {seconds:.1f} | {megabytes:.0f} |", flush=True)
                rows.append((num_gallery, name, seconds, megabytes))
    if figure:
        draw(rows, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--galleries", type=parse_ints, default=(1000, 4000, 16000, 64000, 256000, 516000))
    parser.add_argument("--re_rank_up_to", type=int, default=64000, help="largest gallery to re-rank (quadratic time)")
    parser.add_argument("--local", type=parse_bool, default=True)
    parser.add_argument("--folder", default=None, help="folder for the features (default: a temporary one)")
    parser.add_argument("--figure", type=Path, default=None)
    parser.add_argument("--tables", type=Path, nargs="+", help="output of earlier runs, for --figure")
    arguments = parser.parse_args()
    if arguments.tables:
        if not arguments.figure:
            parser.error("--tables needs --figure")
        draw([row for path in arguments.tables for row in read_rows(path.read_text())], arguments.figure)
        return
    measure_sizes(arguments.galleries, arguments.re_rank_up_to, arguments.local, arguments.folder, arguments.figure)


if __name__ == "__main__":
    main()
