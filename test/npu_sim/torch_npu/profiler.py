"""torch_npu.profiler: its call and its folder; what it writes there is torch's trace of the host."""

import contextlib
import enum
from pathlib import Path

import torch


class ProfilerActivity(enum.Enum):
    CPU = 0
    NPU = 1


def tensorboard_trace_handler(folder):
    return lambda profiler: profiler.export_chrome_trace(str(Path(folder, "simulated_ascend_pt.json")))


@contextlib.contextmanager
def profile(activities, on_trace_ready):
    assert ProfilerActivity.NPU in activities
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        yield profiler
    on_trace_ready(profiler)
