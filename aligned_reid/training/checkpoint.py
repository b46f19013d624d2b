"""The run's ckpt.pth: everything that `--resume` needs, written whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aligned_reid.config import Config
from aligned_reid.device import Accelerator
from aligned_reid.distributed import World, from_main
from aligned_reid.errors import InputError
from aligned_reid.files import replacing
from aligned_reid.flags import TRAINING
from aligned_reid.training.learner import Learner
from aligned_reid.weights import CHECKPOINT_NAME, PREVIOUS_NAME, read_weight_file

FORMAT = 1
WRITING_SHARE = 0.1  # of a run's time at most goes into writing checkpoints


class Checkpoints:
    """Writes and reads the checkpoint of one run folder."""

    def __init__(
        self, config: Config, learners: Sequence[Learner], world: World, trained_on: dict[str, list[str]]
    ) -> None:
        """trained_on: see data.identities."""
        self.config, self.learners, self.world, self.trained_on = config, learners, world, trained_on
        self.accelerator = learners[0].accelerator
        self.path = config.run_dir / CHECKPOINT_NAME
        # What a resumed run must have in common with the interrupted one to end with the same bits.
        self.made_on = {"num_processes": world.size, "device": self.accelerator.device.type}
        self.newest_is_good = True  # a damaged file must not replace the one before it
        self.last_end, self.last_duration = -float("inf"), 0.0

    def is_due(self) -> bool:
        """Whether writing now keeps to WRITING_SHARE: short epochs are not all followed by a checkpoint."""
        return time.monotonic() - self.last_end >= self.last_duration / WRITING_SHARE

    def save(self, epoch: int, step: int = 0, meters: dict[str, Any] | None = None, seconds: float = 0.0) -> None:
        """Write the state after `epoch` and `step` steps of the next, whose sums are `meters`; it took `seconds`.

        The previous file stays as ckpt.previous.pth. Raises OSError if writing fails; then the previous file is intact.
        """
        start = time.monotonic()
        content = {
            "format": FORMAT,
            **on_host(self.learners[0].state_dict()),
            "other_models": [on_host(learner.state_dict()) for learner in self.learners[1:]],
            "sampler": {"seed": self.config.seed, "epoch": epoch},
            "epoch": epoch,
            "step": step,
            "meters": on_host(meters),
            "train_seconds": seconds,
            "random": random_states(self.accelerator),
            "config": self.config.to_dict(),
            "made_on": self.made_on,
            "job": self.world.job,
            "trained_on": self.trained_on,
        }
        write_checkpoint(self.path, content, self.path.with_name(PREVIOUS_NAME) if self.newest_is_good else None)
        self.newest_is_good = True
        self.last_end = time.monotonic()
        self.last_duration = self.last_end - start

    def load(self) -> LastGood:
        """Restore model, optimizer, scaler and random states from the last good file, and return it.

        Rank 0 reads it and sends it to the others, whose machines need not see its folder. Raises InputError if there
        is none, or if it is of another model than the run's settings give.
        """
        last: LastGood = from_main(lambda: read_last_good(self.path.parent), self.accelerator.device)
        content = last.content
        self.newest_is_good = not last.damage
        try:
            states = [content, *content.get("other_models", [])]
            if len(states) != len(self.learners):
                raise ValueError(f"it has {len(states)} models, not {len(self.learners)}")
            for learner, state in zip(self.learners, states, strict=True):
                learner.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            changed = self.config.differences(content.get("config", {}), TRAINING)
            reason = "; ".join(changed) or " ".join(str(error).split())[:160]
            raise InputError(
                f"{last.path} is of another model or other losses than the flags give ({reason}): repeat that run's "
                "flags, or start a new run from its weights with --model_weight_file instead of --resume"
            ) from error
        set_random_states(content["random"], self.accelerator)
        return last


class LastGood(NamedTuple):
    """A checkpoint to resume from."""

    content: dict[str, Any]
    path: Path
    damage: str  # what is wrong with the newest one; empty if this is it


def read_last_good(folder: Path) -> LastGood:
    """The run folder's newest checkpoint, or the one before it if that is damaged.

    Raises InputError if neither can be resumed from.
    """
    damage: list[str] = []
    for path in (folder / CHECKPOINT_NAME, folder / PREVIOUS_NAME):
        if damage and not path.is_file():
            break
        try:
            content = read_weight_file(path)
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise InputError(f"{path} holds no run to resume: use it as --model_weight_file")
            return LastGood(content, path, "; ".join(damage))
        except InputError as error:
            damage.append(str(error).split("; the one before it")[0])
    raise InputError(f"no checkpoint to resume from: {'; '.join(damage)}")


def on_host(value: Any) -> Any:
    """Nested dicts and lists with every tensor on the CPU: loading a device's tensors may need its package."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: on_host(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_host(one) for one in value)
    return value


