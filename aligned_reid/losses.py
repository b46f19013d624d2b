"""Batch-hard triplet loss on global and aligned local distances, and the deep mutual learning losses.

Batch-hard mining: Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", arXiv:1703.07737.
Mutual learning: Zhang et al., "Deep Mutual Learning", arXiv:1706.00384, on distances: arXiv:1711.08184, section 3.2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligned_reid.distance import (
    aligned_distance,
    aligned_distance_pairs,
    at_least_float32,
    euclidean_distance,
    normalize,
)
from aligned_reid.errors import InputError

COSTS_AT_A_TIME = 2**20  # of pairs of stripes, in mining: all of a batch of 128 images with 8 stripes


class HardExamples(NamedTuple):
    """For each anchor, its farthest positive and its nearest negative; each [N]."""

    dist_ap: Tensor  # distance of anchor and positive
    dist_an: Tensor  # distance of anchor and negative
    p_inds: Tensor  # index of the positive in the batch, int64
    n_inds: Tensor  # index of the negative in the batch, int64


@dataclass(frozen=True)
class TripletLoss:
    """Mean over anchors of max(0, dist_ap - dist_an + margin), or with margin None of log(1 + exp(dist_ap - dist_an)).

    Called with dist_ap [N] and dist_an [N]; returns a scalar.
    """

    margin: float | None = None

    def __call__(self, dist_ap: Tensor, dist_an: Tensor) -> Tensor:
        if dist_ap.shape != dist_an.shape:
            raise InputError(f"TripletLoss: needs two [N], got {list(dist_ap.shape)} and {list(dist_an.shape)}")
        excess = at_least_float32(dist_ap) - at_least_float32(dist_an)
        if self.margin is None:
            return -F.logsigmoid(-excess).mean()  # does not overflow as exp does
        return (excess + self.margin).clamp(min=0).mean()


def check_batch_labels(labels: Tensor) -> None:
    """Raise InputError unless every anchor of a batch, labels [N], has a positive and a negative in it.

    Call it on the host's copy of the labels: on a device's copy it waits for the device.
    """
    identities, counts = torch.unique(labels, return_counts=True)
    if len(identities) < 2:
        raise InputError(
            f"an anchor has no negative: all {labels.numel()} images of the batch are of one identity; "
            "triplets need at least two identities in a batch"
        )
    if int(counts.min()) < 2:
        alone = identities[counts < 2].tolist()
        raise InputError(
            f"an anchor has no positive: identity {alone[0]} has one image in the batch"
            + (f", and so have {len(alone) - 1} more" if len(alone) > 1 else "")
            + "; triplets need at least two images of each identity"
        )


def batch_hard(dist: Tensor, labels: Tensor) -> HardExamples:
    """The hardest positive and negative of each anchor: dist [N, N], labels [N] -> HardExamples.

    Identities may have unequal numbers of images. As in the reference an anchor counts among its own positives, which
    matters only where all others coincide with it. Among equals the first index is taken. Gradient flows into the
    selected distances.

    An anchor without another image of its identity, or without one of another identity, raises InputError when `labels`
    are on the CPU, wherever `dist` is. Labels on a device are not looked at from the host, which would wait for it in
    every step: call check_batch_labels on the host's copy before its transfer. Unchecked, such an anchor's distances
    are nan, so that the loss is not finite rather than quietly wrong.
    """
    if dist.dim() != 2 or dist.shape[0] != dist.shape[1] or labels.shape != dist.shape[:1]:
        shapes = f"{list(dist.shape)} and {list(labels.shape)}"
        raise InputError(f"batch_hard: needs dist [N, N] and labels [N], got {shapes}")
    if labels.device.type == "cpu":
        check_batch_labels(labels)
    labels = labels.to(dist.device, non_blocking=True)
    is_positive = labels.unsqueeze(0) == labels.unsqueeze(1)  # [N, N], the diagonal included
    values = dist.detach()
    p_inds = values.masked_fill(~is_positive, -torch.inf).argmax(1)
    n_inds = values.masked_fill(is_positive, torch.inf).argmin(1)
    num_positives = is_positive.sum(1)
    nan = torch.full_like(values[:, 0], torch.nan)
    dist_ap = torch.where(num_positives > 1, _at(dist, p_inds), nan)
    dist_an = torch.where(num_positives < len(labels), _at(dist, n_inds), nan)
    return HardExamples(dist_ap, dist_an, p_inds, n_inds)


def global_loss(
    triplet: TripletLoss, feat: Tensor, labels: Tensor, normalize_feature: bool
) -> tuple[Tensor, HardExamples, Tensor]:
    """Triplet loss on euclidean distances: feat [N, D], labels [N] -> (loss, HardExamples, dist [N, N])."""
    if normalize_feature:
        feat = normalize(feat)
    dist = euclidean_distance(feat, feat)
    hard = batch_hard(dist, labels)
    return triplet(hard.dist_ap, hard.dist_an), hard, dist


def local_loss(
    triplet: TripletLoss,
    feat: Tensor,
    labels: Tensor | None = None,
    p_inds: Tensor | None = None,
    n_inds: Tensor | None = None,
    normalize_feature: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Triplet loss on aligned distances: feat [N, H, d] -> (loss, dist_ap [N], dist_an [N]).

    The hard samples are those at p_inds and n_inds (each [N], of the global distance) where they are given; else the
    aligned distance mines its own with `labels` [N]. Raises InputError where neither is given.
    """
    if normalize_feature:
        feat = normalize(feat)
    if p_inds is None or n_inds is None:
        if labels is None:
            raise InputError("local_loss: needs labels, or both p_inds and n_inds")
        # Of the N x N distances only 2 N enter the loss: mine without gradient, then differentiate those.
        with torch.no_grad():
            hard = batch_hard(_distances_by_rows(feat), labels)
        p_inds, n_inds = hard.p_inds, hard.n_inds
    partners = torch.cat([p_inds, n_inds]).to(feat.device, non_blocking=True)
    dist = aligned_distance_pairs(feat.repeat(2, 1, 1), feat.index_select(0, partners))
    dist_ap, dist_an = dist.chunk(2)
    return triplet(dist_ap, dist_an), dist_ap, dist_an


