"""Losses against the reference's values and gradients, and against the definitions written out."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from aligned_reid import InputError, losses
from aligned_reid.distance import aligned_distance, euclidean_distance, normalize
from aligned_reid.losses import (
    HardExamples,
    TripletLoss,
    batch_hard,
    check_batch_labels,
    global_loss,
    local_loss,
    mutual_distance_loss,
    mutual_probability_loss,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz")
UNEQUAL_LABELS = torch.tensor([5, 7, 5, 9, 9, 5, 7, 9, 9, 9])


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[name])


def random_tensor(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("margin_name", "margin"), [("m03", 0.3), ("soft", None)])
@pytest.mark.parametrize(("norm_name", "normalize_feature"), [("norm", True), ("raw", False)])
class TestGolden:
    def check(self, prefix: str, feat: torch.Tensor, loss: torch.Tensor, *dists: torch.Tensor) -> None:
        loss.backward()
        assert feat.grad is not None
        computed = {"loss": loss, "grad": feat.grad, "dist_ap": dists[0], "dist_an": dists[1]}
        for name, value in computed.items():
            np.testing.assert_allclose(value.detach().numpy(), GOLDEN[prefix + name], rtol=0, atol=1e-10, err_msg=name)

    def test_global(self, margin_name: str, margin: float | None, norm_name: str, normalize_feature: bool) -> None:
        prefix = f"global_{norm_name}_{margin_name}_"
        feat = golden("global_feat").requires_grad_()
        loss, hard, dist = global_loss(TripletLoss(margin), feat, golden("labels"), normalize_feature)
        assert torch.equal(hard.p_inds, golden(prefix + "p_inds"))
        assert torch.equal(hard.n_inds, golden(prefix + "n_inds"))
        assert dist.shape == (24, 24)
        self.check(prefix, feat, loss, hard.dist_ap, hard.dist_an)

    def test_local_own(self, margin_name: str, margin: float | None, norm_name: str, normalize_feature: bool) -> None:
        feat = golden("local_feat").requires_grad_()
        labels = golden("labels")
        loss, *dists = local_loss(TripletLoss(margin), feat, labels, normalize_feature=normalize_feature)
        self.check(f"local_own_{norm_name}_{margin_name}_", feat, loss, *dists)

    def test_local_shared(
        self, margin_name: str, margin: float | None, norm_name: str, normalize_feature: bool
    ) -> None:
        feat = golden("local_feat").requires_grad_()
        inds = {key: golden(f"global_{norm_name}_{margin_name}_{key}") for key in ("p_inds", "n_inds")}
        loss, *dists = local_loss(TripletLoss(margin), feat, normalize_feature=normalize_feature, **inds)
        self.check(f"local_shared_{norm_name}_{margin_name}_", feat, loss, *dists)


def test_mutual_golden() -> None:
    computed = {
        "mutual_prob_a_from_b": mutual_probability_loss(golden("mutual_logits_a"), golden("mutual_logits_b")),
        "mutual_global_dist": mutual_distance_loss(
            euclidean_distance(golden("global_feat"), golden("global_feat")),
            euclidean_distance(golden("mutual_global_b"), golden("mutual_global_b")),
        ),
        "mutual_local_dist": mutual_distance_loss(
            aligned_distance(golden("local_feat"), golden("local_feat")),
            aligned_distance(golden("mutual_local_b"), golden("mutual_local_b")),
        ),
    }
    for name, value in computed.items():
        assert value.item() == pytest.approx(float(GOLDEN[name]), abs=1e-10), name


def test_mutual_losses_teach_one_model_only() -> None:
    own, other = random_tensor(0, 6, 4).requires_grad_(), random_tensor(1, 6, 4).requires_grad_()
    (mutual_probability_loss(own, other) + mutual_distance_loss(own, other)).backward()
    assert other.grad is None
    assert own.grad is not None
    expected = (own.detach().softmax(1) - other.detach().softmax(1)) / 6 + 2 * (own - other).detach() / 24
    torch.testing.assert_close(own.grad, expected)


def test_mutual_losses_vanish_on_equal_models_and_widen_half() -> None:
    logits = random_tensor(0, 6, 4)
    assert mutual_probability_loss(logits, logits).item() == pytest.approx(0, abs=1e-15)
    assert mutual_distance_loss(logits, logits).item() == 0
    assert mutual_probability_loss(logits.half(), logits.half()).dtype == torch.float32
    assert mutual_distance_loss(logits.bfloat16(), logits.bfloat16()).dtype == torch.float32
    for function in (mutual_probability_loss, mutual_distance_loss):
        with pytest.raises(InputError, match="differ in shape"):
            function(logits, logits[:, :3])


def check_against_loops(hard: HardExamples, dist: torch.Tensor, labels: torch.Tensor) -> None:
    for n, label in enumerate(labels.tolist()):
        positives = [i for i, other in enumerate(labels.tolist()) if other == label]
        negatives = [i for i, other in enumerate(labels.tolist()) if other != label]
        p_ind = max(positives, key=lambda i: (dist[n, i].item(), -i))
        n_ind = min(negatives, key=lambda i: (dist[n, i].item(), i))
        assert (hard.p_inds[n].item(), hard.n_inds[n].item()) == (p_ind, n_ind)
        assert (hard.dist_ap[n].item(), hard.dist_an[n].item()) == (dist[n, p_ind].item(), dist[n, n_ind].item())


def test_batch_hard_with_unequal_counts() -> None:
    for seed in range(5):
        feat = random_tensor(seed, 10, 4)
        dist = euclidean_distance(feat, feat)
        check_against_loops(batch_hard(dist, UNEQUAL_LABELS), dist, UNEQUAL_LABELS)


def test_batch_hard_takes_the_first_of_equals() -> None:
    dist = torch.tensor(np.random.default_rng(0).integers(0, 3, (10, 10)), dtype=torch.float32)
    check_against_loops(batch_hard(dist, UNEQUAL_LABELS), dist, UNEQUAL_LABELS)
    hard = batch_hard(torch.ones(4, 4), torch.tensor([0, 0, 1, 1]))
    assert hard.p_inds.tolist() == [0, 0, 2, 2]
    assert hard.n_inds.tolist() == [2, 2, 0, 0]


def test_batch_hard_gradient_reaches_the_selected_distances_only() -> None:
    dist = random_tensor(0, 10, 10).requires_grad_()
    hard = batch_hard(dist, UNEQUAL_LABELS)
    (hard.dist_ap.sum() - 2 * hard.dist_an.sum()).backward()
    expected = torch.zeros(10, 10, dtype=torch.float64)
    anchors = torch.arange(10)
    expected[anchors, hard.p_inds] += 1
    expected[anchors, hard.n_inds] -= 2
    assert dist.grad is not None
    assert torch.equal(dist.grad, expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([3, 3, 3, 3], "no negative: all 4 images"),
        ([3, 3, 4, 5], "no positive: identity 4 has one image in the batch, and so have 1 more"),
        ([3, 3, 3, 5], "no positive: identity 5 has one image in the batch;"),
        ([3], "no negative"),
        ([], "no negative"),
    ],
)
def test_anchor_without_partner_is_said(labels: list[int], message: str) -> None:
    host_labels = torch.tensor(labels, dtype=torch.int64)
    feat = random_tensor(0, len(labels), 4, 4)
    triplet = TripletLoss(0.3)
    for function in (
        lambda: check_batch_labels(host_labels),
        lambda: batch_hard(torch.ones(len(labels), len(labels)), host_labels),
        lambda: global_loss(triplet, feat[:, 0], host_labels, normalize_feature=False),
        lambda: local_loss(triplet, feat, host_labels),
    ):
        with pytest.raises(InputError, match=message):
            function()


def test_unchecked_labels_give_nan_rather_than_a_wrong_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with labels on a device, where nothing is checked."""
    monkeypatch.setattr(losses, "check_batch_labels", lambda labels: None)
    hard = batch_hard(random_tensor(0, 4, 4), torch.tensor([0, 0, 0, 1]))
    assert hard.dist_ap.isnan().tolist() == [False, False, False, True]
    assert not hard.dist_an.isnan().any()
    hard = batch_hard(random_tensor(0, 3, 3), torch.tensor([1, 1, 1]))
    assert hard.dist_an.isnan().all()
    assert TripletLoss(0.3)(hard.dist_ap, hard.dist_an).isnan()
    assert TripletLoss(None)(hard.dist_ap, hard.dist_an).isnan()


