"""The moving average of a model's weights over the steps, which is tested in their place."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class WeightAverage:
    """Exponential moving average of all of a model's tensors (Polyak and Juditsky, 1992; arXiv:1703.01780, section 2).

    In the first steps the decay is lower, (1 + steps) / (10 + steps), so that the average soon forgets the start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model: Any = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.num_steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the weights after a step."""
        self.num_steps += 1
        decay = min(self.decay, (1 + self.num_steps) / (10 + self.num_steps))
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([own for own, _ in floats], [new for _, new in floats], 1 - decay)
        for own, new in pairs:
            if not own.is_floating_point():  # a count of batches
                own.copy_(new)
