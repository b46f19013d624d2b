"""Training: epochs of batch, forward, losses, backward, step, log; a checkpoint after each."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

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
from aligned_reid.evaluation.best import Best
from aligned_reid.losses import check_batch_labels
from aligned_reid.model import AlignedReID
from aligned_reid.objective import Figures, Shown, mutual_loss, show
from aligned_reid.stop import StopSignals
from aligned_reid.training.apart import Apart
from aligned_reid.training.checkpoint import Checkpoints
from aligned_reid.training.learner import Learner
from aligned_reid.training.log import Log, Meters, Throughput, format_epoch
from aligned_reid.training.profile import StepProfile
from aligned_reid.training.resume import describe_resume, first_step
from aligned_reid.training.schedule import learning_rate
from aligned_reid.training.watch import CollapseWatch, LossWatch
from aligned_reid.training.watchdog import Watchdog

COLLAPSED = 3  # exit status of --stop_on_collapse


@dataclass
class Speed:
    """What was timed over all epochs."""

    seconds: float = 0.0
    images: int = 0

    @property
    def fps(self) -> float | None:
        return self.images / self.seconds if self.seconds else None


class Trainer:
    """The models, their data, and the loop over them: one model, or several that learn from each other."""

    def __init__(
        self,
        config: Config,
        models: Sequence[AlignedReID],
        images: TrainImages,
        sampler: IdentityBatchSampler,
        accelerators: Sequence[Accelerator],
        world: World,
        log: Log,
        folder: Path,
    ) -> None:
        self.config, self.images, self.sampler = config, images, sampler
        self.accelerator, self.world, self.log = accelerators[0], world, log
        self.epoch = 0  # the last one that is done
        self.step = 0  # the last one of the next epoch that is done
        self.start = time.monotonic()
        self.meters = Meters()
        self.between_steps = True  # and not in the middle of one, where nothing can be saved
        self.stop = StopSignals()
        self.watchdog = Watchdog(config.timeout if world.size > 1 else 0)
        self.best: Best | None = None  # evaluates in between, where that is asked for
        self.speed = Speed()
        self.throughput = Throughput()
        self.profile = StepProfile(config.profile if world.is_main else 0, self.accelerator, folder / "profile", log)
        self.collapse = CollapseWatch(config)
        self.num_skipped = 0  # steps of the epoch
        each_has_own = config.models_apart and world.size > 1
        self.learners = [
            Learner(config, model, accelerator, World() if each_has_own else world)
            for model, accelerator in zip(models, itertools.cycle(accelerators), strict=False)
        ]
        self.apart = Apart(self.learners[0], world) if each_has_own else None
        self.checkpoints = Checkpoints(
            folder, self.apart.learners if self.apart else self.learners, self.accelerator, writes=world.is_main
        )
        self.checkpoints.job = dict(world.job)
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

    def resume(self) -> None:
        """Go on from the run folder's checkpoint."""
        last = self.checkpoints.load(self.config)
        self.epoch = last.content["epoch"]
        self.start -= last.content.get("train_seconds", 0.0)
        self.step = first_step(last.content, self.config, self.world.size, self.steps_per_epoch)
        if self.step:
            self.meters.load_state_dict(last.content["meters"], self.accelerator.device)
        for line in describe_resume(self.config, last, self.checkpoints.made_on()):
            self.log(line)

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken, up to the checkpoint that it was resumed from and since."""
        return time.monotonic() - self.start

    def train(self) -> None:
        """Train the epochs that are left; a checkpoint after the last, and after each before it as far as due.

        At one of STOP_SIGNALS rank 0 saves after the step that it is in. Raises RunStopped with status 128 + signal.
        """
        with self.stop:
            while self.epoch < self.config.total_epochs:
                try:
                    self.train_epoch(self.epoch + 1)
                except WorkerDied as error:
                    self.stop_here(str(error), can_save=not self.apart)
                except RunStopped:
                    raise
                except RuntimeError:  # a loader's worker, or another rank, may have answered a signal by ending
                    if not self.stop.number:
                        raise
                    self.stop_here(can_save=not self.apart)
                if self.best:
                    with self.told_where_to_go_on():
                        self.best.after_epoch(self.tested_models()[0], self.epoch)
                self.save_if(self.epoch == self.config.total_epochs or self.checkpoints.is_due())
        self.profile.finish()

    def tested_models(self) -> list[AlignedReID]:
        """The models to evaluate, the same on every rank."""
        if self.apart:
            return self.apart.tested_models()
        for learner in self.learners:  # each rank's last step moved its own batch norm statistics
            take_from_main(learner.tested_model.buffers())
        return [learner.tested_model for learner in self.learners]

    def train_epoch(self, epoch: int) -> None:
        """One epoch, or what is left of it: every identity once (sharded: once among all ranks)."""
        self.sampler.set_epoch(epoch, first_batch=self.step * self.config.accumulate)
        for learner in self.learners:
            learner.start_epoch(epoch)
        watch = LossWatch(self.accelerator, self.describe_batch(epoch))
        self.throughput.start_epoch()
        steps = self.profile.steps(self.watchdog.over(self.progress(epoch)))
        for step, batches in enumerate(steps, start=self.step + 1):
            self.between_steps = False
            rate = learning_rate(epoch, self.config, self.learners[0].world.size, (step - 1) / self.steps_per_epoch)
            for learner in self.learners:
                learner.set_learning_rate(rate)
                learner.optimizer.zero_grad()
            for number, batch in enumerate(batches, start=1):
                check_batch_labels(batch.labels)  # on the host's copy: no wait for the device
                loss, figures = self.learn(batch, 1 / len(batches), is_last=number == len(batches))
                watch.add(step, loss, batch.indices)
                self.meters.update(figures)
            skipped = [learner for learner in self.learners if learner.step()]
            if skipped:
                watch.flush()  # a loss that is not finite stops the run; a gradient alone skips its step
                self.num_skipped += 1
                scale = skipped[0].scaler.current
                self.log(f"epoch {epoch}, step {step}: a gradient is not finite, step skipped (loss scale {scale:g})")
            self.throughput.add(sum(len(batch.labels) for batch in batches), self.accelerator.synchronize)
            self.end_step(step, watch)
        watch.flush()
        self.accelerator.synchronize()
        self.finish_epoch(epoch, self.meters)
        self.epoch, self.step, self.meters, self.num_skipped = epoch, 0, Meters(), 0

    def learn(self, batch: TrainBatch, share: float, is_last: bool) -> tuple[Tensor, Figures]:
        """Forward and backward of one batch, which is `share` of a step, for every model; returns loss and figures."""
        losses, all_figures, shown = [], [], []
        with contextlib.ExitStack() as stack:
            if not is_last:
                for learner in self.learners:
                    stack.enter_context(learner.gradients_kept())
            for learner in self.learners:
                device = learner.accelerator.device
                features = learner.forward(batch.images.to(device, non_blocking=True))
                with learner.accelerator.full_precision():
                    loss, figures = learner.judge(features, batch.labels.to(device, non_blocking=True))
                    losses.append(loss)
                    all_figures.append(figures)
                    shown.append(show(features, self.config))
            for number, learner in enumerate(self.learners):
                if sum(self.config.mutual_weights) > 0:
                    with learner.accelerator.full_precision():
                        loss, figures = mutual_loss(self.config, shown[number], self.others(shown, number))
                    losses[number] = losses[number] + loss
                    all_figures[number] |= {**figures, "loss": losses[number]}
                learner.backward(losses[number] if share == 1 else losses[number] * share)
        return self.joined(losses, all_figures)

    def others(self, shown: list[Shown], number: int) -> list[Shown]:
        """What the other models show of a batch to model `number` of this process, on its device."""
        if self.apart:
            return self.apart.others(shown[number])
        device = self.learners[number].accelerator.device
        return [one.detached(device) for other, one in enumerate(shown) if other != number]

    def joined(self, losses: list[Tensor], all_figures: list[Figures]) -> tuple[Tensor, Figures]:
        """The models' losses as one, and their figures under one roof, the names numbered where there are several."""
        if len(losses) == 1:
            return losses[0], all_figures[0]
        device = self.accelerator.device
        named = {
            f"{name}.{number}": value.detach().to(device)
            for number, figures in enumerate(all_figures, start=1)
            for name, value in figures.items()
        }
        loss = torch.stack([loss.detach().to(device) for loss in losses]).mean()
        return loss, named | {"loss": loss}

    def end_step(self, step: int, watch: LossWatch) -> None:
        """Save where that is due, and end here where a signal asks for it."""
        self.step, self.between_steps = step, True
        every = self.config.checkpoint_every_steps
        if self.apart:  # all save together, or nobody
            self.stop.number = self.apart.agree(self.stop.number)
        if not (self.world.is_main or self.apart) or not (self.stop.number or (every and step % every == 0)):
            return
        watch.flush()  # no checkpoint of a loss that is not finite
        if self.stop.number:
            self.stop_here()
        self.save()

    def save_if(self, due: bool) -> None:
        """Save where that is due for rank 0."""
        if self.apart:
            due = bool(self.apart.agree(int(due and self.world.is_main)))
        if due and (self.world.is_main or self.apart):
            self.save()

    def stop_here(self, reason: str = "", *, can_save: bool = True) -> NoReturn:
        """End the run, as a signal asks or for another reason.

        What is done is saved, by rank 0 and unless it is in the middle of a step.
        """
        if can_save and (self.world.is_main or self.apart) and self.between_steps:
            self.save()
        at = f"step {self.step} of epoch {self.epoch + 1}"
        signalled = self.stop.number
        line = f"{self.stop.name if signalled else reason} at {at}; {self.last_checkpoint()}: go on with --resume true"
        raise RunStopped(line, 128 + signalled if signalled else 1)

    def finish_epoch(self, epoch: int, meters: Meters) -> None:
        """Log the epoch: rank 0's means, all ranks' images."""
        seconds, timed_seconds, timed_images = self.throughput.end_epoch()
        count = torch.tensor(float(timed_images), device=self.accelerator.device)
        all_images = timed_images if self.apart else int(sum_over_ranks(count).item())
        self.speed.seconds += timed_seconds
        self.speed.images += all_images
        fps = all_images / timed_seconds
        means = self.apart.means(meters.means()) if self.apart else meters.means()
        self.check_ranks(epoch)
        self.log(format_epoch(epoch, seconds, fps, fps / self.config.ims_per_id, means))
        rate = self.learners[0].optimizer.param_groups[0]["lr"]
        self.log.scalars(means | {"learning_rate": rate, "images_per_second": fps}, epoch)
        self.look_for_collapse(epoch, means)

    def look_for_collapse(self, epoch: int, means: dict[str, float]) -> None:
        """Log what has collapsed in this epoch; with --stop_on_collapse end the run on all ranks if rank 0's has."""
        signs = self.collapse.find(epoch, means, self.steps_per_epoch, self.num_skipped)
        for sign in signs:
            self.log(sign)
        if self.config.stop_on_collapse:
            found = torch.tensor(float(bool(signs)), device=self.accelerator.device)
            take_from_main([found])
            if found.item():
                sign = signs[0] if signs else f"epoch {epoch}: collapse, as the first process says"
                raise RunStopped(f"{sign}; {self.last_checkpoint()}", COLLAPSED)

    def check_ranks(self, epoch: int) -> None:
        """Raise RunStopped unless all ranks hold the same weights, as they do while gradients are averaged."""
        if self.world.size == 1 or self.apart:
            return
        parameters = [parameter for learner in self.learners for parameter in learner.model.parameters()]
        sums = torch.stack([parameter.detach().float().sum().to(self.accelerator.device) for parameter in parameters])
        of_main = sums.clone()
        take_from_main([of_main])
        num_different = sum_over_ranks((sums != of_main).any().float())
        if num_different.item() > 0:
            raise RunStopped(
                f"after epoch {epoch} the weights of {num_different.item():.0f} of {self.world.size} processes differ "
                f"from the first one's; {self.last_checkpoint()}"
            )

    def progress(self, epoch: int) -> tqdm:
        """The epoch's steps, each the batches that it averages, with a bar on a terminal."""
        hidden = None if self.world.is_main else True
        steps, total, done = grouped(self.loader, self.config.accumulate), self.steps_per_epoch, self.step
        return tqdm(steps, f"epoch {epoch}", total, initial=done, unit="step", leave=False, disable=hidden)

    def save(self) -> None:
        """Write the checkpoint; a full or read-only folder ends the run with the former checkpoint in place."""
        with self.told_where_to_go_on():
            self.checkpoints.save(self.epoch, self.config, self.step, self.meters.state_dict(), self.seconds)

    @contextlib.contextmanager
    def told_where_to_go_on(self) -> Iterator[None]:
        """Raise InputError, with the last good checkpoint, where a file cannot be written."""
        try:
            yield
        except OSError as error:
            raise InputError(f"{error}; {self.last_checkpoint()}: make room, and go on with --resume true") from error

    def last_checkpoint(self) -> str:
        """Where the last good checkpoint is, for a message."""
        if self.checkpoints.path.is_file():
            return f"the last good checkpoint is {self.checkpoints.path}"
        return "no checkpoint was written yet"

    def describe_batch(self, epoch: int) -> Callable[[int, Tensor], str]:
        """For LossWatch: a step and its images in words."""

        def describe(step: int, indices: Tensor) -> str:
            names = " ".join(self.images.image_names[index] for index in indices.tolist())
            return f"step {step} of epoch {epoch}; {self.last_checkpoint()}; images of the step: {names}"

        return describe


def grouped(batches: Iterable[TrainBatch], size: int) -> Iterator[list[TrainBatch]]:
    """The batches, `size` at a time; the last ones may be fewer."""
    batches = iter(batches)
    while group := list(itertools.islice(batches, size)):
        yield group
