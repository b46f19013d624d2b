"""Mutual learning with a model in each of two processes: the run is that of one process with both models."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

PROGRAM = Path(__file__).with_name("faulty_train.py")
MUTUAL = ("--num_models=2", "-pmlw=0.5", "-gdmlw=0.5", "-ldmlw=0.5", "-idlw=1", "-llw=1", "--ema_decay=0.9")


@pytest.fixture
def train(tiny_data, tmp_path):
    """Two epochs of two models, in one process or in two; returns the finished process and the run folder."""

    def run(name, *flags, ranks, fault=("none", 0, 0)):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        settings = (f"--data_path={tiny_data}", *TINY, "--seed=1", "--amp=O0", f"--exp_dir={folder / 'run'}", *MUTUAL)
        command = [PROGRAM, *fault, folder, *settings, "--total_epochs=2", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": "0"}
        if ranks == 2:
            command = [ROOT / "script" / "launch.py", "--nproc=2", *command, "--models_apart=true"]
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        return done, folder / "run"

    return run


def content_of(folder):
    return torch.load(folder / "ckpt.pth", weights_only=True)


def losses_of(text):
    return re.findall(r"^Ep .*(gp\.1 .*)$", text, flags=re.MULTILINE)


def test_two_processes_with_a_model_each_are_one_with_both(train):
    one, folder = train("one", ranks=1)
    assert one.returncode == 0, one.stderr
    two, apart = train("two", ranks=2)
    assert two.returncode == 0, two.stderr
    assert losses_of(one.stdout) == losses_of(two.stdout) != []
    first, second = content_of(folder), content_of(apart)
    states = [[content, *content["other_models"]] for content in (first, second)]
    assert len(states[0]) == len(states[1]) == 2
    for expected, state in zip(*states, strict=True):
        for part in ("model", "average"):
            assert all(torch.equal(value, state[part][name]) for name, value in expected[part].items()), part
    results = [json.loads((path / "results.json").read_text()) for path in (folder, apart)]
    assert results[0]["models"] == results[1]["models"]
    assert (apart / "model_2.safetensors").is_file()


@pytest.mark.slow
def test_they_go_on_after_one_was_killed(train):
    whole, folder = train("whole", ranks=2)
    assert whole.returncode == 0, whole.stderr
    killed, parts = train("parts", "--checkpoint_every_steps=1", ranks=2, fault=("kill", 1, 3))
    assert killed.returncode == 128 + 9
    rest, parts = train("parts", "--checkpoint_every_steps=1", "--resume=true", ranks=2)
    assert rest.returncode == 0, rest.stderr
    assert "resumed from" in rest.stdout
    expected, content = content_of(folder), content_of(parts)
    for first, second in zip([expected, *expected["other_models"]], [content, *content["other_models"]], strict=True):
        assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())


def test_as_many_processes_as_models(train):
    done, _ = train("three", "--num_models=3", ranks=2)
    assert done.returncode == 2
    assert "--models_apart true: of 2 processes each has a model, and --num_models is 3" in done.stderr
    assert "Traceback" not in done.stderr
