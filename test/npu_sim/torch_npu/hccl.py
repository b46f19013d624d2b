"""The process group `hccl`: gloo on the host memory behind the npu tensors. It has no gather, as HCCL has none."""

import torch
import torch.distributed

from torch_npu.memory import to_host
from torch_npu.operators import convert
from torch_npu.report import calls


def register() -> None:
    from torch._C import _distributed_c10d as c10d

    class ProcessGroupHCCL(c10d.Backend):
        def __init__(self, gloo) -> None:
            super().__init__(gloo.rank(), gloo.size())
            self.gloo = gloo

        def getBackendName(self) -> str:
            return "hccl"

        name = _get_backend_name = getBackendName

        def finish(self, name, result, *args):
            getattr(self.gloo, name)(*args).wait()
            calls[f"hccl::{name}"] += 1
            future = torch.futures.Future()
            future.set_result(result)
            return c10d._create_work_from_future(future)

    def collective(name, options, num_inputs):
        def run(self, outputs, *rest):
            *inputs, given = rest if len(rest) > num_inputs else (*rest, options())
            hosts = [convert(to_host, one) for one in (outputs, *inputs)]
            return self.finish(name, outputs, *hosts, given)

        setattr(ProcessGroupHCCL, name, run)

    for name, options, num_inputs in (
        ("allreduce", c10d.AllreduceOptions, 0),
        ("broadcast", c10d.BroadcastOptions, 0),
        ("allgather", c10d.AllgatherOptions, 1),
        ("_allgather_base", c10d.AllgatherOptions, 1),
    ):
        collective(name, options, num_inputs)
    ProcessGroupHCCL.all_gather_single = ProcessGroupHCCL._allgather_base  # newer versions of torch call it so

    def create(store, rank, size, timeout):
        return ProcessGroupHCCL(torch.distributed.ProcessGroupGloo(store, rank, size, timeout))

    torch.distributed.Backend.register_backend("hccl", create, devices=["npu"])
