"""Launching ranks: exit statuses, the one line about a failure, logs, environment, signals and restarts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import PATIENCE, ROOT, assert_refused, is_alive, run_program, run_script, wait_for

from aligned_reid.launcher import launch
from aligned_reid.stop import StopSignals

LAUNCH = ROOT / "script" / "launch.py"
IMPORTS = "import os, signal, sys, time\nfrom pathlib import Path\nRANK = os.environ.get('RANK')\n"
MISTAKE = "try: raise ValueError('no such file')\nexcept ValueError: sys.exit(2)\n"
COUNT = "count = Path(f'attempts {RANK}'); tried = len(count.read_text()) if count.exists() else 0\n"
COUNT += "count.write_text('a' * (tried + 1))\n"
KILL = "os.kill(os.getpid(), signal.SIGKILL)\n"


def until(name):
    """A statement that waits for a file in the current folder."""
    return f"while not Path({name!r}).exists(): time.sleep(0.01)\n"


@pytest.fixture
def script(tmp_path):
    """Writes a rank's program and returns its path; RANK is its rank."""

    def write(body):
        path = tmp_path / "program.py"
        path.write_text(f"{IMPORTS}{body}\n")
        return str(path)

    return write


@pytest.fixture
def run(script, tmp_path, capfd, monkeypatch):
    """Launches a rank's program from this process, which has imported torch already: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")  # restored afterwards, and so is what launch() sets

    def launch_program(body, num_processes=2, **options):
        with StopSignals():  # restores the handlers that torch's agent replaces
            status = launch([script(body)], num_processes, tmp_path / "logs", **options)
        return status, *capfd.readouterr()

    return launch_program


def read_log(tmp_path, device):
    return (tmp_path / "logs" / str(device) / f"train_{device}.log").read_text()


def in_rank(rank, statements):
    """A program that runs `statements` in one rank; the other waits."""
    return f"if RANK == '{rank}':\n    " + statements.replace("\n", "\n    ") + "\ntime.sleep(30)"


# ---- statuses and output


def test_output_of_each_rank_and_its_children_is_logged(run, tmp_path):
    body = "print('to stdout', RANK); print('to stderr', RANK, file=sys.stderr); os.system('echo from a child')"
    assert run("print('earlier')", first_device=4)[0] == 0  # this log is replaced
    assert run(body, first_device=4) == (0, "to stdout 0\n", "")
    for rank in (0, 1):
        assert read_log(tmp_path, 4 + rank) == f"to stdout {rank}\nto stderr {rank}\nfrom a child\n"


@pytest.mark.parametrize(
    ("rank", "end", "status", "word"),
    [
        (1, MISTAKE, 2, "ValueError: no such file"),
        (0, MISTAKE.replace("no such", r"no \udcff"), 2, "udcff"),  # a name that is not UTF-8
        (0, "raise RuntimeError('out of stripes')", 1, "RuntimeError: out of stripes"),
        (0, KILL, 137, "SIGKILL"),
        (1, KILL, 137, "SIGKILL"),
        (1, "os._exit(7)", 7, "status 7"),
    ],
)
def test_the_failing_rank_gives_the_status_and_one_line(run, tmp_path, rank, end, status, word):
    found, out, err = run(in_rank(rank, end))
    assert (found, out) == (status, "")
    assert err.startswith(f"launch.py: error: rank {rank} ") and word in err
    assert err.count("\n") == 1
    assert ("Traceback (most recent call last)" in read_log(tmp_path, rank)) == (status == 1)


CAUSE_AND_VICTIM = """
def find_spec(name, *_):  # of an importer that takes too long to import torch
    if name == "torch":
        Path("cause").touch()
        time.sleep(30)

if RANK == "1":
    sys.meta_path.insert(0, sys.modules["__main__"])
    {cause}
while not Path("cause").exists():
    time.sleep(0.01)
{victim}
raise ConnectionError("peer is gone")
"""


def test_a_killed_rank_is_reported_rather_than_its_victims(run):
    cause = "Path('pid').write_text(str(os.getpid())); Path('cause').touch(); time.sleep(30)"
    victim = "os.kill(int(Path('pid').read_text()), signal.SIGKILL)"
    status, _, err = run(CAUSE_AND_VICTIM.format(cause=cause, victim=victim))
    assert status == 137 and "rank 1" in err


def test_a_mistake_is_reported_rather_than_its_victims(run):
    """The rank that made it is stopped before it has told torch's agent."""
    status, _, err = run(CAUSE_AND_VICTIM.format(cause=MISTAKE.replace("\n", "\n    "), victim=""))
    assert status == 2 and "rank 1" in err


