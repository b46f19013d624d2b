"""train.py with a fault: python faulty_train.py <fault> <rank> <step> <folder> <flags of train.py>.

test_ranks.py runs it. In the folder, `attempts` gets a letter for every attempt of rank 0. All faults but `mistake`
happen in the first attempt only.
"""

import itertools
import os
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from conftest import make_small_trunk  # noqa: E402

from aligned_reid import model, preflight  # noqa: E402
from aligned_reid.cli import run_command  # noqa: E402
from aligned_reid.config import Config  # noqa: E402
from aligned_reid.data.dataset import TrainImages  # noqa: E402
from aligned_reid.errors import InputError  # noqa: E402
from aligned_reid.run import run  # noqa: E402
from aligned_reid.training.learner import Learner  # noqa: E402


def mistake(*_):
    raise InputError("the flags are wrong")


@torch.no_grad()
def diverge(learner, *_):
    next(learner.model.parameters())[0] += 1


FAULTS = {
    "kill": lambda *_: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda *_: time.sleep(3600),
    "hang_loading": lambda *_: time.sleep(3600),
    "stall": lambda *_: time.sleep(0.5),  # in every step
    "mistake": mistake,
    "diverge": diverge,
}


def run_before(owner, name, fault, call=None):
    """Run `fault` before the `call`-th call of a method, or before every one."""
    method, calls = getattr(owner, name), itertools.count(1)

    def faulty(*given):
        if next(calls) == call or call is None:
            fault(*given)
        return method(*given)

    setattr(owner, name, faulty)


def main() -> None:
    fault, rank, step, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    for module in (model, preflight):
        module.make_trunk = make_small_trunk
    own_rank, happened = int(os.environ["RANK"]), folder / "happened"
    if own_rank == 0:
        with open(folder / "attempts", "a") as attempts:
            attempts.write("a")
    if fault in FAULTS and own_rank == rank and (fault == "mistake" or not happened.exists()):
        happened.touch()
        owner, method = (TrainImages, "load") if fault == "hang_loading" else (Learner, "start_step")
        run_before(owner, method, FAULTS[fault], None if fault == "stall" else step)
    run(Config.from_arguments(sys.argv[5:]))


if __name__ == "__main__":
    run_command(main)
