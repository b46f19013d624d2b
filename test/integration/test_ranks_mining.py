"""Mining over the batches of all ranks: two ranks learn what one with the whole batch does."""

from pathlib import Path

import pytest
import torch
from conftest import run_script

PROGRAM = Path(__file__).with_name("mining_gradients.py")


def gradients_of(folder, dtype, num_ranks):
    """The gradients and figures that `num_ranks` processes give."""
    file = folder / f"{num_ranks}.pth"
    launcher = ("launch.py", f"--nproc={num_ranks}", f"--log_dir={folder}/logs")
    done = run_script(*launcher, PROGRAM, file, dtype, environment={"OMP_NUM_THREADS": "1"})
    assert done.status == 0, done.err
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
def test_two_ranks_have_the_gradients_of_one(tmp_path, dtype, tolerance):
    one, two = (gradients_of(tmp_path, dtype, num_ranks) for num_ranks in (1, 2))
    assert set(one["gradients"]) == set(two["gradients"])
    for name, gradient in one["gradients"].items():
        largest = gradient.abs().max().item()
        assert largest > 0, name
        assert (gradient - two["gradients"][name]).abs().max().item() <= tolerance * largest, name
    for name in ("gp", "gL", "lL"):  # of all triplets, whichever rank says it
        assert two["figures"][name] == pytest.approx(one["figures"][name], rel=1e-5)
    assert 0 < one["figures"]["gp"] < 1  # hard samples that are not all alike
