"""Processes of one run: the group's start and end, this process's rank, sums and gathers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from aligned_reid.errors import InputError


@dataclass(frozen=True)
class World:
    """Where this process stands among the run's processes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine

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


WORLD_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def open_group(world: World, backend: str, address: str = "") -> None:
    """Join the process group; no more than a check for a single process.

    address: of the first machine; default: MASTER_ADDR, which torchrun sets. The time-out is long because the first
    process may load and check data while others wait.
    """
    if world.size == 1:
        return
    if address:
        os.environ["MASTER_ADDR"] = address
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timedelta(hours=2))


def close_group() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


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
