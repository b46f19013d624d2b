"""Operators of npu tensors: one fallback runs each with the CPU's kernel on the same memory, and counts it."""

import functools

import torch

from torch_npu import report
from torch_npu.memory import storage_bytes, to_device, to_host
from torch_npu.npu import index_of

aten = torch.ops.aten

COPY = "aten::_copy_from"
# These may have arguments on the host beside those on the device; all others refuse them, as a device does.
MIXED = {COPY, "aten::index", "aten::index_put_", "aten::_index_put_impl_"}
# The CPU's kernels for half products are tens of times slower than those for float. The device multiplies halves and
# sums in float, which these do: float arguments, the result rounded to half.
HALF_PRODUCTS = {
    f"aten::{name}"
    for name in ("convolution_overrideable", "convolution_backward_overrideable", "mm", "addmm", "bmm", "baddbmm")
}
FOREACH = (
    "abs add addcdiv addcmul clamp_max clamp_min copy div exp lerp log maximum minimum mul neg norm pow sqrt sub zero"
)

_libraries = []  # registrations last as long as these


def register() -> None:
    everything, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend([everything, own])
    everything.fallback(run, "PrivateUse1")
    # Operators that are made of others reach a fallback only through their parts; a device has kernels for these.
    direct = [aten.convolution_overrideable.default, aten.convolution_backward_overrideable.default]
    for name in FOREACH.split():
        for packet in (getattr(aten, f"_foreach_{name}", None), getattr(aten, f"_foreach_{name}_", None)):
            if packet is not None:
                direct += [getattr(packet, one) for one in packet.overloads() if not one.endswith("out")]
    for operator in direct:
        own.impl(operator, functools.partial(run, operator), "PrivateUse1")
    # There is nothing to pin memory for, and no device that torch.empty could ask for pinned memory.
    own.impl("_pin_memory", lambda tensor, device=None: tensor.clone(), "CPU")
    own.impl("is_pinned", lambda tensor, device=None: False, "CPU")
    empty = torch.empty
    torch.empty = lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs)


def run(operator, *args, **kwargs):
    """Run one operator, whose tensor arguments or asked-for device are npu."""
    name = operator._schema.name
    report.calls[name if name != COPY else copy_name(*args)] += 1
    if operator in REPLACING:
        return REPLACING[operator](*args, **kwargs)
    return Call(operator, name).run(args, kwargs)


def copy_name(source, target, *_) -> str:
    """Copies that cross between host and device are told apart, for they are what a step should not do."""
    if source.device.type == target.device.type:
        return COPY
    return f"{COPY}[{source.device.type} to {target.device.type}]"


