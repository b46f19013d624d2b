"""Runs a script as one rank: rank.py <log folder> <first device> <launcher's folder> <script> <arguments>.

launcher.py starts it. It is a program, which imports nothing of the package: a rank's PYTHONPATH may hold anything.
"""

from __future__ import annotations

import ctypes
import io
import os
import runpy
import signal
import sys
from contextlib import suppress
from pathlib import Path

LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_USE_AGENT_STORE"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_ERROR_FILE"),
)
MISTAKE_NAME = "mistake"  # in the launcher's folder: the status and reason of a rank that must not be restarted


def log_file(log_dir: str | Path, device: int) -> Path:
    """Where Ascend's tooling looks for the log of a device."""
    return Path(log_dir, str(device), f"train_{device}.log")


class Tee(io.TextIOWrapper):
    """A text file that also copies to the console, until the console's reader leaves."""

    console = -1

    def write(self, text: str) -> int:
        with suppress(OSError):
            os.write(self.console, text.encode(errors="surrogateescape"))
        return super().write(text)


def log_to(path: Path, *, copy_stdout: bool, copy_stderr: bool) -> None:
    """Redirect all output of this process and its children to a log; what Python prints may go to the console, too."""
    consoles = {1: os.dup(1) if copy_stdout else -1, 2: os.dup(2) if copy_stderr else -1}
    log = os.open(path, os.O_WRONLY | os.O_APPEND)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(log, descriptor)
        stream = Tee(io.FileIO(descriptor, "w", closefd=False), "utf-8", "surrogateescape", write_through=True)
        stream.console = consoles[descriptor]
        setattr(sys, name, stream)


def main(log_dir: str, first_device: str, folder: str, *command: str) -> None:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    has_agent = bool(folder)
    if has_agent and sys.platform == "linux":  # end with a launcher that is killed: PR_SET_PDEATHSIG is 1
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    mistake = Path(folder, MISTAKE_NAME)
    if has_agent and mistake.exists():  # the agent restarts ranks after any failure
        sys.exit(1)
    is_first = local_rank == 0
    log_to(log_file(log_dir, int(first_device) + local_rank), copy_stdout=is_first, copy_stderr=not has_agent)
    os.environ["ALIGNED_REID_RANK_LOG"] = "1"  # see training/log.py
    sys.argv = list(command)
    sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
    try:
        runpy.run_path(command[0], run_name="__main__")
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else 1
        if has_agent and status:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            cause = error.__context__ if isinstance(error, SystemExit) and error.__context__ else error
            get_error_handler().record_exception(cause)
            if isinstance(status, int) and (status == 2 or status > 128):
                mistake.write_text(f"{status} {os.environ['RANK']} {type(cause).__name__}: {cause}")
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
