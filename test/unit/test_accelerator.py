import importlib
import os
import sys
from dataclasses import replace

import pytest
import torch
from conftest import refusal

from aligned_reid.config import Config
from aligned_reid.device import Accelerator, open_accelerator
from aligned_reid.device.base import trained_parameters
from aligned_reid.device.npu import Npu, import_torch_npu, why_no_apex
from aligned_reid.model import AlignedReID

PLAIN = Config(device="cpu", amp="O0")
needs_cpu_scaler = pytest.mark.skipif(
    not hasattr(torch.amp, "GradScaler"), reason="torch < 2.3 has no GradScaler for the CPU"
)


@pytest.fixture
def fake_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("set_device", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, lambda index: "a GPU")


def test_auto_falls_back_to_the_cpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    accelerator = open_accelerator(Config(), None, 0)
    assert accelerator.device == torch.device("cpu")
    assert "no npu: torch_npu is not installed; no cuda: " in accelerator.passed_over
    for device, index, reason in (("cuda", None, "CUDA"), ("npu", None, "torch_npu"), ("auto", 9, "--npu 9")):
        assert reason in refusal(open_accelerator, Config(device=device), index, 0)


FAILURES = {
    "libhccl.so": "raise ImportError('libhccl.so: cannot open shared object file')",
    "made for another torch": "raise RuntimeError('made for another torch')",
    "a_missing_helper": "import a_missing_helper",
}


@pytest.mark.parametrize("reason", FAILURES)
def test_the_reason_of_a_failed_torch_npu_import_is_reported(tmp_path, monkeypatch, reason):
    (tmp_path / "torch_npu.py").write_text(FAILURES[reason])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    module, why = import_torch_npu()
    assert module is None and reason in why and "\n" not in why


def test_mixed_precision_needs_hardware_support(monkeypatch):
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    for has, amp, expected in ((True, "O1", "bfloat16"), (True, "O0", "float32"), (False, "O1", "float32")):
        monkeypatch.setattr("aligned_reid.device.base.cpu_has_bfloat16", lambda has=has: has)
        accelerator = Accelerator(Config(amp=amp))
        assert f", {expected}, torch" in accelerator.describe()
        with accelerator.autocast():
            assert layer(x).dtype is getattr(torch, expected)


@needs_cpu_scaler
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_step(bad):
    good, broken = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    accelerator = Accelerator(Config(amp="O0"))
    optimizer, scaler = accelerator.adam([good, broken], lr=1.0), accelerator.loss_scaler(128.0)
    scaler.backward((good + broken * torch.tensor([1.0, bad])).sum())
    assert scaler.step(optimizer) is True
    assert torch.equal(good.detach(), torch.zeros(2))
    optimizer.zero_grad()
    scaler.backward((good + broken).sum())
    assert scaler.step(optimizer) is False
    assert torch.allclose(good.detach(), -torch.ones(2))
    assert scaler.current == 1.0  # float32 needs no scaling


@needs_cpu_scaler
@pytest.mark.parametrize("static", [128.0, None])
def test_an_overflow_lowers_a_dynamic_scale_only(static):
    accelerator = Accelerator(Config())
    accelerator.half = torch.float16
    scaler = accelerator.loss_scaler(static)
    start = scaler.current
    assert start == (static or 2.0**16)
    parameter = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler.backward(parameter.square().sum() * float("inf"))
    assert scaler.step(optimizer) is True
    assert parameter.item() == 3.0
    assert scaler.current == (static or start / 2)
    optimizer.zero_grad()
    scaler.backward(parameter.square().sum())
    assert parameter.grad.item() == 6.0 * scaler.current
    assert scaler.step(optimizer) is False
    assert parameter.item() == pytest.approx(3.0 - 0.6)
    restored = accelerator.loss_scaler(static)
    restored.load_state_dict(scaler.state_dict())
    assert restored.current == scaler.current
    restored.load_state_dict({"scale": 1.0})  # of a run that needed no scaling
    assert restored.current == scaler.current


