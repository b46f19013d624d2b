"""Training: epochs of batch, forward, losses, backward, step, log; a checkpoint after each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from aligned_reid.accelerator import Accelerator
from aligned_reid.config import Config
from aligned_reid.data.dataset import TrainImages, make_loader
from aligned_reid.data.sampler import IdentityBatchSampler
from aligned_reid.data.transforms import normalize_images
from aligned_reid.distributed import World, sum_over_ranks, take_from_main
from aligned_reid.errors import InputError, RunStopped
from aligned_reid.losses import check_batch_labels
from aligned_reid.model import AlignedReID
from aligned_reid.training.best import Best
from aligned_reid.training.checkpoint import Checkpoints
from aligned_reid.training.log import Log, Meters, Throughput, format_epoch
from aligned_reid.training.objective import Objective
from aligned_reid.training.profile import StepProfile
from aligned_reid.training.resume import describe_resume, first_step
from aligned_reid.training.schedule import learning_rate
from aligned_reid.training.stop import StopSignals
from aligned_reid.training.watchdog import Watchdog

WEIGHT_DECAY = 5e-4
LOSS_CHECK_LAG = 3  # steps: reading a loss at once would make a device wait for the host


@dataclass
class Speed:
    """What was timed over all epochs."""

    seconds: float = 0.0
    images: int = 0

    @property
    def fps(self) -> float | None:
        return self.images / self.seconds if self.seconds else None


class Trainer:
    """One model, its data, its optimiser, and the loop over them."""

    def __init__(
        self,
        config: Config,
        model: AlignedReID,
        images: TrainImages,
        sampler: IdentityBatchSampler,
        accelerator: Accelerator,
        world: World,
        log: Log,
        folder: Path,
    ) -> None:
        self.config, self.images, self.sampler = config, images, sampler
        self.accelerator, self.world, self.log = accelerator, world, log
        self.epoch = 0  # the last one that is done
        self.step = 0  # the last one of the next epoch that is done
        self.meters = Meters()
        self.between_steps = True  # and not in the middle of one, where nothing can be saved
        self.stop = StopSignals()
        self.watchdog = Watchdog(config.timeout if world.size > 1 else 0)
        self.best: Best | None = None  # evaluates in between, where that is asked for
        self.speed = Speed()
        self.throughput = Throughput()
        self.profile = StepProfile(config.profile if world.is_main else 0, accelerator, folder / "profile", log)
        model.train_heads(local=config.l_loss_weight > 0, identity=config.id_loss_weight > 0)
        self.model = model.to(accelerator.device).to(memory_format=accelerator.memory_format)
        self.objective = Objective(config)
        self.optimizer, self.scaler = accelerator.prepare(self.model, config.base_lr, WEIGHT_DECAY, config.loss_scale)
        self.checkpoints = Checkpoints(folder, self.model, self.optimizer, self.scaler, accelerator)
        self.checkpoints.job = dict(world.job)
        self.loader = make_loader(images, sampler, workers=config.workers, pin_memory=accelerator.pin_memory)
        self.network = accelerator.compile(self.model)
        if world.size > 1:
            self.network = DistributedDataParallel(self.network, **accelerator.data_parallel_arguments())

    def resume(self) -> None:
        """Go on from the run folder's checkpoint."""
        last = self.checkpoints.load()
        self.epoch = last.content["epoch"]
        self.step = first_step(last.content, self.config, self.world.size, len(self.sampler))
        if self.step:
            self.meters.load_state_dict(last.content["meters"], self.accelerator.device)
        for line in describe_resume(self.config, last, self.checkpoints.made_on()):
            self.log(line)

    def train(self) -> None:
        """Train the epochs that are left; a checkpoint after the last, and after each before it as far as due.

        At SIGTERM or SIGINT rank 0 saves after the step that it is in. Raises RunStopped with status 128 + signal.
        """
        with self.stop:
            while self.epoch < self.config.total_epochs:
                try:
                    self.train_epoch(self.epoch + 1)
                except RunStopped:
                    raise
                except RuntimeError:  # a loader's worker, or another rank, may have answered a signal by ending
                    if not self.stop.number:
                        raise
                    self.stop_here()
                if self.best:
                    self.best.after_epoch(self.model, self.epoch)
                if self.world.is_main and (self.epoch == self.config.total_epochs or self.checkpoints.is_due()):
                    self.save()
        take_from_main(self.model.buffers())  # each rank's last step moved its own batch norm statistics
        self.profile.finish()

    def train_epoch(self, epoch: int) -> None:
        """One epoch, or what is left of it: every identity once (sharded: once among all ranks)."""
        self.set_learning_rate(learning_rate(epoch, self.config, self.world.size))
        self.sampler.set_epoch(epoch, first_batch=self.step)
        self.network.train()
        watch = LossWatch(self.accelerator, self.describe_batch(epoch))
        self.throughput.start_epoch()
        for step, batch in enumerate(self.watchdog.over(self.profile.steps(self.progress(epoch))), start=self.step + 1):
            self.between_steps = False
            check_batch_labels(batch.labels)  # on the host's copy: no wait for the device
            pixels = batch.images.to(self.accelerator.device, non_blocking=True)
            labels = batch.labels.to(self.accelerator.device, non_blocking=True)

            with self.accelerator.autocast():
                features = self.network(normalize_images(pixels, self.accelerator.memory_format))
            with self.accelerator.full_precision():
                loss, figures = self.objective(features, labels)

            self.optimizer.zero_grad()
            self.scaler.backward(loss)
            watch.add(step, loss, batch.indices)
            if self.scaler.step(self.optimizer):
                watch.flush()  # a loss that is not finite stops the run; a gradient alone skips its step
                scale = self.scaler.current
                self.log(f"epoch {epoch}, step {step}: a gradient is not finite, step skipped (loss scale {scale:g})")

            self.meters.update(figures)
            self.throughput.add(len(labels), self.accelerator.synchronize)
            self.end_step(step, watch)
        watch.flush()
        self.accelerator.synchronize()
        self.finish_epoch(epoch, self.meters)
        self.epoch, self.step, self.meters = epoch, 0, Meters()

    def end_step(self, step: int, watch: LossWatch) -> None:
        """Save where that is due, and end here where a signal asks for it."""
        self.step, self.between_steps = step, True
        every = self.config.checkpoint_every_steps
        if not self.world.is_main or not (self.stop.number or (every and step % every == 0)):
            return
        watch.flush()  # no checkpoint of a loss that is not finite
        if self.stop.number:
            self.stop_here()
        self.save()

    def stop_here(self) -> NoReturn:
        """End the run as a signal asks: what is done is saved, by rank 0 and unless it is in the middle of a step."""
        if self.world.is_main and self.between_steps:
            self.save()
        at = f"step {self.step} of epoch {self.epoch + 1}"
        line = f"{self.stop.name} at {at}; {self.last_checkpoint()}: go on with --resume true"
        raise RunStopped(line, 128 + self.stop.number)

    def finish_epoch(self, epoch: int, meters: Meters) -> None:
        """Log the epoch: rank 0's means, all ranks' images."""
        seconds, timed_seconds, timed_images = self.throughput.end_epoch()
        count = torch.tensor(float(timed_images), device=self.accelerator.device)
        all_images = int(sum_over_ranks(count).item())
        self.speed.seconds += timed_seconds
        self.speed.images += all_images
        fps = all_images / timed_seconds
        means = meters.means()
        self.check_ranks(epoch)
        self.log(format_epoch(epoch, seconds, fps, fps / self.config.ims_per_id, means))
        rate = self.optimizer.param_groups[0]["lr"]
        self.log.scalars(means | {"learning_rate": rate, "images_per_second": fps}, epoch)

    def check_ranks(self, epoch: int) -> None:
        """Raise RunStopped unless all ranks hold the same weights, as they do while gradients are averaged."""
        if self.world.size == 1:
            return
        sums = torch.stack([parameter.detach().float().sum() for parameter in self.model.parameters()])
        of_main = sums.clone()
        take_from_main([of_main])
        num_different = sum_over_ranks((sums != of_main).any().float())
        if num_different.item() > 0:
            raise RunStopped(
                f"after epoch {epoch} the weights of {num_different.item():.0f} of {self.world.size} processes differ "
                f"from the first one's; {self.last_checkpoint()}"
            )

    def progress(self, epoch: int) -> tqdm:
        """The epoch's batches, with a bar on a terminal."""
        hidden = None if self.world.is_main else True
        total, done = len(self.sampler), self.step
        return tqdm(self.loader, f"epoch {epoch}", total, initial=done, unit="step", leave=False, disable=hidden)

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def save(self) -> None:
        """Write the checkpoint; a full or read-only folder ends the run with the former checkpoint in place."""
        try:
            self.checkpoints.save(self.epoch, self.config, self.step, self.meters.state_dict())
        except OSError as error:
            raise InputError(f"{error}; {self.last_checkpoint()}") from error

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
