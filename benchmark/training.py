"""Training compared with the published loop, in one run: tables of training, scaling, loading and the local loss.

    python benchmark/training.py --data_path=<prepared data set> [--resize_h_w=256,128] [--steps=2] [--rounds=1]
        [--only=training|scaling|loader|local]

Training: images/s of the published loop, of ours, of ours with flags that save time or memory, and of the bare step
(forward, backward and optimizer of the same model on random images). Scaling: ours in one process with all cores, and
in two that share cores and batch. Loading and the local loss: see benchmark/loader.py and local_loss.py.

The published loop is the reference's algorithm, line for line, on current torch: PIL decoding and float64 normalization
in two threads, float32 NCHW, Adam, mining by boolean masks, figures read back in every step. All sides train a randomly
initialized ResNet-50 on the same images with 32 x 4 images per step, loading included. They take turns in blocks of
steps. Each block runs in its own process, so that none has the memory or memory settings of another, and its first step
is not timed. Rates are medians over the steps. Memory is the peak of a process (VmHWM, Linux only), without its loading
workers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from blocks import Block, in_own_processes
from loader import loader_rates, loader_table
from local_loss import local_table, local_turns
from training_ours import bare_block, our_block, our_rank
from training_published import IMS_PER_ID, published_block

from aligned_reid.config import Config
from aligned_reid.data import TrainImages, open_data
from aligned_reid.data.sampler import IdentityBatchSampler
from aligned_reid.errors import InputError
from aligned_reid.flags import parse_height_width
from aligned_reid.launcher import free_port

SUBJECTS = ("training", "scaling", "loader", "local")
NUM_RANKS = 2


class Side(NamedTuple):
    """One side of the comparison: its title, its settings, and the number of processes."""

    title: str
    settings: dict[str, Any] = {}
    num_ranks: int = 1
    batch_parts: int = 1  # ids_per_batch is divided by this


SHARED = {"id_sampling": "sharded"}
SIDES = {
    "published": Side("published, float32 NCHW"),
    "live": Side("ours"),
    "cached": Side("ours, --cache true", {"cache": True}),
    "accumulated": Side("ours, --accumulate 2, half the --ids_per_batch", {"accumulate": 2}, batch_parts=2),
    "frozen": Side("ours, --freeze_stages 1", {"freeze_stages": 1}),
    "bare": Side("bare step, random images"),
    "ranks": Side("2 processes", SHARED, NUM_RANKS, NUM_RANKS),
    "mined": Side("2 processes, --cross_rank_mining true", {**SHARED, "cross_rank_mining": True}, NUM_RANKS, NUM_RANKS),
}
SIDES_OF = {
    "training": ("published", "live", "cached", "accumulated", "frozen", "bare"),
    "scaling": ("published", "live", "ranks", "mined"),
}


def config_of(side: Side, arguments: argparse.Namespace) -> Config:
    return Config(
        data_path=arguments.data_path,
        resize_h_w=arguments.resize_h_w,
        ids_per_batch=arguments.ids_per_batch // side.batch_parts,
        ims_per_id=IMS_PER_ID,
        workers=arguments.workers,
        pretrained="none",
        seed=0,
        **side.settings,
    ).checked()


def take_turn(name: str, arguments: argparse.Namespace, cache_folder: Path) -> list[Block]:
    """Run a block of one side; return the measurements of each of its processes."""
    side = SIDES[name]
    config = config_of(side, arguments)
    if name == "published":
        return in_own_processes(published_block, [(config, arguments.steps)])
    if name == "bare":
        return in_own_processes(bare_block, [(config, arguments.steps)])
    if side.num_ranks == 1:
        return in_own_processes(our_block, [(config, arguments.steps, cache_folder)])
    port = free_port()
    ranks = [(config, arguments.steps, cache_folder, rank, side.num_ranks, port) for rank in range(side.num_ranks)]
    return in_own_processes(our_rank, ranks)


class Measured(NamedTuple):
    """All blocks of a side: median seconds per step, peak memory of a process in MB, device."""

    seconds: float
    megabytes: float
    device: str


def train_by_turns(names: list[str], arguments: argparse.Namespace) -> dict[str, Measured]:
    blocks: dict[str, list[Block]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            for name in names:
                turn = take_turn(name, arguments, Path(folder))
                steps = ", ".join(f"{seconds:.2f}" for seconds in turn[0].seconds)
                print(f"{SIDES[name].title}: {steps} s a step", file=sys.stderr, flush=True)
                blocks[name] += turn
    return {
        name: Measured(
            statistics.median(seconds for block in measured for seconds in block.seconds),
            max(block.megabytes for block in measured),
            measured[0].device,
        )
        for name, measured in blocks.items()
    }


def training_table(measured: dict[str, Measured], batch: int) -> str:
    """Images/s, seconds per step, ratios and memory of each side."""
    rows = [
        "| training, loading included | images/s | s a step | to published | of the bare step | MB at most |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    published, bare = measured["published"].seconds, measured["bare"].seconds
    for name in SIDES_OF["training"]:
        seconds, megabytes, _ = measured[name]
        rows.append(
            f"| {SIDES[name].title} | {batch / seconds:.2f} | {seconds:.2f} | {published / seconds:.2f} "
            f"| {bare / seconds:.1%} | {megabytes:,.0f} |"
        )
    return "\n".join(rows)


def scaling_table(measured: dict[str, Measured], batch: int) -> str:
    """The same for one process and for two that share the batch."""
    rows = [
        "| scaling | device of a process | images/s of all | to published | to one process | MB at most, of each |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    published, one = measured["published"].seconds, measured["live"].seconds
    for name in SIDES_OF["scaling"][1:]:
        seconds, megabytes, device = measured[name]
        title = "1 process" if name == "live" else SIDES[name].title
        rows.append(
            f"| {title} | {device.partition(', torch')[0]} | {batch / seconds:.2f} | {published / seconds:.2f} "
            f"| {one / seconds:.2f} | {megabytes:,.0f} |"
        )
    return "\n".join(rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--resize_h_w", type=parse_height_width, default=(256, 128))
    parser.add_argument("--ids_per_batch", type=int, default=32, help=f"identities per step, {IMS_PER_ID} images each")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per block")
    parser.add_argument("--rounds", type=int, default=1, help="blocks per side")
    parser.add_argument("--workers", type=int, default=1, help="loading workers of each process of ours")
    parser.add_argument("--only", choices=SUBJECTS, help="a single table (default: all)")
    arguments = parser.parse_args()
    if arguments.ids_per_batch < 2 * NUM_RANKS or arguments.ids_per_batch % NUM_RANKS:
        parser.error("--ids_per_batch must be even and at least 4: two processes share it")
    if min(arguments.steps, arguments.rounds) < 1:
        parser.error("--steps and --rounds must be at least 1")
    try:
        images = TrainImages(open_data(arguments.data_path))
        epoch = len(IdentityBatchSampler(images.person_ids, arguments.ids_per_batch, IMS_PER_ID, False, 0))
    except InputError as error:
        parser.error(str(error))
    if arguments.steps >= epoch:
        parser.error(f"--steps {arguments.steps} and the untimed step exceed the {epoch} steps of an epoch")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    subjects = [arguments.only] if arguments.only else SUBJECTS
    names = [name for name in SIDES if any(name in SIDES_OF.get(subject, ()) for subject in subjects)]
    tables = []
    if names:
        measured = train_by_turns(names, arguments)
        batch = arguments.ids_per_batch * IMS_PER_ID
        height, width = arguments.resize_h_w
        print(f"{measured['live'].device}; {arguments.ids_per_batch} x {IMS_PER_ID} images of {height} x {width}\n")
        makers = {"training": training_table, "scaling": scaling_table}
        tables += [make(measured, batch) for subject, make in makers.items() if subject in subjects]
    if "loader" in subjects:
        tables.append(loader_table(loader_rates(arguments.data_path, arguments.resize_h_w)))
    if "local" in subjects:
        tables.append(local_table(local_turns((128, 512), arguments.rounds)))
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
