"""The devices that a run computes on: NPUs, GPUs and the CPU. Nothing outside this package knows a kind of device."""

from aligned_reid.device.base import Accelerator
from aligned_reid.device.cpu import available_memory, keep_freed_memory, mkl_leaves_avx512
from aligned_reid.device.open import ACCELERATORS, check_device_name, open_accelerator
from aligned_reid.device.precision import find_wrong_layer

__all__ = [
    "ACCELERATORS",
    "Accelerator",
    "available_memory",
    "check_device_name",
    "find_wrong_layer",
    "keep_freed_memory",
    "mkl_leaves_avx512",
    "open_accelerator",
]
