"""Signals that ask a process to end: the first is noted or raised, and later ones are ignored."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# From a scheduler, Ctrl-C, a terminal that closes, and the usual choice for Slurm (sbatch --signal).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SECONDS_TO_INSIST = 1.0


class StopSignals:
    """Inside `with`, the first of STOP_SIGNALS is stored in `number`, and raised as `error(number)` if that is given.

    Later ones are ignored: a scheduler signals every process of a job, and a launcher then passes its own signal on.
    Only a second Ctrl-C, at least a second after the first, ends the process at once. Signals that were ignored before
    stay ignored, such as SIGHUP under nohup. A signal that an inner `with` has stored is not raised by an outer one.
    """

    def __init__(self, error: Callable[[int], BaseException] | None = None) -> None:
        self.error = error
        self.number = 0
        self.interrupted_at = math.inf  # the first Ctrl-C
        self.former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.former[number] = signal.signal(number, self.take_note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self.former.items():
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, StopSignals) and self.number:
                outer.number, outer.interrupted_at = self.number, self.interrupted_at
            signal.signal(number, handler)

    def take_note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - self.interrupted_at >= SECONDS_TO_INSIST:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self.interrupted_at = min(self.interrupted_at, now)
        if not self.number:
            self.number = number
            if self.error:
                raise self.error(number)

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name
