"""Guards: a step that hangs, and signs of a collapse."""

import faulthandler
import math
import sys

import pytest
from conftest import run_program

from aligned_reid.config import Config
from aligned_reid.training.guards import CollapseGuard, end_if_hung

HEALTHY = {"gp": 0.4, "gd_ap": 9.0, "gd_an": 8.7, "gL": 1.1}


@pytest.mark.parametrize(
    ("loading", "step"), [("time.sleep(3600)", "pass"), ("pass", "time.sleep(3600)"), ("while True: pass", "pass")]
)
def test_a_hang_ends_the_process_and_shows_where(loading, step):
    program = f"""
import time
from aligned_reid.training.guards import end_if_hung
def batches():
    yield 1
    {loading}
    yield 2
for batch in end_if_hung(batches(), 0.5):
    {step}
"""
    done = run_program(sys.executable, "-c", program)
    assert done.status == 1
    assert "Timeout" in done.err and 'File "<string>"' in done.err


def test_a_step_has_twice_the_time_of_loading_and_what_follows_has_no_limit(monkeypatch):
    limits = []  # that count
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, exit: limits.append((seconds, exit)))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", limits.clear)

    def batches():
        for number in range(3):
            assert limits[-1] == (4.0, True)
            yield number

    for _ in end_if_hung(batches(), 4.0):
        assert limits[-1] == (8.0, True)
    assert limits == []


def figures(branch="g", dist_ap=5.0, dist_an=5.0, loss=0.3, model=""):
    return {f"{branch}d_ap{model}": dist_ap, f"{branch}d_an{model}": dist_an, f"{branch}L{model}": loss}


def test_healthy_epochs_have_no_sign():
    guard = CollapseGuard(Config())
    assert guard.find(1, HEALTHY, 20, 0) == []
    assert guard.find(2, {**HEALTHY, "gL": 0.3}, 20, 1) == []  # at the margin, but the distances differ
    assert guard.find(3, figures(loss=0.7), 20, 0) == []  # the distances are equal in the mean only
    assert guard.find(4, figures(dist_ap=4.0, loss=0.05), 20, 0) == []


def test_features_without_spread_are_reported_when_it_starts():
    guard = CollapseGuard(Config())
    point = figures(dist_ap=1e-3, dist_an=9e-4, loss=0.3001)
    found = [guard.find(epoch, means, 20, 0) for epoch, means in ((7, point), (8, point), (9, HEALTHY), (10, point))]
    assert [len(lines) for lines in found] == [1, 0, 0, 1]
    assert found[0][0].startswith("epoch 7: collapse: the global features have no spread")


@pytest.mark.parametrize(("margin", "value"), [(0.3, 0.3), (0.5, 0.5), (None, math.log(2))])
@pytest.mark.parametrize(("branch", "name"), [("g", "global"), ("l", "local")])
def test_a_loss_at_the_margin_for_two_epochs_is_stuck(margin, value, branch, name):
    guard = CollapseGuard(Config(global_margin=margin, local_margin=margin, l_loss_weight=1.0))
    means = figures(branch, 5.001, 5.0, value + 1e-3)
    assert guard.find(1, means, 20, 0) == []
    (line,) = guard.find(2, means, 20, 0)
    assert line.startswith(f"epoch 2: collapse: the {name} loss is stuck at {value + 1e-3:.4f}")


def test_more_skipped_steps_than_others_are_reported():
    guard = CollapseGuard(Config())
    assert guard.find(1, HEALTHY, 20, 10) == []
    (line,) = guard.find(2, HEALTHY, 20, 11)
    assert "11 of 20 steps" in line and "--loss_scale" in line


def test_each_of_several_models_is_checked():
    means = figures(dist_ap=9.0, loss=1.0, model=".1") | figures(dist_ap=1e-3, dist_an=1e-3, model=".2")
    (line,) = CollapseGuard(Config()).find(1, means, 20, 0)
    assert "of model 2" in line