def test_the_first_error_is_reported_rather_than_its_victim(run):
    """Both fail before the agent looks, and in one second."""
    cause = "atexit.register(lambda: until('victim')); raise RuntimeError('out of stripes')"
    victim = "until(Path(os.environ['TORCHELASTIC_ERROR_FILE']).parents[1] / '1' / 'error.json')\n"
    victim += "atexit.register(Path('victim').touch); raise ConnectionError('peer is gone')"
    program = "import atexit, torch.distributed.elastic.multiprocessing.errors\n"
    program += "def until(path):\n    while not os.path.exists(path): time.sleep(0.01)\n"
    status, _, err = run(f"{program}if RANK == '1':\n    {cause}\n{victim}")
    assert status == 1 and "rank 1" in err and "out of stripes" in err


def test_a_port_in_use(run):
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        status, _, err = run("pass", endpoint=f"127.0.0.1:{listener.getsockname()[1]}")
    assert (status, err.count("\n")) == (1, 1) and "could not start" in err


def test_many_lines_and_no_newline_at_the_end(run, tmp_path):
    _, out, _ = run("print('x' * 5000 + '\\n' * 3 + 'y\\n' * 20000 + 'end', end='')")
    assert out == "x" * 5000 + "\n" * 3 + "y\n" * 20000 + "end"
    assert read_log(tmp_path, 0) == read_log(tmp_path, 1) == out


