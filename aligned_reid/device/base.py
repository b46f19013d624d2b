"""The only file that knows npu, cuda and cpu. Everything else is written for "a device"."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from aligned_reid.device.cpu import cpu_has_bfloat16, keep_freed_memory
from aligned_reid.device.optimizer import ADAM, Parameters, make_adam, parameters_of
from aligned_reid.device.scaler import ApexScaler, LossScaler, NativeScaler
from aligned_reid.errors import InputError


@dataclass(frozen=True)
class Modes:
    """How a device computes."""

    mixed_precision: bool = True  # 16 bit where the device has it
    apex: bool = False  # Huawei's package casts, in place of torch
    tf32: bool = False  # convolutions round their float32 input to 19 bits; distances and losses never do
    deterministic: bool = False
    compiled: bool = False


class Accelerator:
    """A device and what is special about it. This class is the CPU; the others override what differs."""

    name = "cpu"
    backend = "gloo"  # of the process group
    memory_format = torch.channels_last
    pin_memory = False
    tf32_name = ""  # what the device calls its short float32; empty where it has none
    compile_backend = "inductor"
    repeats_bits = True  # the same input gives the same bits, without deterministic operators too
    passed_over = ""  # what auto would rather have taken, and why it could not
    wrong_half = ""  # the 16-bit type that it computes wrongly in, and where; it computes in float32 then

    def __init__(self, index: int = 0, **modes: bool) -> None:
        """modes: the fields of Modes."""
        self.index = index
        self.modes = Modes(**modes)
        self.apex_amp: Any = None  # its module, once it casts
        self.device = self.find_device()
        self.half: torch.dtype | None = self.find_half() if self.modes.mixed_precision else None
        if self.modes.deterministic:
            self.make_deterministic()
        self.select()

    @classmethod
    def why_not(cls) -> str:
        """Why this kind of device cannot be used here; empty where it can."""
        return ""

    @classmethod
    def why_not_compile(cls) -> str:
        """Why torch.compile cannot work here; empty where it can."""
        compilers = (os.environ.get("CXX"), "g++", "clang++")
        return "" if any(map(shutil.which, filter(None, compilers))) else "there is no C++ compiler (g++ or clang++)"

    @classmethod
    def count(cls) -> int:
        return 1

    def find_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")

    @property
    def multiplies_pointwise(self) -> bool:
        """Whether 1 x 1 convolutions train faster as products of matrices; with AVX-512 oneDNN's own are faster."""
        return torch.backends.cpu.get_cpu_capability() != "AVX512"

    def find_half(self) -> torch.dtype | None:
        """The 16-bit type of mixed precision; a CPU without bfloat16 units would emulate it, slower than float32."""
        return torch.bfloat16 if cpu_has_bfloat16() else None

    def distrust_half(self, where: str) -> None:
        """Compute in float32: `where`, a layer, is wrong in 16 bit."""
        self.wrong_half = f"{name_of(self.half)} is wrong here ({where})"
        self.half = None

    def select(self) -> None:
        """Make this the process's current device, and set up what is to be set up once."""
        keep_freed_memory()

    def make_deterministic(self) -> None:
        """Same input, same bits: operators take their deterministic form; one that has none warns with its name."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        if hasattr(torch.utils, "deterministic"):  # torch >= 2.2
            settings: Any = torch.utils.deterministic
            settings.fill_uninitialized_memory = False  # nothing here reads what it has not written

    def compile(self, network: nn.Module, *, inference: bool = False) -> nn.Module:
        """`network`, compiled where that was asked for; with `inference` its weights may become constants."""
        if not self.modes.compiled:
            return network
        options: Any = {"freezing": True} if inference and self.compile_backend == "inductor" else None
        compiled: Any = torch.compile(network, backend=self.compile_backend, dynamic=False, options=options)
        return compiled

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision for what runs inside."""
        if self.half is None or self.apex_amp is not None:  # where apex casts, it casts everywhere
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.half)

    def full_precision(self) -> contextlib.AbstractContextManager[Any]:
        """Around losses, whose tensors are in float32 already: nothing casts them back."""
        return contextlib.nullcontext()

    def prepare(
        self, model: nn.Module, lr: float, weight_decay: float, scale: float | None, *, decay_norms: bool = True
    ) -> tuple[torch.optim.Optimizer, LossScaler]:
        """The optimiser of what `model` trains, and its loss scaler; before the model is wrapped for several processes.

        scale: static loss scale; None: dynamic. decay_norms: whether weight_decay is for norms and biases too.
        """
        return self.adam(parameters_of(model, decay_norms), lr, weight_decay), self.loss_scaler(scale)

    def loss_scaler(self, scale: float | None) -> LossScaler:
        """scale: static loss scale; None: dynamic. bfloat16 and float32 need none, so the CPU's is 1."""
        return LossScaler()

    def adam(self, parameters: Parameters, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return make_adam(parameters, lr, weight_decay)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Bring `adam`'s optimiser to a `state_dict()`, which may be of another device's Adam; its settings stay.

        Raises ValueError or KeyError where the state is of other parameters.
        """
        groups = optimizer.state_dict()["param_groups"]
        theirs = [group["params"] for group in state["param_groups"]]
        if [len(group["params"]) for group in groups] != [len(params) for params in theirs]:
            raise ValueError("the optimiser's state is of other parameters")
        groups = [{**group, "params": params} for group, params in zip(groups, theirs, strict=True)]
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})

    def read_later(self, value: Tensor) -> Callable[[], Tensor]:
        """Start copying `value` to the host; the returned function waits for it and gives it."""
        return lambda: value

    @contextlib.contextmanager
    def trace(self, folder: Path) -> Iterator[None]:
        """Trace what runs inside, on host and device: trace.json.gz for a trace viewer, and a table of operators."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it takes a machine without a GPU for an error
        with torch.profiler.profile() as profiler:
            yield
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        by = f"self_{self.device.type}_time_total"
        (folder / "operators.txt").write_text(profiler.key_averages().table(sort_by=by, row_limit=40))

    def prepare_group(self, timeout: int) -> None:
        """Tell the backend's library, before the group is opened, how many seconds a rank waits for others."""

    def data_parallel_arguments(self) -> dict[str, Any]:
        return {}

    def random_state(self) -> Tensor | None:
        """The device's random state, where it has one of its own."""
        return None

    def set_random_state(self, state: Tensor) -> None:
        """Undo `random_state`."""

    def describe(self) -> str:
        """For the log: the device, its precision and how it computes."""
        precision = name_of(self.half or torch.float32) + (f": {self.wrong_half}" if self.wrong_half else "")
        engine = " by apex" if self.modes.apex and self.half else ""
        modes = {
            f"{self.tf32_name} convolutions": self.modes.tf32,
            "deterministic": self.modes.deterministic,
            f"compiled by {self.compile_backend}": self.modes.compiled,
        }
        said = "".join(f", {mode}" for mode, on in modes.items() if on)
        return f"{self.name} ({self.model_name()}), {precision}{engine}{said}, torch {torch.__version__}"

    def model_name(self) -> str:
        return f"{platform.machine()}, {torch.get_num_threads()} threads"


def name_of(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


class Cuda(Accelerator):
    """NVIDIA GPUs."""

    name = "cuda"
    backend = "nccl"
    multiplies_pointwise = False
    repeats_bits = False
    pin_memory = True
    tf32_name = "TF32"

    @classmethod
    def why_not(cls) -> str:
        return "" if torch.cuda.is_available() else "torch sees no CUDA GPU"

    @classmethod
    def why_not_compile(cls) -> str:
        return "" if importlib.util.find_spec("triton") else "triton is not installed (pip install triton)"

    @classmethod
    def count(cls) -> int:
        return torch.cuda.device_count()

    @property
    def api(self) -> Any:
        """torch.cuda, or what stands for it on another device."""
        return torch.cuda

    def find_device(self) -> torch.device:
        return torch.device(self.name, self.index)

    def find_half(self) -> torch.dtype | None:
        return torch.float16

    def select(self) -> None:
        self.api.set_device(self.index)
        torch.backends.cudnn.allow_tf32 = self.modes.tf32  # torch's default is True
        torch.backends.cuda.matmul.allow_tf32 = False

    def make_deterministic(self) -> None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        super().make_deterministic()

    def synchronize(self) -> None:
        self.api.synchronize()

    def loss_scaler(self, scale: float | None) -> LossScaler:
        if self.half is None:
            return LossScaler()
        return NativeScaler(self.grad_scaler({} if scale is None else {"init_scale": scale}), static=scale)

    def grad_scaler(self, options: dict[str, Any]) -> Any:
        if hasattr(torch.amp, "GradScaler"):  # torch >= 2.3
            return torch.amp.GradScaler("cuda", **options)
        return torch.cuda.amp.GradScaler(**options)

    def read_later(self, value: Tensor) -> Callable[[], Tensor]:
        copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
        done = self.api.Event()
        done.record()

        def wait() -> Tensor:
            done.synchronize()
            return copy

        return wait

    def data_parallel_arguments(self) -> dict[str, Any]:
        return {"device_ids": [self.index]}

    def random_state(self) -> Tensor | None:
        return self.api.get_rng_state(self.index)

    def set_random_state(self, state: Tensor) -> None:
        self.api.set_rng_state(state, self.index)

    def model_name(self) -> str:
        return f"{self.api.get_device_name(self.index)}, device {self.index}"


# Seconds that CANN takes: of a collective, and of the connection before the first.
HCCL_TIMEOUTS = {"HCCL_EXEC_TIMEOUT": (1, 17340), "HCCL_CONNECT_TIMEOUT": (120, 7200)}


class Npu(Cuda):
    """Huawei Ascend NPUs through torch_npu, whose torch.npu follows torch.cuda."""

    name = "npu"
    backend = "hccl"
    memory_format = torch.contiguous_format  # the device has layouts of its own
    tf32_name = "HF32"
    compile_backend = "npu"  # torch_npu's, which is torchair

    @classmethod
    def why_not(cls) -> str:
        module, reason = import_torch_npu()
        if module is None:
            return reason
        if not module.npu.is_available():
            return "torch_npu sees no NPU (see `npu-smi info`: driver, permissions, ASCEND_RT_VISIBLE_DEVICES)"
        return ""

    @classmethod
    def why_not_compile(cls) -> str:
        return "" if "npu" in torch.compiler.list_backends() else "this torch_npu brings no compiler (torchair)"

    @classmethod
    def count(cls) -> int:
        module, _ = import_torch_npu()
        return module.npu.device_count() if module else 0

    @property
    def api(self) -> Any:
        return import_torch_npu()[0].npu  # type: ignore[union-attr]

    def select(self) -> None:
        self.api.set_device(self.index)
        self.api.set_compile_mode(jit_compile=False)  # precompiled kernels: no compilation at each new shape
        self.api.conv.allow_hf32 = self.modes.tf32  # torch_npu's default is True
        self.api.matmul.allow_hf32 = False

    def make_deterministic(self) -> None:
        os.environ["HCCL_DETERMINISTIC"] = "true"  # read when the process group starts
        Accelerator.make_deterministic(self)

    def grad_scaler(self, options: dict[str, Any]) -> Any:
        """torch_npu's own: first-generation chips saturate instead of giving inf, which only it notices.

        Not its `dynamic=False`: that one looks for no overflow and steps with whatever the gradients are.
        """
        return self.api.amp.GradScaler(**options)

    def adam(self, parameters: Parameters, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        module, _ = import_torch_npu()
        return module.optim.NpuFusedAdam(list(parameters), lr=lr, weight_decay=weight_decay, **ADAM)  # type: ignore[union-attr]

    @contextlib.contextmanager
    def trace(self, folder: Path) -> Iterator[None]:
        """By torch_npu's profiler, which alone sees the device; it writes a folder of its own into `folder`."""
        profiler = import_torch_npu()[0].profiler  # type: ignore[union-attr]
        activities = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU]
        written = profiler.tensorboard_trace_handler(str(folder))
        with profiler.profile(activities=activities, on_trace_ready=written):
            yield

    def full_precision(self) -> contextlib.AbstractContextManager[Any]:
        return self.apex_amp.disable_casts() if self.apex_amp is not None else contextlib.nullcontext()

    def prepare(
        self, model: nn.Module, lr: float, weight_decay: float, scale: float | None, *, decay_norms: bool = True
    ) -> tuple[torch.optim.Optimizer, LossScaler]:
        if not self.modes.apex or self.half is None:
            return super().prepare(model, lr, weight_decay, scale, decay_norms=decay_norms)
        amp, reason = import_apex()
        assert amp is not None, reason
        optimizers = importlib.import_module("apex.optimizers")
        parameters = parameters_of(model, decay_norms)
        optimizer = optimizers.NpuFusedAdam(parameters, lr=lr, weight_decay=weight_decay, **ADAM)
        given = "dynamic" if scale is None else scale
        _, optimizer = amp.initialize(model, optimizer, opt_level="O1", loss_scale=given, combine_grad=True)
        self.apex_amp = amp
        return optimizer, ApexScaler(amp, optimizer, static=scale)

    def prepare_group(self, timeout: int) -> None:
        """HCCL has its own time-outs, within bounds; what the user has set stays."""
        for name, (shortest, longest) in HCCL_TIMEOUTS.items():
            os.environ.setdefault(name, str(min(max(timeout, shortest), longest)))

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """As the others'; NpuFusedAdam counts its steps on the host, and a tensor there would make it wait."""
        counted = {index: {**one, "step": int(one["step"])} for index, one in state["state"].items()}
        super().load_optimizer(optimizer, {**state, "state": counted})


# In the order in which auto looks for them. Another kind of device is a class above and a name here.
ACCELERATORS: dict[str, type[Accelerator]] = {"npu": Npu, "cuda": Cuda, "cpu": Accelerator}


def check_device_name(device: str) -> None:
    """Raise InputError unless --device names a kind of device, or is auto."""
    if device not in ("auto", *ACCELERATORS):
        raise InputError(f"--device {device}: there is no such kind of device; choose auto, {', '.join(ACCELERATORS)}")


def open_accelerator(
    device: str,
    index: int | None,
    local_rank: int,
    *,
    mixed_precision: bool,
    amp_backend: str = "auto",
    tf32: bool = False,
    deterministic: bool = False,
    compiled: bool = False,
) -> Accelerator:
    """The accelerator that `--device` and `--npu` name; "auto" takes the first of npu, cuda, cpu that is there.

    index: device index; None takes the process's local rank. amp_backend: "apex" is Huawei's package, "native" and
    "auto" are torch's own. The others are fields of Modes. Raises InputError with the reason where it cannot be used.
    """
    check_device_name(device)
    kinds = list(ACCELERATORS) if device == "auto" else [device]
    reasons = {name: ACCELERATORS[name].why_not() for name in kinds}
    usable = [name for name in kinds if not reasons[name]]
    if not usable:
        raise InputError(f"--device {device}: {reasons[device]}; use --device auto, or cpu")
    kind = ACCELERATORS[usable[0]]
    index = local_rank if index is None else index
    if kind.name != "cpu" and index >= kind.count():
        raise InputError(f"device {kind.name}:{index} is not there: this machine has {kind.count()} (numbers from 0)")
    if kind.name == "cpu" and index > local_rank:
        raise InputError(
            f"--npu {index}: there is no such device, only the CPU ({'; '.join(filter(None, reasons.values()))})"
        )
    if amp_backend == "apex":
        reason = import_apex()[1] if kind is Npu else f"it is for NPUs, and the device is {kind.name}"
        if reason:
            raise InputError(f"--amp_backend apex: {reason}; use --amp_backend native")
    if tf32 and not kind.tf32_name:
        raise InputError(f"--tf32 true: {kind.name} has no short float32 (TF32 is CUDA's, HF32 the NPU's)")
    if compiled and (reason := kind.why_not_compile()):
        raise InputError(f"--compile true: {reason}")
    modes = Modes(mixed_precision, amp_backend == "apex" and mixed_precision, tf32, deterministic, compiled)
    try:
        accelerator = kind(index, **asdict(modes))
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise InputError(
            f"device {kind.name}:{index} cannot be used ({reason}): another process may hold it; see `npu-smi info` "
            "or `nvidia-smi`, or choose another with --npu"
        ) from error
    before = kinds[: kinds.index(kind.name)]
    accelerator.passed_over = "; ".join(f"no {name}: {reasons[name]}" for name in before)
    return accelerator


def import_torch_npu() -> tuple[ModuleType | None, str]:
    """torch_npu, or None and why it cannot be imported (not installed, no CANN, made for another torch)."""
    try:
        return importlib.import_module("torch_npu"), ""
    except ModuleNotFoundError as error:
        if error.name == "torch_npu":
            return None, "torch_npu is not installed"
        return None, f"torch_npu cannot be imported ({error})"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return (
            None,
            f"torch_npu cannot be imported ({reason}): is CANN's set_env.sh sourced, and does its version fit torch's?",
        )


def import_apex() -> tuple[ModuleType | None, str]:
    """The amp module of Huawei's apex, or None and why it is not that."""
    try:
        amp = importlib.import_module("apex.amp")
        if "combine_grad" in inspect.signature(amp.initialize).parameters:
            return amp, ""
        return None, "the apex installed here is NVIDIA's, not the one that Huawei builds from it"
    except ModuleNotFoundError as error:
        if error.name == "apex":
            return (
                None,
                "apex is not installed (build it from Ascend's apex repository; PyPI's apex is another project)",
            )
        if error.name == "apex.amp":
            return None, "the apex installed here is another project of that name (no apex.amp): pip uninstall apex"
        return None, f"apex cannot be imported ({error})"
    except Exception as error:  # a foreign package may fail in any way
        return None, f"apex cannot be imported ({(str(error).splitlines() or [type(error).__name__])[0]})"
