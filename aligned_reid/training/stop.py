"""SIGTERM and Ctrl-C during training: a note is taken, and the loop saves before it ends."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Inside `with`, the first SIGTERM or SIGINT is kept in `number`; a second one ends the process as ever."""

    def __init__(self) -> None:
        self.number = 0
        self.former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.former[number] = signal.signal(number, self.take_note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def take_note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name
