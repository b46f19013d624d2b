"""The only file that knows npu, cuda and cpu. Everything else is written for "a device"."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from aligned_reid.errors import InputError

ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}


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
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = bool(torch.stack([gradient.sum() for gradient in gradients]).isfinite().all())
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


class Accelerator:
    """A device and what is special about it. This class is the CPU; the others override what differs."""

    name = "cpu"
    backend = "gloo"  # of the process group
    memory_format = torch.channels_last
    pin_memory = False

    def __init__(self, index: int = 0, *, mixed_precision: bool = True) -> None:
        self.index = index
        self.device = torch.device(self.name, index) if self.name != "cpu" else torch.device("cpu")
        self.half: torch.dtype | None = self.find_half() if mixed_precision else None
        self.select()

    @classmethod
    def why_not(cls) -> str:
        """Why this kind of device cannot be used here; empty where it can."""
        return ""

    @classmethod
    def count(cls) -> int:
        return 1

    def find_half(self) -> torch.dtype | None:
        """The 16-bit type of mixed precision; a CPU without bfloat16 units would emulate it, slower than float32."""
        return torch.bfloat16 if cpu_has_bfloat16() else None

    def select(self) -> None:
        """Make this the process's current device, and set up what is to be set up once."""
        keep_freed_memory()

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.name, dtype=self.half) if self.half else contextlib.nullcontext()

    def loss_scaler(self, scale: float | None) -> LossScaler:
        """scale: static loss scale; None: dynamic. bfloat16 and float32 need none, so the CPU's is 1."""
        return LossScaler()

    def adam(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return make_adam(parameters, lr, weight_decay)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Bring `adam`'s optimiser to a `state_dict()`, which may be of another device's Adam; its settings stay.

        Raises ValueError or KeyError where the state is of other parameters.
        """
        groups = optimizer.state_dict()["param_groups"]
        theirs = [group["params"] for group in state["param_groups"]]
        if [len(group["params"]) for group in groups] != [len(params) for params in theirs]:
            raise ValueError("the optimiser's state is of other parameters")
        groups = [{**group, "params": params} for group, params in zip(groups, theirs, strict=True)]
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})

    def read_later(self, value: Tensor) -> Callable[[], Tensor]:
        """Start copying `value` to the host; the returned function waits for it and gives it."""
        return lambda: value

    def data_parallel_arguments(self) -> dict[str, Any]:
        return {}

    def random_state(self) -> Tensor | None:
        """The device's random state, where it has one of its own."""
        return None

    def set_random_state(self, state: Tensor) -> None:
        """Undo `random_state`."""

    def describe(self) -> str:
        """For the log: the device, its precision and the backend."""
        precision = str(self.half or torch.float32).removeprefix("torch.")
        return f"{self.name} ({self.model_name()}), {precision}, torch {torch.__version__}"

    def model_name(self) -> str:
        return f"{platform.machine()}, {torch.get_num_threads()} threads"


class Cuda(Accelerator):
    """NVIDIA GPUs."""

    name = "cuda"
    backend = "nccl"
    pin_memory = True

    @classmethod
    def why_not(cls) -> str:
        return "" if torch.cuda.is_available() else "torch sees no CUDA GPU"

    @classmethod
    def count(cls) -> int:
        return torch.cuda.device_count()

    @property
    def api(self) -> Any:
        """torch.cuda, or what stands for it on another device."""
        return torch.cuda

    def find_half(self) -> torch.dtype | None:
        return torch.float16

    def select(self) -> None:
        self.api.set_device(self.index)

    def synchronize(self) -> None:
        self.api.synchronize()

    def loss_scaler(self, scale: float | None) -> LossScaler:
        if self.half is None:
            return LossScaler()
        return NativeScaler(self.grad_scaler({} if scale is None else {"init_scale": scale}), static=scale)

    def grad_scaler(self, options: dict[str, Any]) -> Any:
        if hasattr(torch.amp, "GradScaler"):  # torch >= 2.3
            return torch.amp.GradScaler("cuda", **options)
        return torch.cuda.amp.GradScaler(**options)

    def read_later(self, value: Tensor) -> Callable[[], Tensor]:
        copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
        done = self.api.Event()
        done.record()

        def wait() -> Tensor:
            done.synchronize()
            return copy

        return wait

    def data_parallel_arguments(self) -> dict[str, Any]:
        return {"device_ids": [self.index]}

    def random_state(self) -> Tensor | None:
        return self.api.get_rng_state(self.index)

    def set_random_state(self, state: Tensor) -> None:
        self.api.set_rng_state(state, self.index)

    def model_name(self) -> str:
        return f"{self.api.get_device_name(self.index)}, device {self.index}"


class Npu(Cuda):
    """Huawei Ascend NPUs through torch_npu, whose torch.npu follows torch.cuda."""

    name = "npu"
    backend = "hccl"
    memory_format = torch.contiguous_format  # the device has layouts of its own

    @classmethod
    def why_not(cls) -> str:
        module, reason = import_torch_npu()
        if module is None:
            return reason
        if not module.npu.is_available():
            return "torch_npu sees no NPU (see `npu-smi info`: driver, permissions, ASCEND_RT_VISIBLE_DEVICES)"
        return ""

    @classmethod
    def count(cls) -> int:
        module, _ = import_torch_npu()
        return module.npu.device_count() if module else 0

    @property
    def api(self) -> Any:
        return import_torch_npu()[0].npu  # type: ignore[union-attr]

    def select(self) -> None:
        super().select()
        self.api.set_compile_mode(jit_compile=False)  # precompiled kernels: no compilation at each new shape

    def grad_scaler(self, options: dict[str, Any]) -> Any:
        """torch_npu's own: first-generation chips saturate instead of giving inf, which only it notices.

        Not its `dynamic=False`: that one looks for no overflow and steps with whatever the gradients are.
        """
        return self.api.amp.GradScaler(**options)

    def adam(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        module, _ = import_torch_npu()
        return module.optim.NpuFusedAdam(list(parameters), lr=lr, weight_decay=weight_decay, **ADAM)  # type: ignore[union-attr]

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """As the others'; NpuFusedAdam counts its steps on the host, and a tensor there would make it wait."""
        counted = {index: {**one, "step": int(one["step"])} for index, one in state["state"].items()}
        super().load_optimizer(optimizer, {**state, "state": counted})


ACCELERATORS: dict[str, type[Accelerator]] = {"npu": Npu, "cuda": Cuda, "cpu": Accelerator}


def open_accelerator(device: str, index: int | None, local_rank: int, *, mixed_precision: bool) -> Accelerator:
    """The accelerator that `--device` and `--npu` name; "auto" takes the first of npu, cuda, cpu that is there.

    index: device index; None takes the process's local rank. Raises InputError with the reason where it cannot be used.
    """
    kinds = list(ACCELERATORS) if device == "auto" else [device]
    reasons = {name: ACCELERATORS[name].why_not() for name in kinds}
    usable = [name for name in kinds if not reasons[name]]
    if not usable:
        raise InputError(f"--device {device}: {reasons[device]}; use --device auto, or cpu")
    kind = ACCELERATORS[usable[0]]
    index = local_rank if index is None else index
    if kind.name != "cpu" and index >= kind.count():
        raise InputError(f"device {kind.name}:{index} is not there: this machine has {kind.count()} (numbers from 0)")
    if kind.name == "cpu" and index > local_rank:
        raise InputError(
            f"--npu {index}: there is no such device, only the CPU ({'; '.join(filter(None, reasons.values()))})"
        )
    return kind(index, mixed_precision=mixed_precision)


def import_torch_npu() -> tuple[ModuleType | None, str]:
    """torch_npu, or None and why it cannot be imported (not installed, no CANN, made for another torch)."""
    try:
        return importlib.import_module("torch_npu"), ""
    except ModuleNotFoundError as error:
        if error.name == "torch_npu":
            return None, "torch_npu is not installed"
        return None, f"torch_npu cannot be imported ({error})"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return (
            None,
            f"torch_npu cannot be imported ({reason}): is CANN's set_env.sh sourced, and does its version fit torch's?",
        )


def make_adam(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """torch's Adam, fused where this torch can for these tensors (CPU: torch >= 2.4)."""
    parameters = list(parameters)
    try:
        return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=True, **ADAM)  # type: ignore[arg-type]
    except RuntimeError:
        return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, **ADAM)  # type: ignore[arg-type]


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the C library keep memory that tensors free, for the tensors of the next step.

    As it is, it gives each activation back to the system and gets it again, zeroed, page by page. Peak memory grows by
    what lies between the pieces. Other libraries than glibc are left alone.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AMX or AVX-512 BF16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
