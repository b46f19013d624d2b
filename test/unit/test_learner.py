"""A model and what trains it: its state, and which parameters take gradients."""

import copy

import pytest
import torch

from aligned_reid.config import Config
from aligned_reid.device import Accelerator
from aligned_reid.distributed import World
from aligned_reid.model import AlignedReID
from aligned_reid.training.learner import Learner

pytestmark = pytest.mark.usefixtures("small_trunk")


def make_learner(**settings):
    torch.manual_seed(0)
    config = Config(**{"id_loss_weight": 1.0} | settings)
    return Learner(config, AlignedReID(4, pretrained="none"), Accelerator(mixed_precision=False), World())


def train_a_step(learner):
    torch.manual_seed(1)
    pixels, labels = torch.randint(0, 256, (8, 64, 32, 3), dtype=torch.uint8), torch.arange(4).repeat_interleave(2)
    learner.start_step(1e-2)
    loss, _ = learner.objective(learner.forward(pixels), labels)
    learner.scaler.backward(loss)
    assert not learner.scaler.step(learner.optimizer)


def test_loading_the_state_continues_training_exactly():
    first, second = make_learner(center_loss_weight=0.1), make_learner(center_loss_weight=0.1)
    first.start_epoch(1)
    train_a_step(first)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.start_epoch(1)
    for learner in (first, second):
        train_a_step(learner)
    weights = second.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.model.state_dict().items())
    assert torch.equal(first.objective.center_loss.centers, second.objective.center_loss.centers)


def test_only_center_loss_adds_to_the_state():
    assert set(make_learner().state_dict()) == {"model", "optimizer", "scaler"}
    assert set(make_learner(center_loss_weight=0.1).state_dict()) == {"model", "optimizer", "scaler", "centers"}


def test_heads_without_a_loss_take_no_gradient():
    learner = make_learner(id_loss_weight=0.0)
    learner.start_epoch(1)
    train_a_step(learner)
    without = {name.split(".")[0] for name, one in learner.model.named_parameters() if one.grad is None}
    assert without == {"local_conv", "local_bn", "fc"}


def test_start_step_sets_the_rate_and_clears_gradients():
    learner = make_learner()
    train_a_step(learner)
    learner.start_step(0.5)
    assert {group["lr"] for group in learner.optimizer.param_groups} == {0.5}
    assert all(one.grad is None for one in learner.model.parameters())
