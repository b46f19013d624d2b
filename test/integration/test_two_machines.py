"""Two machines with one process each, played by two network namespaces with a cable between them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

FAULTY = Path(__file__).with_name("small_train.py")


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


def train(machines, data, folder, *flags):
    """Run one command per machine, in separate folders; returns what each prints."""
    processes = []
    for node_rank, machine in enumerate(machines):
        own = folder / machine
        own.mkdir(exist_ok=True)
        command = ["ip", "netns", "exec", machine, sys.executable, ROOT / "script" / "launch.py", "--nproc=1"]
        command += ["--nnodes=2", f"--node_rank={node_rank}", "--addr=10.77.0.1", "--port=29511"]
        command += [FAULTY, "none", "0", "0", own, f"--data_path={data}", *TINY, "--exp_dir=run", "--amp=O0", *flags]
        options = {"cwd": own, "env": os.environ | {"GLOO_SOCKET_IFNAME": machine}, "text": True}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(list(map(str, command)), **options, **pipes))
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [out for out, _ in outputs]


@pytest.mark.slow
def test_two_machines_train_together_and_resume(machines, tiny_data, tmp_path):
    flags = ("--id_sampling=sharded", "--timeout=60")
    first, second = train(machines, tiny_data, tmp_path, "--total_epochs=1", *flags)
    assert "2 processes" in first and "Ep 1," in first
    assert "Ep 1," in second  # the second machine shows the log of its rank
    # The second machine cannot read the first one's folder; it gets the checkpoint from rank 0.
    assert not (tmp_path / machines[1] / "run" / "ckpt.pth").exists()
    first, _ = train(machines, tiny_data, tmp_path, "--total_epochs=2", "--resume=true", *flags)
    assert "resumed from run/ckpt.pth after epoch 1" in first
    content = torch.load(tmp_path / machines[0] / "run" / "ckpt.pth", weights_only=True)
    assert (content["epoch"], content["made_on"]) == (2, {"num_processes": 2, "device": "cpu"})
