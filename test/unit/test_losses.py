"""Losses, compared with the reference's values and gradients and with their definitions."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, refusal
from torch._subclasses.fake_tensor import FakeTensorMode

from aligned_reid import losses
from aligned_reid.distance import aligned_distance, euclidean_distance, normalize
from aligned_reid.losses import (
    CenterLoss,
    TripletLoss,
    batch_hard,
    check_batch_labels,
    global_loss,
    local_loss,
    mutual_distance_loss,
    mutual_probability_loss,
)

VECTORS = np.load(GOLDEN / "losses.npz")
UNEQUAL_LABELS = torch.tensor([5, 7, 5, 9, 9, 5, 7, 9, 9, 9])


def golden(name):
    return torch.from_numpy(VECTORS[name])


def random_tensor(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("margin_name", "margin"), [("m03", 0.3), ("soft", None)])
@pytest.mark.parametrize(("norm_name", "normalize_feature"), [("norm", True), ("raw", False)])
@pytest.mark.parametrize("kind", ["global", "local_own", "local_shared"])
def test_triplet_losses_match_the_reference(kind, norm_name, normalize_feature, margin_name, margin):
    triplet, labels = TripletLoss(margin), golden("labels")
    inds = {name: golden(f"global_{norm_name}_{margin_name}_{name}") for name in ("p_inds", "n_inds")}
    feat = golden("global_feat" if kind == "global" else "local_feat").requires_grad_()
    if kind == "global":
        loss, (dist_ap, dist_an, *mined), dist = global_loss(triplet, feat, labels, normalize_feature)
        assert dist.shape == (24, 24)
        assert all(torch.equal(one, expected) for one, expected in zip(mined, inds.values(), strict=True))
    else:
        partners = {"labels": labels} if kind == "local_own" else inds
        loss, dist_ap, dist_an = local_loss(triplet, feat, normalize_feature=normalize_feature, **partners)
    loss.backward()
    for name, value in {"loss": loss, "grad": feat.grad, "dist_ap": dist_ap, "dist_an": dist_an}.items():
        expected = VECTORS[f"{kind}_{norm_name}_{margin_name}_{name}"]
        np.testing.assert_allclose(value.detach().numpy(), expected, rtol=0, atol=1e-10, err_msg=name)


def test_mutual_losses_match_the_reference():
    prob = mutual_probability_loss(golden("mutual_logits_a"), golden("mutual_logits_b"))
    assert prob.item() == pytest.approx(VECTORS["mutual_prob_a_from_b"].item(), abs=1e-10)
    for kind, distance in (("global", euclidean_distance), ("local", aligned_distance)):
        own, other = golden(f"{kind}_feat"), golden(f"mutual_{kind}_b")
        loss = mutual_distance_loss(distance(own, own), distance(other, other))
        assert loss.item() == pytest.approx(VECTORS[f"mutual_{kind}_dist"].item(), abs=1e-10), kind


def test_mutual_losses_have_gradients_for_one_model_only():
    own, other = random_tensor(0, 6, 4).requires_grad_(), random_tensor(1, 6, 4).requires_grad_()
    (mutual_probability_loss(own, other) + mutual_distance_loss(own, other)).backward()
    assert other.grad is None
    expected = (own.detach().softmax(1) - other.detach().softmax(1)) / 6 + 2 * (own - other).detach() / 24
    torch.testing.assert_close(own.grad, expected)


@pytest.mark.parametrize("function", [mutual_probability_loss, mutual_distance_loss])
def test_mutual_losses_of_equal_outputs_are_zero_and_in_float32(function):
    logits = random_tensor(0, 6, 4)
    assert function(logits, logits).item() == pytest.approx(0, abs=1e-15)
    assert function(logits.half(), logits.half()).dtype == torch.float32
    assert "shape" in refusal(function, logits, logits[:, :3])


TIES = torch.tensor(np.random.default_rng(0).integers(0, 3, (10, 10)), dtype=torch.float64)


@pytest.mark.parametrize("dist", [euclidean_distance(random_tensor(1, 10, 4), random_tensor(1, 10, 4)), TIES])
def test_batch_hard_selects_the_first_farthest_positive_and_nearest_negative(dist):
    hard = batch_hard(dist, UNEQUAL_LABELS)
    for n, label in enumerate(UNEQUAL_LABELS):
        positives = (label == UNEQUAL_LABELS).nonzero().flatten().tolist()
        negatives = (label != UNEQUAL_LABELS).nonzero().flatten().tolist()
        p_ind = max(positives, key=lambda i, n=n: dist[n, i])  # max and min return the first
        n_ind = min(negatives, key=lambda i, n=n: dist[n, i])
        assert [value[n] for value in hard] == [dist[n, p_ind], dist[n, n_ind], p_ind, n_ind]


@pytest.mark.parametrize(
    ("labels", "words"), [([3, 3, 3, 3], "no negative"), ([3, 3, 4, 5], "no positive"), ([], "no negative")]
)
def test_an_anchor_without_partner_is_an_error(labels, words):
    labels = torch.tensor(labels, dtype=torch.int64)
    feat = random_tensor(0, len(labels), 4, 4)
    assert words in refusal(check_batch_labels, labels)
    assert words in refusal(batch_hard, torch.ones(len(labels), len(labels)), labels)
    assert words in refusal(global_loss, TripletLoss(0.3), feat[:, 0], labels, normalize_feature=False)
    assert words in refusal(local_loss, TripletLoss(0.3), feat, labels)


@pytest.fixture
def unchecked_labels(monkeypatch):
    """Treat labels on the CPU like labels on a device, which are not checked."""
    monkeypatch.setattr(losses, "check_batch_labels", lambda labels: None)


@pytest.mark.usefixtures("unchecked_labels")
def test_unchecked_labels_give_nan_instead_of_a_wrong_loss():
    hard = batch_hard(random_tensor(0, 4, 4), torch.tensor([0, 0, 0, 1]))
    assert hard.dist_ap.isnan().tolist() == [False, False, False, True] and not hard.dist_an.isnan().any()
    hard = batch_hard(random_tensor(0, 3, 3), torch.tensor([1, 1, 1]))
    assert hard.dist_an.isnan().all()
    assert all(TripletLoss(margin)(hard.dist_ap, hard.dist_an).isnan() for margin in (0.3, None))


@pytest.mark.usefixtures("unchecked_labels")
def test_losses_never_wait_for_the_device():
    """Fake tensors have no values, so any operation that needs a value on the host raises."""
    with FakeTensorMode():
        feat, labels = torch.empty(8, 4, 6, requires_grad=True), torch.zeros(8, dtype=torch.int64)
        loss, hard, _ = global_loss(TripletLoss(0.3), feat[:, 0], labels, normalize_feature=True)
        loss = loss + local_loss(TripletLoss(None), feat, labels)[0]
        loss = loss + local_loss(TripletLoss(0.3), feat, p_inds=hard.p_inds, n_inds=hard.n_inds)[0]
        loss.backward()
        assert feat.grad is not None


def test_a_soft_margin_does_not_overflow():
    far = torch.tensor([1000.0], requires_grad=True)
    loss = TripletLoss(None)(far, torch.tensor([0.0]))
    loss.backward()
    assert (loss.item(), far.grad.item()) == (1000, 1)


def test_local_loss_equals_the_loss_of_the_whole_distance_matrix():
    feat = random_tensor(3, 130, 8, 4).requires_grad_()  # mined in two blocks of rows
    labels = UNEQUAL_LABELS.repeat(13)
    loss, dist_ap, dist_an = local_loss(TripletLoss(0.3), feat, labels)
    unit = normalize(feat)
    hard = batch_hard(aligned_distance(unit, unit), labels)
    expected = TripletLoss(0.3)(hard.dist_ap, hard.dist_an)
    torch.testing.assert_close((loss, dist_ap, dist_an), (expected, hard.dist_ap, hard.dist_an))
    torch.testing.assert_close(torch.autograd.grad(loss, feat), torch.autograd.grad(expected, feat))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_are_in_at_least_float32_under_autocast(dtype):
    feat = random_tensor(4, 10, 5, 4).to(dtype).requires_grad_()
    expected_dtype = torch.promote_types(dtype, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        global_value, hard, dist = global_loss(TripletLoss(0.3), feat[:, 0], UNEQUAL_LABELS, normalize_feature=True)
        local_value, *_ = local_loss(TripletLoss(None), feat, UNEQUAL_LABELS)
    plain_value, *_ = global_loss(TripletLoss(0.3), feat[:, 0], UNEQUAL_LABELS, normalize_feature=True)
    assert {value.dtype for value in (global_value, local_value, dist, hard.dist_ap)} == {expected_dtype}
    assert torch.equal(global_value, plain_value)
    (global_value + local_value).backward()
    assert feat.grad.dtype == dtype
    assert torch.isfinite(feat.grad).all()


def test_wrong_arguments_are_errors():
    assert "labels" in refusal(local_loss, TripletLoss(0.3), random_tensor(0, 4, 5, 6), p_inds=torch.arange(4))
    for dist, labels in (((4, 5), (4,)), ((4, 4), (5,)), ((4, 4), (4, 1))):
        assert "batch_hard" in refusal(batch_hard, torch.zeros(dist), torch.zeros(labels, dtype=torch.int64))
    assert "TripletLoss" in refusal(TripletLoss(0.3), torch.zeros(3), torch.zeros(4))


def test_center_loss_follows_its_definition():
    loss = CenterLoss(3, 2)
    loss.centers.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]]))
    feat = torch.tensor([[3.0, 4.0], [1.0, 1.0], [1.0, 3.0]], requires_grad=True)
    labels = torch.tensor([0, 1, 1])
    value = loss(feat, labels)
    assert value.item() == pytest.approx(0.5 * (25 + 0 + 4) / 3)
    value.backward()
    assert torch.allclose(feat.grad, (feat.detach() - loss.centers[labels]) / 3)
    loss.move(feat, labels)
    # rate 0.5 times the sum of differences over 1 + their count; centers of identities not in the batch stay
    expected = torch.tensor([[0.5 * 3 / 2, 0.5 * 4 / 2], [1.0, 1.0 + 0.5 * 2 / 3], [5.0, 5.0]])
    assert torch.allclose(loss.centers, expected)
    alone, ranks = CenterLoss(3, 2), CenterLoss(3, 2)  # centers move by the images of all ranks
    alone.move(feat.repeat(2, 1), labels.repeat(2))
    ranks.move(feat, labels, sum_over_ranks=lambda value: 2 * value)
    assert torch.allclose(alone.centers, ranks.centers)
