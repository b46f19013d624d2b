"""Ranks, shares and the environment that a launcher leaves."""

import pytest
import torch

from aligned_reid import InputError
from aligned_reid.distributed import World, gather_rows, open_group, read_world, share_of, sum_over_ranks


def test_world_comes_from_the_launchers_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert read_world() == World(0, 1, 0)
    assert read_world().is_main
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert read_world() == World(9, 16, 1)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(InputError, match="RANK 9 does not fit WORLD_SIZE 8"):
        read_world()
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(InputError, match="whole numbers"):
        read_world()


@pytest.mark.parametrize(("total", "size"), [(10, 1), (10, 3), (3, 8), (8, 8), (0, 2)])
def test_shares_cover_everything_once_in_order(total, size):
    shares = [share_of(total, World(rank, size)) for rank in range(size)]
    assert [index for share in shares for index in share] == list(range(total))


def test_one_process_needs_no_group():
    open_group(World(), "gloo")
    rows = torch.arange(6.0).view(3, 2)
    assert gather_rows(rows, 3) is rows
    assert sum_over_ranks(torch.tensor(3.0)) == 3
    assert not torch.distributed.is_initialized()
