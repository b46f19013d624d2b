"""The losses of one batch, and the figures about its triplets that an epoch's line reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligned_reid.config import Config
from aligned_reid.distance import aligned_distance, euclidean_distance, normalize
from aligned_reid.distributed import World, gather_with_own, sum_over_ranks
from aligned_reid.losses import (
    CenterLoss,
    TripletLoss,
    global_loss,
    local_loss,
    mutual_distance_loss,
    mutual_probability_loss,
)
from aligned_reid.model import TRUNK_CHANNELS, Features

Figures = dict[str, Tensor]


class Objective(nn.Module):
    """Weighted sum of the global triplet, the local triplet, the identity and the center loss.

    Zhang et al., arXiv:1711.08184, section 3. With --cross_rank_mining triplets are mined over the batches of all ranks
    of `world`, which have one size. num_classes: for the centers.
    """

    def __init__(self, config: Config, world: World | None = None, num_classes: int = 0) -> None:
        super().__init__()
        self.config = config
        self.global_triplet = TripletLoss(config.global_margin)
        self.local_triplet = TripletLoss(config.local_margin)
        self.num_mined = world.size if world and config.cross_rank_mining else 1
        self.center_loss = CenterLoss(num_classes, TRUNK_CHANNELS) if config.center_loss_weight > 0 else None

    def forward(self, features: Features, labels: Tensor) -> tuple[Tensor, Figures]:
        """Features of N images and labels [N] -> (loss, named scalars for the log; the last one is the loss).

        With mining across ranks the loss is of all ranks' triplets; its gradient reaches this rank's features only and
        is so many times larger that the mean over ranks, which data parallel training takes, is the whole.
        """
        config = self.config
        if self.num_mined > 1:
            total, figures = self.triplet_losses(*gather_batches(features, labels))
            total = total.detach() + self.num_mined * (total - total.detach())
        else:
            total, figures = self.triplet_losses(features, labels)
        if config.id_loss_weight > 0:
            assert features.logits is not None, "a model that trains on identities has a classifier"
            loss = F.cross_entropy(features.logits.float(), labels, label_smoothing=config.label_smoothing)
            total = total + config.id_loss_weight * loss
            figures["idL"] = loss
        if self.center_loss is not None:
            loss = self.center_loss(features.global_feat, labels)
            self.center_loss.move(features.global_feat, labels, sum_over_ranks)
            total = total + config.center_loss_weight * loss
            figures["cL"] = loss
        return total, figures | {"loss": total}

    def triplet_losses(self, features: Features, labels: Tensor) -> tuple[Tensor, Figures]:
        """The weighted sum of the triplet losses, and their figures."""
        config = self.config
        total = features.global_feat.new_zeros(()).float()
        figures: Figures = {}
        p_inds = n_inds = None
        if config.g_loss_weight > 0 or (config.l_loss_weight > 0 and not config.local_dist_own_hard_sample):
            loss, hard, _ = global_loss(self.global_triplet, features.global_feat, labels, config.normalize_feature)
            if not config.local_dist_own_hard_sample:
                p_inds, n_inds = hard.p_inds, hard.n_inds
            if config.g_loss_weight > 0:
                total = total + config.g_loss_weight * loss
                figures |= triplet_figures("g", hard.dist_ap, hard.dist_an, config.global_margin, loss)
        if config.l_loss_weight > 0:
            loss, dist_ap, dist_an = local_loss(
                self.local_triplet, features.local_feat, labels, p_inds, n_inds, config.normalize_feature
            )
            total = total + config.l_loss_weight * loss
            figures |= triplet_figures("l", dist_ap, dist_an, config.local_margin, loss)
        return total, figures


def gather_batches(features: Features, labels: Tensor) -> tuple[Features, Tensor]:
    """The features and labels of all ranks' batches, in rank order; gradient reaches this rank's own."""
    global_feat, local_feat = (gather_with_own(one) for one in (features.global_feat, features.local_feat))
    return Features(global_feat, local_feat, None), gather_with_own(labels)


def peer_outputs(features: Features, config: Config) -> dict[str, Tensor]:
    """The outputs for a batch that mutual losses compare, by the loss's name in the log: logits, distances [N, N]."""
    global_feat, local_feat = features.global_feat, features.local_feat
    if config.normalize_feature:
        global_feat, local_feat = normalize(global_feat), normalize(local_feat)
    outputs: dict[str, Tensor] = {}
    if config.pm_loss_weight > 0:
        assert features.logits is not None, "--pm_loss_weight needs --id_loss_weight"
        outputs["pmL"] = features.logits
    if config.gdm_loss_weight > 0:
        outputs["gdmL"] = euclidean_distance(global_feat, global_feat)
    if config.ldm_loss_weight > 0:
        outputs["ldmL"] = aligned_distance(local_feat, local_feat)
    return outputs


def mutual_loss(
    config: Config, own: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]]
) -> tuple[Tensor | float, Figures]:
    """Weighted sum of a model's mutual losses, each the mean over the other models, and their figures.

    Deep mutual learning, arXiv:1706.00384, section 3.2; on distances arXiv:1711.08184, section 3.2.
    """
    weights = {"pmL": config.pm_loss_weight, "gdmL": config.gdm_loss_weight, "ldmL": config.ldm_loss_weight}
    figures: Figures = {}
    total: Tensor | float = 0.0
    for name, mine in own.items():
        compare = mutual_probability_loss if name == "pmL" else mutual_distance_loss
        theirs = [other[name].detach().to(mine.device) for other in others]
        figures[name] = torch.stack([compare(mine, other) for other in theirs]).mean()
        total = total + weights[name] * figures[name]
    return total, figures


def triplet_figures(
    branch: str, dist_ap: Tensor, dist_an: Tensor, margin: float | None, loss: Tensor
) -> dict[str, Tensor]:
    """Share of triplets in the right order (p) and with the margin kept (m; soft margin: 0), mean distances, loss."""
    dist_ap, dist_an = dist_ap.detach(), dist_an.detach()
    return {
        f"{branch}p": (dist_an > dist_ap).float().mean(),
        f"{branch}m": (dist_an > dist_ap + (margin or 0.0)).float().mean(),
        f"{branch}d_ap": dist_ap.mean(),
        f"{branch}d_an": dist_an.mean(),
        f"{branch}L": loss,
    }