def test_a_closed_console_does_not_stop_the_run(script, tmp_path):
    path = script(f"print('started')\n{until('closed')}print('more'); Path('done').touch()")
    command = [sys.executable, LAUNCH, "--nproc=2", f"--log_dir={tmp_path}/logs", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout.readline() == "started\n"
        process.stdout.close()
        (tmp_path / "closed").touch()
        assert process.wait(PATIENCE) == 0
    assert read_log(tmp_path, 0) == "started\nmore\n" and (tmp_path / "done").exists()


def test_one_process_has_no_agent_but_a_log(script, tmp_path):
    """No rank is inherited from another launcher, and the status is the script's own."""
    body = "print(os.getppid(), os.environ.get('WORLD_SIZE'), RANK)\nprint('to stderr', file=sys.stderr)\nos._exit(9)"
    flags = ("--nproc=1", f"--log_dir={tmp_path}/logs", script(body))
    result = run_script("launch.py", *flags, environment={"WORLD_SIZE": "8", "RANK": "3"})
    assert result == (9, f"{os.getpid()} None None\n", "to stderr\n")
    assert read_log(tmp_path, 0) == result.out + result.err


# ---- the environment of a rank


def test_ranks_get_torchruns_variables(run, tmp_path, monkeypatch):
    monkeypatch.setenv("KEPT", "yes")
    assert run("import json; print(json.dumps(dict(os.environ)))", num_processes=3)[0] == 0
    ranks = [json.loads(read_log(tmp_path, rank)) for rank in range(3)]
    for rank, variables in enumerate(ranks):
        expected = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
        expected |= {"KEPT": "yes", "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // 3))}
        assert expected.items() <= variables.items()
    assert len({variables["MASTER_PORT"] for variables in ranks}) == 1


def test_the_script_runs_as_python_would_run_it_with_the_users_number_of_threads(run, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    (tmp_path / "neighbour.py").write_text("here = 'imported'")
    body = "import neighbour; print(__name__, neighbour.here, sys.argv == [__file__], os.environ['OMP_NUM_THREADS'])"
    assert run(body)[1] == "__main__ imported True 5\n"


# ---- signals


@pytest.fixture
def launcher(script, tmp_path):
    """Starts two ranks in tmp_path, which each write their process id first: (the launcher's process, the ids)."""

    def start(body, *before):
        path = script(f"Path(RANK + '.pid').write_text(f'{{os.getpid()}} ')\n{body}")
        command = [*before, sys.executable, LAUNCH, "--nproc=2", f"--log_dir={tmp_path}/logs", path]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, **pipes, text=True, cwd=tmp_path)
        files = [tmp_path / f"{rank}.pid" for rank in (0, 1)]
        wait_for(lambda: all(file.exists() and file.read_text().endswith(" ") for file in files))
        return process, [int(file.read_text()) for file in files]

    return start


@pytest.mark.parametrize(("name", "ranks_get"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGUSR1", "SIGTERM")])
def test_ranks_get_the_signal_and_time_to_finish(launcher, tmp_path, name, ranks_get):
    process, ranks = launcher(
        f"def finish(*_): time.sleep(0.2); print('finished after {ranks_get}'); sys.exit(3)\n"
        f"signal.signal(signal.{ranks_get}, finish)\nprint('ready')\nwhile True: time.sleep(0.05)"
    )
    wait_for(lambda: read_log(tmp_path, 0) == read_log(tmp_path, 1) == "ready\n")
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (128 + signal.Signals[name], f"ready\nfinished after {ranks_get}\n")
    assert "Traceback" not in err
    assert read_log(tmp_path, 1) == out
    assert not any(map(is_alive, ranks))


def test_a_signal_before_the_training_is_named(launcher, tmp_path):
    process, _ = launcher(
        f"sys.path.insert(0, {str(ROOT)!r})\nfrom aligned_reid.cli import run_command\n"
        "def main():\n    print('ready', flush=True)\n    while True: time.sleep(0.05)\nrun_command(main)"
    )
    wait_for(lambda: read_log(tmp_path, 0) == read_log(tmp_path, 1) == "ready\n")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM" in err and "KeyboardInterrupt" not in err


def test_a_closed_terminal_does_not_end_a_run_under_nohup(launcher, tmp_path):
    process, _ = launcher(until("hung up") + "print('done')", "nohup")
    process.send_signal(signal.SIGHUP)
    (tmp_path / "hung up").touch()
    assert (process.wait(PATIENCE), process.stdout.read(), read_log(tmp_path, 1)) == (0, "done\n", "done\n")


def test_the_other_ranks_end_with_the_first(launcher, tmp_path):
    process, ranks = launcher("if RANK == '1': signal.pause()\n" + until("both run") + "sys.exit(5)")
    (tmp_path / "both run").touch()
    assert process.wait(PATIENCE) == 5
    assert not any(map(is_alive, ranks))


def test_a_killed_launcher_takes_its_ranks_along(launcher):
    process, ranks = launcher("signal.pause()")
    process.kill()
    process.wait(PATIENCE)
    wait_for(lambda: not any(map(is_alive, ranks)))


# ---- mistakes and restarts


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
        (["--nproc=1", "--log_dir=/proc", __file__], "--log_dir"),
        (["--nproc=2", LAUNCH.with_name("train.py"), "--data_path=/nowhere"], "train.py: error: "),
    ],
)
def test_mistakes_are_one_line(command, monkeypatch, arguments, word):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    done = command("launch.py", *arguments)
    assert_refused(done, word)
    assert done.out == ""


@pytest.mark.parametrize(
    ("end", "status", "attempts"),
    [("sys.exit(2)", 2, 1), ("sys.exit(1)", 1, 2), ("os.kill(os.getpid(), 11)", 139, 2)],
)
def test_a_mistake_is_not_retried(run, tmp_path, end, status, attempts):
    assert run(COUNT + in_rank(1, end), max_restarts=1)[0] == status
    assert len((tmp_path / "attempts 1").read_text()) == attempts


def test_one_process_can_be_restarted(run):
    assert run(f"{COUNT}print(tried); sys.exit(tried == 0)", num_processes=1, max_restarts=1)[:2] == (0, "0\n1\n")


def test_a_users_own_train_script_has_its_own_flags(command, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import sys; print(sys.argv[1:])")
    done = command("launch.py", "--nproc=2", f"--log_dir={tmp_path}/logs", script, "--mine=1")
    assert (done.status, read_log(tmp_path, 1)) == (0, "['--mine=1']\n")


def test_a_command_is_launched_by_its_name_without_a_checkout(tmp_path):
    """As from an installed wheel: the package alone, in another folder than the user's."""
    shutil.copytree(LAUNCH.parents[1] / "aligned_reid", tmp_path / "site" / "aligned_reid")
    command = (sys.executable, "-m", "aligned_reid", "launch", "--nproc=2", "--check=false", "train")
    place = {"cwd": tmp_path, "environment": {"PYTHONPATH": str(tmp_path / "site")}}
    done = run_program(*command, "--data_path=/nowhere", "--device=cpu", **place)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("aligned-reid launch: error: rank ") and "/nowhere" in done.err
    assert read_log(tmp_path, 0).startswith("aligned-reid train: error: ")
