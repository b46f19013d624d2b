"""The moving average of weights: its formula, its start, and what is no weight."""

import pytest
import torch
from torch import nn

from aligned_reid.training.average import WeightAverage


def test_it_follows_its_formula_from_the_start():
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    average = WeightAverage(model, 0.999)
    nn.init.constant_(model.weight, 2.0)
    average.update(model)
    decay = 2 / 11  # (1 + 1) / (10 + 1)
    assert average.model.weight.tolist() == [pytest.approx([decay + 2 * (1 - decay)] * 2)]
    average.num_steps = 10**6
    before = average.model.weight.clone()
    average.update(model)
    assert torch.allclose(average.model.weight, 0.999 * before + 0.001 * 2.0)


def test_counts_are_taken_over_and_statistics_averaged():
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, 0.5)
    model(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    average.update(model)
    assert average.model.num_batches_tracked == 1
    assert 0 < average.model.running_mean[0] < model.running_mean[0]
    assert not average.model.weight.requires_grad
    assert not average.model.training
