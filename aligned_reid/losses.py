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

MINED_STRIPE_PAIRS = 2**20  # computed at a time in local mining: a whole batch of 128 images with 8 stripes


class HardExamples(NamedTuple):
    """The farthest positive and the nearest negative of each anchor."""

    dist_ap: Tensor  # [N], distance from anchor to positive
    dist_an: Tensor  # [N], distance from anchor to negative
    p_inds: Tensor  # [N] int64, index of the positive in the batch
    n_inds: Tensor  # [N] int64, index of the negative in the batch


@dataclass(frozen=True)
class TripletLoss:
    """Mean over anchors of max(0, dist_ap - dist_an + margin), or of log(1 + exp(dist_ap - dist_an)) if margin is None.

    dist_ap [N], dist_an [N] -> scalar.
    """

    margin: float | None = None

    def __call__(self, dist_ap: Tensor, dist_an: Tensor) -> Tensor:
        if dist_ap.shape != dist_an.shape:
            raise InputError(f"TripletLoss: needs two [N], got {list(dist_ap.shape)} and {list(dist_an.shape)}")
        excess = at_least_float32(dist_ap) - at_least_float32(dist_an)
        if self.margin is None:
            return -F.logsigmoid(-excess).mean()  # exp would overflow
        return (excess + self.margin).clamp(min=0).mean()


def check_batch_labels(labels: Tensor) -> None:
    """Raise InputError unless every anchor of the batch has a positive and a negative; labels [N].

    Pass labels on the host: with labels on a device, the host waits for the device.
    """
    identities, counts = torch.unique(labels, return_counts=True)
    if len(identities) < 2:
        raise InputError(
            "an anchor has no negative: triplets need at least two identities in a batch, "
            f"but all of its {labels.numel()} images show the same one"
        )
    if int(counts.min()) < 2:
        alone = ", ".join(map(str, identities[counts < 2].tolist()[:8]))
        raise InputError(
            "an anchor has no positive: triplets need at least two images of each identity in a batch, "
            f"which has only one of {alone}"
        )


def batch_hard(dist: Tensor, labels: Tensor) -> HardExamples:
    """Find the hardest positive and negative of each anchor: dist [N, N], labels [N] -> HardExamples.

    Identities may have different numbers of images. As in the reference, an anchor counts among its own positives,
    which matters only if all others coincide with it. Ties go to the first index. Gradient flows into the selected
    distances.

    Labels on the CPU are checked (see check_batch_labels) and raise InputError. Labels on a device are not, because the
    host would wait for the device at every step: check the host's copy before the transfer. The distances of an
    unchecked anchor without positive or negative are nan, so the loss is not finite rather than silently wrong.
    """
    if dist.dim() != 2 or dist.shape[0] != dist.shape[1] or labels.shape != dist.shape[:1]:
        shapes = f"{list(dist.shape)} and {list(labels.shape)}"
        raise InputError(f"batch_hard: needs dist [N, N] and labels [N], got {shapes}")
    if labels.device.type == "cpu":
        check_batch_labels(labels)
    labels = labels.to(dist.device, non_blocking=True)
    is_positive = labels.unsqueeze(0) == labels.unsqueeze(1)  # [N, N], including the diagonal
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
    """Triplet loss on Euclidean distances: feat [N, D], labels [N] -> (loss, HardExamples, dist [N, N])."""
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

    p_inds, n_inds [N]: the positives and negatives that the global distance selected; if they are not given, they are
    mined by aligned distance, which needs `labels` [N]. Raises InputError if neither is given.
    """
    if normalize_feature:
        feat = normalize(feat)
    if p_inds is None or n_inds is None:
        if labels is None:
            raise InputError("local_loss: needs labels, or both p_inds and n_inds")
        # Only 2 N of the N x N distances enter the loss: mine without gradient, a few rows at a time because there
        # are H * H as many stripe pairs, then differentiate those 2 N.
        rows = max(1, MINED_STRIPE_PAIRS // max(1, len(feat) * feat.shape[1] ** 2))
        with torch.no_grad():
            dist = torch.cat([aligned_distance(block, feat) for block in feat.split(rows)])  # [N, N]
            _, _, p_inds, n_inds = batch_hard(dist, labels)
    partners = torch.cat([p_inds, n_inds]).to(feat.device, non_blocking=True)
    dist = aligned_distance_pairs(feat.repeat(2, 1, 1), feat.index_select(0, partners))
    dist_ap, dist_an = dist.chunk(2)
    return triplet(dist_ap, dist_an), dist_ap, dist_an


class CenterLoss(nn.Module):
    """Half the mean squared distance of features from the centers of their identities.

    Wen et al., "A Discriminative Feature Learning Approach for Deep Face Recognition", ECCV 2016, equation 2, averaged
    over images. The centers are buffers, not parameters; `move` updates them by equation 4.
    """

    centers: Tensor  # [num_classes, width]

    def __init__(self, num_classes: int, width: int, rate: float = 0.5) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("centers", torch.zeros(num_classes, width))

    def forward(self, feat: Tensor, labels: Tensor) -> Tensor:
        """feat [N, width], labels [N] -> scalar, differentiable with respect to `feat`."""
        difference = at_least_float32(feat) - self.centers.index_select(0, labels)
        return 0.5 * difference.square().sum(1).mean()

    @torch.no_grad()
    def move(self, feat: Tensor, labels: Tensor, sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Move each center by rate * sum(feature - center) / (1 + count), over the images of its identity."""
        difference = at_least_float32(feat) - self.centers.index_select(0, labels)
        # [num_classes, width + 1]: the last column counts images, so a single reduction sums over the ranks.
        moved = self.centers.new_zeros((len(self.centers), self.centers.shape[1] + 1))
        moved.index_add_(0, labels, F.pad(difference, (0, 1), value=1.0))
        moved = sum_over_ranks(moved)
        self.centers.add_(moved[:, :-1] / (1.0 + moved[:, -1:]), alpha=self.rate)


def mutual_probability_loss(logits: Tensor, other_logits: Tensor) -> Tensor:
    """KL divergence of a model's class probabilities from another model's: [N, C], [N, C] -> scalar.

    KL(other || own), summed over classes and averaged over images. Gradient flows into `logits` only.
    """
    _check_same_shape("mutual_probability_loss", logits, other_logits)
    own = F.log_softmax(at_least_float32(logits), dim=1)
    other = F.log_softmax(at_least_float32(other_logits.detach()), dim=1)
    return F.kl_div(own, other, reduction="batchmean", log_target=True)


def mutual_distance_loss(dist: Tensor, other_dist: Tensor) -> Tensor:
    """Mean squared difference between two models' distances: [N, N], [N, N] -> scalar.

    Gradient flows into `dist` only.
    """
    _check_same_shape("mutual_distance_loss", dist, other_dist)
    return (at_least_float32(dist) - at_least_float32(other_dist.detach())).square().mean()


def _at(dist: Tensor, indices: Tensor) -> Tensor:
    """dist [N, N], indices [N] -> [N]: dist[n, indices[n]]."""
    return dist.gather(1, indices.unsqueeze(1)).squeeze(1)


def _check_same_shape(name: str, own: Tensor, other: Tensor) -> None:
    if own.shape != other.shape:
        raise InputError(f"{name}: the shapes of the two models differ: {list(own.shape)} and {list(other.shape)}")
