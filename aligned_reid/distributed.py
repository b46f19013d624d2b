"""The processes of a run: this one's rank, the process group, sums, gathers and broadcasts."""

from __future__ import annotations

import gc
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aligned_reid.errors import InputError, RunStopped

MEETING_SHARE = 4  # times --timeout: some ranks check and load data for longer than others
POLL_SECONDS = 0.05
GRACE_SECONDS = 2.0  # within which the ranks that time out in a collective report that they do
TIMED_OUT = re.compile(r"tim(ed|e) ?out", re.IGNORECASE)


@dataclass(frozen=True)
class World:
    """This process's place among the processes of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    job: str = ""  # identifies the launch, if a launcher may restart it; set by process_group

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_world() -> World:
    """The rank and size that a launcher put into the environment. Raises InputError if they are not valid."""
    try:
        rank, size, local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
    except ValueError as error:
        raise InputError(f"RANK, WORLD_SIZE and LOCAL_RANK have to be whole numbers ({error})") from error
    if not 0 <= rank < size:
        raise InputError(f"RANK {rank} does not fit WORLD_SIZE {size}: unset both for a run of one process")
    return World(rank, size, local_rank)


@contextmanager
def process_group(world: World, backend: str, address: str = "", timeout: float = 600.0) -> Iterator[World]:
    """The process group while the block runs, which gets the world with its `job`. A single process has neither.

    address: of the first machine; default: MASTER_ADDR, which torchrun sets. timeout: seconds that a collective waits
    for a rank. Raises InputError for an invalid port; RunStopped if ranks are missing or, with the ranks that did not
    answer, if a collective times out.
    """
    is_launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if world.size == 1 and not is_launched:
        yield world
        return
    patience = MEETING_SHARE * timeout
    store, token = open_store(world, address, is_launched, patience)
    store = meet(store, world, patience)
    limit = timedelta(seconds=timeout)
    try:
        if world.size > 1:
            dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=limit)
        yield replace(world, job=token if is_launched else "")
    except RuntimeError as error:
        if isinstance(error, RunStopped) or not TIMED_OUT.search(str(error)):
            raise
        raise RunStopped(describe_timeout(store, world, timeout)) from error
    finally:
        if is_grouped():  # if it outlived the interpreter, its threads would abort the process
            dist.destroy_process_group()
            gc.collect()  # a data parallel model in a reference cycle still holds the group


def open_store(world: World, address: str, is_launched: bool, patience: float) -> tuple[dist.Store, str]:
    """The store of the launcher, which lasts over restarts, or of rank 0 if there is none; and the launch's token."""
    port = os.environ.setdefault("MASTER_PORT", "29500")
    if not port.isdecimal() or int(port) > 65535:
        raise InputError(f"MASTER_PORT is {port!r}, not a whole number from 0 to 65535")
    if address:
        os.environ["MASTER_ADDR"] = address
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(port),
            is_master=world.is_main and not is_launched,
            timeout=timedelta(seconds=patience),
            wait_for_workers=False,
        )
        return store, store.compare_set("aligned_reid/launch", "", secrets.token_hex(16)).decode()
    except RuntimeError as error:
        raise RunStopped(f"rank {world.rank} found no other process within {patience:g} s: {error}") from error


def meet(store: dist.Store, world: World, patience: float) -> dist.Store:
    """The part of a launch's store that is this attempt's, once all of its ranks are there.

    After a restart the store still holds the keys of the attempt before, and the restart counts of several machines may
    differ. So each process draws a token, and an attempt is named by the tokens of all its ranks. Raises RunStopped if
    ranks are missing after `patience` seconds.
    """
    arrived, agreed = ([f"{key} {rank}" for rank in range(world.size)] for key in ("arrived", "agreed"))
    store.set(arrived[world.rank], secrets.token_hex(8))
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if store.check(arrived):
            attempt = " ".join(store.get(key).decode() for key in arrived)
            store.set(agreed[world.rank], attempt)
            if store.check(agreed) and all(store.get(key).decode() == attempt for key in agreed):
                return dist.PrefixStore(f"attempt {attempt}", store)
        time.sleep(POLL_SECONDS)
    raise RunStopped(f"rank {world.rank}: not all of {world.size} processes came within {patience:g} s (4 x --timeout)")


def describe_timeout(store: dist.Store, world: World, timeout: float) -> str:
    """One line about a collective that timed out, with the ranks that do not report the same."""
    silent = "another process"
    try:
        store.set(f"waited {world.rank}", "")
        time.sleep(GRACE_SECONDS)
        ranks = [str(rank) for rank in range(world.size) if not store.check([f"waited {rank}"])]
        silent = f"rank {', '.join(ranks)}" if ranks else silent
    except RuntimeError:  # the store is gone with its machine
        pass
    return f"no answer from {silent}: rank {world.rank} waited {timeout:g} s (--timeout)"


def is_grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over all ranks; the tensor itself in a run of one process."""
    if is_grouped():
        dist.all_reduce(value)
    return value


def take_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors on every rank with rank 0's."""
    if is_grouped():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather_with_own(own: Tensor) -> Tensor:
    """Concatenate the ranks' tensors [n, ...] of equal shape to [size * n, ...].

    Gradients flow through this rank's part, which is `own` itself; the others are constants.
    """
    if not is_grouped():
        return own
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.detach().contiguous())
    parts[dist.get_rank()] = own
    return torch.cat(parts)


def from_main(read: Callable[[], Any], device: torch.device) -> Any:
    """What `read` returns on rank 0, on all ranks. Its tensors have to be on the CPU; `device` is the backend's."""
    if not is_grouped():
        return read()
    objects = [read() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(objects, src=0, device=device)
    return objects[0]


def gather_rows(rows: Tensor, total: int) -> Tensor:
    """Concatenate the ranks' blocks [n_r, ...], cut by `share_of`, to [total, ...] on every rank.

    Blocks are padded to equal size for all_gather: hccl has no gather.
    """
    if not is_grouped():
        return rows
    size = dist.get_world_size()
    longest = -(-total // size)
    padded = torch.zeros((longest, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    padded[: len(rows)] = rows
    blocks = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(blocks, padded)
    counts = [len(share_of(total, World(rank, size))) for rank in range(size)]
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


def share_of(total: int, world: World) -> range:
    """This rank's block of `total` items. All blocks have the same size but the last ones, which may be shorter."""
    longest = -(-total // world.size)
    return range(min(world.rank * longest, total), min((world.rank + 1) * longest, total))
