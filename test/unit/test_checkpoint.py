"""ckpt.pth: written whole or not at all, read back exactly, and what a resumed run logs and where it starts."""

import os
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import full_disk, refusal, same, tiny_config

from aligned_reid.config import Config
from aligned_reid.device import Accelerator
from aligned_reid.distributed import World
from aligned_reid.model import AlignedReID
from aligned_reid.preflight import check_input
from aligned_reid.run import resume_after_restart, run, run_extraction, run_folder
from aligned_reid.training.checkpoint import (
    WRITING_SHARE,
    Checkpoints,
    LastGood,
    describe_resume,
    first_step,
    random_states,
    set_aside,
    set_random_states,
)
from aligned_reid.training.learner import Learner
from aligned_reid.weights import read_weight_file

pytestmark = pytest.mark.usefixtures("small_trunk")

HERE = {"num_processes": 2, "device": "cpu"}


def make_checkpoints(folder, **settings):
    """The checkpoints of a small model."""
    torch.manual_seed(0)
    config = tiny_config("", folder, **settings)
    accelerator = Accelerator(config)
    model = AlignedReID(None, pretrained="none", bnneck=config.bnneck)
    return Checkpoints(config, [Learner(config, model, accelerator, World())], World(), {})


def train_step(checkpoints):
    """A step of the model; returns its state."""
    (learner,) = checkpoints.learners
    learner.start_step(0.1)
    images = torch.arange(4 * 64 * 32 * 3).reshape(4, 64, 32, 3) % 251
    learner.scaler.backward(learner.forward(images.to(torch.uint8)).global_feat.square().sum())
    learner.scaler.step(learner.optimizer)
    return state_of(checkpoints)


def state_of(checkpoints):
    state = checkpoints.learners[0].state_dict()
    return deepcopy({"model": state["model"], "optimizer": state["optimizer"]["state"]})


def epochs_in(folder):
    return {path.name: torch.load(path, weights_only=True)["epoch"] for path in folder.iterdir()}


def test_load_restores_weights_optimizer_and_random_states(tmp_path):
    first, second = make_checkpoints(tmp_path), make_checkpoints(tmp_path)
    train_step(first)
    first.save(1)
    drawn, expected = torch.rand(3), train_step(first)
    content = second.load().content
    assert (content["epoch"], content["sampler"]) == (1, {"seed": 1, "epoch": 1})
    assert content["config"] == second.config.to_dict()
    assert torch.equal(torch.rand(3), drawn)
    assert same(train_step(second), expected)


