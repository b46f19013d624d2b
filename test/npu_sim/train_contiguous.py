"""script/train.py on the CPU with an NPU's memory layout, so that sums are taken in the same order."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from aligned_reid.device import Accelerator  # noqa: E402

Accelerator.memory_format = torch.contiguous_format
runpy.run_path(str(ROOT / "script" / "train.py"), run_name="__main__")
