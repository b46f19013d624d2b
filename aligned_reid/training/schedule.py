"""Learning rate schedules of the reference; epochs count from 1, a rate holds for a whole epoch."""

from collections.abc import Sequence

from aligned_reid.config import Config

LR_SCALE_POWERS = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}


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


def learning_rate(epoch: int, config: Config, num_processes: int = 1) -> float:
    """The learning rate that the run's settings give for `epoch` (arXiv:1706.02677, section 2.1 for its scaling)."""
    base_lr = config.base_lr * num_processes ** LR_SCALE_POWERS[config.lr_scale]
    if config.lr_decay_type == "exp":
        return exp_decay(epoch, base_lr, config.total_epochs, config.exp_decay_at_epoch)
    return staircase(epoch, base_lr, config.staircase_decay_at_epochs, config.staircase_decay_multiply_factor)
