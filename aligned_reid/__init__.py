"""AlignedReID: training and evaluation of person re-identification (arXiv:1711.08184) on Ascend NPUs, GPUs and CPUs."""

import importlib
import os
from typing import Any

from aligned_reid.errors import InputError

# Before torch is imported: torch >= 2.5 would load torch_npu by itself, and fail to import where CANN is missing.
# device/ loads it when it is asked for, and can say why it does not load.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

__version__ = "1.0.0"
__all__ = ["Gallery", "InputError", "ReID", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("ReID", "Gallery"):  # torch takes seconds to import
        return getattr(importlib.import_module("aligned_reid.inference"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
