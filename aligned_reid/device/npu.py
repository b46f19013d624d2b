"""Huawei Ascend NPUs through torch_npu, whose torch.npu follows torch.cuda, and Huawei's apex."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from aligned_reid.config import Config
from aligned_reid.device.base import Accelerator, trained_parameters
from aligned_reid.device.cuda import Cuda
from aligned_reid.device.scaler import LossScaler

# The least and the most seconds that HCCL accepts: for a collective, and for the first connection.
HCCL_TIMEOUTS = {"HCCL_EXEC_TIMEOUT": (1, 17340), "HCCL_CONNECT_TIMEOUT": (120, 7200)}


class Npu(Cuda):
    name = "npu"
    backend = "hccl"
    memory_format = torch.contiguous_format  # the device has its own layouts
    tf32_name = "HF32"
    compile_backend = "npu"  # torchair
    apex_amp: Any = None  # the module apex.amp, once it casts

    @classmethod
    def why_unavailable(cls) -> str:
        module, reason = import_torch_npu()
        if module is not None and not module.npu.is_available():
            return "torch_npu sees no NPU (see `npu-smi info`: driver, permissions, ASCEND_RT_VISIBLE_DEVICES)"
        return reason

    @classmethod
    def why_not_compilable(cls) -> str:
        return "" if "npu" in torch.compiler.list_backends() else "this torch_npu has no compiler (torchair)"

    @classmethod
    def count(cls) -> int:
        return importlib.import_module("torch_npu").npu.device_count()

    @property
    def api(self) -> Any:
        return importlib.import_module("torch_npu").npu

    def select(self) -> None:
        self.api.set_device(self.index)
        self.api.set_compile_mode(jit_compile=False)  # use precompiled kernels instead of compiling each new shape
        self.api.conv.allow_hf32 = self.config.amp == "tf32"  # torch_npu's default is True
        self.api.matmul.allow_hf32 = False

    def make_deterministic(self) -> None:
        os.environ["HCCL_DETERMINISTIC"] = "true"  # read when the process group starts
        Accelerator.make_deterministic(self)

    def grad_scaler(self, options: dict[str, Any]) -> Any:
        """torch_npu's, which also detects overflow on first-generation chips, where values saturate instead of inf.

        Never with its `dynamic=False`, which does not look for overflow and takes every step.
        """
        return self.api.amp.GradScaler(**options)

    def adam(self, parameters: list[Any], **options: float) -> torch.optim.Optimizer:
        return importlib.import_module("torch_npu").optim.NpuFusedAdam(parameters, **options)

    @contextlib.contextmanager
    def trace(self, folder: Path) -> Iterator[None]:
        """With torch_npu's profiler, the only one that sees the device; it makes a subfolder."""
        profiler = importlib.import_module("torch_npu").profiler
        activities = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU]
        handler = profiler.tensorboard_trace_handler(str(folder))
        with profiler.profile(activities=activities, on_trace_ready=handler):
            yield

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.apex_amp else super().autocast()  # apex casts everywhere

    def full_precision(self) -> contextlib.AbstractContextManager[Any]:
        return self.apex_amp.disable_casts() if self.apex_amp else contextlib.nullcontext()

    def prepare(self, model: nn.Module, config: Config) -> tuple[torch.optim.Optimizer, LossScaler]:
        if config.amp != "apex" or self.half is None:
            return super().prepare(model, config)
        self.apex_amp = importlib.import_module("apex.amp")
        optimizers = importlib.import_module("apex.optimizers")
        parameters = trained_parameters(model, config.decay_norms)
        optimizer = optimizers.NpuFusedAdam(parameters, lr=config.base_lr, weight_decay=config.weight_decay)
        scale = config.loss_scale
        options = {"opt_level": "O1", "loss_scale": "dynamic" if scale is None else scale, "combine_grad": True}
        _, optimizer = self.apex_amp.initialize(model, optimizer, **options)
        return optimizer, ApexScaler(self.apex_amp, optimizer, scale)

    def prepare_group(self, timeout: int) -> None:
        """Pass the time-out on to HCCL, within its bounds; variables that the user has set stay."""
        for name, (shortest, longest) in HCCL_TIMEOUTS.items():
            os.environ.setdefault(name, str(min(max(timeout, shortest), longest)))

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """NpuFusedAdam counts its steps on the host: a tensor from another Adam would make it wait for the device."""
        counted = {index: {**one, "step": int(one["step"])} for index, one in state["state"].items()}
        super().load_optimizer(optimizer, {**state, "state": counted})


class ApexScaler(LossScaler):
    """Huawei's apex behind the interface of LossScaler. apex itself never skips a step at a static scale."""

    def __init__(self, amp: Any, optimizer: torch.optim.Optimizer, static: float | None) -> None:
        self.amp, self.optimizer, self.static = amp, optimizer, static
        self.current = self.apex_scale()

    def apex_scale(self) -> float:
        return float(self.amp.state_dict()["loss_scaler0"]["loss_scale"])

    def backward(self, loss: Tensor) -> None:
        with self.amp.scale_loss(loss, self.optimizer) as scaled:
            scaled.backward()

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        if self.static is None:
            optimizer.step()  # after an overflow, apex has replaced it by a function that does nothing, for one call
            before, self.current = self.current, self.apex_scale()
            return self.current < before
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = bool(torch.stack([gradient.sum() for gradient in gradients]).isfinite().all())
        if finite:
            optimizer.step()
        return not finite

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.current, "apex": self.amp.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.static is None and "apex" in state:
            self.amp.load_state_dict(state["apex"])
            self.current = self.apex_scale()


def import_torch_npu() -> tuple[ModuleType | None, str]:
    """torch_npu, or None and why it cannot be imported: not installed, no CANN, or built for another torch."""
    try:
        return importlib.import_module("torch_npu"), ""
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch_npu":
            return None, "torch_npu is not installed"
        return None, (
            f"torch_npu cannot be imported ({first_line(error)}): "
            "is CANN's set_env.sh sourced, and does its version fit torch's?"
        )


def why_no_apex() -> str:
    """Why Huawei's apex cannot be used; empty if it can."""
    try:
        amp = importlib.import_module("apex.amp")
        if "combine_grad" in inspect.signature(amp.initialize).parameters:
            return ""
        return "the apex installed here is NVIDIA's, not Huawei's build of it"
    except Exception as error:  # a foreign package may fail in any way
        missing = error.name if isinstance(error, ModuleNotFoundError) else ""
        if missing == "apex":
            return "apex is not installed (build it from Ascend's apex repository; PyPI's apex is another project)"
        if missing == "apex.amp":
            return "the apex installed here is another project of that name (no apex.amp): pip uninstall apex"
        return f"apex cannot be imported ({first_line(error)})"


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
