"""The frame of every command: its argument parser, one line for a user's mistake, and the exit status."""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from aligned_reid.errors import InputError, RunStopped
from aligned_reid.stop import StopSignals

STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
FILE_LIMITS = (errno.EMFILE, errno.ENFILE)
OUT_OF_MEMORY = re.compile("out of memory|allocate memory")  # of a device, of the host
READER_GONE = (errno.EPIPE, errno.EIO)  # of a pipe, of a terminal


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main` and exit: 0 done, 1 the run stopped itself, 2 a user's mistake, 128 + n signal n."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and Console(stream) for stream in streams)
    try:
        with StopSignals(KeyboardInterrupt):
            report(main)
    finally:
        sys.stdout, sys.stderr = streams
    sys.exit(0)


def report(main: Callable[[], None]) -> None:
    """Run `main`; report an error that the user can fix as one line and an exit status."""
    try:
        try:
            main()
        finally:
            print(end="", flush=True)
    except InputError as error:
        complain(f"error: {error}", 2)
    except RunStopped as error:
        complain(f"stopped: {error}", error.status)
    except KeyboardInterrupt as error:
        number = signal.Signals(*error.args or [signal.SIGINT])
        complain(f"interrupted by {number.name}", 128 + number)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        reason = str(error).partition("\n")[0]
        complain(f"stopped: out of memory ({reason}); smaller batches or images need less", 1)
    except OSError as error:
        if error.errno in FILE_LIMITS:
            complain(f"error: {error.strerror}: raise the limit (ulimit -n), or use fewer --workers", 2)
        if error.errno not in STORAGE_ERRORS:
            raise
        complain(f"error: {error.strerror}: {error.filename or 'while writing'}; make room or choose another path", 2)


def complain(line: str, status: int) -> NoReturn:
    """Print a line in the name of the command that runs, and exit."""
    print(f"{program_name()}:", *line.split(), file=sys.stderr, flush=True)
    sys.exit(status)


def program_name() -> str:
    """The name of the command that runs: "train.py", or "aligned-reid train", which aligned_reid.commands has set."""
    return os.path.basename(sys.argv[0])


def command_line(name: str) -> str:
    """How a message spells the command `name`, e.g. "prepare photos": by its script in a checkout that runs scripts."""
    has_scripts = (Path(__file__).parents[1] / "script" / "train.py").is_file()
    if has_scripts and not program_name().startswith("aligned-reid"):
        return f"python script/{name.replace(' ', '_')}.py"
    return f"aligned-reid {name}"


def nearest(name: str, names: Iterable[str]) -> str:
    """ " (did you mean ...?)" with the name that is most like a mistyped one; empty if none is."""
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


class Console:
    """Standard output or error that can print any path, and that drops output once its reader has gone.

    A command outlives its reader: with `nohup train.py | tee log`, closing the terminal ends tee, but not the run.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        if isinstance(stream, io.TextIOWrapper):  # print paths that are not UTF-8 unchanged
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
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # what is left in its buffer goes there
            if error.errno not in READER_GONE:  # such as a full disk
                raise


def parse_bool(text: str) -> bool:
    """'true' or 'false', in any case; anything else is refused."""
    try:
        return {"true": True, "false": False}[text.strip().lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


def parse_ints(text: str) -> tuple[int, ...]:
    """'256,128' or '(256, 128)' -> (256, 128). Parsed, never evaluated."""
    try:
        return tuple(int(part) for part in text.strip().strip("()[]").split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 256,128") from None


def expand_home(text: str) -> str:
    """A path with a leading ~ or ~user expanded; shells do not expand it after `--flag=`.

    An empty path, such as a shell's unset variable, is refused: it would mean the current folder, or a flag's default.
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; is a variable unset?")
    user = text.split("/")[0]
    home = os.path.expanduser(user)
    if user.startswith("~") and not (os.path.isabs(home) and os.path.isdir(home)):
        raise argparse.ArgumentTypeError(f"{text!r}: there is no home folder {user} (a folder of that name: ./{user})")
    return home + text[len(user) :]


def parse_path(text: str) -> Path:
    return Path(expand_home(text))


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that prints an error as one line, with the nearest flag's name, and exits with status 2."""

    def __init__(self, *, removed: Mapping[str, str] | None = None, **settings: Any) -> None:
        """removed: names of flags of earlier versions, and what to use instead."""
        super().__init__(**{"prog": program_name(), **settings})
        self.removed = removed or {}

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"invalid int value: (.*)", r"\1 is not a whole number", message)
        message = re.sub(r"invalid float value: (.*)", r"\1 is not a number", message)
        if found := re.match(r"unrecognized arguments: (-[^\s=]*)", message):
            unknown = found[1]
            flags = [flag for action in self._actions for flag in action.option_strings]
            message = f"unknown flag {unknown}{nearest(unknown, flags)}"
            if unknown.lstrip("-") in self.removed:
                message = f"{unknown} was removed: {self.removed[unknown.lstrip('-')]}"
        print(f"{self.prog}: error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)
