"""What tests share: a tiny drawn data set, a tiny trunk, and commands run as a user runs them."""

import errno
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from aligned_reid import InputError, ReID, commands, model, preflight
from aligned_reid.config import Config
from aligned_reid.data import make_synthetic
from aligned_reid.model import AlignedReID
from aligned_reid.weights import write_safetensors

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "test" / "golden"
# Variables of launchers, of Ascend's platform, and of terminals and languages, which must not reach the tests.
VARIABLES = re.compile(
    "ASCEND|RANK|WORLD_SIZE|PET_|NNODES|MASTER_|TORCHELASTIC|HCCL|etp_running_flag|TASK_QUEUE|COMBINED|CPU_AFF|"
    "PYTHON$|TORCH_DEVICE|LC_|LANG|COLUMNS|_COLOR"
)
PROGRAM_PATH = {"PYTHONPATH": f"{ROOT}:{ROOT / 'test'}"}  # for tests' programs, which import this file
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job and its children ignore it
PATIENCE = 600  # seconds for a process that imports torch, on a machine that is busy with much else
TINY = ("--pretrained=none", "--resize_h_w=64,32", "--ids_per_batch=4", "--ims_per_id=2", "--workers=0", "--device=cpu")


def pytest_configure():  # not for tests' programs, whose launcher sets some of them
    for variable in filter(VARIABLES.search, list(os.environ)):
        del os.environ[variable]
    os.environ["COLUMNS"] = "100"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A drawn data set of 16 people and 2 cameras, prepared and never written to by a test."""
    return make_synthetic(tmp_path_factory.mktemp("data") / "tiny", 16, 2, 3, seed=1)


@pytest.fixture
def tiny_flags(tiny_data):
    """Flags of a run that takes seconds."""
    return (f"--data_path={tiny_data}", *TINY)


@pytest.fixture
def photos(tiny_data, tmp_path):
    """A folder of twelve photos, with a folder in it."""
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for number, path in enumerate(sorted((tiny_data / "images").iterdir())[:12]):
        shutil.copy(path, folder / ("inner" if number % 2 else "") / path.name)
    return folder


def tiny_config(data, folder, **settings):
    """Settings of a run of two epochs that takes seconds."""
    common = {"data_path": str(data), "exp_dir": str(folder), "pretrained": "none", "resize_h_w": (64, 32), "seed": 1}
    common |= {"ids_per_batch": 4, "ims_per_id": 2, "workers": 0, "device": "cpu", "amp": "O0", "total_epochs": 2}
    return Config(**common | settings)


def make_small_trunk():
    """A trunk of a few thousand weights in ResNet-50's place, for tests about what is around it."""
    layers = {
        "conv1": nn.Conv2d(3, 16, 32, stride=32, bias=False),
        "bn1": nn.BatchNorm2d(16),
        "layer1": nn.ReLU(),
        "conv2": nn.Conv2d(16, 2048, 1),
    }
    return nn.Sequential(OrderedDict(layers))


def use_small_trunk(patch=setattr):
    """Build models with make_small_trunk's trunk."""
    for module in (model, preflight):
        patch(module, "make_trunk", make_small_trunk)


@pytest.fixture
def small_trunk(monkeypatch):
    use_small_trunk(monkeypatch.setattr)


def refusal(function, *arguments, **named):
    """The message of the InputError that a call raises: one printable line."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **named)
    message = str(caught.value)
    assert message.isprintable()
    return message


def preparation_refusal(prepare, source, save_dir, *options, **named):
    """The one line that `prepare` raises; it must not leave a data set behind."""
    message = refusal(prepare, source, save_dir, *options, **named)
    assert not (save_dir / "partitions.pkl").exists()
    return message


def contents(folder):
    """The files below a folder by their relative names."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def same(first, second):
    """Whether nested dicts and lists of tensors and numbers are equal to the bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def full_disk(*_):
    """In place of a function that writes."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Finished(NamedTuple):
    """A command that has ended."""

    status: int
    out: str
    err: str


def assert_done(finished):
    """Exit status 0 and nothing on stderr; returns `finished`."""
    assert (finished.status, finished.err) == (0, "")
    return finished


