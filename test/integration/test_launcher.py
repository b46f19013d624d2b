"""Launching ranks: exit statuses, the one line about a failure, logs, environment, signals and restarts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import run_script

from aligned_reid.launcher import free_port, launch
from aligned_reid.stop import StopSignals

LAUNCH = Path(__file__).parents[2] / "script" / "launch.py"
MISTAKE = "try: raise ValueError('no such file')\nexcept ValueError: sys.exit(2)\n"


@pytest.fixture
def script(tmp_path):
    """Writes a rank's program and returns its path; RANK is its rank."""

    def write(body):
        path = tmp_path / "program.py"
        path.write_text(
            f"import os, signal, sys, time\nfrom pathlib import Path\nRANK = os.environ.get('RANK')\n{body}\n"
        )
        return str(path)

    return write


@pytest.fixture
def run(script, tmp_path, capfd, monkeypatch):
    """Launches a rank's program from this process, which has imported torch already: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")  # restored afterwards, and so is what launch() sets
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")

    def launch_program(body, num_processes=2, **options):
        with StopSignals():  # restores the handlers that torch's agent replaces
            status = launch([script(body)], num_processes, tmp_path / "logs", **options)
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return launch_program


def read_log(tmp_path, device):
    return (tmp_path / "logs" / str(device) / f"train_{device}.log").read_text()


class TestStatus:
    def test_success(self, run, tmp_path):
        body = "print('to stdout', RANK); print('to stderr', RANK, file=sys.stderr); os.system('echo from a child')"
        assert run(body, first_device=4) == (0, "to stdout 0\n", "")
        for rank in (0, 1):
            lines = [f"to stdout {rank}", f"to stderr {rank}", "from a child"]
            assert read_log(tmp_path, 4 + rank).splitlines() == lines

    @pytest.mark.parametrize("rank", [0, 1])
    @pytest.mark.parametrize(
        ("end", "status", "word"),
        [
            (MISTAKE, 2, "ValueError: no such file"),
            ("raise RuntimeError('out of stripes')", 1, "RuntimeError: out of stripes"),
            ("os.kill(os.getpid(), signal.SIGKILL)", 137, "SIGKILL"),
            ("os._exit(7)", 7, "status 7"),
        ],
    )
    def test_the_failing_rank_gives_the_status_and_one_line(self, run, rank, end, status, word):
        body = f"if RANK == '{rank}':\n    " + end.replace("\n", "\n    ") + "\ntime.sleep(30)"
        found, out, err = run(body)
        assert (found, out) == (status, "")
        assert err.startswith(f"launch.py: error: rank {rank} on {socket.gethostname()} ") and word in err
        assert err.count("\n") == 1

    def test_the_log_has_the_traceback(self, run, tmp_path):
        run("if RANK == '1': raise RuntimeError('out of stripes')\ntime.sleep(30)")
        assert "Traceback (most recent call last)" in read_log(tmp_path, 1)

    @pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", MISTAKE])
    def test_the_cause_is_reported_rather_than_its_victims(self, run, tmp_path, end):
        body = f"gone = Path({str(tmp_path)!r}, 'gone')\nif RANK == '1':\n    gone.touch(); time.sleep(0.2)\n    "
        body += end.replace("\n", "\n    ") + "\nwhile not gone.exists(): time.sleep(0.01)\n"
        status, _, err = run(f"{body}time.sleep(0.2); raise ConnectionError('peer is gone')")
        assert status in (2, 137) and "rank 1" in err

    def test_a_port_in_use(self, run):
        with socket.socket() as listener:
            listener.bind(("", 0))
            listener.listen()
            status, _, err = run("pass", endpoint=f"127.0.0.1:{listener.getsockname()[1]}")
        assert (status, err.count("\n")) == (1, 1) and "could not start" in err


class TestOutput:
    def test_a_former_log_is_replaced(self, run, tmp_path):
        run("print('first')")
        run("print('second')")
        assert read_log(tmp_path, 0) == read_log(tmp_path, 1) == "second\n"

    def test_many_lines_and_no_newline_at_the_end(self, run, tmp_path):
        _, out, _ = run("print('x' * 5000 + '\\n' * 3 + 'y\\n' * 20000 + 'end', end='')")
        assert out == "x" * 5000 + "\n" * 3 + "y\n" * 20000 + "end"
        assert read_log(tmp_path, 0) == read_log(tmp_path, 1) == out

    def test_a_closed_console_does_not_stop_the_run(self, script, tmp_path):
        path = script("print('started'); time.sleep(0.5); print('more'); Path('done').touch()")
        command = [sys.executable, LAUNCH, "--nproc=2", f"--log_dir={tmp_path}/logs", path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
            assert process.stdout.readline() == "started\n"
            process.stdout.close()
            assert process.wait(30) == 0
        assert read_log(tmp_path, 0) == "started\nmore\n" and (tmp_path / "done").exists()

    def test_one_process_has_no_agent_but_a_log(self, script, tmp_path):
        """No rank is inherited from another launcher, and the status is the script's own."""
        body = (
            "print(os.getppid(), os.environ.get('WORLD_SIZE'), RANK)\nprint('to stderr', file=sys.stderr)\nos._exit(9)"
        )
        flags = ("--nproc=1", f"--log_dir={tmp_path}/logs", script(body))
        result = run_script("launch.py", *flags, environment={"WORLD_SIZE": "8", "RANK": "3"})
        assert result == (9, f"{os.getpid()} None None\n", "to stderr\n")
        assert read_log(tmp_path, 0) == result.out + result.err


