"""The run's ckpt.pth: everything that `--resume` goes on from, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from aligned_reid.config import Config
from aligned_reid.device import Accelerator
from aligned_reid.distributed import from_rank, group_size
from aligned_reid.errors import InputError
from aligned_reid.weights import CHECKPOINT_NAME, PREVIOUS_NAME, read_weight_file

FORMAT = 1
WRITING_SHARE = 0.1  # of a run's time at most goes into writing checkpoints


class Learns(Protocol):
    """What a checkpoint holds the state of: a training.learner.Learner."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """Writes and reads the checkpoint of one run folder."""

    def __init__(
        self,
        folder: Path,
        learners: Sequence[Learns],
        accelerator: Accelerator,
        *,
        writes: bool = True,
    ) -> None:
        """writes: whether this process writes what `save` collects; others may have a part in that."""
        self.writes = writes
        self.path = folder / CHECKPOINT_NAME
        self.learners, self.accelerator = learners, accelerator
        self.newest_is_good = True  # else it may not take the place of the one before it
        self.job: dict[str, str] = {}  # who writes; see rendezvous.job_of
        self.trained_on: dict[str, list[str]] = {}  # see data.identities
        self.last_end, self.last_duration = -float("inf"), 0.0

    def is_due(self) -> bool:
        """Whether writing now keeps to WRITING_SHARE: an epoch of seconds shall not wait for each of its files."""
        return time.monotonic() - self.last_end >= self.last_duration / WRITING_SHARE

    def save(
        self, epoch: int, config: Config, step: int = 0, meters: dict[str, Any] | None = None, seconds: float = 0.0
    ) -> None:
        """Write the state after `epoch`, and `step` steps of the next with its `meters`; it took `seconds`.

        The former file stays beside it, as ckpt.previous.pth. Raises OSError where that fails, and then the former file
        is still there.
        """
        start = time.monotonic()
        content = {
            "format": FORMAT,
            **on_host(self.learners[0].state_dict()),
            "other_models": [on_host(learner.state_dict()) for learner in self.learners[1:]],
            "sampler": {"seed": config.seed, "epoch": epoch},
            "epoch": epoch,
            "step": step,
            "meters": on_host(meters),
            "train_seconds": seconds,
            "random": random_states(self.accelerator),
            "config": config.to_dict(),
            "made_on": self.made_on(),
            "job": self.job,
            "trained_on": self.trained_on,
        }
        if self.writes:
            write_atomically(self.path, content, self.path.with_name(PREVIOUS_NAME) if self.newest_is_good else None)
        self.newest_is_good = True
        self.last_end = time.monotonic()
        self.last_duration = self.last_end - start

    def made_on(self) -> dict[str, Any]:
        """What a resumed run has to share with the one before it, to end with the same bits."""
        return {"num_processes": group_size(), "device": self.accelerator.device.type}

    def load(self, config: Config) -> LastGood:
        """Bring model, optimiser, scaler and random states to those of the last good file; returns that.

        Rank 0 reads it and the others get it from there: their machines need not see its folder. Raises InputError
        where there is none, or it belongs to another model than `config`, the run's, gives.
        """
        content, path, damage = from_rank(0, lambda: read_content(self.path.parent), self.accelerator.device)
        last = LastGood(content, Path(path), damage)
        self.newest_is_good = not last.damage
        try:
            states = [content, *content.get("other_models", [])]
            if len(states) != len(self.learners):
                raise ValueError(f"it has {len(states)} models, not {len(self.learners)}")
            for learner, state in zip(self.learners, states, strict=True):
                learner.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            changed, _ = config.differences_by_effect(content.get("config", {}))
            reason = "; ".join(changed) or " ".join(str(error).split())[:160]
            raise InputError(
                f"{last.path} is of another model or other losses than the flags give ({reason}): repeat that run's "
                "flags, or start anew from its weights, with --model_weight_file in the place of --resume"
            ) from error
        set_random_states(content["random"], self.accelerator)
        return last


class LastGood(NamedTuple):
    """A checkpoint that --resume goes on from."""

    content: dict[str, Any]
    path: Path
    damage: str  # what is wrong with the newest; empty where this is it


def read_last_good(folder: Path) -> LastGood:
    """The run folder's newest checkpoint, or the one before it where that is damaged.

    Raises InputError where neither can be gone on from.
    """
    newest, previous = folder / CHECKPOINT_NAME, folder / PREVIOUS_NAME
    try:
        return LastGood(as_run(read_weight_file(newest), newest), newest, "")
    except NotARun:
        raise
    except InputError as error:
        damage = str(error).split("; the one before it")[0]
        if not previous.is_file():
            raise
    try:
        return LastGood(as_run(read_weight_file(previous), previous), previous, damage)
    except InputError as error:
        raise InputError(f"no checkpoint to go on from: {damage}; {error}") from error


def read_content(folder: Path) -> list[Any]:
    """`read_last_good` in what torch.save and weights_only know."""
    last = read_last_good(folder)
    return [last.content, str(last.path), last.damage]


class NotARun(InputError):
    """A whole file, which is not one of ours."""


def on_host(value: Any) -> Any:
    """Nested dicts and lists with every tensor on the CPU: a file of a device's tensors may need its package."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: on_host(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_host(one) for one in value)
    return value


def as_run(content: Any, path: Path) -> dict[str, Any]:
    """The content of a checkpoint that this library wrote; raises NotARun where it is none."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise NotARun(f"{path} holds no run that --resume could go on from: use it as --model_weight_file")
    return content


def write_atomically(path: Path, content: Any, previous: Path | None = None) -> None:
    """torch.save into a file beside `path`, then rename: `path` is the old or the new content, never a part of one.

    previous: the name that the old content keeps. There is a whole file under one of the names at any moment.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.is_file():
            keep_as(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch puts a RuntimeError in front of a full disk's
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error).splitlines()[0]
        raise OSError(f"cannot write {path}: {reason}") from error


def keep_as(path: Path, name: Path) -> None:
    """Give a file a second name, which another file may have had; where links cannot be made, this name instead."""
    link = name.with_name(name.name + ".tmp")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except OSError:
        os.replace(path, name)
    else:
        os.replace(link, name)


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
    """Random states as tensors, numbers and lists of them, which weights_only reads back."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    device_state = accelerator.random_state()
    return {
        "torch": torch.get_rng_state(),
        "device": device_state if device_state is not None else torch.empty(0, dtype=torch.uint8),
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
    }


def set_random_states(states: dict[str, Any], accelerator: Accelerator) -> None:
    """Undo `random_states`; a state of another kind of device is left out."""
    torch.set_rng_state(states["torch"])
    device_state = accelerator.random_state()
    if device_state is not None and device_state.shape == states["device"].shape:
        accelerator.set_random_state(states["device"])
    keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
