"""What every command does around its work: one line for a user's mistake, and an exit status that tells."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from aligned_reid.errors import InputError, RunStopped
from aligned_reid.stop import StopSignals

STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
FILE_LIMITS = (errno.EMFILE, errno.ENFILE)
READER_GONE = (errno.EPIPE, errno.EIO)  # of a pipe, of a terminal


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and exit: 0 done, 1 the run stopped itself, 2 a user's mistake, 128 + n signal n."""
    name = os.path.basename(sys.argv[0])
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and Console(stream) for stream in streams)
    try:
        with StopSignals(KeyboardInterrupt):
            report(name, main)
    finally:
        print(end="", flush=True)
        sys.stdout, sys.stderr = streams
    sys.exit(0)


def report(name: str, main: Callable[[], None]) -> None:
    """Run `main`; of an error that a user can do something about, one line and the exit status."""
    try:
        main()
    except InputError as error:
        complain(f"{name}: error: {error}", 2)
    except RunStopped as error:
        complain(f"{name}: stopped: {error}", error.status)
    except KeyboardInterrupt as error:
        number = signal.Signals(*error.args or [signal.SIGINT])
        complain(f"{name}: interrupted by {number.name}", 128 + number)
    except OSError as error:
        if error.errno in FILE_LIMITS:
            complain(f"{name}: error: {error.strerror}: raise the limit (ulimit -n), or use fewer --workers", 2)
        if error.errno not in STORAGE_ERRORS:
            raise
        complain(
            f"{name}: error: {error.strerror}: {error.filename or 'while writing'}; make room or choose another folder",
            2,
        )


def complain(line: str, status: int) -> NoReturn:
    print(" ".join(line.split()), file=sys.stderr, flush=True)
    sys.exit(status)


class Console:
    """Standard output or error that takes any file's name, and whose reader may leave: the rest is dropped then.

    A command does not end with its reader: in `nohup train.py | tee log`, a closed terminal ends tee, and the run has
    log.txt.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        if isinstance(stream, io.TextIOWrapper):  # paths that are not UTF-8 are printed as they are
            is_utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, act: Callable[..., Any], *given: str) -> None:
        try:
            act(*given)
        except OSError as error:
            if error.errno not in READER_GONE:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
