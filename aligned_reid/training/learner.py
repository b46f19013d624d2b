"""One model in training: its network on a device, its objective, optimizer and loss scaler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aligned_reid.config import Config
from aligned_reid.data.transforms import normalize_images
from aligned_reid.device import Accelerator
from aligned_reid.distributed import World
from aligned_reid.model import AlignedReID, Features
from aligned_reid.objective import Figures, Objective


class Learner:
    """A model and what trains it. For each batch the trainer calls forward, compute_loss and the scaler's backward."""

    def __init__(self, config: Config, model: AlignedReID, accelerator: Accelerator, world: World) -> None:
        self.config, self.accelerator, self.world = config, accelerator, world
        model.train_heads(local=config.l_loss_weight > 0, identity=config.id_loss_weight > 0)
        # Stages that are frozen for the whole run are not passed to the optimizer; all others are, from the start.
        self.num_frozen = config.freeze_stages if config.freeze_stages_from == 1 else 0
        model.freeze_stages(self.num_frozen)
        self.model = model.to(accelerator.device).to(memory_format=accelerator.memory_format)
        num_classes = model.fc.out_features if model.fc is not None else 0
        self.objective = Objective(config, world, num_classes).to(accelerator.device)
        self.optimizer, self.scaler = accelerator.prepare(self.model, config)
        self.network = self.wrap()

    def wrap(self) -> nn.Module:
        """The model as it runs: compiled if asked for, and data parallel in several processes."""
        network = self.accelerator.compile(self.model)
        if self.world.size > 1:
            device = self.accelerator.device
            network = DistributedDataParallel(network, device_ids=None if device.type == "cpu" else [device])
        return network

    def start_epoch(self, epoch: int) -> None:
        """Training mode, except for the stages that are frozen in this epoch."""
        self.network.train()
        num_frozen = self.config.freeze_stages if epoch >= self.config.freeze_stages_from else 0
        self.model.freeze_stages(num_frozen)
        if num_frozen != self.num_frozen:
            self.num_frozen = num_frozen
            self.network = self.wrap()  # data parallel training waits for the gradients that existed when it was made

    def start_step(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()

    def forward(self, images: Tensor, *, sync: bool = True) -> Features:
        """Features of uint8 images [N, H, W, 3]; sync: ranks average the gradients in the backward pass."""
        if isinstance(self.network, DistributedDataParallel):
            self.network.require_backward_grad_sync = sync
        pixels = images.to(self.accelerator.device, non_blocking=True)
        with self.accelerator.autocast():
            features: Features = self.network(normalize_images(pixels, self.accelerator.memory_format))
        return features

    def compute_loss(self, features: Features, labels: Tensor) -> tuple[Tensor, Figures]:
        """The model's own loss of a batch and its figures; labels [N], on the host."""
        with self.accelerator.full_precision():
            loss, figures = self.objective(features, labels.to(self.accelerator.device, non_blocking=True))
        return loss, figures

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.objective.center_loss is not None:
            state["centers"] = self.objective.center_loss.centers
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`. Raises RuntimeError, ValueError or KeyError if the state is another model's."""
        self.model.load_state_dict(state["model"])
        self.accelerator.load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.objective.center_loss is not None and "centers" in state:
            with torch.no_grad():
                self.objective.center_loss.centers.copy_(state["centers"])
