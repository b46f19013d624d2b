"""The wrappers as Ascend's platform calls them, with real training of a small model."""

import json
import os
import re
import signal
import sys

import pytest
import torch
from conftest import PATIENCE, PROGRAM_PATH, ROOT, TINY, assert_refused, write_small_script
from wrapper_case import Case, assert_nothing_happened, final_figures

from aligned_reid.data import make_synthetic

FLAGS = [*TINY, "--total_epochs=1", "--seed=1"]
ON_NPU = [flag for flag in FLAGS if flag != "--device=cpu"]  # npu is the wrappers' default


@pytest.fixture
def real(tmp_path, tiny_data):
    """The wrappers with the project's own scripts, and their logs apart from the project's."""
    case = Case(tmp_path)
    (case.project / "script").mkdir()
    for name in ("launch.py", "train.py"):
        write_small_script(case.project / "script" / name, name)
    case.environment |= PROGRAM_PATH | {"PYTHON": sys.executable}
    case.data = f"--data_path={tiny_data}"
    return case


def train(real, wrapper, name, *options, device=0, **environment):
    """Run a wrapper; its figures, which must agree with the log, and the log."""
    status, out, err = real.run(wrapper, real.data, *options, **environment)
    assert status == 0, err
    log = real.log(device)
    fps = [float(line.split()[4].rstrip(",")) for line in log.splitlines() if "FPS" in line][-5:]
    rank1 = [line.split()[3].split("%")[0] for line in log.splitlines() if "cmc1" in line][-1]
    figures = real.figures(name, device)
    assert final_figures(out) == (figures["ActualFPS"], figures["TrainAccuracy"])
    assert figures["ActualFPS"] == (f"{sum(fps) / len(fps):.2f}" if fps else "")
    assert figures["TrainAccuracy"] == rank1
    losses = [line.split("loss")[1].strip(" ,") for line in log.splitlines() if "Ep" in line]
    assert real.losses(name, device) == losses
    return figures, log


def test_a_training_leaves_its_weights_and_figures(real):
    figures, log = train(real, "train_full_8p.sh", "bs4_2p_acc", *FLAGS, "--nproc=2")
    assert float(figures["ActualFPS"]) > 0 and float(figures["ActualLoss"]) > 0
    assert 0 <= float(figures["TrainAccuracy"]) <= 100
    assert {"ckpt.pth", "results.json"} <= set(os.listdir(real.here))
    assert "2 processes" in log and "FPS" not in real.log(1)


@pytest.mark.parametrize(
    ("wrapper", "options", "variables", "word"),
    [
        ("train_full_8p.sh", ["--data_path=/nowhere", "--nproc=2"], {}, "/nowhere"),
        ("train_full_8p.sh", ["--data_path=~/nowhere", "--nproc=1"], {"HOME": "/usr"}, "/usr/nowhere"),
        ("train_eval_8p.sh", ["--pth_path=~/nowhere", "--nproc=1"], {"HOME": "/usr"}, "/usr/nowhere"),
        ("train_performance_8p.sh", ["--device=npu", "--nproc=2"], {"etp_running_flag": "true"}, "--device npu"),
    ],
)
def test_refused_input_is_one_line_of_train_py(real, wrapper, options, variables, word):
    assert_refused(real.run(wrapper, real.data, *FLAGS, *options, **variables), "train.py: error: ", word)
    assert_nothing_happened(real)
    assert not list(real.here.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not torch.__version__.startswith("2.14"), reason="the simulated NPU is made for torch 2.14")
def test_every_wrapper_on_the_simulated_npu(real, tmp_path):
    """--pth_path=. takes the weight file of a run before, which is kept."""
    path = f"{ROOT}/test/npu_sim:{PROGRAM_PATH['PYTHONPATH']}"
    real.environment |= {"PYTHONPATH": path, "NPU_SIM_REPORT": f"{tmp_path}/report", "etp_running_flag": "true"}

    def run(wrapper, name, *options, devices=(0, 1), **environment):
        figures, log = train(real, wrapper, name, *ON_NPU, *options, device=devices[0], **environment)
        assert figures["RankSize"] == str(len(devices))
        assert "npu (simulated Ascend" in log and "float16" in log
        files = sorted(tmp_path.glob("report.*.json"))
        reports = [json.loads(file.read_text()) for file in files]
        for file in files:
            file.unlink()
        assert [report["device"] for report in reports] == list(devices)
        assert all(report["calls"]["aten::convolution_overrideable"] >= 3 for report in reports)
        return figures

    figures = run("train_performance_8p.sh", "bs4_2p_perf", "--nproc=2")
    assert float(figures["ActualFPS"]) > 0 and float(figures["TrainingTime"]) > 0
    run("train_performance_1p.sh", "bs4_1p_perf", devices=[1], ASCEND_DEVICE_ID="1")
    trained = run("train_full_8p.sh", "bs4_2p_acc", RANK_SIZE="2")
    first = (real.here / "ckpt.pth").read_bytes()
    evaluated = run("train_eval_8p.sh", "bs4_2p_eval", "--nproc=2", "--pth_path=.")
    assert (evaluated["ActualFPS"], evaluated["ActualLoss"]) == ("", "")
    assert evaluated["TrainAccuracy"] == trained["TrainAccuracy"]
    assert (real.here / "ckpt.pth").read_bytes() == first

    other = make_synthetic(tmp_path / "other", num_ids=20, num_cameras=4, images_per_camera=2, seed=2)
    real.data = f"--data_path={other}"
    run("train_finetune_1p.sh", "bs4_1p_finetune", "--pth_path=.", "-idlw=1", devices=[0])
    kept = [file for file in real.here.iterdir() if file.is_file() and file.read_bytes() == first]
    assert len(kept) == 1 and kept[0].name != "ckpt.pth"
    assert (real.here / "ckpt.pth").is_file()


@pytest.mark.slow
def test_stop_a_training_of_two_processes(real):
    process = real.start("train_full_8p.sh", real.data, *FLAGS, "--nproc=2", "--total_epochs=100000")
    while not process.stdout.readline().startswith("Ep 2,"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert final_figures(out) == ("", "")
    stopped = re.search(r"SIGTERM at step (\d+) of epoch (\d+)", err)
    assert stopped, err
    saved = torch.load(real.here / "ckpt.pth", weights_only=True)
    assert (saved["step"], saved["epoch"]) == (int(stopped[1]), int(stopped[2]) - 1)
