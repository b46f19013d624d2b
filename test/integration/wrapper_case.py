"""Copies of the wrappers in a folder, for tests: how to run them, and what they have written."""

import os
import re
import shutil
import subprocess

from conftest import PATIENCE, ROOT, VARIABLES, Finished

# Records its arguments and environment, logs as the launcher would, and does what check.sh and run.sh say.
STAND_IN = r"""#!/usr/bin/env bash
case " $* " in *" --check=only "*) call=check ;; *) call=run ;; esac
printf '%s\n' "$@" >"$CASE/$call.arguments"
env >"$CASE/$call.environment"
for argument; do
    case $argument in
        --log_dir=*) folder=${argument#*=} ;;
        --first_device=*) log=$folder/${argument#*=}/train_${argument#*=}.log ;;
    esac
done
[ "$call" = check ] || tee "$log" <"$CASE/log"
[ ! -f "$CASE/$call.sh" ] || source "$CASE/$call.sh"
"""


class Case:
    """A copy of the wrappers, a stand-in for Python, and a directory to call them from."""

    def __init__(self, folder):
        self.folder, self.project, self.here = folder, folder / "project", folder / "here"
        self.output = self.project / "test" / "output"
        (self.project / "test").mkdir(parents=True)
        self.here.mkdir()
        for script in (ROOT / "test").glob("*.sh"):
            shutil.copy(script, self.project / "test")
        self.write("stand_in", STAND_IN).chmod(0o755)
        self.environment = {name: value for name, value in os.environ.items() if not VARIABLES.search(name)}
        self.environment |= {"CASE": str(folder), "PYTHON": str(folder / "stand_in")}

    def write(self, name, text):
        (self.folder / name).write_text(text)
        return self.folder / name

    def start(self, wrapper, *options, directory=None, **environment):
        directory = directory or self.here
        return subprocess.Popen(
            ["bash", os.path.relpath(self.project / "test" / wrapper, directory), *options],
            cwd=directory,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, wrapper, *options, **given):
        process = self.start(wrapper, *options, **given)
        try:
            out, err = process.communicate(timeout=2 * PATIENCE)
        finally:
            process.terminate()
        return Finished(process.returncode, out, err)

    def arguments(self, call="run"):
        return (self.folder / f"{call}.arguments").read_text().splitlines()

    def flags(self):
        """train.py's flags as argparse reads them: the last one counts."""
        arguments = self.arguments()
        script = arguments.index(str(self.project / "script" / "train.py"))
        return dict(argument.removeprefix("--").split("=", 1) for argument in arguments[script + 1 :])

    def variables(self):
        """The environment of the training, as NAME=value."""
        return set((self.folder / "run.environment").read_text().splitlines())

    def figures(self, name, device=0):
        lines = (self.output / str(device) / f"AlignedReID_for_PyTorch_{name}.log").read_text().splitlines()
        return dict(re.fullmatch(r"(\w+) = (.*)", line).groups() for line in lines)

    def losses(self, name, device=0):
        return (self.output / str(device) / f"train_AlignedReID_for_PyTorch_{name}_loss.txt").read_text().splitlines()

    def log(self, device=0):
        return (self.output / str(device) / f"train_{device}.log").read_text()


def final_figures(out):
    """FPS and rank@1 in the final lines."""
    title, fps, accuracy, seconds = out.splitlines()[-4:]
    assert title == "------------------ Final result ------------------"
    assert re.fullmatch(r"E2E Training Duration sec : \d+", seconds)
    return fps.removeprefix("Final Performance images/sec : "), accuracy.removeprefix("Final Train Accuracy : ")


def assert_nothing_happened(case):
    assert not case.output.exists()
    assert not (case.folder / "run.arguments").exists()
