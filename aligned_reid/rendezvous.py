"""Where the processes of a run find each other: attempt after attempt, and who of them is missing.

A launcher that restarts ranks (torchrun --max_restarts, script/launch.py) may keep its store over the attempts, with a
dead attempt's addresses in it, and machines need not count attempts alike. So each attempt meets under a number of its
own, which its rank 0 draws.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from aligned_reid.errors import InputError, RunStopped

WORLD_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
POLL_SECONDS = 0.05
GRACE_SECONDS = 2.0  # in which other waiting ranks say that they wait, too
NAMELESS_JOBS = ("", "none", "aligned_reid")  # what torchrun and script/launch.py say where nobody named the job
TIMED_OUT = re.compile(r"tim(ed|e) ?out|timeout", re.IGNORECASE)


@dataclass(frozen=True)
class World:
    """Where this process stands among the run's processes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    job: Mapping[str, str] = field(default_factory=dict, compare=False)  # of job_of, once the group is open

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_world() -> World:
    """The rank and size that a launcher put into the environment (torchrun's RANK, WORLD_SIZE, LOCAL_RANK)."""
    try:
        rank, size, local_rank = (int(os.environ.get(n, d)) for n, d in WORLD_VARIABLES.items())
    except ValueError as error:
        raise InputError(f"RANK, WORLD_SIZE and LOCAL_RANK have to be whole numbers ({error})") from error
    if not 0 <= rank < size:
        raise InputError(f"RANK {rank} does not fit WORLD_SIZE {size}: unset both for a run of one process")
    return World(rank, size, local_rank)


def connect(world: World, timeout: float) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT: the launcher's where it keeps one there, else rank 0's."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=world.is_main and not has_launchers_store(),
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
    )


def has_launchers_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and "MASTER_PORT" in os.environ


class Meeting:
    """One attempt's ranks, and their part of the store."""

    def __init__(self, store: dist.Store, world: World, number: int, timeout: float) -> None:
        self.world, self.timeout, self.whole_store = world, timeout, store
        self.store = dist.PrefixStore(prefix_of(number, world), store)

    def describe(self, rank: int) -> str:
        return f"rank {rank} on {self.store.get(f'host {rank}').decode()}"

    def missing_ranks(self) -> list[int]:
        """The ranks that do not wait, some time after this one has waited in vain."""
        self.store.set(f"waits {self.world.rank}", "")
        time.sleep(GRACE_SECONDS)
        return [rank for rank in range(self.world.size) if not self.store.check([f"waits {rank}"])]

    def explain(self, error: RuntimeError) -> RunStopped | None:
        """In one line, what a collective's time-out means: who did not answer. None where `error` is none."""
        if not TIMED_OUT.search(str(error)):
            return None
        try:
            missing = self.missing_ranks()
            who = ", ".join(self.describe(rank) for rank in missing) or "another process"
        except (RuntimeError, OSError):  # the store has gone with its machine
            who = "another process"
        waited = f"{self.describe_own()} waited {self.timeout:g} s (--timeout)"
        return RunStopped(f"no sign of life from {who}: {waited}")

    def describe_own(self) -> str:
        return f"rank {self.world.rank} on {socket.gethostname()}"


def prefix_of(number: int, world: World) -> str:
    return f"attempt {number} of {world.size}"


def meet(store: dist.Store, world: World, timeout: float, patience: float) -> Meeting:
    """Wait until all ranks of this attempt are there.

    Rank 0 draws the attempt's number. Whoever joins follows the newest that has not started yet: an attempt that has
    started without it is a former one, whose rank 0 will be back. timeout: of the attempt's collectives. patience:
    seconds that ranks may come after each other. Raises RunStopped where some stay away.
    """
    deadline = time.monotonic() + patience
    counter = f"attempts of {world.size}"
    number = store.add(counter, 1) if world.is_main else 0
    while True:
        if not world.is_main:
            newest = store.add(counter, 0)
            if newest > number and not store.check([f"{prefix_of(newest, world)}/started"]):
                number = newest
        if number:
            attempt = Meeting(store, world, number, timeout)
            attempt.store.set(f"host {world.rank}", socket.gethostname())
            if world.is_main and attempt.store.check([f"host {rank}" for rank in range(world.size)]):
                attempt.store.set("started", "")
            if attempt.store.check(["started"]):
                return attempt
        if time.monotonic() > deadline:
            raise RunStopped(f"rank {world.rank}: not all of {world.size} processes came within {patience:g} s")
        time.sleep(POLL_SECONDS)


def job_of(store: dist.Store | None) -> dict[str, str]:
    """What all attempts of one launch have in common: a token in the launcher's store, and the job's name.

    store: None where the launcher keeps none. Empty values where there is nothing to know a job by.
    """
    token = ""
    if store is not None and has_launchers_store():
        token = store.compare_set("aligned_reid/job", "", secrets.token_hex(16)).decode()
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return {"token": token, "name": "" if name in NAMELESS_JOBS else name}


def is_same_job(job: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two attempts are of one launch: by the token, or by the name where this attempt is not the first.

    A name alone may be used again for a later launch, whose first attempt must not go on from the earlier one.
    """
    if job.get("token") and job["token"] == other.get("token"):
        return True
    is_restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return is_restarted and bool(job.get("name")) and job["name"] == other.get("name")