@needs_cpu_scaler
@pytest.mark.parametrize("half", [torch.float16, None])
def test_a_dynamic_scale_does_not_continue_a_static_one(half):
    accelerator = Accelerator(PLAIN)
    accelerator.half = half
    static = accelerator.loss_scaler(128.0)
    accelerator.half = torch.float16
    dynamic = accelerator.loss_scaler(None)
    before = dynamic.state_dict()
    dynamic.load_state_dict(static.state_dict())
    assert dynamic.state_dict() == before


APEXES = {
    "PyPI's": ("", "another project of that name"),
    "NVIDIA's": ("def initialize(models, optimizers=None, opt_level='O1', loss_scale=None): ...", "NVIDIA's"),
    "broken": ("import another_module", "No module named 'another_module'"),
    "failing": ("raise RuntimeError('no libhccl.so')", "no libhccl.so"),
    "Huawei's": ("def initialize(models, optimizers=None, combine_grad=None): ...", ""),
}


@pytest.mark.parametrize("kind", APEXES)
def test_only_huaweis_apex_is_accepted(tmp_path, monkeypatch, kind):
    source, reason = APEXES[kind]
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("apex", "apex.amp"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert "apex is not installed" in why_no_apex()
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    if source:
        (tmp_path / "apex" / "amp.py").write_text(source)
    importlib.invalidate_caches()
    why = why_no_apex()
    assert reason in why and bool(reason) == bool(why)


@pytest.fixture
def undo_deterministic():
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_modes_are_applied_and_described(undo_deterministic, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)  # in place of a compiler
    plain = open_accelerator(PLAIN, None, 0)
    assert not torch.are_deterministic_algorithms_enabled()
    assert plain.compile(network := torch.nn.Linear(2, 2)) is network
    modes = open_accelerator(replace(PLAIN, deterministic=True, compile=True), None, 0)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert "float32, deterministic, compiled by inductor, torch" in modes.describe()
    assert "compiled" not in plain.describe()


def test_a_cuda_index_out_of_range_and_apex_elsewhere_are_refused(fake_cuda):
    assert "has 2" in refusal(open_accelerator, Config(device="cuda"), 9, 0)
    assert "--amp apex" in refusal(open_accelerator, replace(PLAIN, amp="apex"), None, 0)


@pytest.mark.parametrize("amp", ["O0", "tf32"])
def test_tf32_applies_to_convolutions_only(monkeypatch, fake_cuda, amp):
    tf32 = amp == "tf32"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not tf32)
    gpu = open_accelerator(Config(device="cuda", amp=amp), 0, 0)
    assert torch.backends.cudnn.allow_tf32 is tf32
    assert torch.backends.cuda.matmul.allow_tf32 is False  # distances are matrix products
    assert ("float32, TF32 convolutions" in gpu.describe()) is tf32
    assert "--amp tf32" in refusal(open_accelerator, replace(PLAIN, amp="tf32"), None, 0)


def test_compiling_needs_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "--compile true" in refusal(open_accelerator, replace(PLAIN, compile=True), None, 0)
    open_accelerator(PLAIN, None, 0)


@pytest.mark.parametrize(
    ("timeout", "expected"), [(300, ("300", "300")), (5, ("5", "120")), (90000, ("17340", "7200"))]
)
def test_hccl_timeouts_follow_the_runs_within_bounds(monkeypatch, timeout, expected):
    names = ("HCCL_EXEC_TIMEOUT", "HCCL_CONNECT_TIMEOUT")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    Npu.prepare_group(None, timeout)
    assert tuple(os.environ[name] for name in names) == expected
    Npu.prepare_group(None, 1836)  # variables that are set stay
    assert tuple(os.environ[name] for name in names) == expected


def test_norms_and_biases_form_a_group_without_weight_decay(small_trunk):
    model = AlignedReID(3, pretrained="none", bnneck=True, pooling="gem")
    model.train_heads(local=False, identity=True)
    names = {one: name for name, one in model.named_parameters() if one.requires_grad}
    assert set(trained_parameters(model)) == names.keys()
    decayed, others = trained_parameters(model, decay_norms=False)
    assert {*decayed["params"], *others["params"]} == names.keys()
    kept = {"base.bn1.weight", "base.bn1.bias", "base.conv2.bias", "pooling.p", "neck.weight"}
    assert {names[one] for one in others["params"]} == kept
    assert others["weight_decay"] == 0
