"""Train with kills: python kill_and_resume.py <data> <folder> <kills> <ranks> <workers>, for test_resume_command.py.

Every attempt is forked from this process, which has imported everything and computed nothing. A rank kills itself at a
random moment of a random step, which may be while a checkpoint is written; the next attempt resumes.
"""

import os
import random
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from conftest import make_small_trunk  # noqa: E402

from aligned_reid import model, objective, preflight, run  # noqa: E402
from aligned_reid.config import Config  # noqa: E402
from aligned_reid.launcher import free_port  # noqa: E402
from aligned_reid.training import trainer  # noqa: E402

MOMENTS = ("loss", "step", "write", "keep", "rename")


def kill_at(moment: str, step: int) -> None:
    """Kill this process at `moment` of its `step`-th step, or of the first later one that has it."""
    steps = 0

    def counted(function, here, before=True):
        def call(*given, **named):
            nonlocal steps
            steps += here == "loss"
            if here == moment and steps >= step:
                if not before:
                    function(*given, **named)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)

        return call

    objective.Objective.__call__ = counted(objective.Objective.__call__, "loss")
    trainer.Trainer.save_or_stop = counted(trainer.Trainer.save_or_stop, "step")
    torch.save = counted(torch.save, "write", before=False)
    os.link = counted(os.link, "keep", before=False)
    Path.replace = counted(Path.replace, "rename")


def attempt(config: Config, ranks: int, victim: int | None, moment: str, step: int) -> bool:
    """Train in `ranks` processes; whether all of them finished."""
    children, port = [], free_port()
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if rank == victim:
            kill_at(moment, step)
        status = 1
        try:
            run.run(config)
            status = 0
        finally:
            os._exit(status)
    first, status = os.wait()
    children.remove(first)
    if status:  # as the launcher does
        for child in children:
            os.kill(child, signal.SIGKILL)
    return not any([status, *(os.waitpid(child, 0)[1] for child in children)])


def main() -> None:
    data, folder, kills, ranks, workers = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
    for module in (model, preflight):
        module.make_trunk = make_small_trunk
    common = {"data_path": data, "pretrained": "none", "resize_h_w": (64, 32), "ids_per_batch": 3, "ims_per_id": 2}
    common |= {"workers": workers, "seed": 1, "l_loss_weight": 1.0, "id_loss_weight": 1.0, "amp": "O0", "device": "cpu"}
    common |= {"total_epochs": 3 + kills, "exp_decay_at_epoch": 2, "checkpoint_every_steps": 1}
    assert attempt(Config(**common, exp_dir=str(folder / "whole")), ranks, None, "", 0)

    config = Config(**common, exp_dir=str(folder / "killed"))
    draw = random.Random(kills)
    for number in range(kills):
        victim = draw.randrange(ranks)
        moment = draw.choice(MOMENTS if victim == 0 else MOMENTS[:2])
        print(f"kill {number + 1}: rank {victim}, {moment}", flush=True)
        if (folder / "killed" / "ckpt.pth").exists():
            config = Config(**common, exp_dir=str(folder / "killed"), resume=True)
        assert not attempt(config, ranks, victim, moment, draw.randint(1, 4)), "no rank was killed"
    assert attempt(Config(**common, exp_dir=str(folder / "killed"), resume=True), ranks, None, "", 0)


if __name__ == "__main__":
    main()