class CenterLoss(nn.Module):
    """Half the mean squared distance of features from the center of their identity.

    Wen et al., "A Discriminative Feature Learning Approach for Deep Face Recognition", ECCV 2016, equation 2, as a mean
    over images. The centers are no parameters: `move` moves them as equation 4 says.
    """

    centers: Tensor  # [num_classes, width]

    def __init__(self, num_classes: int, width: int, rate: float = 0.5) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("centers", torch.zeros(num_classes, width))

    def forward(self, feat: Tensor, labels: Tensor) -> Tensor:
        """feat [N, width], labels [N] -> scalar; its gradient reaches `feat`."""
        difference = at_least_float32(feat) - self.centers.index_select(0, labels)
        return 0.5 * difference.square().sum(1).mean()

    @torch.no_grad()
    def move(self, feat: Tensor, labels: Tensor, sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Move each center by rate * sum(feature - center) / (1 + number), over the images of its identity."""
        difference = at_least_float32(feat) - self.centers.index_select(0, labels)
        # One tensor [C, width + 1], the last column counting, so that ranks add up theirs in one go.
        moved = self.centers.new_zeros((len(self.centers), self.centers.shape[1] + 1))
        moved.index_add_(0, labels, F.pad(difference, (0, 1), value=1.0))
        moved = sum_over_ranks(moved)
        self.centers.add_(moved[:, :-1] / (1.0 + moved[:, -1:]), alpha=self.rate)


def mutual_probability_loss(logits: Tensor, other_logits: Tensor) -> Tensor:
    """How far a model's class probabilities are from those of another, which is taken as given.

    [N, C], [N, C] -> scalar: KL(other || own), summed over classes, mean over images. The gradient reaches `logits`
    only.
    """
    _check_same_shape("mutual_probability_loss", logits, other_logits)
    own = F.log_softmax(at_least_float32(logits), dim=1)
    other = F.log_softmax(at_least_float32(other_logits.detach()), dim=1)
    return F.kl_div(own, other, reduction="batchmean", log_target=True)


def mutual_distance_loss(dist: Tensor, other_dist: Tensor) -> Tensor:
    """Mean squared difference of a model's distances from those of another, which is taken as given.

    [N, N], [N, N] -> scalar. The gradient reaches `dist` only.
    """
    _check_same_shape("mutual_distance_loss", dist, other_dist)
    return (at_least_float32(dist) - at_least_float32(other_dist.detach())).square().mean()


def _distances_by_rows(feat: Tensor) -> Tensor:
    """Aligned distances of all pairs, feat [N, H, d] -> [N, N]; some rows at a time: the costs are H * H as many."""
    rows = max(1, COSTS_AT_A_TIME // max(1, len(feat) * feat.shape[1] ** 2))
    return torch.cat([aligned_distance(block, feat) for block in feat.split(rows)])


def _at(dist: Tensor, indices: Tensor) -> Tensor:
    """dist [N, N], indices [N] -> dist[n, indices[n]], [N]."""
    return dist.gather(1, indices.unsqueeze(1)).squeeze(1)


def _check_same_shape(name: str, own: Tensor, other: Tensor) -> None:
    if own.shape != other.shape:
        raise InputError(f"{name}: the two models differ in shape: {list(own.shape)} and {list(other.shape)}")
