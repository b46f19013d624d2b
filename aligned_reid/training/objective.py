"""The losses of one batch, and the figures about its triplets that an epoch's line reports."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from aligned_reid.config import Config
from aligned_reid.losses import TripletLoss, global_loss, local_loss
from aligned_reid.model import Features


class Objective:
    """Weighted sum of the global triplet, the local triplet and the identity loss (arXiv:1711.08184, section 3)."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.global_triplet = TripletLoss(config.global_margin)
        self.local_triplet = TripletLoss(config.local_margin)

    def __call__(self, features: Features, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features of N images and labels [N] -> (loss, named scalars for the log; the last one is the loss)."""
        config = self.config
        total = features.global_feat.new_zeros(()).float()
        figures: dict[str, Tensor] = {}
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
        if config.id_loss_weight > 0:
            assert features.logits is not None, "a model that trains on identities has a classifier"
            loss = F.cross_entropy(features.logits.float(), labels)
            total = total + config.id_loss_weight * loss
            figures["idL"] = loss
        return total, figures | {"loss": total}


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