class TestEnvironment:
    def test_ranks_get_torchruns_variables(self, run, tmp_path, monkeypatch):
        monkeypatch.setenv("KEPT", "yes")
        assert run("import json; print(json.dumps(dict(os.environ)))", num_processes=3)[0] == 0
        ranks = [json.loads(read_log(tmp_path, rank)) for rank in range(3)]
        for rank, variables in enumerate(ranks):
            expected = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
            expected |= {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "KEPT": "yes"}
            expected |= {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 3))}
            assert expected.items() <= variables.items()
        assert len({variables["MASTER_PORT"] for variables in ranks}) == 1

    def test_the_users_number_of_threads_stays(self, run, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
        assert run("print(os.environ['OMP_NUM_THREADS'])")[1] == "5\n"

    def test_the_script_runs_as_python_would_run_it(self, run, tmp_path):
        (tmp_path / "neighbour.py").write_text("here = 'imported'")
        body = "import neighbour; print(__name__, neighbour.here, sys.argv == [__file__])"
        assert run(body)[1] == "__main__ imported True\n"

    @pytest.mark.slow
    def test_two_machines(self, script, tmp_path):
        """Two launchers on this machine, with one rank each, play two machines."""
        path = script("print(RANK, os.environ['WORLD_SIZE'], os.environ['MASTER_PORT'])")
        port = free_port()
        environment = os.environ | {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        flags = ["--nproc=1", f"--log_dir={tmp_path}/logs"]
        machines = [
            subprocess.Popen([sys.executable, LAUNCH, *flags, f"--node_rank={rank}", path], env=environment)
            for rank in (0, 1)
        ]
        assert [machine.wait(60) for machine in machines] == [0, 0]
        assert [read_log(tmp_path, rank) for rank in (0, 1)] == [f"0 2 {port}\n", f"1 2 {port}\n"]


def is_alive(pid):
    """Whether a process runs and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


class TestSignals:
    @pytest.fixture
    def launcher(self, script, tmp_path):
        """Starts two ranks that write their process ids to files: (the launcher's process, the ids)."""

        def start(body, *before):
            path = script(f"Path({str(tmp_path)!r}, RANK + '.pid').write_text(f'{{os.getpid()}} ')\n{body}")
            command = [*before, sys.executable, LAUNCH, "--nproc=2", f"--log_dir={tmp_path}/logs", path]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            files = [tmp_path / f"{rank}.pid" for rank in (0, 1)]
            wait_for(lambda: all(file.exists() and file.read_text().endswith(" ") for file in files))
            return process, [int(file.read_text()) for file in files]

        return start

    @pytest.mark.parametrize(
        ("number", "ranks_get"),
        [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGUSR1, signal.SIGTERM)],
    )
    def test_ranks_get_the_signal_and_time_to_finish(self, launcher, tmp_path, number, ranks_get):
        process, ranks = launcher(
            f"def finish(number, frame): time.sleep(0.5); print('finished', number); sys.exit(3)\n"
            f"signal.signal({int(ranks_get)}, finish)\nprint('ready')\nwhile True: time.sleep(0.05)"
        )
        assert process.stdout.readline() == "ready\n"
        wait_for(lambda: read_log(tmp_path, 1) == "ready\n")
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (128 + number, f"finished {int(ranks_get)}\n")
        assert "Traceback" not in err
        assert read_log(tmp_path, 1) == f"ready\nfinished {int(ranks_get)}\n"
        assert not any(map(is_alive, ranks))

    def test_a_closed_terminal_does_not_end_a_run_under_nohup(self, launcher, tmp_path):
        process, _ = launcher("time.sleep(0.5); print('done')", "nohup")
        process.send_signal(signal.SIGHUP)
        assert (process.wait(30), process.stdout.read(), read_log(tmp_path, 1)) == (0, "done\n", "done\n")

    def test_the_other_ranks_end_with_the_first(self, launcher):
        process, ranks = launcher("if RANK == '0': time.sleep(0.2); sys.exit(5)\nsignal.pause()")
        assert process.wait(30) == 5
        assert not any(map(is_alive, ranks))

    def test_a_killed_launcher_takes_its_ranks_along(self, launcher):
        process, ranks = launcher("signal.pause()")
        process.kill()
        process.wait(30)
        wait_for(lambda: not any(map(is_alive, ranks)))


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "word"),
        [
            ([], "which script"),
            (["--nproc=0", "x.py"], "--nproc"),
            (["--nproc=two", "x.py"], "whole number"),
            (["--processes=2", "x.py"], "--processes"),
            (["--nnodes=2", "--node_rank=2", "x.py"], "--node_rank"),
            (["--nnodes=2", "x.py"], "--addr"),
            (["--nproc=2", "x.py"], "x.py"),
            (["--nproc=2", f"--log_dir={__file__}", __file__], "--log_dir"),
        ],
    )
    def test_mistakes_are_one_line(self, command, monkeypatch, arguments, word):
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        result = command("launch.py", *arguments)
        assert result.status == 2
        assert word in result.err and result.err.count("\n") == 1

    @pytest.mark.parametrize("num_processes", [1, 2])
    def test_train_py_is_checked_before_ranks_start(self, tmp_path, num_processes):
        flags = (f"--nproc={num_processes}", f"--log_dir={tmp_path}/logs")
        result = run_script("launch.py", *flags, LAUNCH.with_name("train.py"), "--data_path=/nowhere", "--device=cpu")
        assert (result.status, result.out) == (2, "")
        assert result.err.startswith("train.py: error: ") and result.err.count("\n") == 1


