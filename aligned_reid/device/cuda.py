"""NVIDIA GPUs."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from aligned_reid.device.base import Accelerator


class Cuda(Accelerator):
    name = "cuda"
    backend = "nccl"
    pin_memory = True
    tf32_name = "TF32"
    repeats_bits = False

    @classmethod
    def why_unavailable(cls) -> str:
        return "" if torch.cuda.is_available() else "torch sees no CUDA GPU"

    @classmethod
    def why_not_compilable(cls) -> str:
        return "" if importlib.util.find_spec("triton") else "triton is not installed (pip install triton)"

    @classmethod
    def count(cls) -> int:
        return torch.cuda.device_count()

    @property
    def api(self) -> Any:
        """torch.cuda; on an NPU, torch.npu."""
        return torch.cuda

    def find_device(self) -> torch.device:
        return torch.device(self.name, self.index)

    def find_half(self) -> torch.dtype | None:
        return torch.float16

    def select(self) -> None:
        self.api.set_device(self.index)
        torch.backends.cudnn.allow_tf32 = self.config.amp == "tf32"  # torch's default is True
        torch.backends.cuda.matmul.allow_tf32 = False

    def make_deterministic(self) -> None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        super().make_deterministic()

    def synchronize(self) -> None:
        self.api.synchronize()

    def random_state(self) -> Tensor:
        return self.api.get_rng_state(self.index)

    def set_random_state(self, state: Tensor) -> None:
        self.api.set_rng_state(state, self.index)

    def model_name(self) -> str:
        return f"{self.api.get_device_name(self.index)}, device {self.index}"
