"""Starts the ranks of a run on this machine: torch's elastic agent, without what it does to a user's error.

torchrun turns a rank's exit status 2 into 1 and prints a table of tracebacks under it. Here the first failing rank's
own status comes back, with one line that says why; every rank's whole output is in its own log file. With
`max_restarts` the agent starts the ranks again after a failure, but for one that another attempt would only repeat.

This file is also the program that a rank's process runs for a moment before the command takes its place
(`become_rank`), which is why it imports torch and the rest of the package only inside functions.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

HCCL_PORTS = range(60000, 60032)  # Ascend's collectives listen there
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
AGENT_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # which torch's agent passes on
MONITOR_SECONDS = 0.05  # how soon a dead rank is seen: before the others have died of its absence
DRAIN_SECONDS = 2.0  # how long output may follow the end of the ranks
SETTLE_SECONDS = 0.2  # in which what a dead rank said last is read

# Not retried: a user's mistake, a run that stopped on purpose (--stop_on_collapse), and what a signal asked for.
FINAL_STATUSES = (2, 3, 128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)

# What a program says when it fails: a traceback's last line, or `train.py: error: ...`. torch puts its rank in front.
RANK_PREFIX = re.compile(r"^\[rank\d+\]:\s?")
TRACEBACK = "Traceback (most recent call last)"
OWN_LINE = re.compile(r"^[\w.]+: (error|stopped|interrupted)\b")
HANG_LINE = re.compile(r"^Timeout \((.+)\)!$")  # faulthandler's, which stacks follow; see training/watchdog.py
SILENT_RANK = re.compile(r"rank (\d+) on \S+(?=.*: rank \d+ on)")  # in rendezvous.Meeting.explain's line
ERROR_LINE = re.compile(OWN_LINE.pattern + r"|^[\w.]*(Error|Exception|Interrupt)\b")


def launch(
    command: Sequence[str],
    num_processes: int,
    log_dir: str | Path,
    *,
    num_nodes: int = 1,
    node_rank: int = 0,
    address: str = "127.0.0.1",
    port: int = 0,
    first_device: int = 0,
    max_restarts: int = 0,
) -> int:
    """Run `command` as `num_processes` ranks on this machine and return the exit status of the run.

    The ranks' environment is torchrun's (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). They log to
    `log_dir`/<device>/train_<device>.log, devices counted from `first_device`; the first rank's output is on the
    console too, but for tracebacks. The status is 0, or the first failing rank's own; 128 + n where signal n killed it,
    or where signal n came from outside and was passed on. After a failure other than those of FINAL_STATUSES all ranks
    start again, at most `max_restarts` times. With several machines, `address` and `port` are those of the first one;
    on one machine port 0 is a free one. One process alone that is not to be restarted takes this process's place: no
    agent, no log file, and no return.
    """
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    if num_processes * num_nodes == 1 and not max_restarts:
        become_command(command)
    devices = range(first_device, first_device + num_processes)
    outputs = [RankOutput(log_file(log_dir, device), on_console=device == first_device) for device in devices]
    first_rank = node_rank * num_processes
    restarts = Restarts(outputs, first_rank, max_restarts)
    with own_signal_handlers(), tempfile.TemporaryDirectory(prefix="aligned_reid_") as folder:
        pump = Pump(folder, outputs)
        pump.start()
        try:
            nodes = (num_nodes, node_rank, address, port or free_port())
            failures = run_agent(command, num_processes, folder, *nodes, restarts)
        except Interrupted as interrupted:
            return 128 + interrupted.signal_number
        except (RuntimeError, OSError, ValueError) as error:
            print(f"launch.py: error: the ranks could not start: {one_line(error)}", file=sys.stderr)
            return 1
        finally:
            pump.finish()
    if not failures:
        return 0
    local_rank, exit_code = first_failure(failures, outputs)
    status = exit_code if exit_code > 0 else 128 - exit_code
    print_all(explain(outputs, first_rank, local_rank, exit_code))
    return status


class Interrupted(Exception):
    """A signal that ended the run from outside; the ranks have had it, too."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def run_agent(
    command: Sequence[str],
    num_processes: int,
    folder: str,
    num_nodes: int,
    node_rank: int,
    address: str,
    port: int,
    restarts: Restarts,
) -> dict[int, int]:
    """Run the ranks to their end under torch's agent: {local rank: exit code} of those that failed, in its order."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    config = LaunchConfig(
        min_nodes=num_nodes,
        max_nodes=num_nodes,
        nproc_per_node=num_processes,
        run_id="aligned_reid",
        rdzv_backend="static",
        rdzv_endpoint=f"{address}:{port}",
        rdzv_configs={"rank": node_rank},
        local_addr=address if num_nodes == 1 else None,
        max_restarts=restarts.max_restarts,
        monitor_interval=MONITOR_SECONDS,
        **agent_folder(folder),
    )
    logging.disable(logging.CRITICAL)  # the agent's own account of a failure; ours is one line
    try:
        # -I: this file only, whatever the rank's PYTHONPATH holds.
        with restarts.decided_by_us():
            launch_agent(config, sys.executable, ["-I", os.path.abspath(__file__), folder, *command])
    except ChildFailedError as error:
        return {failure.local_rank: failure.exitcode for failure in error.failures.values()}
    except SignalException as error:
        raise Interrupted(error.sigval) from None
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT) from None
    finally:
        logging.disable(logging.NOTSET)
    return {}


class Restarts:
    """Decides whether ranks start again after a failure, and says so."""

    def __init__(self, outputs: Sequence[RankOutput], first_rank: int, max_restarts: int) -> None:
        self.outputs, self.first_rank, self.max_restarts = outputs, first_rank, max_restarts

    def may_follow(self, failures: dict[int, int], num_left: int) -> bool:
        """Whether another attempt follows these failures ({local rank: exit code}) while `num_left` are left."""
        time.sleep(SETTLE_SECONDS)
        local_rank, exit_code = first_failure(failures, self.outputs)
        if exit_code in FINAL_STATUSES:
            return False
        print_all(explain(self.outputs, self.first_rank, local_rank, exit_code))
        print_all([f"launch.py: restart {self.max_restarts - num_left + 1} of {self.max_restarts}"])
        for output in self.outputs:
            output.forget()
        return True

    @contextmanager
    def decided_by_us(self) -> Iterator[None]:
        """Let torch's agent ask `may_follow`; it would restart after anything."""
        if not self.max_restarts:
            yield
            return
        from torch.distributed.launcher import api

        restarts = self

        class Agent(api.LocalElasticAgent):
            def _monitor_workers(self, group: Any) -> Any:
                result = super()._monitor_workers(group)
                if result.is_failed() and self._remaining_restarts > 0:
                    failures = {failure.local_rank: failure.exitcode for failure in result.failures.values()}
                    if not restarts.may_follow(failures, self._remaining_restarts):
                        self._remaining_restarts = 0
                return result

        torchs, api.LocalElasticAgent = api.LocalElasticAgent, Agent  # type: ignore[misc]
        try:
            yield
        finally:
            api.LocalElasticAgent = torchs  # type: ignore[misc]


