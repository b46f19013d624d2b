"""Nothing is lost: a run that was killed, anywhere and often, ends as one that was not."""

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
from conftest import ROOT

from aligned_reid.lock import hold


def same(first, second):
    """Whether nested dicts and lists of tensors and numbers are equal to the bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def epoch_lines(log):
    """What each epoch's line says besides times, by epoch; an epoch that was repeated has to say it again."""
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
    # Into a file, and not a pipe: loading processes of a killed attempt hold it open for as long as they live.
    with open(tmp_path / "said.txt", "w+") as said:
        process = subprocess.Popen(list(map(str, command)), stdout=said, stderr=said, start_new_session=True)
        try:
            status = process.wait(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what they left behind
    output = (tmp_path / "said.txt").read_text()
    assert status == 0, output[-2000:]
    assert output.count("kill ") == kills
    whole, killed = (torch.load(tmp_path / name / "ckpt.pth", weights_only=True) for name in ("whole", "killed"))
    for part in ("model", "optimizer", "scaler", "sampler", "epoch", "step"):
        assert same(whole[part], killed[part]), part
    assert torch.equal(whole["random"]["torch"], killed["random"]["torch"])
    lines = epoch_lines(tmp_path / "whole" / "log.txt")
    assert len(lines) == kills + 3
    assert epoch_lines(tmp_path / "killed" / "log.txt") == lines


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_first(tiny_data, tmp_path, number, status):
    script = ROOT / "script" / "train.py"
    flags = (
        "--pretrained=none",
        "--resize_h_w=64,32",
        "--ids_per_batch=4",
        "--ims_per_id=2",
        "--workers=0",
        "--seed=1",
    )
    command = [sys.executable, script, f"--data_path={tiny_data}", *flags, "--device=cpu", f"--exp_dir={tmp_path}"]
    process = subprocess.Popen(
        [*map(str, command), "--total_epochs=1000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("Ep 1,"):
            break
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    message = re.fullmatch(
        rf"train\.py: stopped: {number.name} at step (\d+) of epoch (\d+); the last good checkpoint is "
        rf"{tmp_path}/ckpt\.pth: go on with --resume true\n",
        err,
    )
    assert message, err
    saved = torch.load(tmp_path / "ckpt.pth", weights_only=True)
    assert (saved["step"], saved["epoch"]) == (int(message[1]), int(message[2]) - 1)


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_behind(tiny_data, tmp_path):
    flags = ("--pretrained=none", "--resize_h_w=64,32", "--ids_per_batch=4", "--ims_per_id=2", "--workers=2")
    command = [sys.executable, ROOT / "script" / "train.py", f"--data_path={tiny_data}", *flags, "--device=cpu"]
    process = subprocess.Popen(
        [*map(str, command), f"--exp_dir={tmp_path / 'run'}", "--total_epochs=1000"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    for line in process.stdout:
        if line.startswith("Ep 1,"):
            break
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
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("processes of the killed run are still there after 30 seconds")
