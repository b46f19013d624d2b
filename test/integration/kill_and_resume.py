"""Train with kills: python kill_and_resume.py <data> <folder> <kills> <ranks> <workers>, for test_resume_command.py.

Every attempt is forked from this process, which has imported everything and computed nothing. A rank kills itself at a
random moment of a random step, which may be while a checkpoint is written; the next attempt resumes.
"""

import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import torch
from conftest import tiny_config, use_small_trunk
from small_train import kill, run_before

from aligned_reid.config import Config
from aligned_reid.launcher import free_port
from aligned_reid.objective import Objective
from aligned_reid.run import run
from aligned_reid.training.trainer import Trainer

MOMENTS = {
    "loss": (Objective, "__call__"),
    "step": (Trainer, "save_or_stop"),
    "write": (torch, "save"),
    "keep": (os, "link"),
    "rename": (Path, "replace"),
}


def train(config: Config, rank: int, ranks: int, port: int, moment: str, step: int) -> None:
    """Train as a rank, which kills itself at the first `moment` after the start of the `step`-th step."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if moment:
        run_before(Objective, "__call__", lambda *_: run_before(*MOMENTS[moment], kill, 1), step)
    run(config)


def attempt(config: Config, ranks: int, victim: int = -1, moment: str = "", step: int = 0) -> bool:
    """Train in `ranks` processes; whether all of them finished."""
    fork, port = multiprocessing.get_context("fork"), free_port()
    settings = [(config, rank, ranks, port, moment if rank == victim else "", step) for rank in range(ranks)]
    processes = [fork.Process(target=train, args=one) for one in settings]
    for process in processes:
        process.start()
    while all(process.exitcode is None for process in processes):
        time.sleep(0.01)
    if any(process.exitcode for process in processes):  # as the launcher does
        for process in processes:
            process.kill()
    for process in processes:
        process.join()
    return not any(process.exitcode for process in processes)


def main() -> None:
    data, folder, kills, ranks, workers = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
    use_small_trunk()
    settings = {"workers": workers, "ids_per_batch": 3, "l_loss_weight": 1.0, "id_loss_weight": 1.0}
    settings |= {"total_epochs": 3 + kills, "exp_decay_at_epoch": 2, "checkpoint_every_steps": 1}
    assert attempt(tiny_config(data, folder / "whole", **settings), ranks)

    def killed() -> Config:
        run_dir = folder / "killed"
        return tiny_config(data, run_dir, **settings, resume=(run_dir / "ckpt.pth").exists())

    draw = random.Random(kills)
    for number in range(kills):
        victim = draw.randrange(ranks)
        moment = draw.choice(list(MOMENTS) if victim == 0 else ["loss", "step"])
        print(f"kill {number + 1}: rank {victim}, {moment}", flush=True)
        assert not attempt(killed(), ranks, victim, moment, draw.randint(1, 4)), "no rank was killed"
    assert attempt(killed(), ranks)


if __name__ == "__main__":
    main()