@contextmanager
def own_signal_handlers() -> Iterator[None]:
    """Undo at the end that the agent takes over signals, and keep those from it that are ignored.

    nohup ignores SIGHUP, which the agent would obey when the terminal closes. Enter before threads start: they inherit
    what is blocked, and so do the ranks.
    """
    handlers = {number: signal.getsignal(number) for number in AGENT_SIGNALS}
    ignored = [number for number, handler in handlers.items() if handler is signal.SIG_IGN]
    signal.pthread_sigmask(signal.SIG_BLOCK, ignored)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)


def agent_folder(folder: str) -> dict[str, Any]:
    """Where the agent may put its own files: `logs_specs` since torch 2.3, `log_dir` before. It redirects nothing."""
    try:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    except ImportError:
        return {"log_dir": folder}
    return {"logs_specs": DefaultLogsSpecs(log_dir=folder)}


def free_port() -> int:
    """A port that is free on this machine and not one of HCCL's."""
    while True:
        with socket.socket() as listener:
            listener.bind(("", 0))
            port: int = listener.getsockname()[1]
        if port not in HCCL_PORTS:
            return port


def log_file(log_dir: str | Path, device: int) -> Path:
    """Where Ascend's tooling looks for the log of a device."""
    return Path(log_dir, str(device), f"train_{device}.log")


