"""A rank that dies or hangs ends the whole run in bounded time and is named; restarted ranks resume by themselves."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, same

from aligned_reid.launcher import free_port

FAULTY = Path(__file__).with_name("small_train.py")
LAUNCH = [ROOT / "script" / "launch.py", "--nproc=2"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--max_restarts=2"]
LAUNCHERS = {
    "launch": [*LAUNCH, "--max_restarts=2"],
    "static": [*TORCHRUN, "--nnodes=1", "--master_port={port}"],
    "c10d": [*TORCHRUN, "--nnodes=1:2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:{port}"],
}
LAUNCHERS["c10d"] += ["--rdzv_conf=last_call_timeout=1"]


class Job:
    """Runs of small_train.py in one folder."""

    def __init__(self, data, folder):
        self.data, self.folder = data, folder

    def start(self, launcher, fault, rank, step, *flags, **environment):
        settings = (f"--data_path={self.data}", *TINY, "--seed=1", "--amp=O0", f"--exp_dir={self.folder / 'run'}")
        program = [FAULTY, fault, rank, step, self.folder, *settings, "--checkpoint_every_steps=1", *flags]
        return subprocess.Popen(
            [sys.executable, *map(str, (*launcher, *program))],
            cwd=self.folder,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, launcher, *program, status=0):
        """Standard output and error of a run that ends with `status`."""
        process = self.start(launcher, *program)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.terminate()
        assert process.returncode == status, err
        return out, err

    @property
    def attempts(self):
        return len((self.folder / "attempts").read_text())

    @property
    def log(self):
        return (self.folder / "run" / "log.txt").read_text()

    @property
    def weights(self):
        return torch.load(self.folder / "run" / "ckpt.pth", weights_only=True)["model"]


@pytest.fixture
def job(tiny_data, tmp_path):
    return Job(tiny_data, tmp_path)


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory):
    """The weights of an undisturbed run of 2 ranks and 3 epochs."""
    job = Job(tiny_data, tmp_path_factory.mktemp("whole"))
    job.run(LAUNCH, "none", 0, 0, "--total_epochs=3")
    return job.weights


def test_fps_counts_all_ranks_and_shows_a_slow_one(job):
    out, _ = job.run(LAUNCH, "stall", 1, 0, "--total_epochs=3")
    rates = [float(rate) for rate in re.findall(r"^Ep .*FPS (\S+),", out, flags=re.MULTILINE)]
    images = 2 * 4 * 2  # ranks, identities, images of each
    assert len(rates) == 3
    for rate in rates:
        assert images / 2 / 0.5 < rate <= images / 0.5  # more than one rank's images alone would give


@pytest.mark.parametrize(
    ("fault", "status", "word"),
    [
        ("kill", 137, "rank 1"),
        ("diverge", 1, "differ"),  # the ranks' weights
        pytest.param("mistake", 2, "flags", marks=pytest.mark.slow),
        pytest.param("hang_loading", 1, "rank 1", marks=pytest.mark.slow),
        pytest.param("hang", 1, "rank 1", marks=pytest.mark.slow),  # torch's agent gives a rank 30 s to end
    ],
)
def test_a_rank_that_fails_ends_the_run_in_bounded_time(job, fault, status, word):
    launcher = [*LAUNCH, "--max_restarts=3"] if fault == "mistake" else LAUNCH
    timeout = ("--timeout=4",) if "hang" in fault else ()
    start = time.monotonic()
    _, err = job.run(launcher, fault, 1, 4, "--total_epochs=50", *timeout, status=status)
    assert time.monotonic() - start < 90
    assert word in err.splitlines()[-1]
    assert job.attempts == 1
    if fault != "mistake":
        assert err.count("\n") == 1
    if fault == "hang_loading":
        log = (job.folder / "logs/1/train_1.log").read_text()
        assert "Timeout" in log and "small_train.py" in log  # the stack


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rank", "step"), [("launch", 0, 4), ("launch", 1, 3), ("static", 0, 4), ("c10d", 0, 4)]
)
def test_restarted_ranks_reach_the_weights_of_an_undisturbed_run(job, whole, name, rank, step):
    launcher = [str(part).format(port=free_port()) for part in LAUNCHERS[name]]
    job.run(launcher, "kill", rank, step, "--total_epochs=3")
    assert job.attempts == 2
    assert "resumed from" in job.log
    assert same(job.weights, whole)
    # Another launch without --resume true starts anew, though the folder holds a checkpoint.
    job.run(launcher, "none", 0, 0, "--total_epochs=3")
    assert "resumed from" not in job.log
    assert (job.folder / "run" / "ckpt.old1.pth").exists()
    assert same(job.weights, whole)


@pytest.mark.slow
def test_a_single_rank_is_restarted_and_resumes(job):
    job.run([LAUNCH[0], "--nproc=1", "--max_restarts=1"], "kill", 0, 4, "--total_epochs=2")
    assert job.attempts == 2
    assert "resumed from" in job.log


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_machines_restart_together(job, whole, rank):
    """Two launchers on this machine, with one rank each, play two machines."""
    launcher = [LAUNCH[0], "--nproc=1", "--nnodes=2", "--addr=127.0.0.1", f"--port={free_port()}", "--max_restarts=2"]
    program = ("kill", rank, 4, "--total_epochs=3", "--timeout=60")
    threads = str(max(1, torch.get_num_threads() // 2))  # as `whole`'s
    machines = [job.start([*launcher, f"--node_rank={n}"], *program, OMP_NUM_THREADS=threads) for n in range(2)]
    for machine in machines:
        _, err = machine.communicate(timeout=120)
        assert machine.returncode == 0, err
    assert job.attempts == 2
    assert same(job.weights, whole)


@pytest.mark.slow
def test_another_number_of_ranks_resumes_with_a_warning(job):
    job.run(LAUNCH, "none", 0, 0, "--total_epochs=1")
    one = [LAUNCH[0], "--nproc=1", "--max_restarts=1"]
    job.run(one, "none", 0, 0, "--total_epochs=2", "--resume=true")
    assert "processes 2 -> 1" in job.log
    assert "Ep 2," in job.log
