"""Mining over the batches of all ranks: two ranks learn what one with the whole batch does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aligned_reid.launcher import free_port

PROGRAM = Path(__file__).with_name("mining_gradients.py")


def gradients_of(file, dtype, num_ranks):
    """The gradients and figures that `num_ranks` processes give."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(file), dtype],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(num_ranks)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * num_ranks
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
def test_two_ranks_have_the_gradients_of_one(tmp_path, dtype, tolerance):
    one = gradients_of(tmp_path / "one.pth", dtype, 1)
    two = gradients_of(tmp_path / "two.pth", dtype, 2)
    assert set(one["gradients"]) == set(two["gradients"])
    for name, gradient in one["gradients"].items():
        largest = gradient.abs().max().item()
        assert largest > 0, name
        assert (gradient - two["gradients"][name]).abs().max().item() <= tolerance * largest, name
    for name in ("gp", "gL", "lL"):  # of all triplets, whichever rank says it
        assert two["figures"][name] == pytest.approx(one["figures"][name], rel=1e-5)
    assert 0 < one["figures"]["gp"] < 1  # hard samples that are not all alike