def first_failure(failures: dict[int, int], outputs: Sequence[RankOutput]) -> tuple[int, int]:
    """(local rank, exit code) of the rank that failed first, where others failed because it did.

    The agent looks some times a second, and so may see several dead ranks at once, or a broken connection's victim
    before its cause. A rank that died without a word (killed) is the agent's to tell; else, who complained first failed
    first. Ranks that the agent itself then stopped are out of it.
    """
    seen_first = next(iter(failures))
    if outputs[seen_first].complained_at < inf:
        own = [rank for rank, exit_code in failures.items() if exit_code != -signal.SIGTERM]
        seen_first = min(own or failures, key=lambda rank: outputs[rank].complained_at)
    return seen_first, failures[seen_first]


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class RankOutput:
    """One rank's output: all of it goes to its log file, and the first rank's to the console, but for tracebacks."""

    def __init__(self, path: Path, on_console: bool) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.log = path.open("wb")
        except OSError as error:
            from aligned_reid.errors import InputError

            raise InputError(f"the log {path} cannot be written: {error.strerror}; choose another --log_dir") from error
        self.path = path
        self.on_console = on_console
        self.complained_at = inf  # time of the first line that names an error
        self.last_words = ""  # the last line that names an error, else the last one of stderr
        self.shown = False  # whether the console has them
        self.last_line = ""  # the last one of stdout
        self.in_traceback = False

    def take(self, line: bytes, is_error_stream: bool) -> None:
        """Pass on one line of the rank. A full disk or a closed console must not stop the run: then it is lost."""
        with suppress(OSError):
            self.log.write(line)
            self.log.flush()
        if is_error_stream:
            self.listen(RANK_PREFIX.sub("", line.decode(errors="replace")).rstrip())
        elif line.strip():
            self.last_line = line.decode(errors="replace").strip()
        if self.on_console and not (is_error_stream and self.in_traceback):
            console: BinaryIO = (sys.stderr if is_error_stream else sys.stdout).buffer
            with suppress(OSError):
                console.write(line)
                console.flush()

    def listen(self, text: str) -> None:
        self.in_traceback = self.in_traceback or bool(text.startswith(TRACEBACK) or HANG_LINE.match(text))
        names_error = bool(ERROR_LINE.match(text) or HANG_LINE.match(text))
        if names_error or self.in_traceback:
            self.complained_at = min(self.complained_at, time.monotonic())
        is_named = ERROR_LINE.match(self.last_words) or HANG_LINE.match(self.last_words)
        if text and (names_error or not is_named):
            self.last_words = text
            self.shown = self.on_console and not self.in_traceback

    def forget(self) -> None:
        """Begin anew with the next attempt."""
        self.complained_at, self.last_words, self.shown, self.in_traceback = inf, "", False, False

    def reason(self, rank: int, exit_code: int) -> str:
        """In one line, why this rank failed; empty where the console has it from the rank itself."""
        if OWN_LINE.match(self.last_words) and exit_code > 0:
            return "" if self.shown else self.last_words
        if exit_code < 0:
            what = f"was killed by signal {-exit_code} ({signal.strsignal(-exit_code)})"
        elif hang := HANG_LINE.match(self.last_words):
            what = f"hung: its step was not done after {hang[1]}"
        else:
            what = f"ended with status {exit_code}" + (f": {self.last_words}" if self.last_words else "")
        return f"launch.py: error: rank {rank} on {socket.gethostname()} {what}; {self.traces()}"

    def traces(self) -> str:
        """What is left of a rank: its last line, and where the others are."""
        said = f"its last line: {self.last_line}; " if self.last_line else ""
        return f"{said}its log: {self.path}"


