"""What a rank's process runs for a moment, before the command takes its place: see launcher.py.

It is run by itself, and imports nothing of the package: a rank's path may hold anything.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
JOB_VARIABLES = ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


def pipe_path(folder: str, local_rank: int | str, descriptor: int) -> str:
    return os.path.join(folder, f"{local_rank}.{descriptor}")


def become_command(command: Sequence[str], remove: Iterable[str] = (*RANK_VARIABLES, *JOB_VARIABLES)) -> NoReturn:
    """Replace this process by the command, without what another launcher may have left in the environment."""
    environment = {name: value for name, value in os.environ.items() if name not in set(remove)}
    sys.stdout.flush()
    os.execvpe(command[0], list(command), {**environment, "PYTHONUNBUFFERED": "1"})


def become_rank(folder: str, command: Sequence[str]) -> NoReturn:
    """What the agent starts as a rank: connect the output to the launcher's pipes, then become the command."""
    if sys.platform == "linux":  # no rank outlives a launcher that was killed: PR_SET_PDEATHSIG is 1
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getsid(0) != os.getpid():  # torch 2.1 leaves it in the launcher's, where a Ctrl-C would reach it twice
        os.setsid()
    local_rank = os.environ["LOCAL_RANK"]
    for descriptor in (1, 2):
        pipe = os.open(pipe_path(folder, local_rank, descriptor), os.O_WRONLY)
        os.dup2(pipe, descriptor)
        os.close(pipe)
    Path(folder, f"{local_rank}.pid").write_text(str(os.getpid()))
    os.environ["ALIGNED_REID_RANK_LOG"] = "1"  # see training/log.py
    # torchrun would set 1 thread, which is right for a GPU and wastes a CPU.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"]))))
    become_command(command, remove=())


if __name__ == "__main__":
    become_rank(sys.argv[1], sys.argv[2:])