def write_checkpoint(path: Path, content: Any, keep: Path | None = None) -> None:
    """torch.save of a whole file or nothing; keep: a name for the former file. Raises OSError with the path."""
    try:
        with replacing(path, durable=True, keep=keep) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk's error in a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error).splitlines()[0]
        raise OSError(f"cannot write {path}: {reason}") from error


def set_aside(path: Path) -> Path | None:
    """Rename an existing file to <stem>.old<N><suffix>, so that a new run in the same folder loses nothing."""
    if not path.exists():
        return None
    number = 1
    while (aside := path.with_name(f"{path.stem}.old{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    return aside


def random_states(accelerator: Accelerator) -> dict[str, Any]:
    """The states of torch's random generators; sampling and augmentation draw from (seed, rank, epoch) instead."""
    return {"torch": torch.get_rng_state(), "device": accelerator.random_state()}


def set_random_states(states: dict[str, Any], accelerator: Accelerator) -> None:
    """Undo `random_states`; another kind of device's state is skipped."""
    torch.set_rng_state(states["torch"])
    if states["device"].shape == accelerator.random_state().shape:
        accelerator.set_random_state(states["device"])


def describe_resume(config: Config, last: LastGood, made_on: dict[str, Any]) -> list[str]:
    """Lines for the log: what the run resumes from, and what may make it end differently.

    made_on: this run's processes and device, see `Checkpoints`.
    """
    lines = [f"{last.damage}: the checkpoint before it is used"] if last.damage else []
    step = last.content.get("step", 0)
    in_epoch = f" and step {step} of the next" if step else ""
    lines.append(f"resumed from {last.path} after epoch {last.content['epoch']}{in_epoch}")
    if "average" in last.content:
        lines.append("the checkpoint's average of the weights (--ema_decay, now removed) is not continued")
    before = last.content.get("made_on", made_on)
    names = {"num_processes": "processes", "device": "device"}
    changed = [f"{names[key]} {before[key]} -> {value}" for key, value in made_on.items() if before[key] != value]
    if changed:
        lines.append(f"{', '.join(changed)}: from here on the run is no longer bit-exact")
    matter = config.differences(last.content["config"], TRAINING)
    if matter:
        lines.append(f"flags that differ from the checkpoint's and change the result: {'; '.join(matter)}")
    expected = ("resume:", "npu: None")  # earlier versions wrote None where no device was named
    others = [line for line in config.differences(last.content["config"]) if not line.startswith(expected)]
    others = [line for line in others if line not in matter]
    if others:
        lines.append(f"flags that differ from the checkpoint's and do not affect training: {'; '.join(others)}")
    return lines


def first_step(content: dict[str, Any], config: Config, num_processes: int, num_steps: int) -> int:
    """How many steps of the next epoch, of `num_steps` now, the checkpoint has done.

    If a step now has another number of batches, or other processes share the identities, as many steps as show the same
    share of the identities.
    """
    step = int(content.get("step", 0))
    step = step * content.get("config", {}).get("accumulate", config.accumulate) // config.accumulate
    before = content.get("made_on", {}).get("num_processes", num_processes)
    if config.id_sampling == "sharded" and before != num_processes:
        step = step * before // num_processes
    return min(step, num_steps)
