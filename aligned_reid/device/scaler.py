"""Loss scaling, which keeps small float16 gradients from underflowing (arXiv:1710.03740, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LossScaler:
    """A GradScaler of torch or torch_npu that skips a step with a gradient that is not finite, and reports it.

    With a static scale an overflow skips the step and leaves the scale as it is.
    """

    NEVER = 2**31 - 1  # steps until a static scale would grow

    def __init__(self, scaler: Any, static: float | None) -> None:
        """scaler: a GradScaler at its initial scale. static: that scale, if it is to stay; None: it is dynamic."""
        self.scaler, self.static = scaler, static
        self.current = float(scaler.get_scale())

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Step unless a gradient is not finite; returns whether the step was skipped. Waits for the device once."""
        self.scaler.step(optimizer)
        self.scaler.update()
        scale = float(self.scaler.get_scale())
        skipped = scale < self.current  # a skipped step is the only reason to lower the scale
        if self.static is None:
            self.current = scale
        elif skipped:
            self.scaler.update(self.static)
        return skipped

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.current, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a dynamic scale, also one saved on another kind of device; a static scale is its run's own."""
        own, saved = self.scaler.state_dict(), state.get("scaler") or {}
        if self.static is None and saved.get("growth_interval") != self.NEVER:
            self.scaler.load_state_dict({name: saved.get(name, value) for name, value in own.items()})
            self.current = float(self.scaler.get_scale())
