"""1 x 1 convolutions as products of matrices: the same results, and only where they are meant."""

import copy

import pytest
import torch
from torch import nn

from aligned_reid.device.pointwise import PointwiseConv2d, multiply_pointwise
from aligned_reid.model import AlignedReID


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_results_and_gradients_are_the_convolutions(stride, bias, training):
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 6, 1, stride=stride, bias=bias).double().train(training)
    product = nn.Sequential(copy.deepcopy(plain)).to(memory_format=torch.channels_last)
    multiply_pointwise(product)
    assert isinstance(product[0], PointwiseConv2d)
    images = torch.randn(3, 8, 5, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    results = []
    for module in (plain, product):
        own = images.clone(memory_format=torch.preserve_format).requires_grad_()
        made = module(own)
        made.square().sum().backward()
        results.append([made, own.grad, *(parameter.grad for parameter in module.parameters())])
    for expected, got in zip(*results, strict=True):
        assert torch.allclose(expected, got)
    assert results[1][0].is_contiguous(memory_format=torch.channels_last)
    assert product[0].weight.grad.stride() == product[0].weight.stride() or not training


def test_only_1_x_1_convolutions_are_replaced_and_no_tensor_is_renamed():
    model = AlignedReID(3, pretrained="none")
    names = list(model.state_dict())
    multiply_pointwise(model)
    assert list(model.state_dict()) == names
    replaced = [module for module in model.modules() if isinstance(module, PointwiseConv2d)]
    assert len(replaced) == 4 * 1 + 16 * 2 + 1  # shortcuts, two in each block, the local branch
    assert {module.kernel_size for module in replaced} == {(1, 1)}
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, padding=1))
    multiply_pointwise(grouped)
    assert {type(module) for module in grouped} == {nn.Conv2d}