class Call:
    """One operator's way to the host and back."""

    def __init__(self, operator, name: str) -> None:
        self.operator, self.name = operator, name
        self.own: dict[int, torch.Tensor] = {}  # id of a host tensor -> the npu tensor it came from
        self.keep: list[torch.Tensor] = []  # the host tensors, so that no id is used twice
        self.indices: set[int] = set()
        self.hosts: list[torch.device] = []
        self.asked: torch.device | None = None

    def run(self, args, kwargs):
        args = [convert(self.enter, one) for one in args]
        kwargs = {key: convert(self.enter, one) for key, one in kwargs.items()}
        self.check_devices()
        grown = self.replace_empty_outputs(kwargs)
        writes_into = any(argument.is_out for argument in self.operator._schema.arguments)
        self.in_float = self.name in HALF_PRODUCTS and not writes_into and any(is_half(one) for one in args)
        if self.in_float:
            args = [one.float() if is_half(one) else one for one in args]
        with self.inference_mode():
            result = KERNELS.get(self.operator, self.operator)(*args, **kwargs)
            for target, host in grown:
                target.data = to_device(host, target.device.index)
            return convert(self.leave, result)

    def enter(self, value):
        if isinstance(value, torch.device):
            self.asked = value
            return torch.device("cpu")
        if not isinstance(value, torch.Tensor):
            return value
        if value.device.type != "npu":
            if value.dim():  # a number on the host goes with anything
                self.hosts.append(value.device)
            return value
        self.indices.add(value.device.index)
        if value.dtype == torch.float64:  # which a device computes slowly or not at all
            report.calls[f"{self.name}[float64]"] += 1
        host = to_host(value)
        self.own[id(host)] = value
        self.keep.append(host)
        return host

    def check_devices(self) -> None:
        mixed = len(self.indices) > 1 or (self.indices and self.hosts and self.name not in MIXED)
        if mixed and self.name != COPY:
            devices = [f"npu:{index}" for index in sorted(self.indices)] + [str(host) for host in self.hosts]
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {devices[0]} and "
                f"{devices[1]}! (when checking arguments of {self.name})"
            )

    def replace_empty_outputs(self, kwargs) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """An empty out= is to grow, which memory that belongs to another tensor cannot: it gets new memory."""
        grown = []
        for argument in self.operator._schema.arguments:
            given = kwargs.get(argument.name) if argument.is_out else None
            if isinstance(given, torch.Tensor) and id(given) in self.own and given.numel() == 0:
                fresh = torch.empty(0, dtype=given.dtype)
                target = self.own[id(fresh)] = self.own[id(given)]
                self.keep.append(fresh)
                kwargs[argument.name] = fresh
                grown.append((target, fresh))
        return grown

    def inference_mode(self):
        """A view of a normal tensor is a normal tensor, in inference mode too; relabelling would lose that."""
        returns = self.operator._schema.returns
        is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in returns)
        inference = torch.is_inference_mode_enabled()
        normal = is_view and not any(one.is_inference() for one in self.own.values())
        return torch.inference_mode(inference and not normal)

    def leave(self, value):
        to_host_asked = self.asked is not None and self.asked.type != "npu"
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu" or to_host_asked:
            return value
        if id(value) in self.own:
            return self.own[id(value)]
        index = min(self.indices) if self.indices else index_of(self.asked)
        return to_device(value.half() if self.in_float else value, index)


def convert(function, value):
    """`function` of each value in nested lists and tuples."""
    if isinstance(value, (list, tuple)):
        return type(value)([convert(function, one) for one in value])
    return function(value)


def is_half(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float16


def _convolution_backward(gradient, x, weight, stride, padding, dilation, transposed, output_padding, groups, mask):
    bias = [gradient.shape[1]] if mask[2] else None
    geometry = (stride, padding, dilation, transposed, output_padding, groups, mask)
    return aten.convolution_backward(gradient, x, weight, bias, *geometry)


KERNELS = {
    aten._copy_from.default: lambda source, target, non_blocking=False: target.copy_(source),
    aten.convolution_overrideable.default: aten.convolution.default,
    aten.convolution_backward_overrideable.default: _convolution_backward,
    aten.record_stream.default: lambda *_: None,
}


# ---- operators that give a tensor other memory, and so cannot run on its old memory


def _replace(tensor, host):
    tensor.data = to_device(host, tensor.device.index)
    return tensor


def _set_storage(tensor, storage, offset=0, size=None, stride=None):
    if size is None:
        size, stride = (storage.nbytes() // tensor.element_size(),), (1,)
    stride = stride or torch.empty(size, device="meta").stride()
    memory = storage_bytes(storage).untyped_storage()
    return _replace(tensor, torch.empty(0, dtype=tensor.dtype).set_(memory, offset, size, stride))


def _resize(tensor, size, memory_format=None):
    host = torch.empty(size, dtype=tensor.dtype)
    kept = min(host.numel(), tensor.numel())
    host.view(-1)[:kept].copy_(to_host(tensor).reshape(-1)[:kept])
    return _replace(tensor, host)


REPLACING = {
    aten.set_.source_Storage: _set_storage,
    aten.set_.source_Storage_storage_offset: _set_storage,
    aten.set_.source_Tensor: lambda tensor, other: _replace(tensor, to_host(other)),
    aten.set_.default: lambda tensor: _replace(tensor, torch.empty(0, dtype=tensor.dtype)),
    aten.resize_.default: _resize,
}
