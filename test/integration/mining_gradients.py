"""Gradients of one batch, mined as a whole: python mining_gradients.py <file> <float32 | float64>, alone or as ranks.

Each rank takes its share of the same 32 identities with 4 images, statistics of batch norms frozen, and rank 0 writes
the gradients that data parallel training gives. test_ranks_mining.py calls it.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from conftest import make_small_trunk  # noqa: E402

from aligned_reid import model  # noqa: E402
from aligned_reid.config import Config  # noqa: E402
from aligned_reid.device import Accelerator  # noqa: E402
from aligned_reid.distributed import close_group, open_group, read_world  # noqa: E402
from aligned_reid.training.learner import Learner  # noqa: E402

NUM_IDS, NUM_IMAGES = 32, 4


def main(file: str, dtype: torch.dtype) -> None:
    world = read_world()
    open_group(world, "gloo")
    torch.manual_seed(0)
    model.make_trunk = make_small_trunk
    config = Config(l_loss_weight=0.7, id_loss_weight=0.3, cross_rank_mining=True, normalize_feature=True)
    network = model.AlignedReID(NUM_IDS, pretrained="none").to(dtype)
    learner = Learner(config, network, Accelerator(mixed_precision=False), world)
    learner.network.eval()
    images = torch.randn(NUM_IDS, NUM_IMAGES, 3, 64, 32, dtype=dtype)
    images += torch.randn(NUM_IDS, 1, 3, 64, 32, dtype=dtype)  # what an identity's images have in common
    own = slice(world.rank * NUM_IDS // world.size, (world.rank + 1) * NUM_IDS // world.size)
    labels = torch.arange(NUM_IDS).repeat_interleave(NUM_IMAGES).view(NUM_IDS, NUM_IMAGES)
    features = learner.network(images[own].flatten(0, 1))
    loss, figures = learner.objective(features, labels[own].flatten())
    learner.scaler.backward(loss)
    if world.is_main:
        gradients = {name: one.grad for name, one in network.named_parameters() if one.grad is not None}
        torch.save({"gradients": gradients, "figures": {name: value.item() for name, value in figures.items()}}, file)
    close_group()


if __name__ == "__main__":
    main(sys.argv[1], getattr(torch, sys.argv[2]))
