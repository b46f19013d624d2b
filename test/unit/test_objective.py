"""The weighted sum of losses, the figures of an epoch's line, and what models learn from each other."""

import math

import pytest
import torch
import torch.nn.functional as F

from aligned_reid.config import Config
from aligned_reid.losses import TripletLoss, global_loss, local_loss
from aligned_reid.model import Features
from aligned_reid.objective import Objective, peer_outputs

WEIGHTS = ("g_loss_weight", "l_loss_weight", "id_loss_weight")


@pytest.fixture
def batch():
    torch.manual_seed(0)
    labels = torch.arange(4).repeat_interleave(3)
    shapes = ((12, 16), (12, 4, 8), (12, 4))
    features = Features(*(torch.randn(shape, requires_grad=True) for shape in shapes))
    return features, labels


@pytest.mark.parametrize(
    ("weights", "own", "names"),
    [
        ((1.0, 0.0, 0.0), False, "gp gm gd_ap gd_an gL loss"),
        ((0.0, 1.0, 0.0), False, "lp lm ld_ap ld_an lL loss"),
        ((0.5, 2.0, 0.25), False, "gp gm gd_ap gd_an gL lp lm ld_ap ld_an lL idL loss"),
        ((0.5, 2.0, 0.25), True, "gp gm gd_ap gd_an gL lp lm ld_ap ld_an lL idL loss"),
    ],
)
def test_the_loss_is_the_weighted_sum_and_unused_heads_get_no_gradient(batch, weights, own, names):
    features, labels = batch
    config = Config(**dict(zip(WEIGHTS, weights, strict=True)), local_dist_own_hard_sample=own)
    loss, figures = Objective(config)(features, labels)
    g_loss, hard, _ = global_loss(TripletLoss(0.3), features.global_feat, labels, False)
    inds = (None, None) if own else (hard.p_inds, hard.n_inds)
    l_loss, _, _ = local_loss(TripletLoss(0.3), features.local_feat, labels, *inds, normalize_feature=False)
    id_loss = F.cross_entropy(features.logits, labels)
    expected = sum(weight * value for weight, value in zip(weights, (g_loss, l_loss, id_loss), strict=True))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert list(figures) == names.split()
    loss.backward()
    assert [feat.grad is not None for feat in features] == [weight > 0 for weight in weights]


def test_figures_count_triplets_in_order_and_beyond_the_margin(batch):
    features, labels = batch
    _, hard, _ = global_loss(TripletLoss(0.3), features.global_feat, labels, False)
    _, figures = Objective(Config())(features, labels)
    assert figures["gp"] == (hard.dist_an > hard.dist_ap).float().mean()
    assert figures["gm"] == (hard.dist_an > hard.dist_ap + 0.3).float().mean()
    loss, figures = Objective(Config(global_margin=None))(features, labels)  # a soft margin counts the order only
    assert math.isfinite(loss.item()) and figures["gm"] == figures["gp"]


@pytest.mark.parametrize("weight", ["pm", "gdm", "ldm"])
def test_peers_see_only_what_a_mutual_loss_uses(batch, weight):
    config = Config(**{f"{weight}_loss_weight": 1.0, "num_models": 2})
    assert list(peer_outputs(batch[0], config)) == [f"{weight}L"]
