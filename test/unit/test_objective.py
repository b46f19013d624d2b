"""The weighted sum of losses, the figures of an epoch's line, and what models learn from each other."""

import math

import pytest
import torch
import torch.nn.functional as F

from aligned_reid.config import Config
from aligned_reid.losses import TripletLoss, global_loss, local_loss
from aligned_reid.model import Features
from aligned_reid.objective import Objective, peer_outputs


@pytest.fixture
def batch():
    torch.manual_seed(0)
    labels = torch.arange(4).repeat_interleave(3)
    shapes = ((12, 16), (12, 4, 8), (12, 4))
    features = Features(*(torch.randn(shape, requires_grad=True) for shape in shapes))
    return features, labels


def test_global_loss_alone_reaches_no_other_head(batch):
    features, labels = batch
    loss, figures = Objective(Config())(features, labels)
    expected, hard, _ = global_loss(TripletLoss(0.3), features.global_feat, labels, False)
    assert torch.equal(loss, expected)
    assert list(figures) == ["gp", "gm", "gd_ap", "gd_an", "gL", "loss"]
    assert figures["gp"] == (hard.dist_an > hard.dist_ap).float().mean()
    assert figures["gm"] == (hard.dist_an > hard.dist_ap + 0.3).float().mean()
    loss.backward()
    assert features.local_feat.grad is features.logits.grad is None
    loss, figures = Objective(Config(global_margin=None))(features, labels)  # a soft margin counts the order only
    assert math.isfinite(loss.item()) and figures["gm"] == figures["gp"]


@pytest.mark.parametrize("own", [True, False])
def test_the_loss_is_the_weighted_sum(batch, own):
    features, labels = batch
    config = Config(g_loss_weight=0.5, l_loss_weight=2.0, id_loss_weight=0.25, local_dist_own_hard_sample=own)
    loss, figures = Objective(config)(features, labels)
    g_loss, hard, _ = global_loss(TripletLoss(0.3), features.global_feat, labels, False)
    inds = (None, None) if own else (hard.p_inds, hard.n_inds)
    l_loss, _, _ = local_loss(TripletLoss(0.3), features.local_feat, labels, *inds, normalize_feature=False)
    id_loss = F.cross_entropy(features.logits, labels)
    assert loss.item() == pytest.approx((0.5 * g_loss + 2.0 * l_loss + 0.25 * id_loss).item(), rel=1e-6)
    names = ["gp", "gm", "gd_ap", "gd_an", "gL", "lp", "lm", "ld_ap", "ld_an", "lL", "idL", "loss"]
    assert list(figures) == names


def test_local_loss_alone_uses_the_global_hard_samples(batch):
    features, labels = batch
    loss, figures = Objective(Config(g_loss_weight=0.0, l_loss_weight=1.0))(features, labels)
    _, hard, _ = global_loss(TripletLoss(0.3), features.global_feat, labels, False)
    inds = {"p_inds": hard.p_inds, "n_inds": hard.n_inds}
    expected, _, _ = local_loss(TripletLoss(0.3), features.local_feat, **inds, normalize_feature=False)
    assert loss.item() == pytest.approx(expected.item())
    assert "gL" not in figures


@pytest.mark.parametrize("weight", ["pm", "gdm", "ldm"])
def test_peers_see_only_what_a_mutual_loss_uses(batch, weight):
    config = Config(**{f"{weight}_loss_weight": 1.0, "num_models": 2})
    assert list(peer_outputs(batch[0], config)) == [f"{weight}L"]
