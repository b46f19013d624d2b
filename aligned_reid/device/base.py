"""The interface to a device. The class itself is the CPU; cuda.py and npu.py override what differs there."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aligned_reid.config import Config
from aligned_reid.device.cpu import cpu_has_bfloat16, keep_freed_memory
from aligned_reid.device.scaler import LossScaler


class Accelerator:
    """A device and what is specific to it, computing as --amp, --deterministic and --compile say.

    With --amp tf32 convolutions may round their float32 input to TF32 or HF32; matrix products never do.
    """

    name = "cpu"
    backend = "gloo"  # of the process group
    memory_format = torch.channels_last
    pin_memory = False
    tf32_name = ""  # what the device calls its reduced float32; empty if it has none
    compile_backend = "inductor"
    repeats_bits = True  # repeated calls give identical bits even without deterministic algorithms
    passed_over = ""  # why --device auto did not choose a faster kind of device
    wrong_half = ""  # the 16-bit type that failed the precision check, and the layer

    def __init__(self, config: Config, index: int = 0) -> None:
        self.config, self.index = config, index
        self.device = self.find_device()
        self.half: torch.dtype | None = self.find_half() if config.amp in ("O1", "apex") else None
        if config.deterministic:
            self.make_deterministic()
        self.select()

    @classmethod
    def why_unavailable(cls) -> str:
        """Why this kind of device cannot be used on this machine; empty if it can."""
        return ""

    @classmethod
    def why_not_compilable(cls) -> str:
        """Why torch.compile cannot be used; empty if it can."""
        compilers = (os.environ.get("CXX"), "g++", "clang++")
        return "" if any(map(shutil.which, filter(None, compilers))) else "no C++ compiler found (g++ or clang++)"

    @classmethod
    def count(cls) -> int:
        return 1

    def find_device(self) -> torch.device:
        return torch.device("cpu")

    def find_half(self) -> torch.dtype | None:
        """The 16-bit type of mixed precision. A CPU without bfloat16 instructions is faster in float32."""
        return torch.bfloat16 if cpu_has_bfloat16() else None

    def distrust_half(self, where: str) -> None:
        """Compute in float32 from now on, because layer `where` is wrong in 16 bit."""
        self.wrong_half = f"{name_of(self.half)} is wrong here ({where})"
        self.half = None

    def select(self) -> None:
        """Make this the current device of the process and apply its settings."""
        keep_freed_memory()

    def make_deterministic(self) -> None:
        """Use deterministic algorithms; an operator without one warns."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        if hasattr(torch.utils, "deterministic"):  # torch >= 2.2
            settings: Any = torch.utils.deterministic
            settings.fill_uninitialized_memory = False  # nothing here reads uninitialized memory

    def compile(self, network: nn.Module, *, inference: bool = False) -> nn.Module:
        """`network`, compiled if the run asks for it; with `inference` its weights are frozen into the graph."""
        if not self.config.compile:
            return network
        options: Any = {"freezing": True} if inference and self.compile_backend == "inductor" else None
        compiled: Any = torch.compile(network, backend=self.compile_backend, dynamic=False, options=options)
        return compiled

    def synchronize(self) -> None:
        """Wait until the device has finished its queued work."""

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which the network runs in mixed precision."""
        return torch.autocast(self.device.type, dtype=self.half) if self.half else contextlib.nullcontext()

    def full_precision(self) -> contextlib.AbstractContextManager[Any]:
        """The context of the losses, whose inputs are float32 already; apex would cast them again."""
        return contextlib.nullcontext()

    def prepare(self, model: nn.Module, config: Config) -> tuple[torch.optim.Optimizer, LossScaler]:
        """The optimizer of `model` and its loss scaler, made before the model is wrapped for data parallel training."""
        parameters = trained_parameters(model, config.decay_norms)
        optimizer = self.adam(parameters, lr=config.base_lr, weight_decay=config.weight_decay)
        return optimizer, self.loss_scaler(config.loss_scale)

    def adam(self, parameters: list[Any], **options: float) -> torch.optim.Optimizer:
        """torch's Adam, fused if this version of torch supports that on the device (CPU: torch >= 2.4)."""
        try:
            return torch.optim.Adam(parameters, fused=True, **options)  # type: ignore[arg-type]
        except RuntimeError:
            return torch.optim.Adam(parameters, **options)  # type: ignore[arg-type]

    def loss_scaler(self, scale: float | None) -> LossScaler:
        """scale: static loss scale; None: dynamic. bfloat16 and float32 need no scaling, so theirs is 1."""
        static = scale if self.half == torch.float16 else 1.0
        options = {} if static is None else {"init_scale": static, "growth_interval": LossScaler.NEVER}
        return LossScaler(self.grad_scaler(options), static)

    def grad_scaler(self, options: dict[str, Any]) -> Any:
        if hasattr(torch.amp, "GradScaler"):  # torch >= 2.3
            return torch.amp.GradScaler(self.device.type, **options)
        return torch.cuda.amp.GradScaler(enabled=self.name == "cuda", **options)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Load a `state_dict()` of Adam, from any kind of device; the optimizer keeps its own settings.

        Raises ValueError or KeyError if the state belongs to other parameters.
        """
        groups = optimizer.state_dict()["param_groups"]
        theirs = [group["params"] for group in state["param_groups"]]
        if [len(group["params"]) for group in groups] != [len(params) for params in theirs]:
            raise ValueError("the optimizer state belongs to other parameters")
        groups = [{**group, "params": params} for group, params in zip(groups, theirs, strict=True)]
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})

    @contextlib.contextmanager
    def trace(self, folder: Path) -> Iterator[None]:
        """Profile the enclosed code: `folder` gets trace.json.gz for a trace viewer, and a table of operators."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # otherwise it reports an error on a machine without a GPU
        with torch.profiler.profile() as profiler:
            yield
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        by = f"self_{self.device.type}_time_total"
        (folder / "operators.txt").write_text(profiler.key_averages().table(sort_by=by, row_limit=40))

    def prepare_group(self, timeout: int) -> None:
        """Configure the communication library before the process group is opened; timeout in seconds."""

    def random_state(self) -> Tensor:
        """The state of the device's random generator; empty if the device uses the CPU's."""
        return torch.empty(0, dtype=torch.uint8)

    def set_random_state(self, state: Tensor) -> None:
        """Restore what `random_state` returned."""

    def describe(self) -> str:
        """The log's line about the device, its precision and its modes."""
        precision = name_of(self.half or torch.float32) + (f": {self.wrong_half}" if self.wrong_half else "")
        modes = {
            f"{self.tf32_name} convolutions": self.config.amp == "tf32",
            "deterministic": self.config.deterministic,
            f"compiled by {self.compile_backend}": self.config.compile,
        }
        engine = " by apex" if self.config.amp == "apex" and self.half else ""
        parts = [precision + engine, *(mode for mode, on in modes.items() if on), f"torch {torch.__version__}"]
        return f"{self.name} ({self.model_name()}), {', '.join(parts)}"

    def model_name(self) -> str:
        return f"{platform.machine()}, {torch.get_num_threads()} threads"


def name_of(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def trained_parameters(model: nn.Module, decay_norms: bool = True) -> list[Any]:
    """The trainable parameters of `model`; without `decay_norms` as two groups, the second without weight decay.

    The second group holds the parameters of at most one dimension: biases, weights of norms, GeM's exponent (He et al.,
    "Bag of Tricks for Image Classification with Convolutional Neural Networks", arXiv:1812.01187, section 3.1).
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if decay_norms:
        return trained
    decayed = {"params": [one for one in trained if one.ndim > 1]}
    return [decayed, {"params": [one for one in trained if one.ndim <= 1], "weight_decay": 0.0}]
