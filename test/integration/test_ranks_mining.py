"""Mining over the batches of all ranks: two ranks, each running this file, learn what one with the whole batch does."""

import sys

import pytest
import torch
from conftest import PROGRAM_PATH, assert_done, run_script, use_small_trunk

from aligned_reid.config import Config
from aligned_reid.device import Accelerator
from aligned_reid.distributed import World, process_group, read_world
from aligned_reid.model import AlignedReID
from aligned_reid.training.learner import Learner

NUM_IDS, NUM_IMAGES = 32, 4


def learn(world, dtype):
    """Gradients and figures of a rank's share of one batch, statistics of batch norms frozen."""
    torch.manual_seed(0)
    config = Config(amp="O0", l_loss_weight=0.7, id_loss_weight=0.3, cross_rank_mining=True, normalize_feature=True)
    network = AlignedReID(NUM_IDS, pretrained="none").to(dtype)
    learner = Learner(config, network, Accelerator(config), world)
    learner.network.eval()
    images = torch.randn(NUM_IDS, NUM_IMAGES, 3, 64, 32, dtype=dtype)
    images += torch.randn(NUM_IDS, 1, 3, 64, 32, dtype=dtype)  # what an identity's images have in common
    own = slice(world.rank * NUM_IDS // world.size, (world.rank + 1) * NUM_IDS // world.size)
    labels = torch.arange(NUM_IDS).repeat_interleave(NUM_IMAGES).view(NUM_IDS, NUM_IMAGES)
    loss, figures = learner.objective(learner.network(images[own].flatten(0, 1)), labels[own].flatten())
    learner.scaler.backward(loss)
    gradients = {name: one.grad for name, one in network.named_parameters() if one.grad is not None}
    return gradients, {name: value.item() for name, value in figures.items()}


def test_two_ranks_have_the_gradients_of_one(tmp_path, small_trunk):
    program = ("launch.py", "--nproc=2", f"--log_dir={tmp_path}/logs", __file__, tmp_path / "two.pth")
    assert_done(run_script(*program, environment=PROGRAM_PATH))
    of_two = torch.load(tmp_path / "two.pth")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        gradients, figures = learn(World(), dtype)
        two_gradients, two_figures = of_two[dtype]
        assert set(gradients) == set(two_gradients)
        for name, gradient in gradients.items():
            largest = gradient.abs().max().item()
            assert largest > 0, name
            assert (gradient - two_gradients[name]).abs().max().item() <= tolerance * largest, name
        for name in ("gp", "gL", "lL"):  # of all triplets, whichever rank says it
            assert two_figures[name] == pytest.approx(figures[name], rel=1e-5)
        assert 0 < figures["gp"] < 1  # hard samples that are not all alike


def main():
    use_small_trunk()
    world = read_world()
    with process_group(world, "gloo"):
        learned = {dtype: learn(world, dtype) for dtype in (torch.float32, torch.float64)}
    if world.is_main:
        torch.save(learned, sys.argv[1])


if __name__ == "__main__":
    main()
