"""Training: epochs of batch, forward, losses, backward, step and log, with a checkpoint after each."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from aligned_reid.config import Config
from aligned_reid.data.dataset import TrainBatch, TrainImages
from aligned_reid.data.loader import WorkerDied, make_loader
from aligned_reid.data.sampler import IdentityBatchSampler
from aligned_reid.device import Accelerator
from aligned_reid.distributed import World, sum_over_ranks, take_from_main
from aligned_reid.errors import InputError, RunStopped
from aligned_reid.model import AlignedReID, Features
from aligned_reid.objective import Figures, mutual_loss, peer_outputs
from aligned_reid.stop import StopSignals
from aligned_reid.training.checkpoint import Checkpoints, describe_resume, first_step
from aligned_reid.training.guards import CollapseGuard, end_if_hung
from aligned_reid.training.learner import Learner
from aligned_reid.training.log import Log, Meters, Throughput, format_epoch
from aligned_reid.training.profile import StepProfile
from aligned_reid.training.schedule import learning_rate


class Trainer:
    """One model, or several that learn from each other, their data, and the loop over them.

    trained_on: see data.identities.identity_record. after_epoch: called with the first model and each epoch's number,
    before the epoch's checkpoint; on all ranks.
    """

    def __init__(
        self,
        config: Config,
        models: Sequence[AlignedReID],
        images: TrainImages,
        sampler: IdentityBatchSampler,
        accelerators: Sequence[Accelerator],
        world: World,
        log: Log,
        *,
        trained_on: dict[str, list[str]] | None = None,
        after_epoch: Callable[[AlignedReID, int], None] | None = None,
    ) -> None:
        self.config, self.images, self.sampler = config, images, sampler
        self.accelerator, self.world, self.log, self.after_epoch = accelerators[0], world, log, after_epoch
        self.learners = [
            Learner(config, model, accelerator, world)
            for model, accelerator in zip(models, itertools.cycle(accelerators), strict=False)
        ]
        self.epoch = 0  # the last completed one
        self.step = 0  # the last completed one of the next epoch
        self.num_skipped = 0  # steps of the epoch that were skipped
        self.meters, self.throughput = Meters(), Throughput(self.accelerator)
        self.start = time.monotonic()
        self.stop = StopSignals()
        self.collapse = CollapseGuard(config)
        self.profile = StepProfile(
            config.profile if world.is_main else 0, self.accelerator, config.run_dir / "profile", log
        )
        self.checkpoints = Checkpoints(config, self.learners, world, trained_on or {})
        self.loader = make_loader(
            images,
            sampler,
            config.ids_per_batch * config.ims_per_id,
            config.workers,
            self.accelerator.pin_memory,
            num_held=config.accumulate,
            say=log,
        )
        self.steps_per_epoch = -(-len(sampler) // config.accumulate)

    def train(self) -> None:
        """Train the remaining epochs, with a checkpoint after the last and, as often as is cheap, after the others.

        At one of STOP_SIGNALS rank 0 saves after its current step. Raises RunStopped with status 128 + signal.
        """
        with self.stop:
            while self.epoch < self.config.total_epochs:
                try:
                    self.train_epoch(self.epoch + 1)
                except WorkerDied as error:  # between two steps
                    if self.world.is_main:
                        self.save()
                    raise self.stopped(str(error)) from error
                except RuntimeError as error:  # in a step, another rank may have ended at the same signal
                    if isinstance(error, RunStopped) or not self.stop.number:
                        raise
                    raise self.stopped() from error
                if self.after_epoch:
                    with self.explaining_full_disk():
                        self.after_epoch(self.learners[0].model, self.epoch)
                if self.world.is_main and (self.epoch == self.config.total_epochs or self.checkpoints.is_due()):
                    self.save()
        self.profile.finish()

    def train_epoch(self, epoch: int) -> None:
        """One epoch, or the rest of it after a resume: every identity once (sharded: once over all ranks)."""
        self.sampler.set_epoch(epoch, first_batch=self.step * self.config.accumulate)
        for learner in self.learners:
            learner.start_epoch(epoch)
        self.throughput.start_epoch()
        for step, batches in enumerate(self.steps(epoch), start=self.step + 1):
            rate = learning_rate(epoch, self.config, (step - 1) / self.steps_per_epoch)
            for learner in self.learners:
                learner.start_step(rate)
            for batch in batches:
                is_last = batch is batches[-1]
                features = [learner.forward(batch.images, sync=is_last) for learner in self.learners]
                losses, figures = self.compute_losses(features, batch.labels)
                for learner, loss in zip(self.learners, losses, strict=True):
                    learner.scaler.backward(loss * (1 / len(batches)))
                self.meters.update(figures)
            skipped = [learner for learner in self.learners if learner.scaler.step(learner.optimizer)]
            self.check_step(step, batches, skipped)
            self.throughput.add(sum(len(batch.labels) for batch in batches))
            self.step = step
            self.save_or_stop()
        self.finish_epoch(epoch)

    def steps(self, epoch: int) -> Iterator[list[TrainBatch]]:
        """The epoch's remaining steps, each with the batches that it averages; a hanging step ends the process."""
        batches = iter(self.loader)
        groups = iter(lambda: list(itertools.islice(batches, self.config.accumulate)), [])
        bar = tqdm(
            groups,
            f"epoch {epoch}",
            self.steps_per_epoch,
            initial=self.step,
            unit="step",
            leave=False,
            disable=None if self.world.is_main else True,  # None: shown on a terminal
        )
        return self.profile.steps(end_if_hung(bar, self.config.timeout) if self.world.size > 1 else bar)

    def compute_losses(self, features: Sequence[Features], labels: Tensor) -> tuple[list[Tensor], Figures]:
        """Each model's loss of a batch, and the figures for the log; those of several models end in .1, .2, ..."""
        alone = [learner.compute_loss(own, labels) for learner, own in zip(self.learners, features, strict=True)]
        if len(alone) == 1:
            loss, figures = alone[0]
            return [loss], figures
        peers = [peer_outputs(own, self.config) for own in features]
        losses: list[Tensor] = []
        named: Figures = {}
        for number, (loss, figures) in enumerate(alone):
            mutual, mutual_figures = mutual_loss(self.config, peers[number], peers[:number] + peers[number + 1 :])
            losses.append(loss + mutual)
            for name, value in {**figures, **mutual_figures, "loss": losses[-1]}.items():
                named[f"{name}.{number + 1}"] = value.detach().to(self.accelerator.device)
        mean = torch.stack([named[f"loss.{number + 1}"] for number in range(len(losses))]).mean()
        return losses, named | {"loss": mean}

    def check_step(self, step: int, batches: Sequence[TrainBatch], skipped: Sequence[Learner]) -> None:
        """Raise RunStopped if the loss is not finite; if only a gradient is not, log the skipped step.

        A loss that is not finite has such gradients, so its step is skipped. After other steps the device is not asked.
        """
        if not skipped and step < self.steps_per_epoch:
            return
        loss = self.meters.means()["loss"]
        if not math.isfinite(loss):
            names = [self.images.image_names[index] for batch in batches for index in batch.indices.tolist()]
            where = f"step {step} of epoch {self.epoch + 1}; {self.last_checkpoint()}"
            raise RunStopped(f"the loss is {loss} at {where}; images of the step: {' '.join(names)}")
        if skipped:
            self.num_skipped += 1
            where, scale = f"epoch {self.epoch + 1}, step {step}", skipped[0].scaler.current
            self.log(f"{where}: a gradient is not finite, step skipped (loss scale {scale:g})")

    def save_or_stop(self) -> None:
        """After a step: save if a checkpoint is due, and stop if a signal has come."""
        if not self.world.is_main:
            return
        if self.stop.number:
            self.save()
            raise self.stopped()
        every = self.config.checkpoint_every_steps
        if every and self.step % every == 0:
            self.save()

    def stopped(self, reason: str = "") -> RunStopped:
        """The error that ends the run, for the signal that has come or else for `reason`."""
        number = self.stop.number
        where = f"step {self.step} of epoch {self.epoch + 1}; {self.last_checkpoint()}"
        line = f"{self.stop.name if number else reason} at {where}: resume with --resume true"
        return RunStopped(line, 128 + number if number else 1)

    def finish_epoch(self, epoch: int) -> None:
        """Log the epoch: rank 0's means, all ranks' images."""
        seconds, fps = self.throughput.end_epoch()
        means = self.meters.means()
        self.check_ranks(epoch)
        # Only rank 0 prints the rates, which are of all ranks, so that their log files can be added up.
        self.log(format_epoch(epoch, seconds, fps if self.world.is_main else None, self.config.ims_per_id, means))
        rate = self.learners[0].optimizer.param_groups[0]["lr"]
        self.log.scalars(means | {"learning_rate": rate, "images_per_second": fps}, epoch)
        for sign in self.collapse.find(epoch, means, self.steps_per_epoch, self.num_skipped):
            self.log(sign)
        self.epoch, self.step, self.meters, self.num_skipped = epoch, 0, Meters(), 0

    def check_ranks(self, epoch: int) -> None:
        """Raise RunStopped unless all ranks hold the same weights, which averaged gradients keep equal."""
        if self.world.size == 1:
            return
        device = self.accelerator.device
        parameters = [parameter for learner in self.learners for parameter in learner.model.parameters()]
        sums = torch.stack([parameter.detach().float().sum().to(device) for parameter in parameters])
        of_main = sums.clone()
        take_from_main([of_main])
        num_different = int(sum_over_ranks((sums != of_main).any().float()).item())
        if num_different:
            raise RunStopped(
                f"after epoch {epoch} the weights of {num_different} of {self.world.size} processes differ from the "
                f"first one's; {self.last_checkpoint()}"
            )

    def save(self) -> None:
        """Write the checkpoint; on a full or read-only disk the run ends and the previous checkpoint stays."""
        with self.explaining_full_disk():
            self.checkpoints.save(self.epoch, self.step, self.meters.state_dict(), self.seconds)

    def resume(self) -> None:
        """Continue from the run folder's checkpoint."""
        last = self.checkpoints.load()
        self.epoch = last.content["epoch"]
        self.start -= last.content.get("train_seconds", 0.0)
        self.step = first_step(last.content, self.config, self.world.size, self.steps_per_epoch)
        if self.step:
            self.meters.load_state_dict(last.content["meters"], self.accelerator.device)
        for line in describe_resume(self.config, last, self.checkpoints.made_on):
            self.log(line)

    @contextlib.contextmanager
    def explaining_full_disk(self) -> Iterator[None]:
        """Raise InputError that names the last good checkpoint if a file cannot be written."""
        try:
            yield
        except OSError as error:
            raise InputError(f"{error}; {self.last_checkpoint()}: make room, and resume with --resume true") from error

    def last_checkpoint(self) -> str:
        """For messages."""
        if self.checkpoints.path.is_file():
            return f"the last good checkpoint is {self.checkpoints.path}"
        return "no checkpoint was written yet"

    @property
    def seconds(self) -> float:
        """Training seconds, those before a resume included."""
        return time.monotonic() - self.start

    def tested_models(self) -> list[AlignedReID]:
        """The models to evaluate, equal on all ranks: each rank has moved its own batch norm statistics."""
        for learner in self.learners:
            take_from_main(learner.model.buffers())
        return [learner.model for learner in self.learners]

    def results(self) -> dict[str, Any]:
        """What results.json holds of the training."""
        timed = self.throughput
        fps = timed.images / timed.seconds if timed.seconds else None
        return {
            "FPS": fps,
            "ids_per_second": fps / self.config.ims_per_id if fps else None,
            "train_seconds": self.seconds,
            "profile": self.profile.results(),
        }
