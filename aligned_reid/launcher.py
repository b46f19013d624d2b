"""Starts the ranks of a run on this machine by torch's elastic agent, and reports in one line why they failed."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HCCL_PORTS = range(60000, 60032)  # Ascend's collectives listen there
OTHER_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT")


def launch(
    script: Sequence[str],
    num_processes: int,
    log_dir: str | Path,
    *,
    num_nodes: int = 1,
    node_rank: int = 0,
    endpoint: str = "",
    first_device: int = 0,
    max_restarts: int = 0,
    name: str = "launch.py",
) -> int:
    """Run a Python script with its arguments as `num_processes` ranks on this machine; returns the exit status.

    Each rank logs to `log_dir`/<device>/train_<device>.log, devices counted from `first_device`; the first rank's
    standard output is on the console, too. The status is 0, or that of the rank that failed first; 128 + n for signal
    n. `name` begins the line about a failure; unless it is a user's mistake, the agent restarts all ranks, at most
    `max_restarts` times. Each of several machines calls this, with the first one's address and port as `endpoint`. A
    single process without restarts replaces this one: no agent, and no return.
    """
    program = [str(Path(__file__).with_name("rank.py").absolute()), str(log_dir), str(first_device)]
    if num_processes * num_nodes == 1 and not max_restarts:
        environment = {name: value for name, value in os.environ.items() if name not in OTHER_LAUNCHERS}
        os.execve(sys.executable, [sys.executable, *program, "", *script], environment)
    options = {
        "min_nodes": num_nodes,
        "max_nodes": num_nodes,
        "nproc_per_node": num_processes,
        "rdzv_endpoint": endpoint or f"127.0.0.1:{free_port()}",
        "rdzv_configs": {"rank": node_rank},
        "max_restarts": max_restarts,
    }
    with tempfile.TemporaryDirectory(prefix="aligned_reid_") as folder:
        mistake = Path(folder, "mistake")  # a rank that ends with status 2 writes the reason there
        status, reason = run_agent([*program, str(mistake), *script], options, folder)
        if mistake.is_file():  # other ranks may have lost this one before it ended
            status, reason = 2, mistake.read_text()
    if reason:
        print(f"{name}: error:", *reason.split(), f"(logs: {log_dir}/*/train_*.log)", file=sys.stderr, flush=True)
    return status


def run_agent(arguments: Sequence[str], options: dict[str, Any], folder: str) -> tuple[int, str]:
    """Run Python as ranks, `options` being LaunchConfig's; returns the exit status and the reason of a failure."""
    import torch
    from torch.distributed.elastic import multiprocessing
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logs = getattr(multiprocessing, "DefaultLogsSpecs", None)  # new in torch 2.3
    options |= {"logs_specs": logs(log_dir=folder)} if logs else {"log_dir": folder}
    config = LaunchConfig(run_id="aligned_reid", rdzv_backend="static", monitor_interval=0.05, **options)
    # torchrun's default is one thread, which suits GPUs and leaves a CPU idle.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // config.nproc_per_node)))
    # Of the agent's own lines, only those about a failure that it retries tell more than ours.
    logging.disable(logging.WARNING if config.max_restarts else logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except multiprocessing.errors.ChildFailedError as error:
        return explain(error.failures)
    except multiprocessing.SignalException as error:
        files = sorted(Path(folder).rglob("error.json"))  # of ranks that had begun to train
        reason = f"interrupted by {signal.Signals(error.sigval).name}"
        return 128 + error.sigval, json.loads(files[-1].read_text())["message"]["message"] if files else reason
    except (RuntimeError, OSError, ValueError) as error:
        return 1, f"the ranks could not start: {error}"
    finally:
        logging.disable(logging.NOTSET)
    return 0, ""


def explain(failures: Mapping[int, Any]) -> tuple[int, str]:
    """The exit status and the reason of the first failure. failures: torch's ProcessFailure of each failed rank."""

    def moment(rank: int) -> float:
        """Seconds: of a rank's last words, else when it was noticed, which may be after the ranks that lost it."""
        code, file = failures[rank].exitcode, Path(failures[rank].error_file)
        stopped = code in (-signal.SIGTERM, 128 + signal.SIGTERM)  # by the agent, after a failure
        return file.stat().st_mtime if file.is_file() else failures[rank].timestamp + (2 if stopped else -2)

    rank = min(failures, key=moment)
    status, message = failures[rank].exitcode, failures[rank].error_file_data["message"]
    if status < 0 and not isinstance(message, dict):  # it left no last words
        return 128 - status, f"rank {rank} was killed by {failures[rank].signal_name()}"
    reason = message["message"] if isinstance(message, dict) else "see its log"
    return max(status, 1), f"rank {rank} ended with status {max(status, 1)}: {reason}"


def free_port() -> int:
    """A port that is free on this machine and not one of HCCL's."""
    with socket.create_server(("", 0)) as listener:
        port: int = listener.getsockname()[1]
    return free_port() if port in HCCL_PORTS else port
