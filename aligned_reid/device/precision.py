"""A check before a run that the device computes the network correctly in 16 bit.

Kernels of a new processor, driver or library can be wrong without an error; some read uninitialized memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from aligned_reid.device.base import Accelerator

NUM_IMAGES = 2  # the fewest that batch norm can train on
# The tolerated error of a value, in roundings of the 16-bit type (finfo.eps): one of the value itself, and BOUND of
# its tensor's root mean square. ResNet-50 with random weights stays below 6.4 in bfloat16 and float16, at 32 x 32 to
# 256 x 128 pixels; a value unrelated to the correct one is off by hundreds.
BOUND = 32
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
LAYERS = (nn.Conv2d, nn.Linear, *NORMS)


class Call(NamedTuple):
    """A layer's input and output in a forward pass."""

    name: str
    layer: nn.Module
    x: Tensor
    y: Tensor


def find_wrong_layer(network: nn.Module, size: tuple[int, int], accelerator: Accelerator, *, backward: bool) -> str:
    """The name and shape of the first layer that is wrong in the accelerator's 16-bit type; empty if none is.

    A small batch of random images of `size` (height, width) passes through the network. Each layer then repeats its
    computation, with `backward` its gradients too, twice in 16 bit and once in float32. Results must agree within
    BOUND; on a device that repeats bits, the two in 16 bit must be identical. If the layers are right but the features
    of the whole network are not, the result is "features". The global random state does not change.
    """
    assert accelerator.half is not None
    random = torch.Generator().manual_seed(0)
    images = torch.randn((NUM_IMAGES, 3, *size), generator=random)
    images = images.to(accelerator.device).to(memory_format=accelerator.memory_format)
    calls: list[Call] = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, y, name=name: calls.append(Call(name, layer, inputs[0], y)))
        for name, layer in network.named_modules()
        if isinstance(layer, LAYERS)
    ]
    network.eval()  # batch norm over few pixels would magnify the roundings before it
    with torch.no_grad():
        with accelerator.autocast():
            features = network(images)
        for hook in hooks:
            hook.remove()
        exact_features = network(images)
    network.train(backward)
    for call in calls:
        grad = torch.randn(call.y.shape, generator=random).to(call.y) if backward else None
        if is_wrong(call, grad, accelerator):
            return describe(call)
    pairs = [pair for pair in zip(features, exact_features, strict=True) if pair[0] is not None]
    return "" if all(agree(got, exact, accelerator.half) for got, exact in pairs) else "features"


def is_wrong(call: Call, grad: Tensor | None, accelerator: Accelerator) -> bool:
    """Whether the layer's output or, given the output's gradient, one of its gradients is wrong in 16 bit."""
    assert accelerator.half is not None
    exact = compute(call.layer, call.x.float(), grad)
    runs = []
    for _ in range(2):
        # Memory that the layer is about to allocate is left full of NaN, to expose kernels that read it.
        num_values = sum(tensor.numel() for tensor in (call.x, call.y, *call.layer.parameters()))
        torch.full((2 * 4 * num_values,), 255, dtype=torch.uint8, device=call.x.device)
        with accelerator.autocast():
            runs.append(compute(call.layer, call.x, grad))
    if accelerator.repeats_bits and not all(map(torch.equal, *runs)):
        return True
    return not all(agree(got, wanted, accelerator.half) for run in runs for got, wanted in zip(run, exact, strict=True))


def compute(layer: nn.Module, x: Tensor, grad: Tensor | None) -> list[Tensor]:
    """The layer's output and, given the output's gradient, the gradients of its parameters and its input.

    The gradient of a batch norm's input is left out: for few pixels it is a difference of nearly equal numbers.
    """
    if grad is None:
        with torch.no_grad():
            return [layer(x)]
    x = x.detach().requires_grad_(not isinstance(layer, NORMS))
    y = layer(x)
    inputs = [tensor for tensor in (*layer.parameters(), x) if tensor.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))]


def agree(got: Tensor, exact: Tensor, half: torch.dtype) -> bool:
    """Whether all of `got` equals `exact` within the tolerance of `half`; NaN never does."""
    error = (got.float() - exact).abs()
    tolerance = torch.finfo(half).eps * (exact.abs() + BOUND * exact.square().mean().sqrt())
    return bool((error <= tolerance).all())


def describe(call: Call) -> str:
    """A layer's name and shape: "base.layer4.0.conv2, 3 x 3 stride 2 on 4 x 2"."""
    shape = f"{call.x.shape[1]} channels"
    if isinstance(call.layer, nn.Conv2d):
        shape = "{} x {} stride {}".format(*call.layer.kernel_size, call.layer.stride[0])
    if call.x.dim() == 4:
        shape += " on {} x {}".format(*call.x.shape[2:])
    return f"{call.name}, {shape}"
