"""What a training step costs (--profile N): operations and bytes counted in one step, time traced over N others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from aligned_reid.device import Accelerator
from aligned_reid.training.log import Log, Throughput

Batch = TypeVar("Batch")


class StepProfile:
    """Counts and traces the steps that follow the process's first ones; does nothing where num_steps is 0."""

    def __init__(self, num_steps: int, accelerator: Accelerator, folder: Path, log: Log) -> None:
        self.num_steps, self.accelerator, self.folder, self.log = num_steps, accelerator, folder, log
        self.step = 0
        self.flops = self.bytes = self.num_traced = 0
        self.seconds = 0.0
        self.tracing = contextlib.ExitStack()

    def steps(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; what the caller does with each of them is its step."""
        for batch in batches:
            self.step += 1
            number = self.step - Throughput.WARM_UP_STEPS if self.num_steps else 0
            if number == 1:
                with self.counting():
                    yield batch
            elif 1 < number <= 1 + self.num_steps:
                if self.num_traced == 0:
                    self.start_trace()
                yield batch
                self.num_traced += 1
                if self.num_traced == self.num_steps:
                    self.finish()
            else:
                yield batch

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        eager = contextlib.nullcontext()
        if self.accelerator.config.compile and hasattr(torch.compiler, "set_stance"):  # torch >= 2.6
            eager = torch.compiler.set_stance("force_eager")  # a compiled kernel does not say what it computes
        with eager, FlopCounterMode(display=False) as products, OperatorBytes() as traffic:
            yield
        self.flops, self.bytes = products.get_total_flops(), traffic.bytes

    def start_trace(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.accelerator.synchronize()
        self.tracing.enter_context(self.accelerator.trace(self.folder))
        self.start = time.monotonic()

    def finish(self) -> None:
        """End the trace and report; called again, or with nothing traced, it does nothing."""
        if self.num_traced == 0 or self.seconds:
            return
        self.accelerator.synchronize()
        self.seconds = (time.monotonic() - self.start) / self.num_traced
        self.tracing.close()
        self.log(
            f"profile: a step computes {self.flops / 1e12:.3f} TFLOP in convolutions and matrix products; "
            f"its operators read and write {self.bytes / 1e9:.2f} GB"
        )
        rate = self.flops / self.seconds / 1e12
        self.log(
            f"profile: {self.seconds:.3f}s a step over {self.num_traced}, {rate:.3f} TFLOP/s; traced in {self.folder}"
        )

    def results(self) -> dict[str, float] | None:
        """For results.json; None where nothing was profiled."""
        if not self.seconds:
            return None
        return {"flops_per_step": self.flops, "bytes_per_step": self.bytes, "seconds_per_step": self.seconds}


class OperatorBytes(TorchDispatchMode):
    """Bytes that the operators read and write, each tensor once an operator: the traffic where nothing is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not makes_a_view(func):
            tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def makes_a_view(operator: Any) -> bool:
    """Whether the operator's result is its argument's memory, seen in another shape."""
    aliases = [one.alias_info for one in operator._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)
