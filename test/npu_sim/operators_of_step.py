"""List the operators of a training step and their calls, for docs/ascend.md; check them against torch_npu's lists.

    NPU_SIM_REPORT=report PYTHONPATH=test/npu_sim TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
        python script/train.py --device=npu -llw=1 -idlw=1 ...
    python test/npu_sim/operators_of_step.py report.0.json <unpacked torch_npu wheel>

torch_npu's wheel lists the operators that it implements in csrc/aten/npu_native_functions*.yaml.
"""

import json
import re
import sys
import textwrap
from pathlib import Path

STEP = 4  # counted from 0: after the first steps' allocations, and within an epoch
OWN = re.compile(r"^\s*- (?:func: )?(\w+)", re.MULTILINE)
COPY = re.compile(r"aten::_copy_from(\[(\w+) to (\w+)\])?$")  # torch's copy_, as a device sees it


def step_operators(report: Path) -> dict[str, int]:
    """Operators of the simulated step and their calls, most frequent first."""
    calls = json.loads(report.read_text())["steps"][STEP]
    calls = {name: count for name, count in calls.items() if not name.endswith("[float64]")}  # counted twice
    return dict(sorted(calls.items(), key=lambda item: (-item[1], item[0])))


def implemented(package: Path) -> set[str]:
    """The operators in the lists of an unpacked torch_npu wheel."""
    lists = sorted(package.glob("**/csrc/aten/npu_native_functions*.yaml"))
    if not lists:
        sys.exit(f"operators_of_step.py: error: no csrc/aten/npu_native_functions*.yaml under {package}")
    return {name for file in lists for name in OWN.findall(file.read_text())}


def main() -> None:
    report, *packages = map(Path, sys.argv[1:])
    words, names = [], set()
    for operator, calls in step_operators(report).items():
        name = operator.split("::")[1]
        if copy := COPY.match(operator):
            name, operator = "copy_", f"copy {copy[2]} to {copy[3]}" if copy[1] else "copy"
        names.add(name)
        words.append(f"{operator.split('::')[-1]} {calls}")
    print(textwrap.fill(", ".join(words), 116, break_on_hyphens=False))
    for package in packages:
        missing = names - implemented(package) - {"NpuFusedAdam"}  # the optimizer is torch_npu.optim's
        print(f"not in torch_npu's lists: {', '.join(sorted(missing)) or 'none'}")


if __name__ == "__main__":
    main()
