"""Mutual learning with one model in each process: what the processes show each other, and how the run stays one."""

from __future__ import annotations

import copy
from typing import Any

import torch

from aligned_reid.distributed import World, from_rank, gather_with_own, largest_over_ranks
from aligned_reid.model import AlignedReID
from aligned_reid.objective import Shown
from aligned_reid.training.checkpoint import on_host
from aligned_reid.training.learner import Learner


class Apart:
    """The models of all processes, of which this one trains `learner`; every method is called by all of them."""

    def __init__(self, learner: Learner, world: World) -> None:
        self.learner, self.world = learner, world
        self.device = learner.accelerator.device
        self.learners = [LearnerOfRank(rank, learner, world) for rank in range(world.size)]

    def others(self, own: Shown) -> list[Shown]:
        """What the other processes' models show of the batch, which is the same for all."""
        parts = [None if one is None else gather_with_own(one.unsqueeze(0)).detach() for one in own]
        ranks = [rank for rank in range(self.world.size) if rank != self.world.rank]
        return [Shown(*(None if part is None else part[rank] for part in parts)) for rank in ranks]

    def means(self, own: dict[str, float]) -> dict[str, float]:
        """The means of an epoch of all models, numbered, and of their losses."""
        values = gather_with_own(torch.tensor([list(own.values())], device=self.device)).tolist()
        named = {
            f"{name}.{number}": value
            for number, row in enumerate(values, start=1)
            for name, value in zip(own, row, strict=True)
        }
        place = list(own).index("loss")
        return named | {"loss": sum(row[place] for row in values) / len(values)}

    def agree(self, value: int) -> int:
        """The largest of the processes' values: whether to save, or which signal has come."""
        return int(largest_over_ranks(torch.tensor(value, device=self.device)).item())

    def tested_models(self) -> list[AlignedReID]:
        """All models, on every process, which share the extraction of each one's features."""
        models = []
        for learner in self.learners:
            model = copy.deepcopy(self.learner.tested_model)
            model.load_state_dict(learner.travelled(self.learner.tested_model.state_dict()))
            models.append(model)
        return models


class LearnerOfRank:
    """A process's learner as a checkpoint sees it: its state comes to all, and goes back to that process only."""

    def __init__(self, rank: int, own: Learner, world: World) -> None:
        self.rank, self.own, self.world = rank, own, world

    def travelled(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` of that process, on every process; there `state` of another is not looked at."""
        travelled: dict[str, Any] = from_rank(self.rank, lambda: on_host(state), self.own.accelerator.device)
        return travelled

    def state_dict(self) -> dict[str, Any]:
        return self.travelled(self.own.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.rank == self.world.rank:
            self.own.load_state_dict(state)
