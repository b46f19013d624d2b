"""The environment that a launcher leaves, shares of work, and the meeting of an attempt's ranks."""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from conftest import PATIENCE, refusal

from aligned_reid.distributed import (
    World,
    describe_timeout,
    gather_rows,
    meet,
    process_group,
    read_world,
    share_of,
    sum_over_ranks,
)
from aligned_reid.errors import RunStopped
from aligned_reid.launcher import HCCL_PORTS, free_port

WORLDS = {"": World(0, 1, 0), "9 16 1": World(9, 16, 1), "9 8 1": "WORLD_SIZE 8", "one 8 1": "whole numbers"}


@pytest.mark.parametrize("values", WORLDS)
def test_world_comes_from_the_launchers_environment(monkeypatch, values):
    for name, value in itertools.zip_longest(("RANK", "WORLD_SIZE", "LOCAL_RANK"), values.split()):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    expected = WORLDS[values]
    if isinstance(expected, str):
        assert expected in refusal(read_world)
    else:
        assert read_world() == expected and read_world().is_main == (expected.rank == 0)


@pytest.mark.parametrize("port", ["http", "99999"])
def test_a_port_that_is_none_is_refused(monkeypatch, port):
    monkeypatch.setenv("MASTER_PORT", port)
    assert "MASTER_PORT" in refusal(process_group(World(1, 2), "gloo", timeout=1).__enter__)


def test_shares_cover_everything_once_in_order():
    for total, size in ((10, 1), (10, 3), (3, 8), (8, 8), (0, 2)):
        shares = [share_of(total, World(rank, size)) for rank in range(size)]
        assert [index for share in shares for index in share] == list(range(total))


def test_a_single_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with process_group(World(), "gloo") as world:
        rows = torch.arange(6.0).view(3, 2)
        assert gather_rows(rows, 3) is rows
        assert sum_over_ranks(torch.tensor(3.0)) == 3
        assert not dist.is_initialized() and not world.job


@pytest.fixture
def store():
    return dist.HashStore()


def start(function, ranks):
    """The results to come of `function(rank)` in a thread per rank."""
    pool = ThreadPoolExecutor(len(ranks))
    futures = [pool.submit(function, rank) for rank in ranks]
    pool.shutdown(wait=False)
    return futures


def meet_all(store, size):
    parts = [part.result() for part in start(lambda rank: meet(store, World(rank, size), PATIENCE), range(size))]
    parts[0].set("from rank 0", "yes")
    assert all(part.check(["from rank 0"]) for part in parts)
    return parts[0]


def test_each_attempt_meets_in_a_new_part_of_the_store(store):
    first, second = meet_all(store, 3), meet_all(store, 3)
    second.set("new", "")
    assert not first.check(["new"])
    meet_all(store, 2)  # a machine less


@pytest.mark.parametrize("early", [0, 1])
def test_a_restarted_rank_waits_for_the_others_to_restart(store, early):
    meet_all(store, 2)
    (met,) = start(lambda rank: meet(store, World(rank, 2), PATIENCE), [early])
    with pytest.raises(TimeoutError):
        met.result(timeout=0.3)
    meet(store, World(1 - early, 2), PATIENCE).set("here", "")
    assert met.result().check(["here"])


def test_missing_ranks_stop_an_attempt_and_are_named(store, monkeypatch):
    with pytest.raises(RunStopped, match="not all of 2 processes"):
        meet(store, World(0, 2), 0.2)
    monkeypatch.setattr("aligned_reid.distributed.GRACE_SECONDS", 0)
    describe_timeout(store, World(1, 4), 7.0)
    line = describe_timeout(store, World(0, 4), 7.0)
    assert "rank 2, 3" in line and "rank 0 waited 7 s (--timeout)" in line


def test_attempts_of_one_launch_have_the_same_job(monkeypatch):
    def job_with(store):
        monkeypatch.setenv("MASTER_PORT", str(store.port))
        with process_group(World(), "gloo", timeout=60.0) as world:
            return world.job

    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # as a launcher that keeps the store
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    one, other = (dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(2))
    job = job_with(one)
    assert job and job == job_with(one)
    assert job_with(other) != job


def test_ranks_that_no_launcher_started_find_each_other(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    port = str(free_port())
    assert int(port) not in HCCL_PORTS
    program = (
        "import sys; from aligned_reid.distributed import *\n"
        "with process_group(read_world(), 'gloo', timeout=120) as world:\n"
        "    value = from_main(lambda: {'a': torch.ones(2), 'b': [world.rank]}, torch.device('cpu'))\n"
        "    assert value['b'] == [0] and value['a'].sum() == 2 and not world.job\n"
    )
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_PORT": port}
    command = [sys.executable, "-c", program]
    ranks = [subprocess.Popen(command, env={**environment, "RANK": rank}) for rank in ("0", "1")]
    assert [rank.wait(PATIENCE) for rank in ranks] == [0, 0]
