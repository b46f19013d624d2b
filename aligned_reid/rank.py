"""Runs a script as one rank: rank.py <log folder> <first device> <launcher's folder, or ""> <script> <arguments>.

launcher.py starts it. It is a program that imports nothing of the package: a rank's PYTHONPATH may hold anything.
"""

import ctypes
import io
import os
import runpy
import signal
import sys
from contextlib import suppress
from pathlib import Path

MISTAKE_NAME = "mistake"  # in the launcher's folder: the rank that ended with status 2, and its reason


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
    is_restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if is_restarted else os.O_TRUNC), 0o666)
    for descriptor, name, copied in zip((1, 2), ("stdout", "stderr"), to_console, strict=True):
        console = os.dup(descriptor) if copied else -1
        os.dup2(log, descriptor)
        stream = Tee(io.FileIO(descriptor, "w", closefd=False), "utf-8", "surrogateescape", write_through=True)
        stream.console = console
        setattr(sys, name, stream)


def main(log_dir: str, first_device: str, folder: str, *command: str) -> None:
    mistake = Path(folder, MISTAKE_NAME)
    if folder and mistake.exists():  # torch's agent restarts ranks after any failure
        sys.exit(1)
    if folder and sys.platform == "linux":  # end with a launcher that is killed: PR_SET_PDEATHSIG is 1
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = int(first_device) + local_rank
    log_to(Path(log_dir, str(device), f"train_{device}.log"), to_console=(local_rank == 0, not folder))
    os.environ["ALIGNED_REID_RANK_LOG"] = "1"  # see training/log.py
    sys.argv, place = list(command), Path(command[0]).absolute().parent
    sys.path[0] = str(place.parent if command[0].endswith("/__main__.py") else place)  # of a package: what holds it
    try:
        runpy.run_path(command[0], run_name="__main__")
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else 1
        if folder and status:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            cause = error.__context__ or error
            get_error_handler().record_exception(cause)
            if status == 2:
                mistake.write_text(f"{os.environ['RANK']} {type(cause).__name__}: {cause}")
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
