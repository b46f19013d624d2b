"""The network: shapes, heads, start, and which parameters learn."""

import copy

import pytest
import torch

from aligned_reid.evaluation.extract import inference_copy
from aligned_reid.model import AlignedReID, GeneralizedMean


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AlignedReID(7, pretrained="none")


@pytest.mark.parametrize(("height", "width", "stripes"), [(256, 128, 8), (128, 64, 4), (384, 128, 12), (64, 32, 2)])
def test_shapes(model, height, width, stripes):
    features = model.eval()(torch.randn(2, 3, height, width))
    assert features.global_feat.shape == (2, 2048)
    assert features.local_feat.shape == (2, stripes, 128)
    assert features.logits.shape == (2, 7)


def test_heads_follow_their_definition(model):
    images = torch.randn(2, 3, 128, 64)
    model.eval()
    with torch.no_grad():
        feat = model.base(images)
        features = model(images)
        assert torch.allclose(features.global_feat, feat.mean((2, 3)), rtol=1e-4, atol=1e-5)
        stripe = feat[:, :, 1].mean(-1)  # [2, 2048], the second stripe
        local = torch.relu(model.local_bn(model.local_conv(stripe[:, :, None, None])))[:, :, 0, 0]
        assert torch.allclose(features.local_feat[:, 1], local, rtol=1e-4, atol=1e-4 * local.max().item())
        assert torch.allclose(features.logits, model.fc(features.global_feat), atol=1e-5)


def test_without_classifier():
    model = AlignedReID(None, local_channels=16, pretrained="none").eval()
    features = model(torch.randn(1, 3, 64, 32))
    assert features.logits is None
    assert features.local_feat.shape == (1, 2, 16)


def test_classifier_starts_small(model):
    assert model.fc.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert model.fc.bias.abs().max() == 0


def test_a_head_without_loss_takes_no_gradient(model):
    model.train_heads(local=False, identity=False)
    model.train()
    model(torch.randn(4, 3, 64, 32)).global_feat.sum().backward()
    assert model.fc.weight.grad is None
    assert model.local_conv.weight.grad is None
    assert model.base.conv1.weight.grad is not None
    model.zero_grad()
    model.train_heads(local=True, identity=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_folded_batch_norms_change_rounding_only(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
        images = torch.randn(3, 3, 128, 64)
        network = inference_copy(model)
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
        plain, folded = model.eval()(images), network(images)
    assert folded.logits is None
    for ours, expected in ((folded.global_feat, plain.global_feat), (folded.local_feat, plain.local_feat)):
        assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_last_stride_1_doubles_the_stripes_and_keeps_the_weights():
    torch.manual_seed(0)
    coarse = AlignedReID(None, pretrained="none").eval()
    fine = AlignedReID(None, pretrained="none", last_stride=1).eval()
    fine.load_state_dict(coarse.state_dict())
    images = torch.randn(2, 3, 128, 64)
    with torch.no_grad():
        features = fine(images)
        assert features.local_feat.shape == (2, 8, 128)
        assert fine.feature_shapes((128, 64), local=True) == {"global": (2048,), "local": (8, 128)}
        stage = torch.nn.Sequential(*list(coarse.base.children())[:-1])
        before = stage(images)  # what the last stage sees
        assert torch.equal(stage(images), torch.nn.Sequential(*list(fine.base.children())[:-1])(images))
        assert fine.base.layer4(before).shape[2:] == (8, 4)


def test_generalised_mean_lies_between_mean_and_maximum():
    pooling = GeneralizedMean()
    feat = torch.rand(2, 5, 4, 3) + 0.1
    with torch.no_grad():
        pooling.p.fill_(1.0)
        assert torch.allclose(pooling(feat), feat.mean((2, 3)), rtol=1e-5)
        pooling.p.fill_(200.0)
        assert torch.allclose(pooling(feat.double()), feat.double().amax((2, 3)), rtol=0.03)
        pooling.p.fill_(3.0)
        assert torch.allclose(pooling(feat), feat.pow(3).mean((2, 3)).pow(1 / 3), rtol=1e-5)
    pooling(feat).sum().backward()
    assert pooling.p.grad.abs() > 0


def test_bnneck_is_between_feature_and_classifier(small_trunk):
    model = AlignedReID(5, pretrained="none", bnneck=True, feature_after_bn=True)
    assert model.fc.bias is None
    assert not model.neck.bias.requires_grad
    images = torch.randn(4, 3, 64, 32)
    model.train()
    features = model(images)  # training compares features before the neck
    normed = torch.nn.functional.batch_norm(features.global_feat, None, None, model.neck.weight, training=True)
    assert torch.allclose(features.logits, model.fc(normed), atol=1e-5)
    assert not torch.allclose(features.global_feat, normed, atol=1e-2)
    model.eval()
    with torch.no_grad():
        after = model(images).global_feat
        model.feature_after_bn = False
        assert torch.allclose(after, model.neck(model(images).global_feat))
    model.train_heads(local=False, identity=False)
    assert not model.neck.weight.requires_grad


def test_a_frozen_trunk_keeps_weights_and_statistics(small_trunk):
    model = AlignedReID(5, pretrained="none").train()
    model.freeze_stages(4)
    before = model.base.bn1.running_mean.clone()
    model(torch.randn(4, 3, 64, 32)).logits.sum().backward()
    assert model.base.conv1.weight.grad is None
    assert torch.equal(model.base.bn1.running_mean, before)
    assert model.fc.weight.grad is not None
    model.freeze_stages(0)
    model(torch.randn(4, 3, 64, 32)).logits.sum().backward()
    assert model.base.conv1.weight.grad is not None
    assert not torch.equal(model.base.bn1.running_mean, before)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_stages_are_frozen_from_the_first(num_stages):
    model = AlignedReID(5, pretrained="none").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.freeze_stages(num_stages)
    model(torch.randn(4, 3, 64, 32)).logits.sum().backward()
    frozen = ["conv1.", "bn1.", *(f"layer{number}." for number in range(1, num_stages + 1))]
    for name, parameter in model.base.named_parameters():
        assert (parameter.grad is None) == name.startswith(tuple(frozen))
    for name, statistic in model.base.named_buffers():
        assert torch.equal(statistic, before[f"base.{name}"]) == name.startswith(tuple(frozen))


def test_checkpointed_activations_give_the_same_gradients_and_statistics():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 32)
    plain = AlignedReID(3, pretrained="none").train()
    saving = copy.deepcopy(plain)
    saving.grad_checkpoint = True
    kept = []
    for model in (plain, saving):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            loss = model(images).global_feat.square().sum()
        loss.backward()
        kept.append(sum(sizes))
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if one.grad is not None:
            assert torch.equal(one.grad, other.grad), name
    for (name, one), other in zip(plain.state_dict().items(), saving.state_dict().values(), strict=True):
        assert torch.equal(one, other), name  # the statistics of batch norms have seen each batch once
    assert kept[1] < 0.5 * kept[0]
