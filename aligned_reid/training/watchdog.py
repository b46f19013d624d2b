"""Ends a process that hangs, by a thread of C that needs nothing of the interpreter."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterable, Iterator
from typing import TypeVar

Batch = TypeVar("Batch")


class Watchdog:
    """Ends this process, with a stack of every thread on stderr and status 1, where a step takes too long.

    timeout: seconds that a batch may take to be loaded, which is nobody else's doing. The step itself has twice that:
    it may wait for other ranks, and where theirs is the hang, they are to be found first. 0: no watch is kept.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout

    def over(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; each one's loading, and what is done with it until the next is asked for, is watched."""
        source = iter(batches)
        try:
            while True:
                self.arm(self.timeout)
                try:
                    batch = next(source)
                except StopIteration:
                    return
                self.arm(2 * self.timeout)
                yield batch
        finally:
            if self.timeout:
                faulthandler.cancel_dump_traceback_later()

    def arm(self, seconds: float) -> None:
        if seconds:
            faulthandler.dump_traceback_later(seconds, exit=True)
