"""Training, evaluation and resuming on the simulated NPU of test/npu_sim, each command in its own process.

Every run leaves a report of the operators that the device ran, so that a silent fallback to the CPU fails the test.
"""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import PROGRAM_PATH, ROOT, TINY, Finished, run_script, same

from aligned_reid.config import Config
from aligned_reid.model import AlignedReID
from aligned_reid.weights import write_safetensors

SMALL_TRAIN = Path(__file__).with_name("small_train.py")
SIMULATION = ROOT / "test" / "npu_sim"
TORCH = "2.14"  # the simulation uses its private interfaces
pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith(TORCH), reason=f"the simulated NPU needs torch {TORCH}"
)
SMALL = (*TINY, "--seed=1", "-llw=1", "-idlw=1")
# What a step copies to the host: whether a gradient overflowed, and the loss scale.
TO_HOST = re.compile(r"_local_scalar_dense|_copy_from\[npu to cpu\]")
SCALE_IN_FLOAT64 = {"aten::_copy_from[float64]", "aten::reciprocal[float64]"}  # one number, in torch's scaler
WAITS = re.compile(r"nonzero|masked_select|unique|aten::index$|index_put")  # shapes that depend on values


ENVIRONMENT = {"PYTHONPATH": f"{SIMULATION}:{PROGRAM_PATH['PYTHONPATH']}", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


class Run(NamedTuple):
    finished: Finished
    losses: list[str]
    results: dict
    folder: Path
    reports: list[dict]  # one a rank


@pytest.fixture
def train(tiny_data, tmp_path):
    """Train as `nproc` processes, with a small trunk unless another program is given, and read the results."""

    def run(name, *flags, nproc=1, device="npu", program=(SMALL_TRAIN, "none", 0, 0, tmp_path), **variables):
        folder, report = tmp_path / name, tmp_path / f"report_{name}"
        flags = (f"--data_path={tiny_data}", *SMALL, f"--device={device}", f"--exp_dir={folder}", *flags)
        environment = {**ENVIRONMENT, "NPU_SIM_REPORT": str(report), **variables}
        if nproc > 1:
            program = ("launch.py", f"--nproc={nproc}", f"--log_dir={tmp_path}/logs", *program)
        finished = run_script(*program, *flags, environment=environment)
        assert finished.status == 0, finished.err + finished.out
        losses = re.findall(r"^Ep .*loss (\S+)$", finished.out, flags=re.MULTILINE)
        results = json.loads((folder / "results.json").read_text())
        reports = [json.loads(path.read_text()) for path in sorted(tmp_path.glob(f"{report.name}.*.json"))]
        if device == "npu":
            assert len(reports) == nproc
            assert all(one["jit_compile"] is False for one in reports)
            assert all(one["calls"]["aten::convolution_overrideable"] >= 3 for one in reports)
        return Run(finished, losses, results, folder, reports)

    return run


def scores_of(results):
    return {name: value for name, value in results.items() if name.startswith(("global", "local"))}


def step_on_device(run):
    """The operators of a step in mid-epoch, which must not wait for the device. Checkpoints come between epochs."""
    step = run.reports[0]["steps"][4]
    assert not [name for name in step if WAITS.search(name)]
    assert sum(count for name, count in step.items() if TO_HOST.search(name)) <= 2, step
    return step


def test_float32_equals_the_cpu_and_the_step_stays_on_the_device(train):
    npu = train("npu", "--amp=O0", "--total_epochs=2")
    cpu = train("cpu", "--amp=O0", "--total_epochs=2", device="cpu")
    assert npu.losses == cpu.losses
    assert scores_of(npu.results) == scores_of(cpu.results)
    # Checkpoints are interchangeable between devices.
    ours, theirs = (torch.load(run.folder / "ckpt.pth", weights_only=True) for run in (npu, cpu))
    assert same(ours["model"], theirs["model"])
    assert npu.reports[0]["hf32"] == {"conv": False, "matmul": False}
    assert npu.reports[0]["calls"]["optim::NpuFusedAdam"] == 6
    step = step_on_device(npu)
    assert step["aten::convolution_backward_overrideable"] == 3
    assert {name for name in step if "float64" in name} <= SCALE_IN_FLOAT64

    tested = train("npu_of_cpu", "--only_test=true", f"--model_weight_file={cpu.folder}", "--amp=O0")
    assert scores_of(tested.results) == scores_of(cpu.results)
    calls = tested.reports[0]["calls"]
    assert calls["aten::addmm"] == 3  # global distances of queries and gallery, and within each
    assert calls["aten::baddbmm"] == 3  # aligned distances of queries and gallery, and within each
    assert calls["aten::minimum"] >= 2 * calls["aten::baddbmm"]  # the cheapest path, by diagonals
    assert calls["aten::mm"] == 3  # products for re-ranking: tiles of queries and gallery
    assert not [name for name in calls if "float64" in name]


def test_photos_are_compared_and_searched_on_the_device(tiny_data, tmp_path):
    torch.manual_seed(0)
    model, settings = AlignedReID(None, pretrained="none"), Config.of(resize_h_w=(64, 32), l_loss_weight=1.0)
    write_safetensors(tmp_path / "model.safetensors", model.state_dict(), settings.to_dict())
    photos = [shutil.copy(path, tmp_path) for path in sorted((tiny_data / "images").iterdir())[:6]]
    shutil.copy(photos[0], tmp_path / "copy.jpg")

    def use(name, *arguments, device):
        environment = {**ENVIRONMENT, "NPU_SIM_REPORT": str(tmp_path / name)}
        flags = ("--model", tmp_path / "model.safetensors", "--device", device, "--json")
        return run_script(ROOT / "aligned_reid" / "__main__.py", name, *arguments, *flags, environment=environment)

    npu, cpu = (json.loads(use("compare", *photos[:2], device=device).out) for device in ("npu:1", "cpu"))
    assert npu["distance"] == pytest.approx(cpu["distance"], rel=0.05)
    assert npu["local_distance"] == pytest.approx(cpu["local_distance"], rel=0.05)
    (found,) = json.loads(use("search", photos[0], "--gallery", tmp_path, device="npu").out)["queries"]
    assert len(found["hits"]) == 6 and Path(found["hits"][0]["path"]).name == "copy.jpg"
    for name, device in (("compare", 1), ("search", 0)):
        (report,) = (json.loads(path.read_text()) for path in tmp_path.glob(f"{name}.*.json"))
        assert report["device"] == device and report["calls"]["aten::convolution_overrideable"] > 50


def operators_in(text):
    """The names in 'name calls, name calls, ...'."""
    return {one.rsplit(maxsplit=1)[0] for one in " ".join(text.split()).split(", ")}


@pytest.mark.parametrize("amp", ["O1", "apex"])
def test_mixed_precision(train, amp, tmp_path):
    program = {"program": ["train.py"]} if amp == "O1" else {}  # ResNet-50, whose operators the docs list
    run = train(amp, f"--amp={amp}", "--total_epochs=2", **program)
    if amp == "O1":
        section = (ROOT / "docs" / "ascend.md").read_text().split("## The operators of a step")[1].split("\n\n")
        listed = next(part for part in section if part.startswith("    "))
        done = run_script(SIMULATION / "operators_of_step.py", tmp_path / f"report_{amp}.0.json")
        assert operators_in(done.out) == operators_in(listed)
        assert {name for name in run.reports[0]["steps"][4] if "float64" in name} == SCALE_IN_FLOAT64
    assert float(run.losses[-1]) < float(run.losses[0])
    assert f"float16{' by apex' if amp == 'apex' else ''}" in run.results["device"]
    saved = torch.load(run.folder / "ckpt.pth", weights_only=True)
    assert saved["scaler"]["scale"] == 128.0
    if amp == "apex":
        assert run.reports[0]["apex"] == {"opt_level": "O1", "loss_scale": 128.0, "combine_grad": True}


@pytest.mark.slow
def test_modes_reach_the_device_and_the_log(train):
    flags = ("--amp=tf32", "--deterministic=true", "--compile=true", "--profile=1", "--total_epochs=2")
    run = train("modes", *flags, NPU_SIM_COMPILER="1")
    assert "float32, HF32 convolutions, deterministic, compiled by npu, torch" in run.results["device"]
    (report,) = run.reports
    assert report["hf32"] == {"conv": True, "matmul": False}
    assert report["compiled_nodes"] > 40  # the model for training, and folded for features
    assert run.results["profile"]["flops_per_step"] > 1e6
    assert [path.name for path in (run.folder / "profile").iterdir()] == ["simulated_ascend_pt.json"]
    assert run.losses == train("plain", "--amp=O0", "--total_epochs=2", device="cpu").losses


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("npu", "npu"), ("npu", "cpu"), ("cpu", "npu")])
def test_a_run_resumes_on_either_device(train, first, second):
    whole = train("whole", "--amp=O0", "--total_epochs=2", device="cpu")
    train("part", "--amp=O0", "--total_epochs=1", device=first)
    rest = train("part", "--amp=O0", "--total_epochs=2", "--resume=true", device=second)
    assert rest.losses == whole.losses[1:]


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["O1", "apex"])
def test_an_overflow_skips_the_step_and_is_logged(train, amp):
    static = train("static", f"--amp={amp}", "--loss_scale=1e9", "--total_epochs=1")
    assert static.finished.out.count("a gradient is not finite, step skipped (loss scale 1e+09)") == 3
    dynamic = train("dynamic", f"--amp={amp}", "--loss_scale=dynamic", "--total_epochs=1")
    scale = torch.load(dynamic.folder / "ckpt.pth", weights_only=True)["scaler"]["scale"]
    skipped = dynamic.finished.out.count("step skipped")
    assert scale == 2.0 ** (16 - skipped)


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["O0", "O1", "apex"])
def test_two_devices(train, amp):
    run = train("two", f"--amp={amp}", "--total_epochs=2", nproc=2)
    assert [report["device"] for report in run.reports] == [0, 1]
    for report in run.reports:
        assert report["calls"]["hccl::allreduce"] > 6
        assert report["calls"]["hccl::allgather"] >= 2  # the features: hccl has no gather
    assert float(run.losses[-1]) < float(run.losses[0])
    if amp == "O0":
        cpu = train("cpu", "--amp=O0", "--total_epochs=2", nproc=2, device="cpu")
        assert run.losses == cpu.losses
        assert scores_of(run.results) == scores_of(cpu.results)


@pytest.mark.slow
def test_models_on_a_device_each_equal_models_on_one(train):
    flags = ("--num_models=2", "-gdmlw=1", "-pmlw=0.5", "--amp=O0", "--total_epochs=1")
    apart = train("apart", *flags, "--npu=0,1")
    together = train("together", *flags, device="cpu")
    assert apart.losses == together.losses
    for one, other in zip(apart.results["models"], together.results["models"], strict=True):
        assert scores_of(one) == scores_of(other)


@pytest.mark.slow
def test_the_strong_recipe_stays_on_the_device(train):
    tricks = ("--recipe=strong", "--last_stride=2", "--pooling=gem", "--center_loss_weight=5e-4", "--warmup_epochs=1")
    flags = (*tricks, "--amp=O0", "--total_epochs=2")
    npu, cpu = train("npu", *flags), train("cpu", *flags, device="cpu")
    assert [float(loss) for loss in npu.losses] == pytest.approx([float(loss) for loss in cpu.losses], rel=1e-3)
    step_on_device(npu)
