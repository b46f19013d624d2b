"""Time and memory of the local loss, forward and backward, compared with the published form and its 64-step program.

    python benchmark/local_loss.py [--sizes=128,512] [--rounds=3]

benchmark/training.py prints the same table. The batches have `sizes` images, 4 per identity, with 8 random stripes of
128 numbers each. Both sides mine by local distance. Each turn runs in a new process, and its first call is not timed.
Memory is the process's peak minus what it held with its inputs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from blocks import forget_peak_memory, in_own_processes, memory, peak_memory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training_published import IMS_PER_ID, MARGIN, published_local_loss

from aligned_reid.cli import parse_ints
from aligned_reid.device import keep_freed_memory
from aligned_reid.losses import TripletLoss, local_loss

STRIPES, CHANNELS = 8, 128
SIDES = ("published", "ours")
CALLS = 3  # timed calls per turn
WARM_UP_SIZE = 4 * IMS_PER_ID


class LocalTurn(NamedTuple):
    loss: float
    seconds: float
    megabytes: float


def make_loss(side: str, feat: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if side == "published":
        return published_local_loss(feat, labels)
    return local_loss(TripletLoss(MARGIN), feat, labels)[0]


def inputs(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    feat = torch.randn(size, STRIPES, CHANNELS, generator=torch.Generator().manual_seed(0))
    return feat.requires_grad_(), torch.arange(size // IMS_PER_ID).repeat_interleave(IMS_PER_ID)


def measure(side: str, size: int) -> LocalTurn:
    """One side's turn, in a new process."""
    if side == "ours":
        keep_freed_memory()  # as in a run on a CPU
    small, small_labels = inputs(WARM_UP_SIZE)
    make_loss(side, small, small_labels).backward()  # loads the library's code, which should not count
    feat, labels = inputs(size)
    before = memory()
    forget_peak_memory()
    seconds = []
    for _ in range(CALLS + 1):
        feat.grad = None
        start = time.perf_counter()
        loss = make_loss(side, feat, labels)
        loss.backward()
        seconds.append(time.perf_counter() - start)
    return LocalTurn(loss.item(), statistics.median(seconds[1:]), peak_memory() - before)


def local_turns(sizes: tuple[int, ...], rounds: int) -> dict[tuple[str, int], LocalTurn]:
    """The loss, median seconds per call and peak memory for each side and size. Exits if the losses differ."""
    turns: dict[tuple[str, int], list[LocalTurn]] = {(side, size): [] for size in sizes for side in SIDES}
    for _ in range(rounds):
        for (side, size), measured in turns.items():
            measured += in_own_processes(measure, [(side, size)])
    for size in sizes:
        published, ours = (turns[side, size][0].loss for side in SIDES)
        if abs(published - ours) > 1e-4 * abs(published):
            raise SystemExit(f"the local losses of {size} images differ: {published} and {ours}")
    return {
        which: LocalTurn(
            measured[0].loss,
            statistics.median(turn.seconds for turn in measured),
            max(turn.megabytes for turn in measured),
        )
        for which, measured in turns.items()
    }


def local_table(turns: dict[tuple[str, int], LocalTurn]) -> str:
    rows = [
        "| local loss of | published, ms | ours, ms | times as fast | published, MB | ours, MB | share |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for size in sorted({size for _, size in turns}):
        published, ours = (turns[side, size] for side in SIDES)
        rows.append(
            f"| {size} images | {1e3 * published.seconds:,.1f} | {1e3 * ours.seconds:,.1f} "
            f"| {published.seconds / ours.seconds:.1f} | {published.megabytes:,.1f} | {ours.megabytes:,.1f} "
            f"| {ours.megabytes / published.megabytes:.0%} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=parse_ints, default=(128, 512))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(local_table(local_turns(arguments.sizes, arguments.rounds)))


if __name__ == "__main__":
    main()
