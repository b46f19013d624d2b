"""Machines whose NPU cannot be used: every command says why in one line, and `import torch` never crashes."""

import sys

import pytest
import torch
from conftest import ROOT, TINY, assert_refused, run_program, run_script

SIMULATION = {"PYTHONPATH": str(ROOT / "test" / "npu_sim")}
TRAIN = ROOT / "script" / "train.py"
BROKEN = {
    "no CANN": ("raise ImportError('libhccl.so: cannot open shared object file')", "cannot be imported (libhccl.so"),
    "no driver": (
        "import types; npu = types.SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)",
        "torch_npu sees no NPU",
    ),
}


@pytest.fixture(params=BROKEN)
def broken(request, tmp_path):
    """A torch_npu that torch loads by itself and that is of no use, and why: (options, reason)."""
    source, reason = BROKEN[request.param]
    entry = tmp_path / "packages" / "torch_npu-2.14.1.dist-info"
    entry.mkdir(parents=True)
    entry.with_name("torch_npu.py").write_text(f"{source}\ndef _autoload(): ...\n")
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.14.1\n")
    (entry / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return {"environment": {"PYTHONPATH": str(entry.parent)}}, reason


@pytest.fixture
def flags(tiny_data, tmp_path):
    return [f"--data_path={tiny_data}", *TINY, f"--exp_dir={tmp_path / 'run'}", "--total_epochs=1", "--device=npu"]


@pytest.mark.skipif(torch.__version__ < "2.5", reason="torch < 2.5 loads no backend by itself")
def test_the_library_is_imported_where_torch_alone_would_crash(broken):
    options, reason = broken
    alone, ours = (
        run_program(sys.executable, "-c", f"import {names}; print(torch.ones(2).sum().item())", cwd=ROOT, **options)
        for names in ("torch", "aligned_reid.run, torch")
    )
    assert (alone.status != 0) == ("imported" in reason)
    assert ours == (0, "2.0\n", "")


def test_train_says_why(broken, flags, tmp_path):
    options, reason = broken
    done = run_script("train.py", *flags, **options)
    assert_refused(done, "--device npu: ", reason)
    assert done.out == "" and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["no CANN"], indirect=True)
def test_every_other_way_to_start_says_why(broken, flags, tmp_path):
    options, reason = broken
    launch = ("launch.py", "--nproc=2", f"--log_dir={tmp_path}/logs", TRAIN, *flags)
    assert_refused(run_script(*launch, **options), "--device npu: ", reason)

    # torchrun imports torch before the script runs, so the caller has to set the variable.
    environment = options["environment"] | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", TRAIN, *flags)
    done = run_program(*torchrun, environment=environment)
    assert done.status != 0 and reason in done.err

    auto = run_script("train.py", *flags, "--device=auto", **options)
    assert auto.status == 0, auto.err
    assert auto.out.startswith("device cpu ") and f"\nno npu: torch_npu {reason}" in auto.out

    flags = [flag for flag in flags if "exp_dir" not in flag and "device" not in flag]  # npu is the default
    options["environment"] |= {"PYTHON": sys.executable, "etp_running_flag": "true"}
    for wrapper in ("train_performance_1p.sh", "train_full_8p.sh"):
        done = run_program("bash", ROOT / "test" / wrapper, *flags, cwd=tmp_path, **options)
        assert_refused(done, "--device npu: ", reason)
        assert done.out == ""


@pytest.mark.skipif(not torch.__version__.startswith("2.14"), reason="the simulated NPU is made for torch 2.14")
@pytest.mark.parametrize(
    ("variables", "nproc", "words"),
    [
        ({"NPU_SIM_BUSY": "0"}, 1, ["npu:0 cannot be used (", "507033", "npu-smi"]),
        ({"NPU_SIM_DEVICES": "1"}, 2, ["no device npu:1: this machine has 1"]),
        ({"NPU_SIM_DEVICES": "0"}, 1, ["torch_npu sees no NPU"]),
    ],
)
def test_devices_that_are_busy_or_fewer(flags, variables, nproc, words):
    launch = ("launch.py", f"--nproc={nproc}", "--check=only", TRAIN, *flags)
    done = run_script(*launch, environment=SIMULATION | variables)
    assert_refused(done, "train.py: error: ", *words)
    assert done.out == ""


def test_the_docs_have_these_lines():
    section = (ROOT / "docs" / "ascend.md").read_text().split("## When it does not start")[1].split("\n## ")[0]
    reasons = [reason for _, reason in BROKEN.values()]
    for words in (*reasons, "torch_npu is not installed", "no device npu:7: this machine has", "cannot be used ("):
        assert words in section