def explain(outputs: Sequence[RankOutput], first_rank: int, local_rank: int, exit_code: int) -> list[str]:
    """Lines that say why a rank failed, and where it waited in vain for ranks of this machine, what those said last."""
    output = outputs[local_rank]
    lines = [output.reason(first_rank + local_rank, exit_code)]
    for rank in map(int, SILENT_RANK.findall(output.last_words)):
        if 0 <= rank - first_rank < len(outputs):
            lines.append(f"launch.py: rank {rank} hung; {outputs[rank - first_rank].traces()}")
    return [line for line in lines if line]


def print_all(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


class Pump(threading.Thread):
    """Carries the ranks' output from named pipes in `folder` to their RankOutput, line by line."""

    def __init__(self, folder: str, outputs: Sequence[RankOutput]) -> None:
        super().__init__(daemon=True)
        self.folder = Path(folder)
        self.outputs = outputs
        self.selector = selectors.DefaultSelector()
        self.writers: list[int] = []  # kept open so that no pipe ends before its rank has opened it
        for local_rank, output in enumerate(outputs):
            for descriptor in (1, 2):
                path = pipe_path(folder, local_rank, descriptor)
                os.mkfifo(path)
                reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                self.writers.append(os.open(path, os.O_WRONLY))
                self.selector.register(reader, selectors.EVENT_READ, (output, descriptor == 2, bytearray()))

    def run(self) -> None:
        while self.selector.get_map():
            for key, _ in self.selector.select():
                output, is_error_stream, rest = key.data
                chunk = os.read(key.fd, 65536)
                rest += chunk
                if not chunk:
                    self.selector.unregister(key.fd)
                    os.close(key.fd)
                    chunk = b"\n"
                    rest += b"\n" if rest else b""
                if b"\n" in chunk:
                    *lines, remainder = bytes(rest).split(b"\n")
                    rest[:] = remainder
                    for line in lines:
                        output.take(line + b"\n", is_error_stream)

    def finish(self) -> None:
        """Read what is left. A pipe that stays open is held by a child that its rank left behind: end those."""
        for writer in self.writers:
            os.close(writer)
        self.join(DRAIN_SECONDS)
        if self.is_alive():
            for path in self.folder.glob("*.pid"):
                with suppress(ProcessLookupError):
                    os.killpg(int(path.read_text()), signal.SIGKILL)
            self.join(DRAIN_SECONDS)
        for output in self.outputs:
            with suppress(OSError):
                output.log.close()


def pipe_path(folder: str, local_rank: int | str, descriptor: int) -> str:
    return os.path.join(folder, f"{local_rank}.{descriptor}")


def become_command(command: Sequence[str], remove: Iterable[str] = RANK_VARIABLES) -> NoReturn:
    """Replace this process by the command, without what another launcher may have left in the environment."""
    environment = {name: value for name, value in os.environ.items() if name not in set(remove)}
    sys.stdout.flush()
    os.execvpe(command[0], list(command), {**environment, "PYTHONUNBUFFERED": "1"})


def become_rank(folder: str, command: Sequence[str]) -> NoReturn:
    """What the agent starts as a rank: connect the output to the launcher's pipes, then become the command."""
    if sys.platform == "linux":  # no rank outlives a launcher that was killed: PR_SET_PDEATHSIG is 1
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getsid(0) != os.getpid():  # torch 2.1 leaves it in the launcher's, where a Ctrl-C would reach it twice
        os.setsid()
    local_rank = os.environ["LOCAL_RANK"]
    for descriptor in (1, 2):
        pipe = os.open(pipe_path(folder, local_rank, descriptor), os.O_WRONLY)
        os.dup2(pipe, descriptor)
        os.close(pipe)
    Path(folder, f"{local_rank}.pid").write_text(str(os.getpid()))
    os.environ["ALIGNED_REID_RANK_LOG"] = "1"  # see training/log.py
    # torchrun would set 1 thread, which is right for a GPU and wastes a CPU.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"]))))
    become_command(command, remove=())


if __name__ == "__main__":
    become_rank(sys.argv[1], sys.argv[2:])
