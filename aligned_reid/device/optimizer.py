"""Adam, in torch's fastest form for a device, and which parameters it decays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]  # or groups of them, with their own weight decay


def parameters_of(model: nn.Module, decay_norms: bool = True) -> Any:
    """What `model` trains, for an optimiser; without `decay_norms` in two groups, of which the second is not decayed.

    That one has what is of one dimension or none: biases, weights of norms, an exponent (He et al., "Bag of Tricks for
    Image Classification with Convolutional Neural Networks", arXiv:1812.01187, section 3.1).
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if decay_norms:
        return trained
    decayed = {"params": [one for one in trained if one.ndim > 1]}
    return [decayed, {"params": [one for one in trained if one.ndim <= 1], "weight_decay": 0.0}]


def make_adam(parameters: Parameters, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """torch's Adam, fused where this torch can for these tensors (CPU: torch >= 2.4)."""
    given: Any = list(parameters)
    try:
        return torch.optim.Adam(given, lr=lr, weight_decay=weight_decay, fused=True, **ADAM)  # type: ignore[arg-type]
    except RuntimeError:
        return torch.optim.Adam(given, lr=lr, weight_decay=weight_decay, **ADAM)  # type: ignore[arg-type]
