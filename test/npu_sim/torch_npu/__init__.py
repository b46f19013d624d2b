"""A simulated Ascend NPU: `npu` tensors whose memory is the host's and whose kernels are the CPU's.

With this folder's parent on PYTHONPATH `import torch_npu` finds it, as does `import torch` where it loads backends by
itself. README.md, one folder up, says how it works and what it cannot show.

NPU_SIM_DEVICES: how many devices there are (default 2). NPU_SIM_REPORT: where each process writes which operators and
collectives ran on the device, as <path>.<rank>.json.
"""

import os
import sys

_wanted = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # this import may come first: torch must not start a second one
import torch  # noqa: E402
import torch.utils.backend_registration  # noqa: E402

from torch_npu import autocast, dynamo, hccl, npu, operators, optim, profiler, report, storage  # noqa: E402

if _wanted is None:
    del os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]
else:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = _wanted

__version__ = "1.0+sim"
__all__ = ["npu", "optim", "profiler"]


def _autoload() -> None:
    """The entry point of torch.backends; importing the package has done all of it."""


def _install() -> None:
    torch.utils.backend_registration._setup_privateuseone_for_python_backend("npu", backend_module=npu)
    sys.modules["torch.npu"] = npu
    sys.modules["torch.npu.amp"] = sys.modules["torch_npu.npu.amp"] = npu.amp
    # The device guard that torch makes for a Python backend knows one device: npu:1 gets no autograd thread.
    torch._C._set_multithreading_enabled(False)
    operators.register()
    autocast.register()
    storage.register()
    hccl.register()
    dynamo.register()
    report.register()


_install()
