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

from torch_npu import autocast, hccl, memory, npu, operators, optim, profiler, report  # noqa: E402

if _wanted is None:
    del os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]
else:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = _wanted

__version__ = "1.0+sim"
__all__ = ["npu", "optim", "profiler"]


def _autoload() -> None:
    """The entry point of torch.backends; importing the package has done all of it."""


def _run_graph(graph_module, example_inputs, **options):
    """The backend "npu" of torch.compile; torch_npu's compiles with torchair, this one runs the graph as it is."""
    report.facts["compiled_nodes"] = report.facts.get("compiled_nodes", 0) + len(graph_module.graph.nodes)
    return graph_module.forward


def _install() -> None:
    torch.utils.backend_registration._setup_privateuseone_for_python_backend("npu", backend_module=npu)
    sys.modules["torch.npu"] = npu
    sys.modules["torch.npu.amp"] = sys.modules["torch_npu.npu.amp"] = npu.amp
    # The device guard that torch makes for a Python backend knows one device: npu:1 gets no autograd thread.
    torch._C._set_multithreading_enabled(False)
    operators.register()
    autocast.register()
    memory.register()
    hccl.register()
    if os.environ.get("NPU_SIM_COMPILER"):  # importing dynamo takes seconds
        from torch._dynamo import register_backend

        register_backend(_run_graph, "npu")
    report.register()


_install()
