"""A run that is killed, anywhere and often, ends with the same bits as one that is not."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, same

from aligned_reid.lock import hold


def epoch_lines(log):
    """The figures of each epoch's line, by epoch, without times; those of a repeated epoch must be equal."""
    found = {}
    for line in log.read_text().splitlines():
        if match := re.match(r"Ep (\d+), .*?(gp .*)", line):
            assert found.setdefault(match[1], match[2]) == match[2]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "ranks", "workers"), [(18, 1, 0), (2, 1, 1), (5, 2, 0)])
def test_a_run_killed_at_random_steps_ends_bit_identical(tiny_data, tmp_path, kills, ranks, workers):
    script = Path(__file__).with_name("kill_and_resume.py")
    command = [sys.executable, script, tiny_data, tmp_path, *map(str, (kills, ranks, workers))]
    # Not through a pipe, which the loading processes of a killed attempt would keep open.
    with open(tmp_path / "output.txt", "w+") as output:
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output, start_new_session=True)
        try:
            status = process.wait(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    text = (tmp_path / "output.txt").read_text()
    assert status == 0, text[-2000:]
    assert text.count("kill ") == kills
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
    command = [sys.executable, ROOT / "script" / "train.py", f"--data_path={data}", *TINY, *flags]
    process = subprocess.Popen(
        [*map(str, command), f"--exp_dir={folder}", "--total_epochs=1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        while not process.stdout.readline().startswith("Ep 1,"):
            assert process.poll() is None
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_first(tiny_data, tmp_path, number, status):
    with training(tiny_data, tmp_path, "--seed=1") as process:
        time.sleep(0.3)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert err.count("\n") == 1, err
    step, epoch = map(
        int, re.search(rf"{number.name} at step (\d+) of epoch (\d+); .*{tmp_path}/ckpt\.pth", err).groups()
    )
    saved = torch.load(tmp_path / "ckpt.pth", weights_only=True)
    assert (saved["step"], saved["epoch"]) == (step, epoch - 1)


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_behind(tiny_data, tmp_path):
    with training(tiny_data, tmp_path / "run", "--workers=2") as process:
        process.kill()
        process.wait()
        with hold(tmp_path / "run", "--exp_dir"):  # free at once, though loading processes end later
            pass
        for _ in range(300):
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)
        pytest.fail("processes of the killed run still exist after 30 seconds")
