"""The frame of every command: its exit status, and its standard output."""

import argparse
import os
import signal
import subprocess
import sys

import pytest
from conftest import PATIENCE, ROOT

from aligned_reid.cli import expand_home


def run_main(body, **options):
    """Run a command whose `main` has this body in a new process."""
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from aligned_reid.cli import run_command

def main():
    {body}

run_command(main)
"""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=False, timeout=PATIENCE, **options
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_one_line_and_its_status(number):
    done = run_main(f"os.kill(os.getpid(), {int(number)})", preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    assert done.returncode == 128 + number
    assert done.stderr.count(b"\n") == 1 and number.name.encode() in done.stderr


def test_an_ignored_hangup_stays_ignored():
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    done = run_main("os.kill(os.getpid(), signal.SIGHUP); print('done')", **ignoring)
    assert (done.returncode, done.stdout) == (0, b"done\n")


def test_any_name_can_be_printed():
    ascii_only = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    done = run_main(r"print('\u6570\udcff')", env=ascii_only)
    assert (done.returncode, done.stdout) == (0, b"\\u6570\\udcff\n")


def test_a_command_outlives_the_reader_of_its_output(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    path = tmp_path / "done"
    done = run_main(f"os.dup2({writer}, 1); print('lost', flush=True); open({str(path)!r}, 'w')", pass_fds=[writer])
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert path.exists()


@pytest.mark.parametrize("flush", [True, False])
def test_output_to_a_full_disk_is_one_line(flush):
    done = run_main(f"os.dup2(os.open('/dev/full', os.O_WRONLY), 1); print('lost', flush={flush})")
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1 and b"No space" in done.stderr


def test_too_many_open_files_is_one_line():
    done = run_main("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)); open(os.devnull)")
    assert done.returncode == 2
    assert b"ulimit -n" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "body",
    ["import torch; torch.empty(2**60)", "import numpy; numpy.empty(2**50)", "raise RuntimeError('NPU out of memory')"],
)
def test_memory_that_is_short_is_one_line(body):
    done = run_main(body)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1 and b"out of memory" in done.stderr


def test_other_runtime_errors_keep_their_traceback():
    done = run_main("raise RuntimeError('CUDA error: an illegal memory access was encountered')")
    assert done.returncode == 1 and b"Traceback" in done.stderr


def test_a_path_that_is_too_long_is_one_line():
    done = run_main("open('a' * 300)")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"too long" in done.stderr


def test_only_a_second_ctrl_c_a_second_later_ends_a_command_that_saves():
    body = """from aligned_reid.stop import StopSignals
    import time
    now = [50.0]
    time.monotonic = lambda: now[0]
    with StopSignals():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
            now[0] += 0.4
        print('saving', flush=True)
        now[0] += 0.3
        os.kill(os.getpid(), signal.SIGINT)
        print('not reached', flush=True)"""
    done = run_main(body, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert (done.returncode, done.stdout) == (-signal.SIGINT, b"saving\n")


def test_a_leading_tilde_is_the_home_folder_if_there_is_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("~/runs/a", "~"):
        assert expand_home(text) == text.replace("~", str(tmp_path))
    for text in ("./~", "runs/~/a"):
        assert expand_home(text) == text
    for home, path in ((tmp_path, "~nosuchuser/x"), (tmp_path / "none", "~/x")):
        monkeypatch.setenv("HOME", str(home))
        with pytest.raises(argparse.ArgumentTypeError, match="home folder"):
            expand_home(path)