def assert_refused(finished, *words):
    """Exit status 2, and one line on stderr that holds all `words`."""
    assert finished.status == 2
    assert finished.err.count("\n") == 1, finished.err
    for word in words:
        assert word in finished.err


@pytest.fixture
def finish(monkeypatch, capfd):
    """Call a command's function in this process: what is patched stays so, and torch is imported once."""

    def run(function, *argv):
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        capfd.readouterr()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        with pytest.raises(SystemExit) as exit_:
            function()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)  # launch.py blocks what nohup ignores
        return Finished(exit_.value.code, *capfd.readouterr())

    return run


@pytest.fixture
def command(finish):
    """Run a script as its command line would."""

    def run(name, *arguments):
        path = str(ROOT / "script" / name)
        return finish(lambda: runpy.run_path(path, run_name="__main__"), path, *arguments)

    return run


@pytest.fixture
def train(command, tiny_flags, tmp_path, small_trunk):
    """Train a small model for an epoch, in the folder `run` or the one given; flags that follow count."""

    def run(*flags, folder="run", status=0):
        done = command("train.py", *tiny_flags, "--total_epochs=1", f"--exp_dir={tmp_path / folder}", *flags)
        assert done.status == status, done.err
        return done

    return run


@pytest.fixture
def aligned_reid(finish):
    """Run `aligned-reid ...`."""
    return lambda *arguments: finish(commands.main, "/somewhere/bin/aligned-reid", *arguments)


@pytest.fixture
def trained(train, tmp_path):
    """The folder of a run of one epoch with the local loss, in float32."""
    assert_done(train("--seed=1", "-llw=1", "--amp=O0", folder="trained"))
    return tmp_path / "trained"


def is_alive(pid):
    """Whether a process runs and is not a zombie, which stays if the container's first process does not wait for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def score_lines(text):
    return [line for line in text.splitlines() if "cmc1" in line or "Market-1501 benchmark" in line]


def run_program(*command, cwd=None, environment=None, timeout=PATIENCE):
    """Run a command in a new process, in whose environment torch may load its backends."""
    inherited = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    options = {"cwd": cwd, "env": inherited | (environment or {}), "timeout": timeout}
    done = subprocess.run(list(map(str, command)), **options, capture_output=True, text=True, check=False)
    return Finished(done.returncode, done.stdout, done.stderr)


def run_script(name, *arguments, **options):
    """Run script/<name> in a new process."""
    return run_program(sys.executable, ROOT / "script" / name, *arguments, **options)


def write_small_script(path, name):
    """A program that is script/<name> with the small trunk; it needs PROGRAM_PATH."""
    script = str(ROOT / "script" / name)
    code = f"exec(open({script!r}).read(), {{'__name__': '__main__', '__file__': {script!r}}})"  # as if it stood here
    path.write_text(f"import conftest\nconftest.use_small_trunk()\n{code}\n")
    return path


RATES = {"at_fmr": {"0.001": {"threshold": 0.5, "tmr": 0.9}}}


def write_run(folder, measured_on="drawn", rates=RATES, **settings):
    """A run folder with a model that has a local branch, features of unit length, and a threshold."""
    torch.manual_seed(0)
    config = Config.of(l_loss_weight=1.0, normalize_feature=True, **settings)
    folder.mkdir(parents=True)
    model = AlignedReID(None, pretrained="none")
    write_safetensors(folder / "model.safetensors", model.state_dict(), config.to_dict())
    results = {"verification": {"measured_on": measured_on, "global": rates}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory):
    """A run folder with a small model for images of 64 x 32 and a threshold of 0.5."""
    with pytest.MonkeyPatch.context() as patch:
        use_small_trunk(patch.setattr)
        return write_run(tmp_path_factory.mktemp("shared") / "run", resize_h_w=(64, 32))


@pytest.fixture
def tiny_run(shared_run, tmp_path, small_trunk):
    """A copy of shared_run that a test may change."""
    return shutil.copytree(shared_run, tmp_path / "run")


@pytest.fixture(scope="session")
def reid(shared_run):
    """The model of shared_run, opened once: that compares the results of its layers, which takes a while."""
    with pytest.MonkeyPatch.context() as patch:
        use_small_trunk(patch.setattr)
        return ReID.from_pretrained(shared_run, "cpu")
