"""Another kind of device is one class and one name: nothing else in the library has to know of it."""

import json

import torch
from conftest import assert_refused

from aligned_reid.config import Config
from aligned_reid.device import ACCELERATORS, Accelerator, open_accelerator


class Loopback(Accelerator):
    """A device whose tensors are the CPU's, but whose precision, optimiser and name are its own."""

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


def test_it_trains_evaluates_and_its_weights_are_the_cpus(command, tiny_flags, tmp_path, small_trunk, monkeypatch):
    monkeypatch.setattr(Loopback, "waits", 0)
    kinds = {"loopback": Loopback, **ACCELERATORS}  # first: auto takes it
    monkeypatch.setattr("aligned_reid.device.open.ACCELERATORS", kinds)
    assert open_accelerator(Config(), None, 0).name == "loopback"
    flags = ("train.py", *tiny_flags, "--device=loopback", "--total_epochs=2", f"--exp_dir={tmp_path / 'run'}")
    assert_refused(command(*flags, "--npu=2"), "no device loopback:2: this machine has 2")
    done = command(*flags, "--npu=1")
    assert done.status == 0, done.err
    assert "device loopback (imagined, device 1), bfloat16, torch" in done.out
    assert Loopback.waits >= 2
    assert json.loads((tmp_path / "run" / "results.json").read_text())["global"]["mAP"] > 0
    optimizer = torch.load(tmp_path / "run" / "ckpt.pth", weights_only=True)["optimizer"]
    assert optimizer["param_groups"][0]["decoupled_weight_decay"]  # AdamW's
    tested = command("train.py", *tiny_flags, "--only_test=true", f"--model_weight_file={tmp_path / 'run'}")
    assert tested.status == 0, tested.err
