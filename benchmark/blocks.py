"""Runs each side of a benchmark in a new process and measures its peak memory."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple


class Block(NamedTuple):
    """Measurements of one process: seconds of each step, peak memory in MB, device."""

    seconds: list[float]
    megabytes: float
    device: str


def in_own_processes(work: Callable[..., Any], all_arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The results of `work` for each of the arguments: one new process each, all at the same time.

    The processes have ended when this returns, so that their memory and their threads disturb no other turn. Exits
    where one of them ends without a result; it has said why.
    """
    context = multiprocessing.get_context("spawn")
    started = []
    for arguments in all_arguments:
        ours, theirs = context.Pipe()
        process = context.Process(target=answer, args=(theirs, work, arguments))
        process.start()
        theirs.close()  # so that recv() raises EOFError when the process ends
        started.append((process, ours))
    try:
        return [connection.recv() for _, connection in started]
    except EOFError:
        raise SystemExit("a process of the benchmark ended without a result") from None
    finally:
        for process, connection in started:
            connection.close()
            process.join()


def answer(connection: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    connection.send(work(*arguments))


def forget_peak_memory() -> None:
    """Reset the peak that peak_memory returns, if Linux allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Peak memory of this process in MB, without its children (Linux).

    getrusage's ru_maxrss will not do: a process inherits it from its parent.
    """
    return memory_line("VmHWM")


def memory() -> float:
    """Current memory of this process in MB."""
    return memory_line("VmRSS")


def memory_line(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {name}: memory is measured on Linux only")
