"""amp at O1: once it is initialised functions cast everywhere, as apex's patched ones do; here autocast does it.

As in apex, a static scale never skips a step; the caller has to do that.
"""

import contextlib

import torch
from torch.nn.parallel import DistributedDataParallel
from torch_npu.report import facts

_scale = 1.0
_is_dynamic = False


def initialize(models, optimizers=None, enabled=True, opt_level="O1", loss_scale=None, combine_grad=None, verbosity=1):
    global _scale, _is_dynamic
    if opt_level != "O1":
        raise NotImplementedError(f"the simulation knows O1 only, not {opt_level}")
    if isinstance(models, DistributedDataParallel):
        raise RuntimeError("parallel wrappers should only be applied AFTER the model was returned from amp.initialize")
    for parameter in models.parameters():
        if parameter.device.type != "npu" or parameter.dtype != torch.float32:
            raise RuntimeError(f"found a parameter of type {parameter.type()}, expected torch.npu.FloatTensor")
    _is_dynamic = loss_scale == "dynamic"
    _scale = 2.0**16 if _is_dynamic else float(loss_scale)
    facts["apex"] = {"opt_level": opt_level, "loss_scale": loss_scale, "combine_grad": combine_grad}
    torch.autocast("npu", dtype=torch.float16).__enter__()
    return models, optimizers


@contextlib.contextmanager
def disable_casts():
    with torch.autocast("npu", enabled=False):
        yield


@contextlib.contextmanager
def scale_loss(loss, optimizers, loss_id=0):
    global _scale
    yield loss.float() * _scale
    gradients = [p.grad for group in optimizers.param_groups for p in group["params"] if p.grad is not None]
    torch._foreach_mul_(gradients, 1.0 / _scale)
    if _is_dynamic and not all(bool(one.isfinite().all()) for one in gradients):
        _scale /= 2.0
        _skip_once(optimizers)


def _skip_once(optimizer):
    """The next step does nothing but put the real one back in its place."""
    real = optimizer.step

    def skip(closure=None):
        optimizer.step = real

    optimizer.step = skip


def state_dict():
    return {"loss_scaler0": {"loss_scale": _scale, "unskipped": 0}}


def load_state_dict(state):
    global _scale
    _scale = state["loss_scaler0"]["loss_scale"]
