"""A model and what trains it: its state, its frozen epochs, what is tested."""

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
    config = Config(**{"id_loss_weight": 1.0, "base_lr": 1e-2} | settings)
    return Learner(config, AlignedReID(4, pretrained="none"), Accelerator(mixed_precision=False), World())


def train_a_step(learner):
    torch.manual_seed(1)
    pixels, labels = torch.randint(0, 256, (8, 64, 32, 3), dtype=torch.uint8), torch.arange(4).repeat_interleave(2)
    learner.optimizer.zero_grad()
    loss, figures = learner.judge(learner.forward(pixels), labels)
    learner.backward(loss)
    return learner.step(), figures


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_its_state_goes_into_another(tmp_path):
    settings = {"ema_decay": 0.9, "center_loss_weight": 0.1}
    first, second = make_learner(**settings), make_learner(**settings)
    first.start_epoch(1)
    assert train_a_step(first)[0] is False
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.start_epoch(1)
    for learner in (first, second):
        train_a_step(learner)
    assert same(first.model.state_dict(), second.model.state_dict())
    assert same(first.tested_model.state_dict(), second.tested_model.state_dict())
    assert torch.equal(first.objective.center_loss.centers, second.objective.center_loss.centers)
    assert first.tested_model is not first.model


def test_without_an_average_the_model_itself_is_tested():
    learner = make_learner()
    assert learner.tested_model is learner.model
    assert set(learner.state_dict()) == {"model", "optimizer", "scaler"}


def test_a_skipped_step_moves_no_average():
    learner = make_learner(ema_decay=0.9)
    learner.start_epoch(1)
    learner.model.base.bn1.bias.register_hook(lambda gradient: gradient * float("nan"))
    assert train_a_step(learner)[0] is True
    assert learner.average.num_steps == 0


def test_heads_without_a_loss_take_no_gradient():
    learner = make_learner(id_loss_weight=0.0)
    learner.start_epoch(1)
    train_a_step(learner)
    without = {name for name, one in learner.model.named_parameters() if one.grad is None}
    assert without == {
        "local_conv.weight",
        "local_conv.bias",
        "local_bn.weight",
        "local_bn.bias",
        "fc.weight",
        "fc.bias",
    }


def test_sync_bn_converts_all_batch_norms():
    learner = make_learner(sync_bn=True)
    norms = [one for one in learner.model.modules() if isinstance(one, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 2
    assert all(isinstance(one, torch.nn.SyncBatchNorm) for one in norms)
    assert {id(one) for group in learner.optimizer.param_groups for one in group["params"]} >= {
        id(one) for norm in norms[:1] for one in norm.parameters()
    }
