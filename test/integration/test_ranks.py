"""A rank that dies or hangs ends the whole run in bounded time and is named; restarted ranks resume by themselves."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, PROGRAM_PATH, ROOT, TINY, same

from aligned_reid.launcher import free_port

PROGRAM = Path(__file__).with_name("small_train.py")
LAUNCH = [sys.executable, ROOT / "script" / "launch.py", "--nproc=2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max_restarts=2"]
LAUNCHERS = {
    "launch": [*LAUNCH, "--max_restarts=2"],
    "static": [*TORCHRUN, "--nnodes=1", "--master_port={port}"],
    "c10d": [*TORCHRUN, "--nnodes=1:2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:{port}"],
}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # launchers choose differently, and sums of other threads have other bits
LAUNCHERS["c10d"] += ["--rdzv_conf=last_call_timeout=1"]


class Job:
    """Runs of small_train.py in one folder."""

    def __init__(self, data, folder):
        self.data, self.folder = data, folder

    def start(self, launcher, fault, rank, step, *flags, **environment):
        settings = (f"--data_path={self.data}", *TINY, "--seed=1", "--amp=O0", f"--exp_dir={self.folder / 'run'}")
        program = [PROGRAM, fault, rank, step, self.folder, *settings, "--checkpoint_every_steps=1", *flags]
        options = {"cwd": self.folder, "env": os.environ | PROGRAM_PATH | ONE_THREAD | environment}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(list(map(str, (*launcher, *program))), **options, **pipes)

    def run(self, launcher, *program, status=0):
        return finish(self.start(launcher, *program), status)

    @property
    def attempts(self):
        return len((self.folder / "attempts").read_text())

    @property
    def log(self):
        return (self.folder / "run" / "log.txt").read_text()

    @property
    def weights(self):
        return torch.load(self.folder / "run" / "ckpt.pth", weights_only=True)["model"]


def finish(process, status=0):
    """Standard output and error of a process that ends with `status`."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.terminate()
    assert process.returncode == status, err
    return out, err


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
    epochs = [list(map(float, pair)) for pair in re.findall(r"^Ep \d, (\S+)s, FPS (\S+),", out, flags=re.MULTILINE)]
    images = 2 * 4 * 2  # ranks, identities, images of each
    assert len(epochs) == 3 and all(rate <= images / 0.5 for _, rate in epochs)
    for seconds, rate in epochs[1:]:  # the first leaves out two of its three steps
        assert seconds * rate == pytest.approx(3 * images, rel=0.02)


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
    timeout = 20 if "hang" in fault else 3 * PATIENCE
    _, err = job.run(launcher, fault, 1, 4, "--total_epochs=50", f"--timeout={timeout}", status=status)
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
    job.run([*LAUNCH, "--nproc=1", "--max_restarts=1"], "kill", 0, 4, "--total_epochs=2")
    assert job.attempts == 2
    assert "resumed from" in job.log


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_machines_restart_together(job, whole, rank):
    """Two launchers on this machine, with one rank each, play two machines."""
    program = ("kill", rank, 4, "--total_epochs=3", "--timeout=60")
    environment = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launcher = [*LAUNCH, "--nproc=1", "--max_restarts=2"]
    for machine in [job.start([*launcher, f"--node_rank={n}"], *program, **environment) for n in range(2)]:
        finish(machine)
    assert {path.name for path in (job.folder / "logs").glob("*/*")} == {"train_0.log", "train_1.log"}
    assert job.attempts == 2
    assert same(job.weights, whole)


@pytest.mark.slow
def test_another_number_of_ranks_resumes_with_a_warning(job):
    job.run(LAUNCH, "none", 0, 0, "--total_epochs=1")
    one = [*LAUNCH, "--nproc=1", "--max_restarts=1"]
    job.run(one, "none", 0, 0, "--total_epochs=2", "--resume=true")
    assert "processes 2 -> 1" in job.log
    assert "Ep 2," in job.log


# ---- two machines, played by two network namespaces with a cable between them


def ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no network namespaces here: ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture
def machines():
    """Names of two namespaces, whose interfaces have their names and the addresses 10.77.0.1 and 10.77.0.2."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and `ip` (package iproute2)")
    names = [f"reid{number}p{os.getpid()}"[:15] for number in (1, 2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", name, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.mark.slow
def test_two_machines_train_together_and_resume(machines, tiny_data, tmp_path):
    jobs = [Job(tiny_data, tmp_path / machine) for machine in machines]
    for job in jobs:
        job.folder.mkdir()

    def train(*flags):
        """Run one command per machine, in separate folders; returns what each prints."""
        flags = ("none", 0, 0, "--id_sampling=sharded", "--timeout=60", *flags)
        processes = []
        for rank, (job, machine) in enumerate(zip(jobs, machines, strict=True)):
            node = ("--nproc=1", "--nnodes=2", f"--node_rank={rank}", "--addr=10.77.0.1", "--port=29511")
            launcher = ["ip", "netns", "exec", machine, *LAUNCH, *node]
            processes.append(job.start(launcher, *flags, GLOO_SOCKET_IFNAME=machine))
        return [finish(process)[0] for process in processes]

    first, second = train("--total_epochs=1")
    assert "2 processes" in first and "Ep 1," in first
    assert "Ep 1," in second  # the second machine shows the log of its rank
    # The second machine cannot read the first one's folder; it gets the checkpoint from rank 0.
    assert not (jobs[1].folder / "run" / "ckpt.pth").exists()
    first, _ = train("--total_epochs=2", "--resume=true")
    assert "resumed from" in first and "after epoch 1" in first
    content = torch.load(jobs[0].folder / "run" / "ckpt.pth", weights_only=True)
    assert (content["epoch"], content["made_on"]) == (2, {"num_processes": 2, "device": "cpu"})
