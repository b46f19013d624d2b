"""The run's ckpt.pth: everything that `--resume` goes on from, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from aligned_reid.accelerator import Accelerator
from aligned_reid.config import Config
from aligned_reid.errors import InputError
from aligned_reid.weights import CHECKPOINT_NAME, read_weight_file

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
    ) -> None:
        self.path = folder / CHECKPOINT_NAME
        self.learners, self.accelerator = learners, accelerator
        self.last_end, self.last_duration = -float("inf"), 0.0

    def is_due(self) -> bool:
        """Whether writing now keeps to WRITING_SHARE: an epoch of seconds shall not wait for each of its files."""
        return time.monotonic() - self.last_end >= self.last_duration / WRITING_SHARE

    def save(self, epoch: int, config: Config, step: int = 0, meters: dict[str, Any] | None = None) -> None:
        """Write the state after `epoch`, and `step` steps of the next with its `meters`.

        Raises OSError where that fails, and then the former file is still there.
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
            "random": random_states(self.accelerator),
            "config": config.to_dict(),
        }
        write_atomically(self.path, content)
        self.last_end = time.monotonic()
        self.last_duration = self.last_end - start

    def load(self) -> dict[str, Any]:
        """Bring model, optimiser, scaler and random states to those of the file; returns its content.

        Raises InputError where there is no file, it is damaged, or belongs to another model.
        """
        content = read_checkpoint(self.path)
        try:
            states = [content, *content.get("other_models", [])]
            if len(states) != len(self.learners):
                raise ValueError(f"it has {len(states)} models, not {len(self.learners)}")
            for learner, state in zip(self.learners, states, strict=True):
                learner.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(
                f"{self.path} is of another model or other losses than the flags give ({reason})"
            ) from error
        set_random_states(content["random"], self.accelerator)
        return content


def on_host(value: Any) -> Any:
    """Nested dicts and lists with every tensor on the CPU: a file of a device's tensors may need its package."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: on_host(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_host(one) for one in value)
    return value


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint that this library wrote; raises InputError where the file is none."""
    content = read_weight_file(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} holds no run that --resume could go on from: use it as --model_weight_file")
    return content


def write_atomically(path: Path, content: Any) -> None:
    """torch.save into a file beside `path`, then rename: `path` is the old or the new content, never a part of one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


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
