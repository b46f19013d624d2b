"""The check that a device computes a network right in 16 bit, before a run relies on it.

Kernels of a new processor, driver or library can be wrong without an error: some read memory that was never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aligned_reid.data.transforms import normalize_images
from aligned_reid.device.base import Accelerator

NUM_IMAGES = 2  # the least that batch norm trains on
# How far a value may be off, in roundings of the 16-bit type (finfo.eps): one of the value itself, and BOUND of its
# tensor's root mean square. The layers and features of ResNet-50 at 32 x 32 to 256 x 128 pixels, in bfloat16 and in
# float16, with random weights, are off by at most 6.4; a value that has nothing to do with the right one by hundreds.
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
    """The first layer of `network` that is wrong in the accelerator's 16-bit type, with its shape; empty if none is.

    A small batch of images of `size` (height, width) goes through the network. Each layer then computes on the input
    that it had there, and with `backward` on a random gradient of its output, twice in 16 bit and once in float32.
    Output and gradients have to agree within BOUND, and those in 16 bit with each other, to the bit where the device
    repeats itself. Before, memory is filled with NaN, for kernels that read what they have not written. If only the
    features of the whole network are wrong, the answer is "features". The global random state stays as it is.
    """
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (NUM_IMAGES, *size, 3), dtype=torch.uint8, generator=random)
    images = normalize_images(pixels.to(accelerator.device), accelerator.memory_format)
    network.eval()  # batch norm over few pixels would magnify the roundings before it
    with torch.no_grad():
        calls, features = record(network, images, accelerator)
        exact_features = network(images)
    network.train(backward)
    for call in calls:
        grad = torch.randn(call.y.shape, generator=random).to(call.y) if backward else None
        if is_wrong(call, grad, accelerator):
            return describe(call)
    pairs = [pair for pair in zip(features, exact_features, strict=True) if pair[0] is not None]
    return "" if all(agree(got, exact, accelerator) for got, exact in pairs) else "features"


def record(network: nn.Module, images: Tensor, accelerator: Accelerator) -> tuple[list[Call], Sequence[Any]]:
    """The calls of the network's layers on `images`, in their order, and its features, in 16 bit."""
    calls: list[Call] = []
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, LAYERS)]
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, y, name=name: calls.append(Call(name, layer, inputs[0], y)))
        for name, layer in layers
    ]
    with accelerator.autocast():
        features = network(images)
    for hook in hooks:
        hook.remove()
    return calls, features


def is_wrong(call: Call, grad: Tensor | None, accelerator: Accelerator) -> bool:
    """Whether a layer's output or, given the gradient of its output, one of its gradients is wrong in 16 bit."""
    exact = compute(call.layer, call.x.float(), grad)
    runs = []
    for _ in range(2):
        dirty_memory(call)
        with accelerator.autocast():
            runs.append(compute(call.layer, call.x, grad))
    if accelerator.repeats_bits and not all(map(torch.equal, *runs)):
        return True
    return not all(agree(got, wanted, accelerator) for run in runs for got, wanted in zip(run, exact, strict=True))


def compute(layer: nn.Module, x: Tensor, grad: Tensor | None) -> list[Tensor]:
    """A layer's output and, given the gradient of that, the gradients of its parameters and of its input.

    Not of a batch norm's input: of few pixels that is a difference of nearly equal numbers.
    """
    if grad is None:
        with torch.no_grad():
            return [layer(x)]
    x = x.detach().requires_grad_(not isinstance(layer, NORMS))
    y = layer(x)
    wanted = [tensor for tensor in (*layer.parameters(), x) if tensor.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad.to(y.dtype))]


def agree(got: Tensor, exact: Tensor, accelerator: Accelerator) -> bool:
    """Whether all of `got` is within the 16-bit type's roundings of `exact`; NaN is not."""
    assert accelerator.half is not None
    eps = torch.finfo(accelerator.half).eps
    error = (got.float() - exact).abs()
    return bool((error <= eps * (exact.abs() + BOUND * exact.square().mean().sqrt())).all())


def dirty_memory(call: Call) -> None:
    """Free memory full of NaN, in every floating-point type, for what the layer is going to allocate."""
    tensors = (call.x, call.y, *call.layer.parameters())
    num_bytes = 2 * 4 * sum(tensor.numel() for tensor in tensors)
    torch.full((num_bytes,), 255, dtype=torch.uint8, device=call.x.device)


def describe(call: Call) -> str:
    """A layer's name and shape: "base.layer4.0.conv2, 3 x 3 stride 2 on 4 x 2"."""
    layer = call.layer
    shape = f"{call.x.shape[1]} channels"
    if isinstance(layer, nn.Conv2d):
        shape = "{} x {} stride {}".format(*layer.kernel_size, layer.stride[0])
    if call.x.dim() == 4:
        shape += " on {} x {}".format(*call.x.shape[2:])
    return f"{call.name}, {shape}"
