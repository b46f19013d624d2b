"""The kinds of device, and the choice of one for a run."""

from __future__ import annotations

from aligned_reid.config import Config
from aligned_reid.device.base import Accelerator
from aligned_reid.device.cuda import Cuda
from aligned_reid.device.npu import Npu, first_line, why_no_apex
from aligned_reid.errors import InputError

# In the order of preference of --device auto. A new kind of device needs a class and an entry here.
ACCELERATORS: dict[str, type[Accelerator]] = {"npu": Npu, "cuda": Cuda, "cpu": Accelerator}


def check_device_name(device: str) -> None:
    """Raise InputError unless --device is auto or a kind of device."""
    if device not in ("auto", *ACCELERATORS):
        raise InputError(f"--device {device}: unknown kind of device; choose auto, {', '.join(ACCELERATORS)}")


def open_accelerator(config: Config, index: int | None, local_rank: int) -> Accelerator:
    """The device of the kind --device, number `index` (None: the process's local rank).

    "auto" takes the first available of npu, cuda, cpu. Raises InputError with the reason if it cannot be used.
    """
    device = config.device
    check_device_name(device)
    kinds = list(ACCELERATORS) if device == "auto" else [device]
    reasons: dict[str, str] = {}
    for name in kinds:
        reasons[name] = ACCELERATORS[name].why_unavailable()
        if not reasons[name]:
            break
    else:
        raise InputError(f"--device {device}: {reasons[device]}; use --device auto, or cpu")
    kind = ACCELERATORS[name]
    index = local_rank if index is None else index
    if name == "cpu" and index > local_rank:
        reason = "; ".join(filter(None, reasons.values())) or "--device cpu"
        raise InputError(f"--npu {index}: only the CPU is available ({reason})")
    if name != "cpu" and index >= kind.count():
        raise InputError(f"no device {name}:{index}: this machine has {kind.count()}, numbered from 0")
    if config.amp == "apex":
        reason = why_no_apex() if name == "npu" else f"it is for NPUs, and the device is {name}"
        if reason:
            raise InputError(f"--amp apex: {reason}; use --amp O1")
    if config.amp == "tf32" and not kind.tf32_name:
        raise InputError(f"--amp tf32: {name} has no reduced float32 (TF32 is CUDA's, HF32 the NPU's)")
    if config.compile and (reason := kind.why_not_compilable()):
        raise InputError(f"--compile true: {reason}")
    try:
        accelerator = kind(config, index)
    except RuntimeError as error:
        raise InputError(
            f"device {name}:{index} cannot be used ({first_line(error)}): another process may hold it; "
            "see `npu-smi info` or `nvidia-smi`, or choose another with --npu"
        ) from error
    accelerator.passed_over = "; ".join(f"no {other}: {reason}" for other, reason in reasons.items() if reason)
    return accelerator
