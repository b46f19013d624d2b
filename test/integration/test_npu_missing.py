"""Machines whose NPU cannot be used: one line that says why, from every command, and never a crash of `import torch`.

Each case has a fake torch_npu that torch would load automatically and that fails to load, as it does without CANN.
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, run_script

SIMULATION = ROOT / "test" / "npu_sim"
BROKEN = {
    "no CANN": (
        "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')",
        "torch_npu cannot be imported (libhccl.so: cannot open shared object file: No such file or directory): "
        "is CANN's set_env.sh sourced, and does its version fit torch's?",
    ),
    "another torch": (
        "raise ImportError('libtorch_npu.so: undefined symbol: _ZN3c1011StorageImplD0Ev')",
        "torch_npu cannot be imported (libtorch_npu.so: undefined symbol: _ZN3c1011StorageImplD0Ev): "
        "is CANN's set_env.sh sourced, and does its version fit torch's?",
    ),
    "no driver": (
        "import types; npu = types.SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)",
        "torch_npu sees no NPU (see `npu-smi info`: driver, permissions, ASCEND_RT_VISIBLE_DEVICES)",
    ),
}
IN_DOCS = ("torch_npu is not installed", "torch_npu cannot be imported (libhccl.so", "torch_npu sees no NPU")


@pytest.fixture(params=BROKEN)
def broken(request, tmp_path):
    """The environment of a machine with a torch_npu that is of no use, and the reason that is to be given."""
    source, reason = BROKEN[request.param]
    packages = tmp_path / "packages"
    (packages / "torch_npu").mkdir(parents=True)
    (packages / "torch_npu" / "__init__.py").write_text(f"{source}\ndef _autoload(): ...\n")
    entry = packages / "torch_npu-2.14.1.dist-info"
    entry.mkdir()
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.14.1\n")
    (entry / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return {"PYTHONPATH": str(packages)}, reason


def python(*arguments, cwd=None, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**inherited, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_one_line(done, reason):
    assert done.returncode == 2
    assert done.stderr == f"train.py: error: --device npu: {reason}; use --device auto, or cpu\n"
    assert done.stdout == ""


@pytest.mark.skipif(torch.__version__ < "2.5", reason="torch < 2.5 loads no backend by itself")
def test_torch_alone_would_crash(broken):
    """What the cases below guard against is real: torch >= 2.5 loads torch_npu by itself."""
    environment, reason = broken
    done = python("-c", "import torch", **environment)
    assert (done.returncode != 0) == ("cannot be imported" in reason)


def test_the_library_is_imported(broken):
    done = python("-c", "import aligned_reid.run, torch; print(torch.ones(2).sum().item())", cwd=ROOT, **broken[0])
    assert (done.returncode, done.stdout, done.stderr) == (0, "2.0\n", "")


def test_train_says_why(broken, tiny_data, tmp_path):
    environment, reason = broken
    flags = [f"--data_path={tiny_data}", *TINY, f"--exp_dir={tmp_path / 'run'}"]
    assert_one_line(python(ROOT / "script" / "train.py", *flags, "--device=npu", **environment), reason)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["no CANN"], indirect=True)
def test_every_other_way_to_start_says_why(broken, tiny_data, tmp_path):
    environment, reason = broken
    flags = [f"--data_path={tiny_data}", *TINY, f"--exp_dir={tmp_path / 'run'}", "--total_epochs=1"]
    train = [ROOT / "script" / "train.py", *flags, "--device=npu"]
    launched = python(ROOT / "script" / "launch.py", "--nproc=2", f"--log_dir={tmp_path}/logs", *train, **environment)
    assert launched.returncode == 2
    assert f"--device npu: {reason}" in launched.stderr and launched.stderr.count("\n") == 1

    options = (f"--data_path={tiny_data}", "--ids_per_batch=4", "--pretrained=none", "--resize_h_w=64,32")
    for wrapper in ("train_performance_1p.sh", "train_full_8p.sh"):
        done = subprocess.run(
            ["bash", ROOT / "test" / wrapper, *options],
            env={**os.environ, **environment, "PYTHON": sys.executable, "etp_running_flag": "true"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert_one_line(done, reason)

    # torchrun imports torch before the script runs, so the caller has to set the variable.
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", *train)
    done = python(*torchrun, TORCH_DEVICE_BACKEND_AUTOLOAD="0", **environment)
    assert done.returncode != 0
    assert f"train.py: error: --device npu: {reason}" in done.stderr

    auto = python(ROOT / "script" / "train.py", *flags, "--device=auto", **environment)
    assert auto.returncode == 0, auto.stderr
    assert f"\nno npu: {reason}; no cuda: " in auto.stdout
    assert auto.stdout.startswith("device cpu ")


@pytest.mark.skipif(not torch.__version__.startswith("2.14"), reason="the simulated NPU is made for torch 2.14")
@pytest.mark.parametrize(
    ("variables", "nproc", "line"),
    [
        (
            {"NPU_SIM_BUSY": "0"},
            1,
            "device npu:0 cannot be used (aclrtSetDevice failed for device 0: error code 507033): another process may "
            "hold it; see `npu-smi info` or `nvidia-smi`, or choose another with --npu",
        ),
        ({"NPU_SIM_DEVICES": "1"}, 2, "no device npu:1: this machine has 1, numbered from 0"),
        (
            {"NPU_SIM_DEVICES": "0"},
            1,
            "--device npu: torch_npu sees no NPU (see `npu-smi info`: driver, permissions, "
            "ASCEND_RT_VISIBLE_DEVICES); use --device auto, or cpu",
        ),
    ],
)
def test_devices_that_are_busy_or_fewer(tiny_data, tmp_path, variables, nproc, line):
    flags = [f"--data_path={tiny_data}", *TINY, f"--exp_dir={tmp_path / 'run'}", "--device=npu"]
    command = ["launch.py", f"--nproc={nproc}", "--check=only", ROOT / "script" / "train.py", *flags]
    done = run_script(*command, environment={"PYTHONPATH": str(SIMULATION), **variables})
    assert (done.status, done.out, done.err) == (2, "", f"train.py: error: {line}\n")


def test_the_docs_have_these_lines():
    section = (ROOT / "docs" / "ascend.md").read_text().split("## When it does not start")[1].split("\n## ")[0]
    for line in (*IN_DOCS, "no device npu:7: this machine has", "cannot be used ("):
        assert line in section
