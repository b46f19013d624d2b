"""A run's output: console, log.txt, tensorboard, and the means of an epoch."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from aligned_reid.device import Accelerator
from aligned_reid.distributed import sum_over_ranks

RANK_LOG = "ALIGNED_REID_RANK_LOG"  # set by rank.py


class Log:
    """Lines for the console and, in a run folder, log.txt; scalars for tensorboard.

    Ranks other than 0 print only if the launcher gives each rank a log file.
    """

    def __init__(self, folder: Path | None, *, is_main: bool = True) -> None:
        self.is_main = is_main
        self.prints = is_main or RANK_LOG in os.environ
        self.file: TextIO | None = None
        self.writer: Any = None
        if is_main and folder is not None:
            self.file = open(folder / "log.txt", "a", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
            self.folder = folder

    def __call__(self, line: str = "") -> None:
        if not self.prints:
            return
        print(line, flush=True)
        if self.file:
            self.file.write(line + "\n")
            self.file.flush()

    def scalars(self, values: Mapping[str, float], epoch: int) -> None:
        """Write an epoch's means to tensorboard."""
        if self.file is None:
            return
        if self.writer is None:
            from tensorboardX import SummaryWriter  # half a second to import, and only training needs it

            self.writer = SummaryWriter(str(self.folder / "tensorboard"))
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.file is not None:
            self.file.close()


class Meters:
    """Means of named scalars over an epoch's steps. Sums stay on the device, and only `means` waits for it."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.names: list[str] = []
        self.count = 0

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's scalars; every step has the same names."""
        self.names = list(values)
        step = torch.stack([value.detach().to(torch.float32) for value in values.values()])
        self.sums = step if self.sums is None else self.sums + step
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint in the middle of an epoch keeps."""
        return {"names": self.names, "sums": self.sums, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.names, self.count = list(state["names"]), int(state["count"])
        self.sums = None if state["sums"] is None else state["sums"].to(device)

    def means(self) -> dict[str, float]:
        if self.sums is None:
            return {}
        return dict(zip(self.names, (self.sums / self.count).tolist(), strict=True))


class Throughput:
    """Images of all ranks per second of wall time, without the process's first steps, which warm up caches and kernels.

    An epoch of such steps only is timed as a whole.
    """

    WARM_UP_STEPS = 2

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.num_steps = self.images = 0  # of all epochs
        self.seconds = 0.0

    def start_epoch(self) -> None:
        self.epoch_start = self.timed_start = time.monotonic()
        self.epoch_images = self.timed_images = 0

    def add(self, num_images: int) -> None:
        """Count one step's images."""
        self.num_steps += 1
        self.epoch_images += num_images
        self.timed_images += num_images
        if self.num_steps == self.WARM_UP_STEPS:
            self.accelerator.synchronize()
            self.timed_start, self.timed_images = time.monotonic(), 0

    def end_epoch(self) -> tuple[float, float]:
        """Seconds of the epoch, and images per second."""
        self.accelerator.synchronize()
        now = time.monotonic()
        start, images = self.timed_start, self.timed_images
        if images == 0:
            start, images = self.epoch_start, self.epoch_images
        images = int(sum_over_ranks(torch.tensor(float(images), device=self.accelerator.device)).item())
        self.seconds += now - start
        self.images += images
        return now - self.epoch_start, images / (now - start)


def format_epoch(epoch: int, seconds: float, fps: float | None, ims_per_id: int, means: Mapping[str, float]) -> str:
    """The reference's line of an epoch, with images and identities per second; tools read its fields by position."""
    parts = [f"Ep {epoch}", f"{seconds:.2f}s"]
    if fps is not None:
        parts += [f"FPS {fps:.2f}", f"ids/s {fps / ims_per_id:.2f}"]
    for name, value in means.items():
        is_share = name.partition(".")[0] in ("gp", "gm", "lp", "lm")
        parts.append(f"{name} {value:.2%}" if is_share else f"{name} {value:.4f}")
    return ", ".join(parts)
