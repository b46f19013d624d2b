"""Starts the ranks of a run on this machine: torch's elastic agent, without what it does to a user's error.

torchrun turns a rank's exit status 2 into 1 and prints a table of tracebacks under it. Here the first failing rank's
own status comes back, with one line that says why; every rank's whole output is in its own log file. With
`max_restarts` the agent starts the ranks again after a failure, but for one that another attempt would only repeat.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aligned_reid import rank_program
from aligned_reid.rank_output import Pump, RankOutput, explain, first_failure, print_all
from aligned_reid.rank_program import become_command
from aligned_reid.stop import STOP_SIGNALS, StopSignals

HCCL_PORTS = range(60000, 60032)  # Ascend's collectives listen there
PASSED_ON = (*STOP_SIGNALS, signal.SIGQUIT)  # to the ranks; torch's agent passes on all of these but SIGUSR1
MONITOR_SECONDS = 0.05  # how soon a dead rank is seen: before the others have died of its absence
SETTLE_SECONDS = 0.2  # in which what a dead rank said last is read

# Not retried: a user's mistake, a run that stopped on purpose (--stop_on_collapse), and what a signal asked for.
FINAL_STATUSES = (2, 3, *(128 + number for number in STOP_SIGNALS), *(-number for number in STOP_SIGNALS))


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
        with restarts.decided_by_us(), signals_passed_on_once():
            launch_agent(config, sys.executable, ["-I", os.path.abspath(rank_program.__file__), folder, *command])
    except ChildFailedError as error:
        return {failure.local_rank: failure.exitcode for failure in error.failures.values()}
    except SignalException as error:
        raise Interrupted(error.sigval) from None
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
def signals_passed_on_once() -> Iterator[None]:
    """Let torch's agent pass the first signal on, and wait for the ranks whatever comes after it."""
    from torch.distributed.elastic.multiprocessing import SignalException, api

    torchs = api._terminate_process_handler
    with StopSignals(lambda number: SignalException("", signal.Signals(number))) as stop:
        api._terminate_process_handler = stop.take_note  # type: ignore[assignment]  # the agent sets it for its signals
        try:
            yield
        finally:
            api._terminate_process_handler = torchs


@contextmanager
def own_signal_handlers() -> Iterator[None]:
    """Undo at the end that the agent takes over signals, and keep those from it that are ignored.

    nohup ignores SIGHUP, which the agent would obey when the terminal closes. Enter before threads start: they inherit
    what is blocked, and so do the ranks.
    """
    handlers = {number: signal.getsignal(number) for number in PASSED_ON}
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


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
