import itertools
import json

import pytest
import torch
from conftest import make_small_trunk, tiny_config

from aligned_reid.config import Config
from aligned_reid.device import Accelerator, find_wrong_layer
from aligned_reid.model import AlignedReID
from aligned_reid.run import run, run_extraction

SIZE = (64, 32)


def with_last_column(y, value):
    return torch.cat([y[..., :-1], value.to(y).expand_as(y[..., -1:])], dim=3)


FACTORS = itertools.cycle((1, 1.01))


def with_wrong_gradient(y):
    if y.requires_grad:
        y.register_hook(lambda grad: grad * torch.linspace(0, 2, grad.shape[1]).to(grad).view(-1, 1, 1))
    return y


FAULTS = {
    "nan": lambda y: with_last_column(y, torch.tensor(torch.nan)),
    "garbage": lambda y: with_last_column(y, 3 * y.std()),
    "not repeatable": lambda y: y * next(FACTORS),
    "gradient": with_wrong_gradient,
}


def spoil(layer, fault):
    """Make a layer wrong in 16 bit only."""
    layer.register_forward_hook(lambda _, inputs, y: y if y.dtype == torch.float32 else fault(y))


@pytest.fixture
def cpu():
    """A CPU that computes in bfloat16, whether it has units for that or not."""
    accelerator = Accelerator(Config())
    accelerator.half = torch.bfloat16
    return accelerator


@pytest.fixture
def model(small_trunk):
    return AlignedReID(4, pretrained="none", bnneck=True)


@pytest.mark.parametrize("backward", [True, False])
def test_a_right_network_passes_and_leaves_the_random_state(model, cpu, backward):
    before = torch.get_rng_state()
    assert find_wrong_layer(model, SIZE, cpu, backward=backward) == ""
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_wrong_layer_is_found(model, cpu, fault):
    spoil(model.base.conv2, FAULTS[fault])
    assert find_wrong_layer(model, SIZE, cpu, backward=True) == "base.conv2, 1 x 1 stride 1 on 2 x 1"
    if fault == "gradient":  # which does not matter to features
        assert find_wrong_layer(model, SIZE, cpu, backward=False) == ""


def test_wrong_features_of_right_layers_are_found(model, cpu):
    spoil(model.base.layer1, lambda y: y + 1)
    assert find_wrong_layer(model, SIZE, cpu, backward=False) == "features"


def test_resnet50_passes_in_float16(cpu):
    cpu.half = torch.float16
    assert find_wrong_layer(AlignedReID(4, pretrained="none"), (32, 32), cpu, backward=True) == ""


def test_a_run_and_an_extraction_fall_back_to_float32(tiny_data, tmp_path, monkeypatch, capsys):
    def make_wrong_trunk():
        trunk = make_small_trunk()
        spoil(trunk.conv2, FAULTS["garbage"])
        return trunk

    monkeypatch.setattr("aligned_reid.device.base.cpu_has_bfloat16", lambda: True)
    for module in ("model", "preflight"):
        monkeypatch.setattr(f"aligned_reid.{module}.make_trunk", make_wrong_trunk)
    found = {amp: run(tiny_config(tiny_data, tmp_path / amp, amp=amp, total_epochs=1)) for amp in ("O0", "O1")}
    (line,) = [line for line in (tmp_path / "O1" / "log.txt").read_text().splitlines() if "device cpu" in line]
    assert "float32: bfloat16 is wrong here (base.conv2, 1 x 1 stride 1 on 2 x 1)" in line
    assert found["O1"]["global"] == found["O0"]["global"]
    assert json.loads((tmp_path / "O1" / "results.json").read_text())["device"] == found["O1"]["device"]
    capsys.readouterr()
    torch.save(AlignedReID(None, pretrained="none").state_dict(), tmp_path / "w.pth")
    run_extraction(tiny_config(tiny_data, "", amp="O1", model_weight_file=str(tmp_path / "w.pth")), tmp_path / "f.h5")
    assert "float32: bfloat16 is wrong here (base.conv2" in capsys.readouterr().out
