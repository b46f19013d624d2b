"""What a resumed run says about itself, and where in an epoch it starts."""

from __future__ import annotations

from typing import Any

from aligned_reid.config import Config
from aligned_reid.training.checkpoint import LastGood


def describe_resume(config: Config, last: LastGood, made_on: dict[str, Any]) -> list[str]:
    """Lines for the log: what the run goes on from, and why it may end otherwise than one that was not stopped.

    made_on: the processes and the device of this run, as `Checkpoints.made_on` gives them.
    """
    lines = [f"{last.damage}: the checkpoint before it is used"] if last.damage else []
    step = last.content.get("step", 0)
    in_epoch = f" and step {step} of the next" if step else ""
    lines.append(f"resumed from {last.path} after epoch {last.content['epoch']}{in_epoch}")
    before = last.content.get("made_on", made_on)
    names = {"num_processes": "processes", "device": "device"}
    changed = [f"{names[key]} {before[key]} -> {value}" for key, value in made_on.items() if before[key] != value]
    if changed:
        lines.append(f"{', '.join(changed)}: from here on the run is no longer bit-exact")
    matter, others = config.differences_by_effect(last.content["config"])
    if matter:
        lines.append(f"flags that differ from those of the checkpoint and change the result: {'; '.join(matter)}")
    if others:
        lines.append(f"flags that differ from those of the checkpoint without effect on training: {'; '.join(others)}")
    return lines


def first_step(content: dict[str, Any], config: Config, num_processes: int, num_steps: int) -> int:
    """The steps of the next epoch that are done; num_steps: of an epoch now.

    Where a step now has another number of batches, or processes share the identities and their number has changed, as
    many steps as show the same share of them.
    """
    step = int(content.get("step", 0))
    step = step * content.get("config", {}).get("accumulate", config.accumulate) // config.accumulate
    before = content.get("made_on", {}).get("num_processes", num_processes)
    if config.id_sampling == "sharded" and before != num_processes:
        step = step * before // num_processes
    return min(step, num_steps)
