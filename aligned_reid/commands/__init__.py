"""The command `aligned-reid`: a table of commands, of which it imports and runs the one that is asked for."""

import sys
from collections.abc import Mapping
from importlib import import_module

from aligned_reid import __version__
from aligned_reid.cli import nearest, program_name, run_command
from aligned_reid.errors import InputError

# Name -> the module in this package, or module:function, and what the command does.
COMMANDS = {
    "demo": ("demo", "draw people, train on them, and show all of this (minutes)"),
    "prepare": ("prepare", "make a data set from your photos, Market-1501 and others"),
    "train": ("train", "train a model and evaluate it, or evaluate only"),
    "launch": ("launch", "run a command as several processes, one a device"),
    "compare": ("compare", "do two photos show the same person?"),
    "search": ("search", "find a person in a folder of photos"),
    "group": ("group", "sort a folder of photos by person"),
    "report": ("report", "a test as a page: its curves, and what it finds or misses"),
    "extract": ("extract", "features of a data set's test part, or of any folder of images"),
    "evaluate": ("evaluate", "scores of saved features, without a model or images"),
    "export": ("export", "write a model as an ONNX graph"),
}
EXAMPLES = """
examples:
  aligned-reid train --data_path=mine --exp_dir=exp/first
  aligned-reid compare a.jpg b.jpg --model exp/first
  aligned-reid search a.jpg --gallery photos --model exp/first --html found.html
"""


def main() -> None:
    """The entry point: `aligned-reid <command> ...`, which is also `python -m aligned_reid`."""
    sys.argv[0] = "aligned-reid"
    if sys.argv[1:] == ["--version"]:
        print(f"aligned-reid {__version__}")
        return
    run_command(lambda: run_from(COMMANDS, "AlignedReID: find people again in the photos of other cameras.", EXAMPLES))


def run_from(commands: Mapping[str, tuple[str, str]], description: str, examples: str) -> None:
    """Run the command in `commands` that sys.argv names first, or print their list.

    Its own arguments and errors are then in its name: sys.argv[0] becomes "aligned-reid train".
    """
    name, *arguments = sys.argv[1:] or ["--help"]
    if name == "help" and arguments:
        name, arguments = arguments[0], [*arguments[1:], "--help"]
    if name in ("help", "-h", "--help"):
        print(help_of(commands, description, examples), end="")
    elif name not in commands:
        line = f"unknown command {name}{nearest(name, commands)}"
        raise InputError(f"{line}; see {program_name()} --help")
    else:
        sys.argv = [f"{program_name()} {name}", *arguments]
        module, _, function = commands[name][0].partition(":")
        getattr(import_module(f"aligned_reid.commands.{module}"), function or "main")()


def help_of(commands: Mapping[str, tuple[str, str]], description: str, examples: str) -> str:
    """The list of commands, which fits a screen of 24 lines by 80 columns."""
    program, width = program_name(), max(map(len, commands))
    lines = [f"usage: {program} <command> [--help] [options]", description, ""]
    lines += [f"  {name:{width}}  {text}" for name, (_, text) in commands.items()]
    return "\n".join(lines) + "\n" + examples
