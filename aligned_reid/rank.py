"""Runs a script as one rank: rank.py <log folder> <first device> <file for a mistake, or ""> <script> <arguments>.

launcher.py starts it, with "" if there is no agent. If the script ends with status 2, a user's mistake, the reason is
written to the file. This program imports nothing of the package: a rank's PYTHONPATH may hold anything.
"""

import ctypes
import io
import os
import runpy
import signal
import sys
from contextlib import suppress
from pathlib import Path


class Tee(io.TextIOWrapper):
    """A text file whose content also goes to a console, until the console's reader leaves."""

    console = -1

    def write(self, text: str) -> int:
        with suppress(OSError):
            os.write(self.console, text.encode(errors="surrogateescape"))
        return super().write(text)


def log_to(path: Path, to_console: tuple[bool, bool]) -> None:
    """Redirect stdout and stderr, children's too, to a log; to_console: which of them Python copies to the console."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as log:
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            log.truncate(0)
        for descriptor, name, copied in zip((1, 2), ("stdout", "stderr"), to_console, strict=True):
            console = os.dup(descriptor) if copied else -1
            os.dup2(log.fileno(), descriptor)
            stream = Tee(io.FileIO(descriptor, "w", closefd=False), "utf-8", "surrogateescape", write_through=True)
            stream.console = console
            setattr(sys, name, stream)


def main(log_dir: str, first_device: str, mistake: str, *command: str) -> None:
    if os.path.exists(mistake):  # torch's agent restarts ranks after any failure
        sys.exit(1)
    if mistake and sys.platform == "linux":  # end with a launcher that is killed: PR_SET_PDEATHSIG is 1
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = int(first_device) + local_rank
    log_to(Path(log_dir, str(device), f"train_{device}.log"), to_console=(local_rank == 0, not mistake))
    os.environ["ALIGNED_REID_RANK_LOG"] = "1"  # see training/log.py
    sys.argv, place = list(command), Path(command[0]).absolute().parent
    sys.path[0] = str(place.parent if command[0].endswith("/__main__.py") else place)  # of a package: what holds it
    try:
        runpy.run_path(command[0], run_name="__main__")
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else 1
        cause = error.__context__ or error
        if mistake and status == 2:  # first: ranks that lose this one end in errors soon, and the agent stops all
            line = f"rank {os.environ['RANK']} ended with status 2: {type(cause).__name__}: {cause}"
            Path(mistake).write_text(line, errors="backslashreplace")
        if mistake and status and not isinstance(cause, KeyboardInterrupt):
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(cause)
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