@pytest.mark.parametrize("has_links", [True, False])
def test_the_previous_checkpoint_is_kept(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(os, "link", full_disk)  # any OSError
    checkpoints = make_checkpoints(tmp_path)
    for epoch in (1, 2, 3):
        checkpoints.save(epoch)
    assert epochs_in(tmp_path) == {"ckpt.pth": 3, "ckpt.previous.pth": 2}


def flip_a_bit(path):
    """Damage a file where its tensors are: torch.load does not notice."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_off, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, damage):
    checkpoints = make_checkpoints(tmp_path)
    checkpoints.save(1)
    first = state_of(checkpoints)
    assert not same(train_step(checkpoints), first)
    checkpoints.save(2)
    damage(tmp_path / "ckpt.pth")
    message = refusal(read_weight_file, tmp_path / "ckpt.pth")  # weights to test are not replaced silently
    assert ("ckpt.previous.pth" in message) == (tmp_path / "ckpt.pth").exists()
    last = checkpoints.load()
    assert (last.path.name, last.content["epoch"]) == ("ckpt.previous.pth", 1)
    assert str(tmp_path / "ckpt.pth") in last.damage and last.damage.isprintable()
    assert same(state_of(checkpoints), first)
    checkpoints.save(3)  # must not replace the good file with the damaged one
    assert epochs_in(tmp_path) == {"ckpt.pth": 3, "ckpt.previous.pth": 1}
    for path in tmp_path.iterdir():
        flip_a_bit(path)
    message = refusal(checkpoints.load)
    assert "no checkpoint" in message and message.count("checksum") == 2


def test_bare_weights_and_another_model_are_refused(tmp_path):
    checkpoints = make_checkpoints(tmp_path)
    torch.save(state_of(checkpoints)["model"], tmp_path / "ckpt.pth")
    assert "--model_weight_file" in refusal(checkpoints.load)
    make_checkpoints(tmp_path, bnneck=True).save(1)
    assert "bnneck: True -> False" in refusal(checkpoints.load)


def test_writing_takes_a_bounded_share_of_the_time(tmp_path, monkeypatch):
    clock, save = [100.0], torch.save

    def save_in_two_seconds(*given):
        clock[0] += 2
        save(*given)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(torch, "save", save_in_two_seconds)
    checkpoints = make_checkpoints(tmp_path)
    assert checkpoints.is_due()
    checkpoints.save(1)
    clock[0] += 2 / WRITING_SHARE - 1
    assert not checkpoints.is_due()
    clock[0] += 2
    assert checkpoints.is_due()


def test_set_aside_never_overwrites(tmp_path):
    for content in ("first", "second", "third"):
        (tmp_path / "ckpt.pth").write_text(content)
        set_aside(tmp_path / "ckpt.pth")
    assert set_aside(tmp_path / "ckpt.pth") is None
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {"ckpt.old1.pth": "first", "ckpt.old2.pth": "second", "ckpt.old3.pth": "third"}


def test_a_new_run_keeps_the_profile_of_an_earlier_one(tmp_path):
    (tmp_path / "profile").mkdir()
    with run_folder(Config(exp_dir=str(tmp_path), log_to_file=False), World()):
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "profile.old1"}


def test_states_of_another_device_are_skipped_or_adapted_and_those_of_other_parameters_refused():
    accelerator = Accelerator(Config(amp="O0"))
    states = random_states(accelerator)
    states["device"] = torch.ones(16, dtype=torch.uint8)
    set_random_states(states, accelerator)
    assert torch.equal(torch.get_rng_state(), states["torch"])
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = accelerator.adam([parameter], lr=0.1)
    state = {"step": 7, "exp_avg": torch.full((3,), 0.5), "exp_avg_sq": torch.full((3,), 0.25)}
    theirs = {"state": {0: state}, "param_groups": [{"lr": 9.0, "betas": (0.5, 0.5), "params": [0]}]}
    accelerator.load_optimizer(optimizer, theirs)
    assert float(optimizer.state[parameter]["step"]) == 7
    assert torch.equal(optimizer.state[parameter]["exp_avg"], state["exp_avg"])
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)  # this run's
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert float(optimizer.state[parameter]["step"]) == 8
    with pytest.raises(ValueError, match="other parameters"):
        accelerator.load_optimizer(optimizer, {"state": {}, "param_groups": [{"params": [0, 1]}]})


def last_good(tmp_path, damage="", **content):
    return LastGood({"config": Config().to_dict(), "epoch": 3, "step": 0, **content}, tmp_path / "ckpt.pth", damage)


@pytest.mark.parametrize(
    ("settings", "last", "expected"),
    [
        ({"resume": True}, {}, ["ckpt.pth after epoch 3"]),  # of the same run, by an old version
        ({"resume": True}, {"made_on": HERE}, ["ckpt.pth after epoch 3"]),
        ({}, {"step": 4}, ["epoch 3 and step 4"]),
        ({}, {"damage": "ckpt.pth is damaged"}, ["ckpt.pth is damaged", "resumed"]),
        ({}, {"average": {}}, ["resumed", "--ema_decay"]),
        ({}, {"made_on": {"num_processes": 8, "device": "npu"}}, ["resumed", "processes 8 -> 2, device npu -> cpu:"]),
        ({"base_lr": 0.5}, {}, ["resumed", "change the result: base_lr: 0.0002 -> 0.5"]),
        ({"checkpoint_every_steps": 7}, {}, ["resumed", "not affect training: checkpoint_every_steps: 0"]),
    ],
)
def test_resuming_logs_one_line_and_what_differs(tmp_path, settings, last, expected):
    lines = describe_resume(Config(**settings), last_good(tmp_path, **last), HERE)
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert part in line


@pytest.mark.parametrize(
    ("sampling", "before", "now", "expected"),
    [("independent", 1, 2, 6), ("sharded", 1, 2, 3), ("sharded", 4, 2, 10), ("sharded", 2, 2, 6)],
)
def test_another_number_of_processes_keeps_the_share_of_the_epoch(sampling, before, now, expected):
    content = {"step": 6, "made_on": {"num_processes": before, "device": "cpu"}}
    assert first_step(content, Config(id_sampling=sampling), now, num_steps=10) == expected


@pytest.mark.parametrize(("before", "now", "expected"), [(1, 2, 3), (2, 1, 12), (2, 3, 4), (2, 2, 6)])
def test_another_number_of_batches_per_step_keeps_the_share_of_the_epoch(before, now, expected):
    content = {"step": 6, "config": Config(accumulate=before).to_dict()}
    assert first_step(content, Config(accumulate=now), 1, num_steps=20) == expected


def test_only_rank_0_needs_the_run_folder(tiny_data, tmp_path):
    config = tiny_config(tiny_data, tmp_path, resume=True)
    message = refusal(check_input, config, World())
    assert "--resume" in message and "ckpt.pth" in message
    assert check_input(config, World(1, 2)).weights is None
    nowhere = tiny_config(tiny_data, "/dev/null/run")
    assert "--exp_dir" in refusal(check_input, nowhere, World())
    check_input(nowhere, World(1, 2))


def test_only_rank_0_needs_the_folder_of_an_extraction(tmp_path, monkeypatch):
    config = Config(only_test=True)
    assert "--save_file" in refusal(run_extraction, config, tmp_path / "nowhere" / "f.h5")
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert "--data_path" in refusal(run_extraction, config, tmp_path / "nowhere" / "f.h5")  # which is checked next


def test_a_run_resumes_from_the_previous_checkpoint_and_adds_to_its_seconds(tiny_data, tmp_path):
    results = run(tiny_config(tiny_data, tmp_path))
    cut_off(tmp_path / "ckpt.pth")
    content = read_weight_file(tmp_path / "ckpt.previous.pth")
    assert 0 < content["train_seconds"] <= results["train_seconds"]
    torch.save({**content, "train_seconds": 1000.0}, tmp_path / "ckpt.previous.pth")
    assert run(tiny_config(tiny_data, tmp_path, resume=True))["train_seconds"] > 1000
    log = (tmp_path / "log.txt").read_text()
    assert f"{tmp_path}/ckpt.pth is damaged" in log
    assert f"resumed from {tmp_path}/ckpt.previous.pth after epoch 1" in log
    assert read_weight_file(tmp_path / "ckpt.pth")["epoch"] == 2


@pytest.mark.parametrize("job", ["a", "b", "", None])
def test_a_restart_resumes_its_own_launch_only(tiny_data, tmp_path, job):
    config, accelerator = tiny_config(tiny_data, tmp_path), Accelerator(Config(amp="O0"))
    world = World(job="a")
    assert not resume_after_restart(config, world, accelerator).resume  # no checkpoint yet
    checkpoints = make_checkpoints(tmp_path)
    checkpoints.world = World(job=job)
    checkpoints.save(1)
    if job is None:
        (tmp_path / "ckpt.pth").write_bytes(b"damaged")
    assert resume_after_restart(config, world, accelerator).resume == (job == world.job)
