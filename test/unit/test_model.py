"""The model: shapes, heads, initial weights, and which parameters are trained."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from aligned_reid.evaluation.extract import inference_copy
from aligned_reid.model import AlignedReID, GeneralizedMean


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AlignedReID(7, pretrained="none")


@pytest.fixture
def shallow_trunk(monkeypatch):
    """A ResNet with one block a stage instead of ResNet-50."""
    resnet = ResNet(Bottleneck, [1, 1, 1, 1])
    trunk = nn.Sequential(OrderedDict((n, m) for n, m in resnet.named_children() if n not in ("avgpool", "fc")))
    monkeypatch.setattr("aligned_reid.model.make_trunk", lambda: trunk)


@pytest.mark.parametrize(("height", "width", "stripes"), [(256, 128, 8), (128, 64, 4), (64, 32, 2)])
@torch.no_grad()
def test_outputs_have_the_documented_shapes(model, height, width, stripes):
    features = model.eval()(torch.randn(1, 3, height, width))
    assert features.global_feat.shape == (1, 2048)
    assert features.local_feat.shape == (1, stripes, 128)
    assert features.logits.shape == (1, 7)
    assert model.feature_shapes((height, width), local=True) == {"global": (2048,), "local": (stripes, 128)}
    assert model.feature_shapes((height, width), local=False) == {"global": (2048,)}


def test_a_model_without_classifier_returns_no_logits(small_trunk):
    features = AlignedReID(None, local_channels=16, pretrained="none").eval()(torch.randn(1, 3, 64, 32))
    assert features.logits is None and features.local_feat.shape == (1, 2, 16)


@torch.no_grad()
def test_heads_follow_their_definition(model):
    images = torch.randn(2, 3, 128, 64)
    feat = model.eval().base(images)
    features = model(images)
    assert torch.allclose(features.global_feat, feat.mean((2, 3)), rtol=1e-4, atol=1e-5)
    stripe = feat[:, :, 1].mean(-1)  # [2, 2048], the second stripe
    local = torch.relu(model.local_bn(model.local_conv(stripe[:, :, None, None])))[:, :, 0, 0]
    assert torch.allclose(features.local_feat[:, 1], local, rtol=1e-4, atol=1e-4 * local.max().item())
    assert torch.allclose(features.logits, model.fc(features.global_feat), atol=1e-5)


def test_initial_weights_are_small(model):
    assert model.fc.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert model.fc.bias.count_nonzero() == 0
    assert (model.base.layer4[2].bn3.weight == 0.2).all()
    assert (model.base.layer4[2].bn2.weight == 1).all()


def test_heads_that_no_loss_uses_get_no_gradient(small_trunk):
    model = AlignedReID(5, pretrained="none").train()
    model.train_heads(local=False, identity=False)
    model(torch.randn(4, 3, 64, 32)).global_feat.sum().backward()
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {
        name for name, value in model.named_parameters() if name.startswith("base.") and value.grad is not None
    }
    model.train_heads(local=True, identity=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_folding_batch_norms_changes_only_rounding(model):
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
    images = torch.randn(3, 3, 128, 64)
    network = inference_copy(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    plain, folded = model.eval()(images), network(images)
    assert folded.logits is None
    for ours, expected in ((folded.global_feat, plain.global_feat), (folded.local_feat, plain.local_feat)):
        assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@torch.no_grad()
def test_last_stride_1_doubles_the_stripes_with_the_same_weights(model):
    fine = AlignedReID(7, pretrained="none", last_stride=1).eval()
    fine.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 128, 64)
    assert fine(images).local_feat.shape == (1, 8, 128)
    assert fine.feature_shapes((128, 64), local=True)["local"] == (8, 128)
    first_stages, fine_first_stages = model.eval().base[:-1], fine.base[:-1]
    assert torch.equal(first_stages(images), fine_first_stages(images))


def test_generalized_mean_lies_between_mean_and_maximum():
    pooling = GeneralizedMean()
    feat = torch.rand(2, 5, 4, 3) + 0.1
    assert torch.allclose(pooling(feat), feat.pow(3).mean((2, 3)).pow(1 / 3), rtol=1e-5)
    pooling(feat).sum().backward()
    assert pooling.p.grad.abs() > 0
    with torch.no_grad():
        pooling.p.fill_(1.0)
        assert torch.allclose(pooling(feat), feat.mean((2, 3)), rtol=1e-5)
        pooling.p.fill_(200.0)
        assert torch.allclose(pooling(feat.double()), feat.double().amax((2, 3)), rtol=0.03)


def test_bnneck_lies_between_feature_and_classifier(small_trunk):
    model = AlignedReID(5, pretrained="none", bnneck=True, feature_after_bn=True).train()
    assert model.fc.bias is None
    assert not model.neck.bias.requires_grad
    images = torch.randn(4, 3, 64, 32)
    features = model(images)  # training compares features before the neck
    normed = nn.functional.batch_norm(features.global_feat, None, None, model.neck.weight, training=True)
    assert torch.allclose(features.logits, model.fc(normed), atol=1e-5)
    assert not torch.allclose(features.global_feat, normed, atol=1e-2)
    model.eval()
    with torch.no_grad():
        after = model(images).global_feat
        model.feature_after_bn = False
        assert torch.allclose(after, model.neck(model(images).global_feat))
    model.train_heads(local=False, identity=False)
    assert not model.neck.weight.requires_grad


@pytest.mark.parametrize("num_stages", [0, 1, 3, 4])
def test_frozen_stages_keep_weights_and_statistics(num_stages, shallow_trunk):
    model = AlignedReID(5, pretrained="none").train()
    model.freeze_stages(4)
    model.freeze_stages(num_stages)  # unfreezes the later stages again
    before = {name: value.clone() for name, value in model.base.named_buffers()}
    model(torch.randn(4, 3, 64, 32)).logits.sum().backward()
    stem = ["conv1.", "bn1."] if num_stages else []
    frozen = (*stem, *(f"layer{number}." for number in range(1, num_stages + 1)))
    for name, parameter in model.base.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name
    for name, statistic in model.base.named_buffers():
        assert torch.equal(statistic, before[name]) == name.startswith(frozen), name
    assert model.fc.weight.grad is not None
