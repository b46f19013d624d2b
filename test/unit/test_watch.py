"""Signs of a collapse: each is named at the epoch it starts, once, and healthy epochs are left alone."""

import math

import pytest

from aligned_reid.config import Config
from aligned_reid.training.watch import CollapseWatch

HEALTHY = {"gp": 0.4, "gd_ap": 9.0, "gd_an": 8.7, "gL": 1.1}


def figures(branch="g", dist_ap=5.0, dist_an=5.0, loss=0.3, model=""):
    return {f"{branch}d_ap{model}": dist_ap, f"{branch}d_an{model}": dist_an, f"{branch}L{model}": loss}


def test_healthy_epochs_have_no_sign():
    watch = CollapseWatch(Config())
    assert watch.find(1, HEALTHY, 20, 0) == []
    assert watch.find(2, {**HEALTHY, "gL": 0.3}, 20, 1) == []  # by the margin, and the distances differ
    assert watch.find(3, figures(loss=0.7), 20, 0) == []  # equal in the mean, and not each of them
    assert watch.find(4, figures(dist_ap=4.0, loss=0.05), 20, 0) == []


def test_features_without_spread():
    watch = CollapseWatch(Config())
    (line,) = watch.find(7, figures(dist_ap=1e-3, dist_an=9e-4, loss=0.3001), 20, 0)
    assert line.startswith("epoch 7: collapse: the global features have no spread")
    assert "learning rate" in line
    assert "weights that were not loaded" in line
    assert watch.find(8, figures(dist_ap=1e-3, dist_an=9e-4, loss=0.3001), 20, 0) == []  # said already
    assert watch.find(9, HEALTHY, 20, 0) == []
    assert len(watch.find(10, figures(dist_ap=1e-3, dist_an=9e-4), 20, 0)) == 1  # it has started again


@pytest.mark.parametrize(("margin", "value"), [(0.3, 0.3), (0.5, 0.5), (None, math.log(2))])
def test_a_loss_at_the_margin_for_two_epochs(margin, value):
    watch = CollapseWatch(Config(global_margin=margin, local_margin=margin, l_loss_weight=1.0))
    for branch, name in (("g", "global"), ("l", "local")):
        assert watch.find(1, figures(branch, 5.001, 5.0, value + 1e-3), 20, 0) == []
        (line,) = watch.find(2, figures(branch, 5.001, 5.0, value + 1e-3), 20, 0)
        assert f"epoch 2: collapse: the {name} loss is stuck at {value + 1e-3:.4f}" in line


def test_skipped_steps():
    watch = CollapseWatch(Config())
    assert watch.find(1, HEALTHY, 20, 10) == []
    (line,) = watch.find(2, HEALTHY, 20, 11)
    assert line.startswith("epoch 2: collapse: 11 of 20 steps were skipped")
    assert "--loss_scale dynamic" in line


def test_each_of_several_models_is_watched():
    watch = CollapseWatch(Config())
    means = figures(dist_ap=9.0, loss=1.0, model=".1") | figures(dist_ap=1e-3, dist_an=1e-3, model=".2")
    (line,) = watch.find(1, means, 20, 0)
    assert "of model 2" in line
