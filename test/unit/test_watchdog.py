"""A process that hangs ends; one that goes on is left alone."""

import faulthandler
import subprocess
import sys
import time

import pytest

from aligned_reid.training.watchdog import Watchdog

HANGS = """
import sys, time
from aligned_reid.training.watchdog import Watchdog
def batches():
    yield 1
    {loading}
    yield 2
for batch in Watchdog(0.5).over(batches()):
    {step}
"""


@pytest.mark.parametrize(
    ("loading", "step", "seconds"),
    [("time.sleep(60)", "pass", 0.5), ("pass", "time.sleep(60)", 1.0), ("while True: pass", "pass", 0.5)],
)
def test_a_hang_ends_the_process_and_shows_where(loading, step, seconds):
    program = HANGS.format(loading=loading, step=step)
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=40, check=False)
    assert done.returncode == 1
    assert time.monotonic() - start > seconds
    assert done.stderr.startswith(f"Timeout (0:00:0{seconds:.6f})!\n".replace("1.000000", "1"))
    assert 'File "<string>"' in done.stderr


def test_slow_steps_are_no_hang_and_the_end_is_not_watched():
    program = HANGS.format(loading="time.sleep(0.3)", step="time.sleep(0.7)") + "time.sleep(1.5)\nprint('end')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=40, check=False)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


def test_without_a_timeout_nothing_is_armed(monkeypatch):
    monkeypatch.setattr(faulthandler, "dump_traceback_later", None)
    assert list(Watchdog(0).over([1, 2])) == [1, 2]
