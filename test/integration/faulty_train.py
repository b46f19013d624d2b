"""train.py with a fault: python faulty_train.py <fault> <rank> <step> <folder> <flags of train.py>.

test_ranks.py runs it. In the folder, `attempts` gets a letter for every attempt of rank 0. All faults but `mistake`
happen in the first attempt only.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from conftest import make_small_trunk  # noqa: E402

from aligned_reid import model, preflight  # noqa: E402
from aligned_reid.cli import run_command  # noqa: E402
from aligned_reid.config import Config  # noqa: E402
from aligned_reid.data.dataset import TrainImages  # noqa: E402
from aligned_reid.errors import InputError  # noqa: E402
from aligned_reid.objective import Objective  # noqa: E402
from aligned_reid.run import run  # noqa: E402


def mistake() -> None:
    raise InputError("the flags are wrong")


STALL_SECONDS = 0.5  # of every step, with the fault `stall`
FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: time.sleep(3600),
    "hang_loading": lambda: time.sleep(3600),
    "mistake": mistake,
}


def at_step(function, step, fault):
    """`function`, whose `step`-th call begins with `fault`."""
    calls = 0

    def counted(*given, **named):
        nonlocal calls
        calls += 1
        if calls == step:
            FAULTS[fault]()
        return function(*given, **named)

    return counted


def stalled(function):
    """`function`, which takes STALL_SECONDS longer."""

    def slow(*given, **named):
        time.sleep(STALL_SECONDS)
        return function(*given, **named)

    return slow


def main() -> None:
    fault, rank, step, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    for module in (model, preflight):
        module.make_trunk = make_small_trunk
    own_rank = int(os.environ["RANK"])
    happened = folder / "happened"
    if own_rank == 0:
        with open(folder / "attempts", "a") as attempts:
            attempts.write("a")
    if fault in FAULTS and own_rank == rank and (fault == "mistake" or not happened.exists()):
        happened.touch()
        if fault == "hang_loading":
            TrainImages._write = at_step(TrainImages._write, 8 * (step - 1) + 1, fault)
        else:
            Objective.__call__ = at_step(Objective.__call__, step, fault)
    if fault == "stall" and own_rank == rank:
        Objective.__call__ = stalled(Objective.__call__)
    run(Config.from_arguments(sys.argv[5:]))


if __name__ == "__main__":
    run_command(main)
