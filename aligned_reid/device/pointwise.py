"""1 x 1 convolutions as products of matrices, which is what they are: a CPU without AVX-512 trains them faster so."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PointwiseConv2d(nn.Conv2d):
    """A 1 x 1 convolution that in training is one product over the pixels of all images.

    Of channels_last images the pixels are the rows of a matrix as they lie. With AVX2, oneDNN's convolution has
    gradients of weights that run at two thirds of the speed of the same product of matrices. Elsewhere it is torch's.
    """

    def forward(self, feat: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, H', W'], the stride's share of the pixels."""
        if not self.training:
            return super().forward(feat)
        down, right = self.stride
        pixels = feat[:, :, ::down, ::right].permute(0, 2, 3, 1)
        return F.linear(pixels, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def multiply_pointwise(model: nn.Module) -> None:
    """Let the 1 x 1 convolutions of `model`, which is in its memory format, train as products of matrices, in place.

    Tensors keep their names, shapes and values. A weight's strides become those of the matrix, which its gradient has:
    data parallel training warns of others, and copies.
    """
    for module in model.modules():
        if type(module) is not nn.Conv2d:
            continue
        if module.kernel_size == (1, 1) and module.padding == (0, 0) and module.groups == 1:
            module.__class__ = PointwiseConv2d
            module.weight.data = module.weight.detach().flatten(1)[:, :, None, None]
