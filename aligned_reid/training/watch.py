"""What is watched for while a run trains: a loss that is not finite, and a model that has collapsed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from aligned_reid.config import Config
from aligned_reid.device import Accelerator
from aligned_reid.errors import RunStopped

LOSS_CHECK_LAG = 3  # steps: reading a loss at once would make a device wait for the host
NO_SPREAD = 1e-2  # mean distance to the nearest negative below which all features are one point
USUAL_CAUSE = (
    "usual causes: weights that were not loaded (see the trunk line above), or too high a learning rate (--base_lr)"
)


class LossWatch:
    """Stops the run at a loss that is not finite, at most LOSS_CHECK_LAG steps late, without waiting for the device."""

    def __init__(self, accelerator: Accelerator, describe: Callable[[int, Tensor], str]) -> None:
        self.accelerator, self.describe = accelerator, describe
        self.pending: deque[tuple[int, Callable[[], Tensor], Tensor]] = deque()

    def add(self, step: int, loss: Tensor, indices: Tensor) -> None:
        self.pending.append((step, self.accelerator.read_later(loss.detach()), indices))
        while len(self.pending) > LOSS_CHECK_LAG:
            self.check_oldest()

    def flush(self) -> None:
        """Check what is left; nothing is written to disk before."""
        while self.pending:
            self.check_oldest()

    def check_oldest(self) -> None:
        step, read, indices = self.pending.popleft()
        value = float(read())
        if not torch.isfinite(torch.tensor(value)):
            raise RunStopped(f"the loss is {value} at {self.describe(step, indices)}")


class CollapseWatch:
    """Looks at an epoch's means for signs that nothing is learnt any more; each sign is named once, when it starts."""

    def __init__(self, config: Config) -> None:
        self.margins = {"g": config.global_margin, "l": config.local_margin}
        self.named: set[str] = set()
        self.last_losses: dict[str, float] = {}

    def find(self, epoch: int, means: Mapping[str, float], num_steps: int, num_skipped: int) -> list[str]:
        """The lines about signs that start in this epoch.

        means: of the epoch, by name as in its line; those of a run of several models end in .1, .2, ...
        num_skipped: of num_steps, whose gradients were not finite.
        """
        signs: dict[str, str] = {}
        if num_skipped > num_steps / 2:
            signs["overflow"] = f"{num_skipped} of {num_steps} steps were skipped for gradients that are not finite" + (
                "; usual causes: the loss scale is too high (--loss_scale dynamic), or the learning rate"
            )
        for name, loss in means.items():
            kind, _, model = name.partition(".")
            if kind in ("gL", "lL"):
                of = f" of model {model}" if model else ""
                found = self.sign_of(kind[0], f".{model}" if model else "", means, loss)
                if found:
                    signs[name] = f"{found}{of}; {USUAL_CAUSE}"
        started = [sign for sign in signs if sign not in self.named]
        self.named = set(signs)
        return [f"epoch {epoch}: collapse: {signs[sign]}" for sign in started]

    def sign_of(self, branch: str, suffix: str, means: Mapping[str, float], loss: float) -> str:
        """What is wrong with a branch ("g" or "l"), or nothing."""
        name = {"g": "global", "l": "local"}[branch]
        dist_ap, dist_an = means[f"{branch}d_ap{suffix}"], means[f"{branch}d_an{suffix}"]
        if dist_ap < NO_SPREAD and dist_an < NO_SPREAD:
            return f"the {name} features have no spread (mean distances {dist_ap:.2g} and {dist_an:.2g})"
        margin = self.margins[branch]
        stuck_at = math.log(2) if margin is None else margin
        last, self.last_losses[branch + suffix] = self.last_losses.get(branch + suffix, math.inf), loss
        # Where distances differ, single triplets pull the mean away from the margin; here all of them are equal.
        is_stuck = abs(loss - stuck_at) < 0.02 * stuck_at and abs(dist_ap - dist_an) < 0.05 * stuck_at
        if is_stuck and abs(last - loss) < 0.02 * stuck_at:
            return f"the {name} loss is stuck at {loss:.4f}, the value for equal distances"
        return ""
