"""A run that is killed, anywhere and often, ends with the same bits as one that is not."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, PROGRAM_PATH, TINY, is_alive, same, wait_for

from aligned_reid.lock import hold

FOLDER = Path(__file__).parent


def epoch_lines(log):
    """The figures of each epoch's line, by epoch, without times; those of a repeated epoch must be equal."""
    found = {}
    for line in log.read_text().splitlines():
        if match := re.match(r"Ep (\d+), .*?(gp .*)", line):
            assert found.setdefault(match[1], match[2]) == match[2]
    return found


def members_of(group):
    """The processes of a process group."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if int(stat.read_text().rsplit(")", 1)[1].split()[2]) == group:
                yield int(stat.parent.name)


@contextlib.contextmanager
def process_group(*command, **options):
    """A process that, with its children, is killed at the end."""
    process = subprocess.Popen([sys.executable, *map(str, command)], start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "ranks", "workers"), [(18, 1, 0), (2, 1, 1), (5, 2, 0)])
def test_a_run_killed_at_random_steps_ends_bit_identical(tiny_data, tmp_path, kills, ranks, workers):
    environment = os.environ | PROGRAM_PATH | {"OMP_NUM_THREADS": "1"}
    # Not through a pipe, which the loading processes of a killed attempt would keep open.
    with open(tmp_path / "output.txt", "w") as output:
        program = (FOLDER / "kill_and_resume.py", tiny_data, tmp_path, kills, ranks, workers)
        with process_group(*program, stdout=output, stderr=output, env=environment) as process:
            status = process.wait(timeout=2 * PATIENCE)
    assert status == 0, (tmp_path / "output.txt").read_text()[-2000:]
    whole, killed = (torch.load(tmp_path / name / "ckpt.pth", weights_only=True) for name in ("whole", "killed"))
    assert whole["scaler"]["scale"] == killed["scaler"]["scale"]  # a static scale does not count steps over a resume
    for part in ("model", "optimizer", "sampler", "epoch", "step"):
        assert same(whole[part], killed[part]), part
    assert torch.equal(whole["random"]["torch"], killed["random"]["torch"])
    lines = epoch_lines(tmp_path / "whole" / "log.txt")
    assert len(lines) == kills + 3
    assert epoch_lines(tmp_path / "killed" / "log.txt") == lines


@contextlib.contextmanager
def training(data, folder, *flags):
    """A run in a new process group, after its first epoch."""
    program = (FOLDER / "small_train.py", "none", 0, 0, folder, f"--data_path={data}", *TINY, *flags)
    environment = os.environ | PROGRAM_PATH | {"PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    end = ("--total_epochs=100000", f"--exp_dir={folder / 'run'}")
    with process_group(*program, *end, env=environment, **pipes) as process:
        while not process.stdout.readline().startswith("Ep 1,"):
            assert process.poll() is None
        yield process


def test_a_signal_saves_first(tiny_data, tmp_path):
    with training(tiny_data, tmp_path) as process:
        process.terminate()
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert err.count("\n") == 1, err
    found = re.search(rf"SIGTERM at step (\d+) of epoch (\d+); .*{re.escape(str(tmp_path))}/run/ckpt\.pth", err)
    step, epoch = map(int, found.groups())
    saved = torch.load(tmp_path / "run" / "ckpt.pth", weights_only=True)
    assert (saved["step"], saved["epoch"]) == (step, epoch - 1)


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_behind(tiny_data, tmp_path):
    with training(tiny_data, tmp_path, "--workers=2") as process:
        process.kill()
        process.wait()
        with hold(tmp_path / "run", "--exp_dir"):  # free at once, though loading processes end later
            pass
        wait_for(lambda: not any(map(is_alive, members_of(process.pid))))
