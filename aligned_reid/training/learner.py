"""One model in training: its network on a device, its objective, optimiser, loss scaler and average of weights."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aligned_reid.config import Config
from aligned_reid.data.transforms import normalize_images
from aligned_reid.device import Accelerator
from aligned_reid.distributed import World
from aligned_reid.model import TRUNK_STAGES, AlignedReID, Features
from aligned_reid.objective import Figures, Objective
from aligned_reid.training.average import WeightAverage


class Learner:
    """A model and what trains it: for each batch forward, judge and backward are called, and then step."""

    def __init__(self, config: Config, model: AlignedReID, accelerator: Accelerator, world: World) -> None:
        self.config, self.accelerator, self.world = config, accelerator, world
        model.train_heads(local=config.l_loss_weight > 0, identity=config.id_loss_weight > 0)
        # What is never trained is no parameter of the optimiser; what is trained at some time is one from the start.
        self.num_frozen = config.freeze_stages if config.freeze_stages_from == 1 else 0
        model.freeze_stages(self.num_frozen)
        model.grad_checkpoint = config.grad_checkpoint
        if config.sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(accelerator.device).to(memory_format=accelerator.memory_format)
        num_classes = model.fc.out_features if model.fc is not None else 0
        self.objective = Objective(config, world, num_classes).to(accelerator.device)
        self.optimizer, self.scaler = accelerator.prepare(
            self.model, config.base_lr, config.weight_decay, config.loss_scale, decay_norms=config.decay_norms
        )
        self.average = WeightAverage(self.model, config.ema_decay) if config.ema_decay > 0 else None
        self.network = self.wrap()

    def wrap(self) -> nn.Module:
        """The model as it is run: compiled, and data parallel in several processes."""
        network = self.accelerator.compile(self.model)
        if self.world.size > 1:
            network = DistributedDataParallel(network, **self.accelerator.data_parallel_arguments())
        return network

    def start_epoch(self, epoch: int) -> None:
        """Training mode, but for the stages of the trunk that are not to be trained in this epoch."""
        self.network.train()
        num_frozen = self.config.freeze_stages if epoch >= self.config.freeze_stages_from else 0
        if epoch <= self.config.freeze_trunk_epochs:
            num_frozen = TRUNK_STAGES
        self.model.freeze_stages(num_frozen)
        if num_frozen != self.num_frozen:
            self.num_frozen = num_frozen
            self.network = self.wrap()  # data parallel training waits for the gradients that it found at its start

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def forward(self, pixels: Tensor) -> Features:
        """Features of uint8 images [N, H, W, 3]."""
        with self.accelerator.autocast():
            features: Features = self.network(normalize_images(pixels, self.accelerator.memory_format))
        return features

    def judge(self, features: Features, labels: Tensor) -> tuple[Tensor, Figures]:
        """The loss of a batch, and its figures for the log."""
        loss, figures = self.objective(features, labels)
        return loss, figures

    def backward(self, loss: Tensor) -> None:
        self.scaler.backward(loss)

    def gradients_kept(self) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward of a batch that is not its step's last: gradients are not yet averaged."""
        if isinstance(self.network, DistributedDataParallel):
            return self.network.no_sync()
        return contextlib.nullcontext()

    def step(self) -> bool:
        """Step unless a gradient is not finite; returns whether the step was skipped."""
        skipped = self.scaler.step(self.optimizer)
        if self.average is not None and not skipped:
            self.average.update(self.model)
        return skipped

    @property
    def tested_model(self) -> AlignedReID:
        """The model to evaluate: the average of its weights where one is kept."""
        model: AlignedReID = self.model if self.average is None else self.average.model
        return model

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; keys of what this run does not use are left out."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.average is not None:
            state |= {"average": self.average.model.state_dict(), "average_steps": self.average.num_steps}
        if self.objective.center_loss is not None:
            state["centers"] = self.objective.center_loss.centers
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`. Raises RuntimeError, ValueError or KeyError where it is another model's."""
        self.model.load_state_dict(state["model"])
        self.accelerator.load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.model.load_state_dict(state.get("average", state["model"]))
            self.average.num_steps = state.get("average_steps", 0)
        if self.objective.center_loss is not None and "centers" in state:
            with torch.no_grad():
                self.objective.center_loss.centers.copy_(state["centers"])
