"""ckpt.pth: whole or not at all, read back to the bit, nothing of a former run lost."""

import random
import zipfile

import numpy as np
import pytest
import torch

from aligned_reid import InputError
from aligned_reid.config import Config
from aligned_reid.device import Accelerator
from aligned_reid.training import checkpoint as checkpoint_module
from aligned_reid.training.checkpoint import (
    Checkpoints,
    random_states,
    read_last_good,
    set_aside,
    set_random_states,
)
from aligned_reid.weights import read_weight_file


class Parts:
    """A small model with what a checkpoint holds."""

    def __init__(self, folder, width=3):
        torch.manual_seed(0)
        accelerator = Accelerator()
        self.model = torch.nn.Linear(width, 2)
        self.optimizer = accelerator.adam(self.model.parameters(), 0.1, 5e-4)
        self.checkpoints = Checkpoints(folder, [self], accelerator)

    def state_dict(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        Accelerator().load_optimizer(self.optimizer, state["optimizer"])

    def step(self):
        self.optimizer.zero_grad()
        self.model(torch.ones(1, self.model.in_features)).sum().backward()
        self.optimizer.step()
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def test_what_is_read_goes_on_to_the_bit(tmp_path):
    config = Config(seed=3)
    first = Parts(tmp_path)
    first.step()
    first.checkpoints.save(1, config)
    drawn = torch.rand(3), np.random.rand(3), random.random()
    expected = first.step()

    second = Parts(tmp_path)
    content = second.checkpoints.load(Config(seed=3)).content
    assert (content["epoch"], content["sampler"]) == (1, {"seed": 3, "epoch": 1})
    assert content["config"] == config.to_dict()
    assert torch.equal(torch.rand(3), drawn[0])
    assert np.array_equal(np.random.rand(3), drawn[1])
    assert random.random() == drawn[2]
    for ours, theirs in zip(second.step(), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_it_holds_tensors_numbers_and_strings_only(tmp_path):
    parts = Parts(tmp_path)
    parts.step()
    parts.checkpoints.save(1, Config(seed=3))
    with open(tmp_path / "ckpt.pth", "rb") as file:
        assert torch.load(file, weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 1 vs 2")])
def test_a_failed_write_leaves_the_former_file(tmp_path, monkeypatch, failure):
    parts = Parts(tmp_path)
    parts.checkpoints.save(1, Config(seed=3))

    def fail(content, file):
        file.write(b"a part")
        raise failure

    monkeypatch.setattr(checkpoint_module.torch, "save", fail)
    with pytest.raises(OSError):
        parts.checkpoints.save(2, Config(seed=3))
    assert read_weight_file(tmp_path)["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pth"]


def test_the_one_before_is_kept_beside_the_newest(tmp_path):
    parts = Parts(tmp_path)
    for epoch in (1, 2, 3):
        parts.checkpoints.save(epoch, Config(seed=3))
    epochs = {path.name: torch.load(path, weights_only=True)["epoch"] for path in tmp_path.iterdir()}
    assert epochs == {"ckpt.pth": 3, "ckpt.previous.pth": 2}


def test_a_disk_without_links_keeps_it_too(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(checkpoint_module.os, "link", no_links)
    parts = Parts(tmp_path)
    for epoch in (1, 2):
        parts.checkpoints.save(epoch, Config(seed=3))
    assert torch.load(tmp_path / "ckpt.previous.pth", weights_only=True)["epoch"] == 1
    (tmp_path / "ckpt.pth").unlink()  # where a kill comes between the two names
    assert read_last_good(tmp_path).content["epoch"] == 1


def flip_a_byte(path):
    """Damage a file where its tensors are: torch.load does not notice."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as records:
        record = next(one for one in records.infolist() if one.filename.endswith("/data/0"))
    content[record.header_offset + 30 + len(record.filename) + 64] ^= 1
    path.write_bytes(content)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [flip_a_byte, cut_off, remove])
def test_a_damaged_one_is_named_and_the_one_before_used(tmp_path, damage):
    parts = Parts(tmp_path, width=40)
    parts.checkpoints.save(1, Config(seed=3))
    first = [parameter.detach().clone() for parameter in parts.model.parameters()]
    parts.step()
    parts.checkpoints.save(2, Config(seed=3))
    damage(tmp_path / "ckpt.pth")
    last = parts.checkpoints.load(Config(seed=3))
    assert (last.path.name, last.content["epoch"]) == ("ckpt.previous.pth", 1)
    assert str(tmp_path / "ckpt.pth") in last.damage and "\n" not in last.damage
    for ours, theirs in zip(parts.model.parameters(), first, strict=True):
        assert torch.equal(ours, theirs)
    parts.checkpoints.save(3, Config(seed=3))  # the damaged file must not take the place of the good one
    epochs = {path.name: torch.load(path, weights_only=True)["epoch"] for path in tmp_path.iterdir()}
    assert epochs == {"ckpt.pth": 3, "ckpt.previous.pth": 1}

    for path in tmp_path.iterdir():
        flip_a_byte(path)
    with pytest.raises(InputError, match="no checkpoint to go on from") as error:
        parts.checkpoints.load(Config(seed=3))
    assert str(error.value).count("the checksum of") == 2 and "\n" not in str(error.value)


def test_weights_to_test_are_not_taken_from_a_damaged_file(tmp_path):
    parts = Parts(tmp_path, width=40)
    for epoch in (1, 2):
        parts.checkpoints.save(epoch, Config(seed=3))
    flip_a_byte(tmp_path / "ckpt.pth")
    with pytest.raises(
        InputError, match=rf"{tmp_path}/ckpt\.pth is damaged.*the one before it is .*ckpt\.previous\.pth"
    ):
        read_weight_file(tmp_path / "ckpt.pth")
    assert read_weight_file(tmp_path / "ckpt.previous.pth")["epoch"] == 1


def test_a_file_that_is_no_run_or_another_model_is_refused(tmp_path):
    parts = Parts(tmp_path)
    torch.save(parts.model.state_dict(), tmp_path / "ckpt.pth")
    with pytest.raises(InputError, match="--model_weight_file"):
        parts.checkpoints.load(Config(seed=3))
    Parts(tmp_path, width=5).checkpoints.save(1, Config(seed=3, bnneck=True))
    with pytest.raises(InputError, match=r"another model or .* the flags give \(bnneck: True -> False\)"):
        parts.checkpoints.load(Config(seed=3))


def test_writing_takes_a_bounded_share_of_the_time(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(checkpoint_module, "write_atomically", lambda *_: clock.__setitem__(0, clock[0] + 2))
    parts = Parts(tmp_path)
    assert parts.checkpoints.is_due()
    parts.checkpoints.save(1, Config(seed=3))
    clock[0] += 19
    assert not parts.checkpoints.is_due()
    clock[0] += 2
    assert parts.checkpoints.is_due()


def test_set_aside_never_overwrites(tmp_path):
    for content in ("first", "second", "third"):
        (tmp_path / "ckpt.pth").write_text(content)
        set_aside(tmp_path / "ckpt.pth")
    assert set_aside(tmp_path / "ckpt.pth") is None
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {"ckpt.old1.pth": "first", "ckpt.old2.pth": "second", "ckpt.old3.pth": "third"}


def test_states_of_another_kind_of_device_are_left_out():
    states = random_states(Accelerator())
    states["device"] = torch.ones(16, dtype=torch.uint8)
    set_random_states(states, Accelerator())  # a CPU has no random state besides torch's
    assert torch.equal(torch.get_rng_state(), states["torch"])


def test_an_optimiser_of_another_device_goes_on_here():
    parameter = torch.nn.Parameter(torch.ones(3))
    accelerator = Accelerator(mixed_precision=False)
    optimizer = accelerator.adam([parameter], 0.1, 0.0)
    state = {"step": 7, "exp_avg": torch.full((3,), 0.5), "exp_avg_sq": torch.full((3,), 0.25)}
    theirs = {"state": {0: state}, "param_groups": [{"lr": 9.0, "betas": (0.5, 0.5), "params": [0]}]}
    accelerator.load_optimizer(optimizer, theirs)
    assert float(optimizer.state[parameter]["step"]) == 7
    assert torch.equal(optimizer.state[parameter]["exp_avg"], state["exp_avg"])
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)  # the settings are this run's
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert float(optimizer.state[parameter]["step"]) == 8


def test_an_optimiser_of_other_parameters_is_refused():
    accelerator = Accelerator(mixed_precision=False)
    optimizer = accelerator.adam([torch.nn.Parameter(torch.ones(3))], 0.1, 0.0)
    with pytest.raises(ValueError, match="other parameters"):
        accelerator.load_optimizer(optimizer, {"state": {}, "param_groups": [{"params": [0, 1]}]})
