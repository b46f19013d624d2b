"""What ranks say: to their log files and the console, and in one line why one of them failed."""

from __future__ import annotations

import os
import re
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import BinaryIO

from aligned_reid.errors import InputError
from aligned_reid.rank_program import pipe_path

DRAIN_SECONDS = 2.0  # how long output may follow the end of the ranks

# What a program says when it fails: a traceback's last line, or `train.py: error: ...`. torch puts its rank in front.
RANK_PREFIX = re.compile(r"^\[rank\d+\]:\s?")
TRACEBACK = "Traceback (most recent call last)"
OWN_LINE = re.compile(r"^[\w.]+: (error|stopped|interrupted)\b")
MISTAKE_LINE = re.compile(r"^[\w.]+: error: ")  # said with status 2; see cli.py
HANG_LINE = re.compile(r"^Timeout \((.+)\)!$")  # faulthandler's, which stacks follow; see training/watchdog.py
SILENT_RANK = re.compile(r"rank (\d+) on \S+(?=.*: rank \d+ on)")  # in rendezvous.Meeting.explain's line
ERROR_LINE = re.compile(OWN_LINE.pattern + r"|^[\w.]*(Error|Exception|Interrupt)\b")


def first_failure(failures: dict[int, int], outputs: Sequence[RankOutput]) -> tuple[int, int]:
    """(local rank, exit code) of the rank that failed first, where others failed because it did.

    The agent looks some times a second, and so may see several dead ranks at once, or a broken connection's victim
    before its cause. A rank that died without a word (killed) is the agent's to tell; else, who complained first failed
    first. Ranks that the agent itself then stopped are out of it, but for one that has named a user's mistake: it was
    on its way out with status 2, and the others may have lost it before it said so.
    """
    seen_first = next(iter(failures))
    if outputs[seen_first].complained_at == inf:
        return seen_first, failures[seen_first]
    stopped = [rank for rank, exit_code in failures.items() if exit_code == -signal.SIGTERM]
    mistaken = [rank for rank in failures if MISTAKE_LINE.match(outputs[rank].last_words)]
    own = [rank for rank in failures if rank not in stopped]
    first = min(mistaken or own or failures, key=lambda rank: outputs[rank].complained_at)
    return first, 2 if first in mistaken and first in stopped else failures[first]


class RankOutput:
    """One rank's output: all of it goes to its log file, and the first rank's to the console, but for tracebacks."""

    def __init__(self, path: Path, on_console: bool) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.log = path.open("wb")
        except OSError as error:
            raise InputError(f"the log {path} cannot be written: {error.strerror}; choose another --log_dir") from error
        self.path = path
        self.on_console = on_console
        self.complained_at = inf  # time of the first line that names an error
        self.last_words = ""  # the last line that names an error, else the last one of stderr
        self.shown = False  # whether the console has them
        self.last_line = ""  # the last one of stdout
        self.in_traceback = False

    def take(self, line: bytes, is_error_stream: bool) -> None:
        """Pass on one line of the rank. A full disk or a closed console must not stop the run: then it is lost."""
        with suppress(OSError):
            self.log.write(line)
            self.log.flush()
        if is_error_stream:
            self.listen(RANK_PREFIX.sub("", line.decode(errors="replace")).rstrip())
        elif line.strip():
            self.last_line = line.decode(errors="replace").strip()
        if self.on_console and not (is_error_stream and self.in_traceback):
            console: BinaryIO = (sys.stderr if is_error_stream else sys.stdout).buffer
            with suppress(OSError):
                console.write(line)
                console.flush()

    def listen(self, text: str) -> None:
        self.in_traceback = self.in_traceback or bool(text.startswith(TRACEBACK) or HANG_LINE.match(text))
        names_error = bool(ERROR_LINE.match(text) or HANG_LINE.match(text))
        if names_error or self.in_traceback:
            self.complained_at = min(self.complained_at, time.monotonic())
        is_named = ERROR_LINE.match(self.last_words) or HANG_LINE.match(self.last_words)
        if text and (names_error or not is_named):
            self.last_words = text
            self.shown = self.on_console and not self.in_traceback

    def forget(self) -> None:
        """Begin anew with the next attempt."""
        self.complained_at, self.last_words, self.shown, self.in_traceback = inf, "", False, False

    def reason(self, rank: int, exit_code: int) -> str:
        """In one line, why this rank failed."""
        if OWN_LINE.match(self.last_words) and exit_code > 0:
            return self.last_words
        if exit_code < 0:
            what = f"was killed by signal {-exit_code} ({signal.strsignal(-exit_code)})"
        elif hang := HANG_LINE.match(self.last_words):
            what = f"hung: its step was not done after {hang[1]}"
        else:
            what = f"ended with status {exit_code}" + (f": {self.last_words}" if self.last_words else "")
        return f"launch.py: error: rank {rank} on {socket.gethostname()} {what}; {self.traces()}"

    def traces(self) -> str:
        """What is left of a rank: its last line, and where the others are."""
        said = f"its last line: {self.last_line}; " if self.last_line else ""
        return f"{said}its log: {self.path}"


def explain(outputs: Sequence[RankOutput], first_rank: int, local_rank: int, exit_code: int) -> list[str]:
    """Lines that say why a rank failed, and where it waited in vain for ranks of this machine, what those said last.

    What the console has in the same words, from this rank or another, is left out.
    """
    output = outputs[local_rank]
    reason = output.reason(first_rank + local_rank, exit_code)
    lines = [] if any(one.shown and one.last_words == reason for one in outputs) else [reason]
    for rank in map(int, SILENT_RANK.findall(output.last_words)):
        if 0 <= rank - first_rank < len(outputs):
            lines.append(f"launch.py: rank {rank} hung; {outputs[rank - first_rank].traces()}")
    return lines


def print_all(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


class Pump(threading.Thread):
    """Carries the ranks' output from named pipes in `folder` to their RankOutput, line by line."""

    def __init__(self, folder: str, outputs: Sequence[RankOutput]) -> None:
        super().__init__(daemon=True)
        self.folder = Path(folder)
        self.outputs = outputs
        self.selector = selectors.DefaultSelector()
        self.writers: list[int] = []  # kept open so that no pipe ends before its rank has opened it
        for local_rank, output in enumerate(outputs):
            for descriptor in (1, 2):
                path = pipe_path(folder, local_rank, descriptor)
                os.mkfifo(path)
                reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                self.writers.append(os.open(path, os.O_WRONLY))
                self.selector.register(reader, selectors.EVENT_READ, (output, descriptor == 2, bytearray()))

    def run(self) -> None:
        while self.selector.get_map():
            for key, _ in self.selector.select():
                output, is_error_stream, rest = key.data
                chunk = os.read(key.fd, 65536)
                rest += chunk
                if not chunk:
                    self.selector.unregister(key.fd)
                    os.close(key.fd)
                    chunk = b"\n"
                    rest += b"\n" if rest else b""
                if b"\n" in chunk:
                    *lines, remainder = bytes(rest).split(b"\n")
                    rest[:] = remainder
                    for line in lines:
                        output.take(line + b"\n", is_error_stream)

    def finish(self) -> None:
        """Read what is left. A pipe that stays open is held by a child that its rank left behind: end those."""
        for writer in self.writers:
            os.close(writer)
        self.join(DRAIN_SECONDS)
        if self.is_alive():
            for path in self.folder.glob("*.pid"):
                with suppress(ProcessLookupError):
                    os.killpg(int(path.read_text()), signal.SIGKILL)
            self.join(DRAIN_SECONDS)
        for output in self.outputs:
            with suppress(OSError):
                output.log.close()
