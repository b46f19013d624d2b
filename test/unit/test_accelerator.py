"""Devices: which one is taken, why one is not, and the step that a bad gradient skips."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from aligned_reid import InputError
from aligned_reid.device import base as accelerator_module
from aligned_reid.device.base import (
    Accelerator,
    import_apex,
    import_torch_npu,
    open_accelerator,
)
from aligned_reid.device.scaler import LossScaler, NativeScaler


def parameter_with_gradient(gradient):
    parameter = torch.nn.Parameter(torch.zeros(len(gradient)))
    parameter.grad = torch.tensor(gradient)
    return parameter


def test_auto_takes_the_cpu_where_there_is_nothing_else(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert open_accelerator("auto", None, 0, mixed_precision=True).device == torch.device("cpu")
    with pytest.raises(InputError, match="--device cuda: torch sees no CUDA GPU"):
        open_accelerator("cuda", None, 0, mixed_precision=True)
    with pytest.raises(InputError, match="torch_npu is not installed"):
        open_accelerator("npu", None, 0, mixed_precision=True)
    with pytest.raises(InputError, match="--npu 9: there is no such device"):
        open_accelerator("auto", 9, 0, mixed_precision=True)


@pytest.mark.parametrize(("capability", "expected"), [("AVX2", True), ("DEFAULT", True), ("AVX512", False)])
def test_a_cpu_with_avx_512_keeps_its_convolutions(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert open_accelerator("cpu", None, 0, mixed_precision=False).multiplies_pointwise is expected


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('libhccl.so: cannot open shared object file')", "libhccl.so"),
        ("raise RuntimeError('made for another torch')", "made for another torch"),
        ("import a_missing_helper", "a_missing_helper"),
    ],
)
def test_a_torch_npu_that_does_not_import_says_why(tmp_path, monkeypatch, source, reason):
    (tmp_path / "torch_npu.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    module, why = import_torch_npu()
    assert module is None
    assert reason in why
    assert "\n" not in why


def test_a_cuda_index_out_of_range(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"cuda:9 is not there: this machine has 2"):
        open_accelerator("cuda", 9, 0, mixed_precision=True)


def test_mixed_precision_needs_units_for_it(monkeypatch):
    monkeypatch.setattr(accelerator_module, "cpu_has_bfloat16", lambda: True)
    assert Accelerator().half is torch.bfloat16
    assert "bfloat16" in Accelerator().describe()
    assert Accelerator(mixed_precision=False).half is None
    monkeypatch.setattr(accelerator_module, "cpu_has_bfloat16", lambda: False)
    assert Accelerator().half is None
    assert "float32" in Accelerator().describe()


def test_autocast_follows_the_half_type(monkeypatch):
    monkeypatch.setattr(accelerator_module, "cpu_has_bfloat16", lambda: True)
    layer = torch.nn.Linear(2, 2)
    with Accelerator().autocast():
        assert layer(torch.ones(1, 2)).dtype is torch.bfloat16
    with Accelerator(mixed_precision=False).autocast():
        assert layer(torch.ones(1, 2)).dtype is torch.float32


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_step(bad):
    good, broken = parameter_with_gradient([1.0, 1.0]), parameter_with_gradient([0.0, bad])
    optimizer = torch.optim.SGD([good, broken], lr=1.0)
    assert LossScaler().step(optimizer) is True
    assert torch.equal(good.detach(), torch.zeros(2))
    broken.grad.zero_()
    assert LossScaler().step(optimizer) is False
    assert torch.equal(good.detach(), -torch.ones(2))


def test_scaling_leaves_the_step_as_it_was():
    steps = []
    for scale in (1.0, 128.0):
        parameter = torch.nn.Parameter(torch.tensor([3.0]))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        scaler = LossScaler(scale)
        scaler.backward(parameter.square().sum())
        assert parameter.grad.item() == 6.0 * scale
        scaler.step(optimizer)
        steps.append(parameter.item())
    assert steps[0] == steps[1]


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="torch < 2.3 has no GradScaler for the CPU")
@pytest.mark.parametrize("static", [128.0, None])
def test_a_devices_own_scaler_keeps_a_static_scale_and_moves_a_dynamic_one(static):
    native = torch.amp.GradScaler("cpu", init_scale=128.0)
    scaler = NativeScaler(native, static=static)
    parameter = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler.backward(parameter.square().sum() * float("inf"))
    assert scaler.step(optimizer) is True
    assert parameter.item() == 3.0
    assert scaler.current == (128.0 if static else 64.0)
    optimizer.zero_grad()
    scaler.backward(parameter.square().sum())
    assert scaler.step(optimizer) is False
    assert parameter.item() == pytest.approx(3.0 - 0.6)
    restored = NativeScaler(torch.amp.GradScaler("cpu", init_scale=static or 2.0**16), static=static)
    restored.load_state_dict(scaler.state_dict())
    assert restored.current == scaler.current


APEXES = {
    "none": (None, "apex is not installed"),
    "PyPI's": ("", "another project of that name"),
    "NVIDIA's": ("def initialize(models, optimizers=None, opt_level='O1', loss_scale=None): ...", "NVIDIA's"),
    "broken": ("import another_module", "cannot be imported (No module named 'another_module')"),
    "failing": ("raise RuntimeError('no libhccl.so')", "no libhccl.so"),
    "Huawei's": ("def initialize(models, optimizers=None, combine_grad=None): ...", ""),
}


@pytest.mark.parametrize("kind", APEXES)
def test_an_apex_that_is_not_huaweis_is_recognised(tmp_path, monkeypatch, kind):
    source, reason = APEXES[kind]
    for name in ("apex", "apex.amp"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if source is None:
        monkeypatch.setattr(sys, "path", [])
    else:
        (tmp_path / "apex").mkdir()
        (tmp_path / "apex" / "__init__.py").touch()
        if source:
            (tmp_path / "apex" / "amp.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
    amp, said = import_apex()
    assert (amp is None) == bool(reason)
    assert reason in said


def test_apex_is_for_npus():
    with pytest.raises(InputError, match="--amp_backend apex: it is for NPUs, and the device is cpu"):
        open_accelerator("cpu", None, 0, mixed_precision=True, amp_backend="apex")


@pytest.fixture
def deterministic_is_undone():
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.usefixtures("deterministic_is_undone")
def test_modes_are_set_and_said(monkeypatch):
    plain = open_accelerator("cpu", None, 0, mixed_precision=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert plain.compile(network := torch.nn.Linear(2, 2)) is network
    modes = open_accelerator("cpu", None, 0, mixed_precision=False, deterministic=True, compiled=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert "float32, deterministic, compiled by inductor, torch" in modes.describe()
    assert "compiled" not in plain.describe()


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_for_convolutions_of_devices_that_have_it(monkeypatch, tf32):
    for name in ("set_device", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not tf32)
    gpu = open_accelerator("cuda", 0, 0, mixed_precision=False, tf32=tf32)
    assert torch.backends.cudnn.allow_tf32 is tf32
    assert torch.backends.cuda.matmul.allow_tf32 is False  # distances are matrix products
    assert ("float32, TF32 convolutions" in gpu.describe()) is tf32
    with pytest.raises(InputError, match="--tf32 true: cpu has no short float32"):
        open_accelerator("cpu", None, 0, mixed_precision=False, tf32=True)


def test_compiling_needs_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match=r"--compile true: there is no C\+\+ compiler"):
        open_accelerator("cpu", None, 0, mixed_precision=False, compiled=True)
    open_accelerator("cpu", None, 0, mixed_precision=False)


def test_a_device_that_another_process_holds(monkeypatch):
    def select(self):
        raise RuntimeError("aclrtSetDevice failed: 507033\nmore lines")

    monkeypatch.setattr(Accelerator, "select", select)
    with pytest.raises(InputError, match=r"cpu:0 cannot be used \(aclrtSetDevice failed: 507033\).*another process"):
        open_accelerator("cpu", None, 0, mixed_precision=False)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_kept_for_the_next_step():
    source = """
import resource, sys, torch
from aligned_reid.device.cpu import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(10):
    if step == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(2**23 + 2**20 * layer) for layer in range(1, 6)]
    del activations
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    pages_again = {}
    for setting in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", source, setting], capture_output=True, text=True, check=True)
        pages_again[setting] = int(done.stdout)
    assert pages_again["keep"] < pages_again["leave"] / 10


def test_hccl_waits_as_long_as_the_run_does_unless_the_user_says_otherwise(monkeypatch):
    for timeout, expected in [(300, ("300", "300")), (5, ("5", "120")), (90000, ("17340", "7200"))]:
        for name in ("HCCL_EXEC_TIMEOUT", "HCCL_CONNECT_TIMEOUT"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        accelerator_module.Npu.prepare_group(None, timeout)
        assert (os.environ["HCCL_EXEC_TIMEOUT"], os.environ["HCCL_CONNECT_TIMEOUT"]) == expected
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "1836")
    accelerator_module.Npu.prepare_group(None, 300)
    assert os.environ["HCCL_EXEC_TIMEOUT"] == "1836"
