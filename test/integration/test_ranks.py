"""A rank that dies or hangs ends the whole run in bounded time and is named; restarted ranks resume by themselves."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

from aligned_reid.launcher import free_port

FAULTY = Path(__file__).with_name("faulty_train.py")
LAUNCH = ROOT / "script" / "launch.py"


class Job:
    """Runs of faulty_train.py in one folder."""

    def __init__(self, data, folder):
        self.data, self.folder = data, folder

    def program(self, fault, rank, step, *flags):
        settings = (f"--data_path={self.data}", *TINY, "--seed=1", "--amp=O0", f"--exp_dir={self.folder / 'run'}")
        return [FAULTY, fault, rank, step, self.folder, *settings, *flags]

    def run(self, launcher, program, timeout=120):
        command = [sys.executable, *launcher, *program]
        start = time.monotonic()
        done = subprocess.run(
            list(map(str, command)), cwd=self.folder, capture_output=True, text=True, timeout=timeout, check=False
        )
        self.seconds = time.monotonic() - start
        return done

    def launch(self, fault, rank, step, *flags, max_restarts=0):
        launcher = [LAUNCH, "--nproc=2", f"--max_restarts={max_restarts}"]
        return self.run(launcher, self.program(fault, rank, step, "--checkpoint_every_steps=1", *flags))

    @property
    def attempts(self):
        return len((self.folder / "attempts").read_text())

    @property
    def log(self):
        return (self.folder / "run" / "log.txt").read_text()

    def weights(self, name="ckpt.pth"):
        return torch.load(self.folder / "run" / name, weights_only=True)["model"]


@pytest.fixture
def job(tiny_data, tmp_path):
    return Job(tiny_data, tmp_path)


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory):
    """The weights of an undisturbed run of 2 ranks and 3 epochs."""
    job = Job(tiny_data, tmp_path_factory.mktemp("whole"))
    done = job.launch("none", 0, 0, "--total_epochs=3")
    assert done.returncode == 0, done.stderr
    return job.weights()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_fps_counts_all_ranks_and_shows_a_slow_one(job):
    done = job.launch("stall", 1, 0, "--total_epochs=3")
    assert done.returncode == 0, done.stderr
    rates = [float(rate) for rate in re.findall(r"^Ep .*FPS (\S+),", done.stdout, flags=re.MULTILINE)]
    images = 2 * 4 * 2  # ranks, identities, images of each
    assert len(rates) == 3
    for rate in rates:
        assert images / 2 / 0.5 < rate <= images / 0.5  # more than one rank's images alone would give


@pytest.mark.parametrize(
    ("fault", "flags", "status", "words"),
    [
        ("kill", [], 137, ["rank 1", "SIGKILL"]),
        pytest.param("hang_loading", ["--timeout=4"], 1, ["rank 1"], marks=pytest.mark.slow),
        # torch's agent gives a rank 30 s to end
        pytest.param("hang", ["--timeout=4"], 1, ["rank 1"], marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_or_hangs_is_named_in_bounded_time(job, fault, flags, status, words):
    done = job.launch(fault, 1, 4, "--total_epochs=50", *flags)
    assert done.returncode == status
    assert all(word in done.stderr for word in words) and done.stderr.count("\n") == 1
    assert job.seconds < 90
    if fault == "hang_loading":
        assert "faulty_train.py" in (job.folder / "logs/1/train_1.log").read_text()  # the stack


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "step"), [(0, 4), (1, 3)])
def test_restarted_ranks_reach_the_weights_of_an_undisturbed_run(job, whole, rank, step):
    done = job.launch("kill", rank, step, "--total_epochs=3", max_restarts=2)
    assert done.returncode == 0, done.stderr
    assert job.attempts == 2
    assert "resumed from" in job.log
    assert same(job.weights(), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rendezvous",
    [
        ("--nnodes=1", "--master_port={port}"),
        ("--nnodes=1:2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--rdzv_conf=last_call_timeout=1"),
    ],
    ids=["static", "c10d"],
)
def test_restarts_by_torchrun_resume_too(job, whole, rendezvous):
    port = free_port()
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--max_restarts=2"]
    launcher += [flag.format(port=port) for flag in rendezvous]
    flags = ("--total_epochs=3", "--checkpoint_every_steps=1")
    done = job.run(launcher, job.program("kill", 0, 4, *flags))
    assert done.returncode == 0, done.stderr
    assert job.attempts == 2
    assert "resumed from" in job.log
    assert same(job.weights(), whole)
    # Another launch without --resume true starts anew, though the folder holds a checkpoint of this one.
    done = job.run(launcher, job.program("none", 0, 0, *flags))
    assert done.returncode == 0, done.stderr
    assert "resumed from" not in job.log
    assert (job.folder / "run" / "ckpt.old1.pth").exists()
    assert same(job.weights(), whole)


@pytest.mark.slow
def test_a_mistake_is_not_retried(job):
    done = job.launch("mistake", 1, 1, max_restarts=3)
    assert done.returncode == 2 and "the flags are wrong" in done.stderr.splitlines()[-1]
    assert job.attempts == 1


@pytest.mark.slow
def test_a_single_rank_is_restarted_and_resumes(job):
    done = job.run([LAUNCH, "--nproc=1", "--max_restarts=1"], job.program("kill", 0, 4, "--total_epochs=2"))
    assert done.returncode == 0, done.stderr
    assert job.attempts == 2
    assert "resumed from" in job.log


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_machines_restart_together(job, whole, rank):
    """Two launchers on this machine, with one rank each, play two machines."""
    port = free_port()
    flags = ["--nproc=1", "--nnodes=2", "--addr=127.0.0.1", f"--port={port}", "--max_restarts=2"]
    program = job.program("kill", rank, 4, "--total_epochs=3", "--checkpoint_every_steps=1", "--timeout=60")
    commands = [[sys.executable, LAUNCH, *flags, f"--node_rank={node}", *program] for node in range(2)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // 2))}  # as `whole`'s
    machines = [subprocess.Popen(list(map(str, command)), cwd=job.folder, env=environment) for command in commands]
    assert [machine.wait(120) for machine in machines] == [0, 0]
    assert job.attempts == 2
    assert same(job.weights(), whole)


@pytest.mark.slow
def test_another_number_of_ranks_resumes_with_a_warning(job):
    assert job.launch("none", 0, 0, "--total_epochs=1").returncode == 0
    program = [*job.program("none", 0, 0, "--total_epochs=2", "--resume=true")]
    done = job.run([LAUNCH, "--nproc=1", "--max_restarts=1"], program)
    assert done.returncode == 0, done.stderr
    assert "processes 2 -> 1: from here on the run is no longer bit-exact" in job.log
    assert "Ep 2," in job.log
