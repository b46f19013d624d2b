"""Processes of one run: the group's start and end, this process's rank, sums and gathers."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aligned_reid.rendezvous import (
    Meeting,
    World,
    connect,
    has_launchers_store,
    job_of,
    meet,
    read_world,
)

__all__ = ["World", "read_world"]  # besides what is defined here: who asks for the group asks for these


MEETING_SHARE = 4  # of --timeout: what ranks may come after each other, for some check and load data longer
CONNECT_SECONDS = 10.0


def open_group(world: World, backend: str, address: str = "", timeout: float = 600.0) -> Meeting | None:
    """Join the process group; no more than a check for a single process. Returns who is in it.

    address: of the first machine; default: MASTER_ADDR, which torchrun sets. timeout: seconds that a collective waits
    for a rank. Raises RunStopped where some ranks do not come.
    """
    if world.size == 1:
        return None
    if address:
        os.environ["MASTER_ADDR"] = address
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    patience = MEETING_SHARE * timeout
    meeting = meet(connect(world, patience), world, timeout, patience)
    dist.init_process_group(
        backend, store=meeting.store, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=timeout)
    )
    return meeting


def job_of_world(world: World, meeting: Meeting | None) -> dict[str, str]:
    """What this launch is known by, over restarts; see rendezvous.job_of."""
    if meeting is not None:
        return job_of(meeting.whole_store)
    with contextlib.suppress(RuntimeError):  # the environment may be that of a launcher that is gone
        if has_launchers_store():
            return job_of(connect(world, CONNECT_SECONDS))
    return job_of(None)


def close_group() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def group_size() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if is_grouped() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over all ranks; the tensor itself in a run of one process."""
    if is_grouped():
        dist.all_reduce(value)
    return value


def wait_for_all(device: torch.device | str = "cpu") -> None:
    """Return once every rank has called this; `device` is the one that the process group's backend computes on."""
    sum_over_ranks(torch.zeros(1, device=device)).item()


def take_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors with rank 0's, on every rank."""
    if is_grouped():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather_with_own(own: Tensor) -> Tensor:
    """Join the ranks' tensors [n, ...], all of one shape, in rank order to [size * n, ...].

    This rank's part is `own` itself, through which gradient flows; the others' are constants.
    """
    if not is_grouped():
        return own
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.detach().contiguous())
    parts[dist.get_rank()] = own
    return torch.cat(parts)


def largest_over_ranks(value: Tensor) -> Tensor:
    """Element-wise maximum of a tensor over all ranks; the tensor itself in a run of one process."""
    if is_grouped():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def from_rank(rank: int, read: Callable[[], Any], device: torch.device) -> Any:
    """What `read` gives rank `rank`, on all: tensors on the host, numbers, strings, lists and dicts of them."""
    if not is_grouped():
        return read()
    buffer = io.BytesIO()
    if dist.get_rank() == rank:
        torch.save(read(), buffer)
    size = torch.tensor([buffer.tell()], device=device)
    dist.broadcast(size, src=rank)
    data = torch.empty(int(size.item()), dtype=torch.uint8)
    if dist.get_rank() == rank:
        data.copy_(torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8))
    data = data.to(device)
    dist.broadcast(data, src=rank)
    return torch.load(io.BytesIO(data.cpu().numpy().tobytes()), weights_only=True)


def gather_rows(rows: Tensor, total: int) -> Tensor:
    """Join the ranks' blocks [n_r, ...] in rank order to [total, ...]; every rank gets it.

    Blocks are those of `share_of`. They travel at equal size by all_gather, which hccl has (it has no gather).
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
    """The block of `total` items that is this rank's; blocks differ by at most one rank's remainder at the end."""
    longest = -(-total // world.size)
    return range(min(world.rank * longest, total), min((world.rank + 1) * longest, total))