class TestRestarts:
    COUNT = "count = Path(f'attempts {RANK}'); tried = len(count.read_text()) if count.exists() else 0\n"
    COUNT += "count.write_text('a' * (tried + 1))\n"

    def test_ranks_start_again_after_a_death(self, run):
        body = "signal.signal(15, lambda *_: sys.exit(143))  # as a run ends that the agent stops\n"
        body += "if RANK == '1' and not tried: os.kill(os.getpid(), 9)\nif not tried: time.sleep(30)\n"
        body = f"{self.COUNT}time.sleep(0.5)\n{body}print('attempt', os.environ['TORCHELASTIC_RESTART_COUNT'])"
        status, out, _ = run(body, max_restarts=2)
        assert (status, out.splitlines()[-1]) == (0, "attempt 1")

    @pytest.mark.parametrize(
        ("end", "status", "attempts"),
        [("sys.exit(2)", 2, 1), ("sys.exit(1)", 1, 2), ("os.kill(os.getpid(), 11)", 139, 2)],
    )
    def test_a_mistake_is_not_retried(self, run, tmp_path, end, status, attempts):
        assert run(f"{self.COUNT}if RANK == '1': {end}\ntime.sleep(30)", max_restarts=1)[0] == status
        assert len((tmp_path / "attempts 1").read_text()) == attempts

    def test_one_process_can_be_restarted(self, run):
        body = f"{self.COUNT}print(tried); sys.exit(tried == 0)"
        assert run(body, num_processes=1, max_restarts=1)[:2] == (0, "0\n1\n")
