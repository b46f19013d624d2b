"""The log of a run, in the form that tools read: lines, means and throughput."""

import io
import os
import time
from contextlib import redirect_stdout

import pytest
import torch

from aligned_reid.config import Config
from aligned_reid.device import Accelerator
from aligned_reid.training.log import Log, Meters, Throughput, format_epoch


def test_tools_read_the_epoch_line_by_position():
    means = {"gp": 0.8731, "gm": 0.6211, "gd_ap": 1.25, "gd_an": 2.5, "gL": 0.1234, "loss": 0.1234}
    line = format_epoch(12, 27.03, 118.2, 4, means)
    assert line == (
        "Ep 12, 27.03s, FPS 118.20, ids/s 29.55, gp 87.31%, gm 62.11%, "
        "gd_ap 1.2500, gd_an 2.5000, gL 0.1234, loss 0.1234"
    )


def test_meters_average_by_name():
    meters = Meters()
    meters.update({"a": torch.tensor(1.0), "b": torch.tensor(0.0, dtype=torch.float64)})
    meters.update({"a": torch.tensor(2.0), "b": torch.tensor(1.0, dtype=torch.float64)})
    assert meters.means() == {"a": 1.5, "b": 0.5}
    assert Meters().means() == {}


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def run_epoch(throughput, clock, durations, images=10):
    throughput.start_epoch()
    for duration in durations:
        clock[0] += duration
        throughput.add(images)
    return throughput.end_epoch()


def test_throughput_leaves_out_the_first_two_steps_of_the_process(clock):
    throughput = Throughput(Accelerator(Config()))
    assert run_epoch(throughput, clock, [50, 30, 1, 1, 1]) == (83, 30 / 3)
    assert run_epoch(throughput, clock, [2, 2, 2]) == (6, 30 / 6)
    assert (throughput.images, throughput.seconds) == (60, 9)
    throughput = Throughput(Accelerator(Config()))  # an epoch of such steps only counts them
    assert run_epoch(throughput, clock, [4, 4]) == (8, 20 / 8)
    assert run_epoch(throughput, clock, [1, 1]) == (2, 20 / 2)


def test_log_writes_console_file_and_tensorboard_also_of_paths_that_are_not_utf_8(tmp_path, capsys):
    for line in ("one line", "another, after a resume"):
        log = Log(tmp_path)
        log(line)
        log.scalars({"loss": 0.5}, 1)
        log.close()
    assert capsys.readouterr().out == (tmp_path / "log.txt").read_text() == "one line\nanother, after a resume\n"
    assert list((tmp_path / "tensorboard").glob("events*"))
    log = Log(tmp_path)
    with redirect_stdout(io.StringIO()):
        log(os.fsdecode(b"data_\xe9"))
    log.close()
    assert (tmp_path / "log.txt").read_bytes().endswith(b"resume\ndata_\xe9\n")


@pytest.mark.parametrize("has_own_file", [False, True])
def test_other_ranks_print_only_if_the_launcher_gives_each_a_log_file(tmp_path, monkeypatch, capsys, has_own_file):
    monkeypatch.delenv("ALIGNED_REID_RANK_LOG", raising=False)
    if has_own_file:
        monkeypatch.setenv("ALIGNED_REID_RANK_LOG", "1")
    log = Log(tmp_path, is_main=False)
    log(format_epoch(1, 27.0, None, 4, {"loss": 0.5}))
    log.scalars({"loss": 0.5}, 1)
    log.close()
    assert capsys.readouterr().out == ("Ep 1, 27.00s, loss 0.5000\n" if has_own_file else "")
    assert list(tmp_path.iterdir()) == []
