"""Ranks that meet: in any order, after deaths, under a number of their own; who is missing; which launch it is."""

import socket
import threading
import time

import pytest
import torch.distributed as dist

from aligned_reid.distributed import World, job_of_world
from aligned_reid.errors import RunStopped
from aligned_reid.rendezvous import Meeting, connect, is_same_job, job_of, meet


@pytest.fixture
def store():
    return dist.HashStore()


def meet_all(store, size, patience=20.0):
    """All ranks at once; the prefixes that they met under."""
    met = {}

    def one(rank):
        met[rank] = meet(store, World(rank, size), 5.0, patience)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in reversed(range(size))]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # rank 0 comes last
    for thread in threads:
        thread.join()
    assert len(met) == size
    met[0].store.set("said by rank 0", "yes")
    assert all(meeting.store.check(["said by rank 0"]) for meeting in met.values())
    return met


def test_every_attempt_meets_anew(store):
    first = meet_all(store, 3)
    second = meet_all(store, 3)
    second[0].store.set("new", "")
    assert not first[0].store.check(["new"])
    meet_all(store, 2)  # a machine less


def test_who_comes_back_waits_for_the_next_attempt(store):
    meet_all(store, 2)
    back = {}
    thread = threading.Thread(target=lambda: back.update(rank=meet(store, World(1, 2), 5.0, 20.0)))
    thread.start()  # rank 1 has died; rank 0 has not seen it yet
    time.sleep(0.3)
    assert not back
    ours = meet(store, World(0, 2), 5.0, 20.0)
    thread.join(timeout=10)
    ours.store.set("here", "")
    assert back["rank"].store.check(["here"])


def test_an_attempt_whose_rank_0_died_before_it_started_is_left(store):
    with pytest.raises(RunStopped, match="rank 0: not all of 2 processes came within 0.2 s"):
        meet(store, World(0, 2), 5.0, patience=0.2)
    meet_all(store, 2)


def test_who_did_not_answer_is_named(store, monkeypatch):
    monkeypatch.setattr("aligned_reid.rendezvous.GRACE_SECONDS", 0.2)
    meetings = [Meeting(store, World(rank, 3), 1, 7.0) for rank in range(3)]
    for rank, host in enumerate(["north", "east", "south"]):
        meetings[rank].store.set(f"host {rank}", host)
    error = RuntimeError("Timed out waiting 7000ms for recv operation to complete")
    waits = threading.Thread(target=meetings[1].explain, args=(error,))
    waits.start()
    stopped = meetings[0].explain(error)
    waits.join()
    here = socket.gethostname()
    assert str(stopped) == f"no sign of life from rank 2 on south: rank 0 on {here} waited 7 s (--timeout)"
    assert stopped.status == 1
    assert meetings[0].explain(RuntimeError("Connection closed by peer")) is None


def test_a_launch_has_one_token_where_the_launcher_keeps_the_store(store, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert job_of(store) == {"token": "", "name": ""}
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    job = job_of(store)
    assert len(job["token"]) == 32
    assert job_of(store) == job
    assert job_of(dist.HashStore()) != job
    assert is_same_job(job, job_of(store))
    assert not is_same_job(job, job_of(dist.HashStore()))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's default
    assert job_of(None) == {"token": "", "name": ""}
    assert not is_same_job(job_of(None), job_of(None))


def test_rank_0_keeps_the_store_where_no_launcher_does(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    main = connect(World(0, 2), 10.0)
    other = connect(World(1, 2), 10.0)
    main.set("key", "value")
    assert other.get("key") == b"value"


def test_the_environment_of_a_launcher_that_is_gone_does_no_harm(monkeypatch):
    monkeypatch.setattr("aligned_reid.distributed.CONNECT_SECONDS", 1.0)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    assert job_of_world(World(), None) == {"token": "", "name": ""}
