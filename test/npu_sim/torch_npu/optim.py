"""torch_npu.optim: NpuFusedAdam's signature, state and misuse errors, and the kernel of the CPU's fused Adam."""

import torch

from torch_npu import report
from torch_npu.memory import to_host


class NpuFusedAdam(torch.optim.Optimizer):
    """Adam whose steps are counted on the host, as an int in each parameter's state."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            self._update([one for one in group["params"] if one.grad is not None], group)
        report.calls["optim::NpuFusedAdam"] += 1
        report.end_of_step()

    def _update(self, parameters, group):
        states = [self.state[one] for one in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")} | {"step": 0}
            if not isinstance(state["step"], int):
                raise TypeError("NpuFusedAdam counts its steps on the host: a tensor there would make each step wait")
            state["step"] += 1
        torch._fused_adam_(
            [to_host(one) for one in parameters],
            [to_host(one.grad) for one in parameters],
            *([to_host(state[name]) for state in states] for name in ("exp_avg", "exp_avg_sq")),
            [],
            [torch.tensor(float(state["step"])) for state in states],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def zero_grad(self, set_to_none=False):
        if set_to_none:
            raise ValueError("set_to_none is not supported in fused optimizers")
        super().zero_grad(set_to_none=False)
