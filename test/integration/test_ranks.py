"""A rank that dies or hangs ends the whole run in bounded time, and says which; restarted ranks go on by themselves."""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

FAULTY = Path(__file__).with_name("faulty_train.py")
HOST = re.escape(socket.gethostname())


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
        launcher = [ROOT / "script" / "launch.py", "--nproc=2", f"--max_restarts={max_restarts}"]
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
    """The weights of a run of 2 ranks and 3 epochs that nothing happened to."""
    job = Job(tiny_data, tmp_path_factory.mktemp("whole"))
    done = job.launch("none", 0, 0, "--total_epochs=3")
    assert done.returncode == 0, done.stderr
    return job.weights()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_figure_for_speed_is_of_all_ranks_and_shows_one_that_stalls(job):
    done = job.launch("stall", 1, 0, "--total_epochs=3")
    assert done.returncode == 0, done.stderr
    rates = [float(rate) for rate in re.findall(r"^Ep .*FPS (\S+),", done.stdout, flags=re.MULTILINE)]
    images = 2 * 4 * 2  # ranks, identities, images of each
    assert len(rates) == 3
    for rate in rates:
        assert images / 2 / 0.5 < rate <= images / 0.5  # more than one rank's images alone would give


def test_a_dead_rank_is_named_with_its_last_line(job):
    done = job.launch("kill", 1, 4, "--total_epochs=50")
    assert done.returncode == 128 + 9
    assert re.fullmatch(
        rf"launch\.py: error: rank 1 on {HOST} was killed by signal 9 \(Killed\); its last line: Ep 1, .*loss \S+; "
        r"its log: logs/1/train_1\.log",
        done.stderr.splitlines()[-1],
    ), done.stderr
    assert job.seconds < 60


@pytest.mark.slow
def test_a_rank_that_hangs_outside_of_a_collective_ends_itself(job):
    done = job.launch("hang_loading", 1, 4, "--total_epochs=50", "--timeout=4")
    assert done.returncode == 1
    assert re.fullmatch(
        rf"launch\.py: error: rank 1 on {HOST} hung: its step was not done after 0:00:04; its last line: Ep 1, .*; "
        r"its log: logs/1/train_1\.log",
        done.stderr.splitlines()[-1],
    ), done.stderr
    assert "faulty_train.py" in (job.folder / "logs/1/train_1.log").read_text()  # the stack
    assert job.seconds < 60


@pytest.mark.slow  # torch's agent gives a rank 30 s to end
def test_a_rank_that_hangs_in_a_step_is_named_by_those_that_wait(job):
    done = job.launch("hang", 1, 4, "--total_epochs=50", "--timeout=4")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    waited = rf"rank 0 on {HOST} waited 4 s \(--timeout\)"
    assert re.fullmatch(rf"faulty_train\.py: stopped: no sign of life from rank 1 on {HOST}: {waited}", lines[0]), lines
    # The launcher says it of rank 1 too; the rank's own watchdog may have ended it before.
    own = rf"error: rank 1 on {HOST} hung: its step was not done after 0:00:08"
    traces = r"its last line: Ep 1, .*; its log: logs/1/train_1\.log"
    assert re.fullmatch(rf"launch\.py: (rank 1 hung|{own}); {traces}", lines[1]), lines
    assert len(lines) == 2
    assert job.seconds < 90


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "step"), [(0, 4), (1, 3)])
def test_restarted_ranks_end_with_the_bits_of_a_run_that_was_not_killed(job, whole, rank, step):
    done = job.launch("kill", rank, step, "--total_epochs=3", max_restarts=2)
    assert done.returncode == 0, done.stderr
    assert job.attempts == 2
    first, second = done.stderr.splitlines()
    assert f"rank {rank} on" in first and "was killed by signal 9" in first
    assert second == "launch.py: restart 1 of 2"
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
def test_torchruns_restarts_go_on_too(job, whole, rendezvous):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--max_restarts=2"]
    launcher += [flag.format(port=port) for flag in rendezvous]
    flags = ("--total_epochs=3", "--checkpoint_every_steps=1")
    done = job.run(launcher, job.program("kill", 0, 4, *flags))
    assert done.returncode == 0, done.stderr
    assert job.attempts == 2
    assert "resumed from" in job.log
    assert same(job.weights(), whole)
    # Another launch without --resume true is a new run, though the folder holds a checkpoint of this one.
    done = job.run(launcher, job.program("none", 0, 0, *flags))
    assert done.returncode == 0, done.stderr
    assert "resumed from" not in job.log
    assert (job.folder / "run" / "ckpt.old1.pth").exists()
    assert same(job.weights(), whole)


@pytest.mark.slow
def test_a_mistake_is_not_tried_again(job):
    done = job.launch("mistake", 1, 1, max_restarts=3)
    assert (done.returncode, done.stderr) == (2, "faulty_train.py: error: the flags are wrong\n")
    assert job.attempts == 1


@pytest.mark.slow
def test_one_rank_is_restarted_and_not_for_ever(job):
    launcher = [ROOT / "script" / "launch.py", "--nproc=1", "--max_restarts=1"]
    program = job.program("kill", 0, 4, "--total_epochs=2")
    done = job.run(launcher, program)
    assert done.returncode == 0, done.stderr
    assert job.attempts == 2
    assert "resumed from" in job.log
    always = [job.folder / "dies.py"]
    always[0].write_text("import os\nprint('alive', flush=True)\nos.kill(os.getpid(), 9)\n")
    done = job.run(launcher, always)
    assert done.returncode == 128 + 9
    assert done.stdout == "alive\n" * 2
    assert done.stderr.count("was killed by signal 9 (Killed); its last line: alive; ") == 2


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_and_says_so(job):
    assert job.launch("none", 0, 0, "--total_epochs=1").returncode == 0
    program = [*job.program("none", 0, 0, "--total_epochs=2", "--resume=true")]
    done = job.run([ROOT / "script" / "launch.py", "--nproc=1", "--max_restarts=1"], program)
    assert done.returncode == 0, done.stderr
    assert "processes 2 -> 1: from here on the run is no longer bit-exact" in job.log
    assert "Ep 2," in job.log
