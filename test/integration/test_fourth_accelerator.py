"""Another kind of device is one class and one name: nothing else in the library has to know of it."""

import json

import pytest
import torch

from aligned_reid.device import ACCELERATORS, Accelerator, open_accelerator


class Loopback(Accelerator):
    """A device whose tensors are the CPU's, but whose precision, loss, optimiser and name are its own."""

    name = "loopback"
    memory_format = torch.contiguous_format
    waits = 0

    @classmethod
    def count(cls):
        return 2

    def find_half(self):
        return torch.bfloat16

    def synchronize(self):
        type(self).waits += 1

    def adam(self, parameters, lr, weight_decay):
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)

    def model_name(self):
        return f"imagined, device {self.index}"


@pytest.fixture
def loopback(monkeypatch):
    monkeypatch.setattr(Loopback, "waits", 0)
    for name, kind in {"loopback": Loopback, **ACCELERATORS}.items():  # first: auto takes it
        monkeypatch.delitem(ACCELERATORS, name, raising=False)
        monkeypatch.setitem(ACCELERATORS, name, kind)
    return Loopback


def test_it_trains_evaluates_and_its_weights_are_the_cpus(loopback, command, tiny_flags, tmp_path, small_trunk):
    flags = [flag for flag in tiny_flags if not flag.startswith("--device")]
    folder = tmp_path / "run"
    done = command("train.py", *flags, "--device=loopback", "--npu=1", "--total_epochs=2", f"--exp_dir={folder}")
    assert done.status == 0, done.err
    assert "device loopback (imagined, device 1), bfloat16, torch" in done.out
    assert loopback.waits >= 2
    assert json.loads((folder / "results.json").read_text())["global"]["mAP"] > 0
    optimizer = torch.load(folder / "ckpt.pth", weights_only=True)["optimizer"]
    assert optimizer["param_groups"][0]["decoupled_weight_decay"]  # AdamW's
    tested = command("train.py", *tiny_flags, "--only_test=true", f"--model_weight_file={folder}")
    assert tested.status == 0, tested.err


def test_auto_finds_it_and_its_devices_are_counted(loopback, command, tiny_flags):
    assert open_accelerator("auto", None, 0, mixed_precision=True).name == "loopback"
    flags = [flag for flag in tiny_flags if not flag.startswith("--device")]
    done = command("train.py", *flags, "--device=loopback", "--npu=2")
    assert (done.status, done.out) == (2, "")
    assert "no device loopback:2: this machine has 2" in done.err


def test_a_kind_of_device_that_there_is_not(command, tiny_flags):
    done = command("train.py", *tiny_flags, "--device=tpu")
    assert (done.status, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert "--device tpu: " in done.err
    assert "auto, npu, cuda, cpu" in done.err
