"""Starting ranks: their statuses, their one line, their logs, their environment, and their end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from aligned_reid.errors import InputError
from aligned_reid.launcher import HCCL_PORTS, RankOutput, first_failure, free_port, launch, log_file

LAUNCH = Path(__file__).parents[2] / "script" / "launch.py"


@pytest.fixture
def script(tmp_path):
    """Writes a rank's program and returns the command that runs it; RANK is its rank."""

    def write(body):
        path = tmp_path / "rank_program.py"
        path.write_text(
            f"import os, signal, sys, time\nfrom pathlib import Path\nRANK = int(os.environ['RANK'])\n{body}\n"
        )
        return [sys.executable, str(path)]

    return write


@pytest.fixture
def run(script, tmp_path, capfd):
    """Launches a rank's program in this process, which has torch already: (status, stdout, stderr)."""

    def launch_program(body, num_processes=2, **options):
        status = launch(script(body), num_processes, tmp_path / "logs", **options)
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return launch_program


def read_log(tmp_path, device):
    return log_file(tmp_path / "logs", device).read_text()


class TestStatus:
    def test_success(self, run):
        status, out, err = run("print('hello from', RANK)")
        assert (status, out, err) == (0, "hello from 0\n", "")

    def test_input_error_of_rank_0_is_said_once(self, run):
        status, out, err = run(
            "if RANK == 0: print('train.py: error: no such file', file=sys.stderr); sys.exit(2)\ntime.sleep(30)"
        )
        assert (status, out, err) == (2, "", "train.py: error: no such file\n")

    def test_input_error_of_another_rank(self, run):
        status, _, err = run(
            "if RANK == 1: print('train.py: error: no such file', file=sys.stderr); sys.exit(2)\ntime.sleep(30)"
        )
        assert (status, err) == (2, "train.py: error: no such file\n")

    def test_stopped_run(self, run):
        status, _, err = run(
            "if RANK == 1: print('train.py: stopped: the loss is nan', file=sys.stderr); sys.exit(1)\ntime.sleep(30)"
        )
        assert (status, err) == (1, "train.py: stopped: the loss is nan\n")

    @pytest.mark.parametrize("rank", [0, 1])
    def test_crash_is_one_line_and_the_log_has_the_traceback(self, run, tmp_path, rank):
        status, _, err = run(f"if RANK == {rank}: raise RuntimeError('out of stripes')\ntime.sleep(30)")
        assert status == 1
        log = log_file(tmp_path / "logs", rank)
        assert (
            err == f"launch.py: error: rank {rank} on {socket.gethostname()} ended with status 1: "
            f"RuntimeError: out of stripes; its log: {log}\n"
        )
        assert "Traceback (most recent call last)" in log.read_text()

    def test_killed_rank(self, run):
        status, _, err = run("if RANK == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(30)")
        assert status == 128 + signal.SIGKILL
        assert err.startswith(
            f"launch.py: error: rank 1 on {socket.gethostname()} was killed by signal 9 (Killed); its log: "
        )
        assert err.count("\n") == 1

    def test_silent_failure(self, run):
        status, _, err = run("if RANK == 1: os._exit(7)\ntime.sleep(30)")
        assert status == 7
        assert err.startswith(f"launch.py: error: rank 1 on {socket.gethostname()} ended with status 7; its log: ")

    @pytest.mark.skipif(
        not hasattr(SubprocessContext, "_capture_process_failures"),
        reason="this torch's agent does not tell how the ranks that it stopped ended",
    )
    def test_the_cause_counts_not_its_victims(self, run, tmp_path):
        """Rank 1 fails and takes long to end; rank 0 fails because of it and ends at once."""
        told = tmp_path / "told"
        status, _, err = run(
            f"told = Path({str(told)!r})\n"
            "if RANK == 1:\n"
            "    print('train.py: error: bad image', file=sys.stderr, flush=True)\n"
            "    signal.signal(signal.SIGTERM, signal.SIG_IGN); told.touch(); time.sleep(1); sys.exit(2)\n"
            "while not told.exists(): time.sleep(0.01)\n"
            "raise ConnectionError('peer is gone')"
        )
        assert (status, err) == (2, "train.py: error: bad image\n")

    def test_missing_program(self, tmp_path, capfd):
        assert launch([str(tmp_path / "nothing")], 2, tmp_path / "logs") == 1
        err = capfd.readouterr().err
        assert "FileNotFoundError" in err and err.count("\n") == 1

    def test_log_dir_that_cannot_be_made(self, tmp_path):
        (tmp_path / "logs").write_text("a file")
        with pytest.raises(InputError, match="--log_dir"):
            launch(["true"], 2, tmp_path / "logs")


