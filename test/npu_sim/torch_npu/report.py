"""What ran on the device, so that a test can tell a run on `npu` from one that quietly ran on the CPU."""

import atexit
import collections
import json
import os

calls: collections.Counter[str] = collections.Counter()  # operator or hccl collective -> how often it ran
facts: dict[str, object] = {}  # what was set: compile mode, device
steps: list[dict[str, int]] = []  # the calls of each optimiser step, from the end of the one before
_counted: collections.Counter[str] = collections.Counter()


def end_of_step() -> None:
    """Called by the optimiser: the calls since the last step are one training step's."""
    steps.append(dict(calls - _counted))
    _counted.update(steps[-1])


def register() -> None:
    path = os.environ.get("NPU_SIM_REPORT")
    if path:
        atexit.register(_write, path)


def _write(path: str) -> None:
    if calls:
        with open(f"{path}.{os.environ.get('RANK', '0')}.json", "w") as file:
            json.dump({"calls": calls, "steps": steps, **facts}, file)
