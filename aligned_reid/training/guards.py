"""Guards around the training loop: a step that hangs, and a model that has collapsed."""

from __future__ import annotations

import faulthandler
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from aligned_reid.config import Config

NO_SPREAD = 1e-2  # mean distance to the nearest negative below which all features are one point
USUAL_CAUSE = (
    "usual causes: weights that were not loaded (see the trunk line above), or too high a learning rate (--base_lr)"
)
Batch = TypeVar("Batch")


def end_if_hung(batches: Iterable[Batch], timeout: float) -> Iterator[Batch]:
    """The batches; if a step hangs, the process ends with status 1 and every thread's stack on stderr.

    timeout: seconds for loading a batch. The step itself has twice that: it may wait for another rank, and the rank
    that hangs should end first. faulthandler's thread works even if the interpreter's lock is held.
    """
    try:
        faulthandler.dump_traceback_later(timeout, exit=True)
        for batch in batches:
            faulthandler.dump_traceback_later(2 * timeout, exit=True)
            yield batch
            faulthandler.dump_traceback_later(timeout, exit=True)
    finally:
        faulthandler.cancel_dump_traceback_later()


class CollapseGuard:
    """Finds signs in an epoch's means that the model no longer learns. Each sign is reported once, when it starts."""

    def __init__(self, config: Config) -> None:
        self.margins = {"g": config.global_margin, "l": config.local_margin}
        self.reported: set[str] = set()
        self.last_losses: dict[str, float] = {}

    def find(self, epoch: int, means: Mapping[str, float], num_steps: int, num_skipped: int) -> list[str]:
        """A line for each sign that starts in this epoch.

        means: the epoch's, by name; with several models the names end in .1, .2, ... num_skipped: how many of the
        epoch's num_steps were skipped for gradients that are not finite.
        """
        signs: dict[str, str] = {}
        if num_skipped > num_steps / 2:
            signs["overflow"] = (
                f"{num_skipped} of {num_steps} steps were skipped for gradients that are not finite; usual causes: too "
                "high a loss scale (--loss_scale dynamic) or learning rate (--base_lr)"
            )
        for name in means:
            kind, dot, model = name.partition(".")
            if kind in ("gL", "lL") and (sign := self.sign_of(kind[0], dot + model, means)):
                signs[name] = sign + (f" of model {model}" if model else "") + f"; {USUAL_CAUSE}"
        started = [sign for sign in signs if sign not in self.reported]
        self.reported = set(signs)
        return [f"epoch {epoch}: collapse: {signs[sign]}" for sign in started]

    def sign_of(self, branch: str, suffix: str, means: Mapping[str, float]) -> str:
        """What is wrong with a branch, "g" or "l", of the model that `suffix` names; empty if nothing is."""
        name = {"g": "global", "l": "local"}[branch]
        dist_ap, dist_an, loss = (means[f"{branch}{one}{suffix}"] for one in ("d_ap", "d_an", "L"))
        if dist_ap < NO_SPREAD and dist_an < NO_SPREAD:
            return f"the {name} features have no spread (mean distances {dist_ap:.2g} and {dist_an:.2g})"
        margin = self.margins[branch]
        stuck_at = math.log(2) if margin is None else margin
        last, self.last_losses[branch + suffix] = self.last_losses.get(branch + suffix, math.inf), loss
        # With any spread, single triplets pull the mean away from the margin; here all distances are equal.
        is_stuck = abs(loss - stuck_at) < 0.02 * stuck_at and abs(dist_ap - dist_an) < 0.05 * stuck_at
        if is_stuck and abs(last - loss) < 0.02 * stuck_at:
            return f"the {name} loss is stuck at {loss:.4f}, the value for equal distances"
        return ""