class TestFirstFailure:
    """Who failed first, from what the agent saw and when each rank complained."""

    @pytest.fixture
    def outputs(self, tmp_path):
        return [RankOutput(log_file(tmp_path, device), on_console=False) for device in range(3)]

    def test_seen_first_without_words(self, outputs):
        outputs[0].complained_at = 1.0
        assert first_failure({2: -9, 0: 1}, outputs) == (2, -9)

    def test_who_complained_first(self, outputs):
        outputs[0].complained_at, outputs[1].complained_at = 2.0, 1.0
        assert first_failure({0: 1, 1: 2}, outputs) == (1, 2)

    def test_stopped_by_the_agent_is_out(self, outputs):
        outputs[0].complained_at, outputs[1].complained_at = 2.0, 1.0
        assert first_failure({0: 1, 1: -signal.SIGTERM}, outputs) == (0, 1)

    def test_all_stopped(self, outputs):
        outputs[1].complained_at = 1.0
        assert first_failure({1: -signal.SIGTERM}, outputs) == (1, -signal.SIGTERM)


class TestOutput:
    def test_one_whole_log_for_each_rank(self, run, tmp_path):
        _, out, err = run("print('to stdout', RANK); print('to stderr', RANK, file=sys.stderr)", first_device=4)
        assert (out, err) == ("to stdout 0\n", "to stderr 0\n")
        for rank in (0, 1):
            assert sorted(read_log(tmp_path, 4 + rank).splitlines()) == [f"to stderr {rank}", f"to stdout {rank}"]

    def test_a_former_log_is_replaced(self, run, tmp_path):
        run("print('first')")
        run("print('second')")
        assert read_log(tmp_path, 1) == "second\n"

    def test_many_lines_and_no_newline_at_the_end(self, run, tmp_path):
        _, out, _ = run("print('x' * 5000 + '\\n' * 3 + 'y\\n' * 20000 + 'end', end='')")
        assert out == "x" * 5000 + "\n" * 3 + "y\n" * 20000 + "end\n"
        assert read_log(tmp_path, 1) == out

    def test_lines_come_while_the_ranks_run(self, script, tmp_path):
        command = [sys.executable, str(LAUNCH), "--nproc=2", f"--log_dir={tmp_path}/logs"]
        body = "print('started'); signal.pause()"
        with subprocess.Popen(command + script(body)[1:], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "started\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 143


class TestEnvironment:
    def test_of_ranks(self, run, tmp_path, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
        monkeypatch.setenv("KEPT", "yes")
        status, _, err = run("import json; print(json.dumps(dict(os.environ)))", num_processes=3)
        assert (status, err) == (0, "")
        ranks = [json.loads(read_log(tmp_path, rank)) for rank in range(3)]
        for rank, variables in enumerate(ranks):
            expected = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
            expected |= {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONUNBUFFERED": "1", "KEPT": "yes"}
            assert expected.items() <= variables.items()
            assert variables["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 3))
        assert len({variables["MASTER_PORT"] for variables in ranks}) == 1

    def test_threads_of_the_user(self, run, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
        assert run("print(os.environ['OMP_NUM_THREADS'])")[1] == "5\n"

    def test_free_port_is_none_of_hccls(self, monkeypatch):
        ports = iter([60000, 60031, 60032])
        monkeypatch.setattr("aligned_reid.launcher.socket.socket", lambda: FakeSocket(next(ports)))
        assert free_port() == 60032
        assert len(HCCL_PORTS) == 32

    def test_port_in_use(self, run):
        with socket.socket() as listener:
            listener.bind(("", 0))
            listener.listen()
            status, _, err = run("pass", port=listener.getsockname()[1])
        assert status == 1
        assert err.splitlines()[-1].startswith("launch.py: error: the ranks could not start: ")
        assert "Traceback" not in err

    def test_ranks_can_talk(self, run):
        status, out, err = run(
            "import torch, torch.distributed as dist\n"
            "dist.init_process_group('gloo')\n"
            "value = torch.tensor(RANK + 1.0); dist.all_reduce(value); print(value.item())\n"
            "dist.destroy_process_group()"
        )
        assert (status, out) == (0, "3.0\n"), err

    @pytest.mark.slow
    def test_two_machines(self, script, tmp_path):
        """Two launchers on this machine, one rank each, play two machines."""
        command = script("print(RANK, os.environ['WORLD_SIZE'], os.environ['MASTER_PORT'])")
        port = free_port()
        environment = os.environ | {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        machines = [
            subprocess.Popen(
                [
                    sys.executable,
                    str(LAUNCH),
                    "--nproc=1",
                    f"--node_rank={rank}",
                    f"--log_dir={tmp_path}/logs",
                    command[1],
                ],
                env=environment,
            )
            for rank in (0, 1)
        ]
        assert [machine.wait(60) for machine in machines] == [0, 0]
        assert [read_log(tmp_path, rank) for rank in (0, 1)] == [f"0 2 {port}\n", f"1 2 {port}\n"]


class FakeSocket:
    def __init__(self, port):
        self.port = port

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def bind(self, _):
        pass

    def getsockname(self):
        return "", self.port


def is_alive(pid):
    """Whether a process runs; one that is dead and only not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


class TestEnd:
    """Signals are passed on, and nothing stays behind."""

    @pytest.fixture
    def launcher(self, script, tmp_path):
        """Starts two ranks that tell their process ids in files: (launcher's process, the ids)."""

        def start(body):
            command = script(f"Path({str(tmp_path)!r}, f'{{RANK}}.pid').write_text(f'{{os.getpid()}} ')\n{body}")
            launcher = subprocess.Popen(
                [sys.executable, str(LAUNCH), "--nproc=2", f"--log_dir={tmp_path}/logs", command[1]],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            files = [tmp_path / f"{rank}.pid" for rank in (0, 1)]
            wait_for(lambda: all(file.exists() and file.read_text().endswith(" ") for file in files))
            return launcher, [int(file.read_text()) for file in files]

        return start

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_ranks_get_the_signal_and_time_to_finish(self, launcher, tmp_path, number):
        process, ranks = launcher(
            f"def finish(number, frame): time.sleep(0.5); print('finished', number); sys.exit(3)\n"
            f"signal.signal({int(number)}, finish)\n"
            "print('ready')\n"
            "while True: time.sleep(0.05)"
        )
        assert process.stdout.readline() == "ready\n"
        wait_for(lambda: read_log(tmp_path, 1) == "ready\n")
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 128 + number
        assert (out, err) == (f"finished {int(number)}\n", "")
        assert read_log(tmp_path, 1) == f"ready\nfinished {int(number)}\n"
        assert not any(map(is_alive, ranks))

    def test_under_nohup(self, script, tmp_path):
        """A terminal that closes does not end the run."""
        command = script("print('started'); time.sleep(0.5); print('done')")
        command[1:1] = [str(LAUNCH), "--nproc=2", f"--log_dir={tmp_path}/logs"]
        with subprocess.Popen(
            ["nohup", *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout.readline() == "started\n"
            process.send_signal(signal.SIGHUP)
            assert process.stdout.read() == "done\n"
            assert process.wait(30) == 0

    def test_the_others_end_with_the_first(self, launcher):
        process, ranks = launcher("if RANK == 0: time.sleep(0.2); sys.exit(5)\nsignal.pause()")
        assert process.wait(30) == 5
        assert not any(map(is_alive, ranks))

    def test_a_killed_launcher_takes_its_ranks_along(self, launcher):
        process, ranks = launcher("signal.pause()")
        process.kill()
        process.wait(30)
        wait_for(lambda: not any(map(is_alive, ranks)))

    def test_children_that_a_rank_left_behind(self, launcher, tmp_path):
        process, _ = launcher(
            "import subprocess\n"
            "child = subprocess.Popen(['sleep', '60'])\n"
            f"Path({str(tmp_path)!r}, f'{{RANK}}.child').write_text(str(child.pid))\n"
            f"while len(list(Path({str(tmp_path)!r}).glob('*.child'))) < 2: time.sleep(0.01)\n"
            "os.kill(os.getpid(), signal.SIGKILL)"
        )
        assert process.wait(30) == 128 + signal.SIGKILL
        children = [int(file.read_text()) for file in tmp_path.glob("*.child")]
        wait_for(lambda: not any(map(is_alive, children)))


class TestScreen:
    def run(self, *arguments, **environment):
        return subprocess.run(
            [sys.executable, str(LAUNCH), *map(str, arguments)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def test_one_process_is_the_command_itself(self, tmp_path):
        """No rank of another launcher is inherited, no log is written, any end is the command's own."""
        path = tmp_path / "program.py"
        path.write_text(
            "import os\nprint(os.getppid(), os.environ.get('WORLD_SIZE'), os.environ.get('RANK'))\nos._exit(9)"
        )
        result = self.run("--nproc=1", f"--log_dir={tmp_path}/logs", path, WORLD_SIZE="8", RANK="3")
        assert (result.returncode, result.stdout, result.stderr) == (9, f"{os.getpid()} None None\n", "")
        assert not (tmp_path / "logs").exists()

    @pytest.mark.parametrize(
        "arguments, says",
        [
            ([], "which script"),
            (["--nproc=0", "x.py"], "--nproc is at least 1"),
            (["--nproc=two", "x.py"], "is not a whole number"),
            (["--processes=2", "x.py"], "unknown flag --processes"),
            (["--nnodes=2", "--node_rank=2", "x.py"], "--node_rank counts from 0"),
            (["--nnodes=2", "x.py"], "--addr"),
            (["--nproc=2", "x.py"], "there is no script x.py"),
        ],
    )
    def test_mistakes(self, arguments, says):
        result = self.run(*arguments, MASTER_ADDR="", PET_MASTER_ADDR="")
        assert result.returncode == 2
        assert says in result.stderr and result.stderr.count("\n") == 1

    @pytest.mark.parametrize("num_processes", [1, 2])
    def test_train_py_is_checked_before_ranks_start(self, tmp_path, num_processes):
        train = LAUNCH.with_name("train.py")
        log_dir = tmp_path / "logs"
        result = self.run(
            f"--nproc={num_processes}", f"--log_dir={log_dir}", train, "--data_path=/nowhere", "--device=cpu"
        )
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("train.py: error: ") and result.stderr.count("\n") == 1
        assert not log_dir.exists()


class TestRestarts:
    COUNTS = "attempts = Path('attempts'); tried = len(attempts.read_text()) if attempts.exists() else 0\n"
    COUNTS += "if RANK == 1: attempts.write_text('a' * (tried + 1))\n"

    def test_ranks_start_again_after_a_death(self, run, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        body = "time.sleep(0.5)\nif RANK == 1 and tried == 0: print('step 7', flush=True); os.kill(os.getpid(), 9)\n"
        body = self.COUNTS + body + "print('attempt', os.environ['TORCHELASTIC_RESTART_COUNT'], flush=True)"
        status, out, err = run(body, max_restarts=2)
        assert (status, out.splitlines()[-1]) == (0, "attempt 1")
        first, second = err.splitlines()
        host = socket.gethostname()
        assert first.startswith(
            f"launch.py: error: rank 1 on {host} was killed by signal 9 (Killed); its last line: step 7;"
        )
        assert second == "launch.py: restart 1 of 2"
        assert "attempt 1" in read_log(tmp_path, 1)

    @pytest.mark.parametrize(
        ("end", "status", "attempts"),
        [("sys.exit(2)", 2, 1), ("sys.exit(3)", 3, 1), ("sys.exit(143)", 143, 1), ("os.kill(os.getpid(), 15)", 143, 1),
         ("sys.exit(1)", 1, 2), ("os.kill(os.getpid(), 11)", 139, 2)],
    )  # fmt: skip
    def test_what_is_final_is_not_tried_again(self, run, tmp_path, monkeypatch, end, status, attempts):
        monkeypatch.chdir(tmp_path)
        assert run(f"{self.COUNTS}if RANK == 1: {end}\ntime.sleep(30)", max_restarts=1)[0] == status
        assert len((tmp_path / "attempts").read_text()) == attempts

    def test_one_process_can_be_restarted(self, run, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        body = self.COUNTS.replace("RANK == 1", "True") + "print(tried); sys.exit(tried == 0)"
        assert run(body, num_processes=1, max_restarts=1)[:2] == (0, "0\n1\n")

    def test_a_hang_that_the_rank_itself_has_seen(self, run, tmp_path):
        body = "import faulthandler\nprint('Ep 1', flush=True)\n"
        body += "if RANK == 1: faulthandler.dump_traceback_later(0.5, exit=True)\ntime.sleep(30)"
        status, _, err = run(body)
        assert status == 1
        assert err == (
            f"launch.py: error: rank 1 on {socket.gethostname()} hung: its step was not done after 0:00:00.500000; "
            f"its last line: Ep 1; its log: {log_file(tmp_path / 'logs', 1)}\n"
        )
        assert "most recent call first" in read_log(tmp_path, 1)

    def test_who_did_not_answer_is_shown_with_its_last_line(self, run, tmp_path):
        waits = "train.py: stopped: no sign of life from rank 1 on here: rank 0 on here waited 4 s (--timeout)"
        body = "print('Ep', RANK, flush=True)\n"
        body += f"if RANK == 0: time.sleep(0.5); print({waits!r}, file=sys.stderr); sys.exit(1)\ntime.sleep(30)"
        status, _, err = run(body)
        log = log_file(tmp_path / "logs", 1)
        assert (status, err) == (1, f"{waits}\nlaunch.py: rank 1 hung; its last line: Ep 1; its log: {log}\n")