def test_nothing_looks_at_values_once_labels_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake tensor has no values: whatever would make a device wait for the host raises."""
    monkeypatch.setattr(losses, "check_batch_labels", lambda labels: None)
    with FakeTensorMode():
        feat, labels = torch.empty(8, 4, 6, requires_grad=True), torch.zeros(8, dtype=torch.int64)
        loss, hard, _ = global_loss(TripletLoss(0.3), feat[:, 0], labels, normalize_feature=True)
        loss = loss + local_loss(TripletLoss(None), feat, labels)[0]
        loss = loss + local_loss(TripletLoss(0.3), feat, p_inds=hard.p_inds, n_inds=hard.n_inds)[0]
        loss.backward()
        assert feat.grad is not None


def test_triplet_is_its_formula() -> None:
    dist_ap, dist_an = random_tensor(0, 20), random_tensor(1, 20)
    excess = (dist_ap - dist_an).tolist()
    margin_loss = sum(max(0.0, value + 0.3) for value in excess) / 20
    soft_loss = sum(math.log(1 + math.exp(value)) for value in excess) / 20
    assert TripletLoss(0.3)(dist_ap, dist_an).item() == pytest.approx(margin_loss, abs=1e-12)
    assert TripletLoss(margin=None)(dist_ap, dist_an).item() == pytest.approx(soft_loss, abs=1e-12)


def test_soft_margin_does_not_overflow() -> None:
    dist_ap = torch.tensor([1000.0], requires_grad=True)
    loss = TripletLoss(None)(dist_ap, torch.tensor([0.0]))
    loss.backward()
    assert loss.item() == 1000
    assert dist_ap.grad is not None
    assert dist_ap.grad.item() == 1


def test_local_loss_is_that_of_the_whole_matrix() -> None:
    feat = random_tensor(3, 10, 5, 4).requires_grad_()
    loss, dist_ap, dist_an = local_loss(TripletLoss(0.3), feat, UNEQUAL_LABELS)
    (gradient,) = torch.autograd.grad(loss, feat)
    unit = normalize(feat)
    hard = batch_hard(aligned_distance(unit, unit), UNEQUAL_LABELS)
    expected = TripletLoss(0.3)(hard.dist_ap, hard.dist_an)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(dist_ap, hard.dist_ap)
    torch.testing.assert_close(dist_an, hard.dist_an)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, feat)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_are_in_at_least_float32_under_autocast(dtype: torch.dtype) -> None:
    feat = random_tensor(4, 10, 5, 4).to(dtype).requires_grad_()
    expected_dtype = torch.promote_types(dtype, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        global_value, hard, dist = global_loss(TripletLoss(0.3), feat[:, 0], UNEQUAL_LABELS, normalize_feature=True)
        local_value, *_ = local_loss(TripletLoss(None), feat, UNEQUAL_LABELS)
    plain_value, *_ = global_loss(TripletLoss(0.3), feat[:, 0], UNEQUAL_LABELS, normalize_feature=True)
    assert {value.dtype for value in (global_value, local_value, dist, hard.dist_ap)} == {expected_dtype}
    assert torch.equal(global_value, plain_value)
    (global_value + local_value).backward()
    assert feat.grad is not None
    assert feat.grad.dtype == dtype
    assert torch.isfinite(feat.grad).all()


def test_identical_images_keep_loss_and_gradient_finite() -> None:
    feat = torch.ones(4, 5, 6, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    for margin in (0.3, None):
        loss = global_loss(TripletLoss(margin), feat[:, 0], labels, normalize_feature=True)[0]
        loss = loss + local_loss(TripletLoss(margin), feat, labels)[0]
        (gradient,) = torch.autograd.grad(loss, feat)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


def test_wrong_arguments_are_said() -> None:
    with pytest.raises(InputError, match="labels"):
        local_loss(TripletLoss(0.3), random_tensor(0, 4, 5, 6), p_inds=torch.arange(4))
    for dist, labels in (((4, 5), (4,)), ((4, 4), (5,)), ((4, 4), (4, 1))):
        with pytest.raises(InputError, match="needs dist"):
            batch_hard(torch.zeros(dist), torch.zeros(labels, dtype=torch.int64))
    with pytest.raises(InputError, match="two"):
        TripletLoss(0.3)(torch.zeros(3), torch.zeros(4))


def test_center_loss_follows_its_definition():
    loss = losses.CenterLoss(3, 2)
    loss.centers.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]]))
    feat = torch.tensor([[3.0, 4.0], [1.0, 1.0], [1.0, 3.0]], requires_grad=True)
    labels = torch.tensor([0, 1, 1])
    value = loss(feat, labels)
    assert value.item() == pytest.approx(0.5 * (25 + 0 + 4) / 3)
    value.backward()
    assert torch.allclose(feat.grad, (feat.detach() - loss.centers[labels]) / 3)
    loss.move(feat, labels)
    # rate 0.5 times the sum of differences over 1 + their number; an identity that is not in the batch stays
    expected = torch.tensor([[0.5 * 3 / 2, 0.5 * 4 / 2], [1.0, 1.0 + 0.5 * 2 / 3], [5.0, 5.0]])
    assert torch.allclose(loss.centers, expected)


def test_centers_move_by_all_ranks_images():
    alone, ranks = losses.CenterLoss(2, 4), losses.CenterLoss(2, 4)
    feat, labels = random_tensor(1, 6, 4).float(), torch.tensor([0, 0, 0, 1, 1, 1])
    alone.move(feat.repeat(2, 1), labels.repeat(2))
    ranks.move(feat, labels, sum_over_ranks=lambda value: 2 * value)
    assert torch.allclose(alone.centers, ranks.centers)
