"""Learning rate schedules. Epochs count from 1; the reference's rates change per epoch, warm-up and cosine per step."""

import math
from collections.abc import Sequence

from aligned_reid.config import Config


def exp_decay(epoch: int, base_lr: float, total_epochs: int, decay_at: int) -> float:
    """Learning rate in `epoch`: constant before epoch `decay_at`, then falling exponentially to base_lr / 1000.

    base_lr * 0.001 ^ ((epoch + 1 - decay_at) / (total_epochs + 1 - decay_at)), arXiv:1703.07737, equation 8.
    """
    if epoch < decay_at:
        return base_lr
    return base_lr * 0.001 ** ((epoch + 1 - decay_at) / (total_epochs + 1 - decay_at))


def staircase(epoch: int, base_lr: float, decay_at: Sequence[int], factor: float) -> float:
    """Learning rate in `epoch`: multiplied by `factor` at the start of each epoch in `decay_at`."""
    return base_lr * factor ** sum(epoch >= start for start in decay_at)


def cosine(done: float, base_lr: float, total_epochs: int) -> float:
    """Learning rate after `done` epochs, of which a step is a part: half a cosine from base_lr to base_lr / 1000.

    Loshchilov and Hutter, "SGDR", arXiv:1608.03983, equation 5, without restarts.
    """
    low = 0.001 * base_lr
    return low + (base_lr - low) * 0.5 * (1 + math.cos(math.pi * min(done / total_epochs, 1.0)))


def warm_up(done: float, warmup_epochs: int, start: float = 0.01) -> float:
    """Factor of the learning rate after `done` epochs: from `start` straight to 1 (arXiv:1706.02677, section 2.2)."""
    return start + (1 - start) * done / warmup_epochs if done < warmup_epochs else 1.0


def learning_rate(epoch: int, config: Config, share_done: float = 0.0) -> float:
    """The learning rate that the run's settings give in `epoch`, `share_done` of whose steps are done."""
    done = epoch - 1 + share_done
    base_lr = config.base_lr * warm_up(done, config.warmup_epochs)
    if config.lr_decay_type == "cosine":
        return cosine(done, base_lr, config.total_epochs)
    if config.lr_decay_type == "exp":
        return exp_decay(epoch, base_lr, config.total_epochs, config.exp_decay_at_epoch)
    return staircase(epoch, base_lr, config.staircase_decay_at_epochs, config.staircase_decay_multiply_factor)
