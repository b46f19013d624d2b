"""train.py with a small trunk: python small_train.py <fault or none> <rank> <step> <folder> <flags of train.py>.

In the folder, `attempts` gets a letter for every attempt of rank 0. A fault happens in the first attempt only, before
the step of that number or, if it is 0, before every step. The CPU has an NPU's memory layout, so that sums are taken in
the same order.
"""

import itertools
import os
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import use_small_trunk

from aligned_reid.cli import run_command
from aligned_reid.config import Config
from aligned_reid.data.dataset import TrainImages
from aligned_reid.device import Accelerator
from aligned_reid.errors import InputError
from aligned_reid.run import run
from aligned_reid.training.learner import Learner


def mistake(*_):
    raise InputError("the flags are wrong")


def kill(*_):
    signal.raise_signal(signal.SIGKILL)


FAULTS = {
    "kill": (Learner, "start_step", kill),
    "hang": (Learner, "start_step", lambda *_: time.sleep(3600)),
    "hang_loading": (TrainImages, "load", lambda *_: time.sleep(3600)),
    "stall": (Learner, "start_step", lambda *_: time.sleep(0.5)),
    "mistake": (Learner, "start_step", mistake),
    "diverge": (Learner, "start_step", lambda learner, *_: next(learner.model.parameters()).data.add_(1)),
}


def run_before(owner, name, action, call=0):
    """Run `action` before the `call`-th call of a function, or before every one."""
    function, calls = getattr(owner, name), itertools.count(1)

    def with_action(*given, **named):
        if call in (0, next(calls)):
            action(*given)
        return function(*given, **named)

    setattr(owner, name, with_action)


def main() -> None:
    fault, rank, step, folder, *flags = sys.argv[1:]
    use_small_trunk()
    Accelerator.memory_format = torch.contiguous_format
    own_rank, restarts = (os.environ.get(name, "0") for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
    if own_rank == "0":
        with open(Path(folder, "attempts"), "a") as attempts:
            attempts.write("a")
    if fault in FAULTS and (own_rank, restarts) == (rank, "0"):
        run_before(*FAULTS[fault], int(step))
    run(Config.from_arguments(flags))


if __name__ == "__main__":
    run_command(main)
