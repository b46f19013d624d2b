"""script/train.py on the CPU with an NPU's memory layout, so that sums are taken in the same order."""

import runpy
from pathlib import Path

import torch

from aligned_reid.device import Accelerator

Accelerator.memory_format = torch.contiguous_format
runpy.run_path(str(Path(__file__).parents[2] / "script" / "train.py"), run_name="__main__")
