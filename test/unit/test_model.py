"""The network: shapes, heads, start, and which parameters learn."""

import pytest
import torch

from aligned_reid.evaluation.extract import inference_copy
from aligned_reid.model import AlignedReID


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
