"""Loss scaling: half gradients too small to be told from zero are scaled up, and those too large skip their step.

Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LossScaler:
    """Scale the loss before backward, unscale the gradients after; a gradient that is not finite skips the step.

    This one needs nothing of a device and keeps its scale (1 for float32 and bfloat16).
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.current = scale

    def backward(self, loss: Tensor) -> None:
        (loss * self.current if self.current != 1.0 else loss).backward()

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Step unless a gradient is not finite; returns whether the step was skipped."""
        gradients = gradients_of(optimizer)
        finite = gradients_are_finite(gradients)
        if finite:
            if self.current != 1.0:
                torch._foreach_mul_(gradients, 1.0 / self.current)
            optimizer.step()
        return not finite

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.current}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.current = float(state.get("scale", self.current))


class NativeScaler(LossScaler):
    """A device's own GradScaler behind the same calls; with `static` an overflow skips the step, the scale stays."""

    def __init__(self, scaler: Any, static: float | None) -> None:
        self.scaler, self.static = scaler, static

    @property
    def current(self) -> float:  # type: ignore[override]
        """The scale; reading it waits for the device."""
        return float(self.scaler.get_scale())

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        self.scaler.unscale_(optimizer)
        skipped = any(bool(found) for found in self.scaler._found_inf_per_device(optimizer).values())
        self.scaler.step(optimizer)
        self.scaler.update(self.static)  # None: as the scaler finds right
        return skipped

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.current, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A static scale stays; a dynamic one goes on, also from another kind of device's."""
        if self.static is None:
            own = self.scaler.state_dict()
            saved = state.get("scaler") or {}
            self.scaler.load_state_dict({name: saved.get(name, value) for name, value in own.items()})


class ApexScaler(LossScaler):
    """Huawei's apex behind the same calls. It scales and unscales; at a static scale it would never skip a step."""

    def __init__(self, amp: Any, optimizer: torch.optim.Optimizer, static: float | None) -> None:
        self.amp, self.optimizer, self.static = amp, optimizer, static
        self.lowered = False

    @property
    def current(self) -> float:  # type: ignore[override]
        return float(self.amp.state_dict()["loss_scaler0"]["loss_scale"])

    def backward(self, loss: Tensor) -> None:
        before = self.current
        with self.amp.scale_loss(loss, self.optimizer) as scaled:
            scaled.backward()
        self.lowered = self.current < before

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        if self.static is None:
            optimizer.step()  # which apex has made to do nothing, once, after an overflow
            return self.lowered
        finite = gradients_are_finite(gradients_of(optimizer))
        if finite:
            optimizer.step()
        return not finite

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.current, "apex": self.amp.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.static is None and "apex" in state:
            self.amp.load_state_dict(state["apex"])


def gradients_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def gradients_are_finite(gradients: list[Tensor]) -> bool:
    """Waits for the device once."""
    return bool(torch.stack([gradient.sum() for gradient in gradients]).isfinite().all())
