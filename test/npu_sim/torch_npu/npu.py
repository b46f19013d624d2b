"""torch.npu: the part of it that training and evaluation call. Nothing here is asynchronous."""

import functools
import os
import types

import torch

from torch_npu.report import facts

COUNT = int(os.environ.get("NPU_SIM_DEVICES", "2"))
_current = 0


def index_of(device: object = None) -> int:
    """The index that a device, its number or None (the current one) names; RuntimeError where there is none such."""
    index = device if device is None or isinstance(device, int) else torch.device(device).index
    index = _current if index is None else index
    if not 0 <= index < COUNT:
        raise RuntimeError(f"npu: invalid device index {index}: there are {COUNT}")
    return index


def device_count() -> int:
    return COUNT


def current_device() -> int:
    return _current


def is_available() -> bool:
    return COUNT > 0


is_initialized = is_available


def set_device(device: object) -> None:
    global _current
    _current = index_of(device)
    if os.environ.get("NPU_SIM_BUSY") == str(_current):
        raise RuntimeError(f"aclrtSetDevice failed for device {_current}: error code 507033\n[PID: 1] more lines")
    facts["device"] = _current


def set_compile_mode(jit_compile: bool = False) -> None:
    facts["jit_compile"] = jit_compile


def synchronize(device: object = None) -> None: ...


def get_device_name(device: object = None) -> str:
    return "simulated Ascend"


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16, torch.float32]


def manual_seed_all(seed: int) -> None:
    """Random numbers come from the CPU's generator, which torch.manual_seed has set already."""


def get_rng_state(device: object = "npu") -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: object = "npu") -> None:
    torch.set_rng_state(state)


def _lazy_init() -> None: ...


def _is_in_bad_fork() -> bool:
    return False


class _HF32:
    """torch.npu.conv and torch.npu.matmul: whether float32 products may round their input (conv: yes, unless told)."""

    def __init__(self, name: str, allowed: bool) -> None:
        self.__dict__.update(name=name, allow_hf32=allowed)

    def __setattr__(self, option: str, value: bool) -> None:
        self.__dict__[option] = value
        facts.setdefault("hf32", {})[self.name] = value


conv, matmul = _HF32("conv", True), _HF32("matmul", False)


class Event:
    """Work is done when its call returns, so an event is always past."""

    def record(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...


amp = types.ModuleType("torch_npu.npu.amp")


class GradScaler(torch.amp.GradScaler):
    """torch_npu's signature, and its trap: with dynamic=False nothing looks for an overflow and every step is taken."""

    def __init__(self, init_scale=2.0**16, dynamic=True, **options):
        super().__init__("npu", init_scale=init_scale, **options)
        self._dynamic = dynamic

    def _maybe_opt_step(self, optimizer, optimizer_state, *args, **kwargs):
        if self._dynamic:
            return super()._maybe_opt_step(optimizer, optimizer_state, *args, **kwargs)
        return optimizer.step(*args, **kwargs)

    def state_dict(self):
        return {**super().state_dict(), "dynamic": self._dynamic}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self._dynamic = state["dynamic"]


amp.GradScaler = GradScaler
amp.autocast = functools.partial(torch.amp.autocast, "npu")
