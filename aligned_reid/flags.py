"""How the values of options are written on a command line: parsed, never evaluated, and written back."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def parse_bool(text: str) -> bool:
    """'true' or 'false' in any case; anything else is refused (`bool('false')` would be True)."""
    try:
        return {"true": True, "false": False}[text.strip().lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


def parse_ints(text: str) -> tuple[int, ...]:
    """'256,128' or '(256, 128)' -> (256, 128). Parsed, never evaluated."""
    try:
        return tuple(int(part) for part in text.strip().strip("()[]").split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 256,128") from None


def parse_height_width(text: str) -> tuple[int, int]:
    size = parse_ints(text)
    if len(size) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not height,width such as 256,128")
    return size[0], size[1]


def parse_margin(text: str) -> float | None:
    """A number, or 'none' for the soft margin log(1 + exp(dist_ap - dist_an))."""
    if text.strip().lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor none (soft margin)") from None


def parse_loss_scale(text: str) -> float | None:
    """A positive number for a static scale, or 'dynamic' (None)."""
    if text.strip().lower() == "dynamic":
        return None
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0.0 < scale < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor dynamic")
    return scale


def parse_local_distance(text: str) -> bool | None:
    """'true', 'false', or 'auto' (None): where the local branch was trained."""
    return None if text.strip().lower() == "auto" else parse_bool(text)


def expand_home(text: str) -> str:
    """A path with the ~ or ~user at its start expanded, which a shell leaves alone behind `--flag=`."""
    user = text.split("/")[0]
    home = os.path.expanduser(user)
    if user.startswith("~") and not (os.path.isabs(home) and os.path.isdir(home)):
        raise argparse.ArgumentTypeError(f"{text!r}: there is no home folder {user} (a folder of that name: ./{user})")
    return home + text[len(user) :]


def expand_homes(text: str) -> str:
    """Several paths, joined with +."""
    return "+".join(map(expand_home, text.split("+")))


def parse_path(text: str) -> Path:
    return Path(expand_home(text))


PARSERS: dict[str, Callable[[str], Any]] = {
    "bool": parse_bool,
    "int": int,
    "int | None": int,
    "float": float,
    "float | None": parse_margin,
    "str": str,
    "tuple[int, int]": parse_height_width,
    "tuple[int, ...]": parse_ints,
}


def format_option(value: Any) -> str:
    """A value other than None as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line with the nearest flag's name, and exit status 2."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"invalid int value: (.*)", r"\1 is not a whole number", message)
        message = re.sub(r"invalid float value: (.*)", r"\1 is not a number", message)
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
        if unknown.startswith("-") and message.startswith("unrecognized"):
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown, flags, n=1)
            message = f"unknown flag {unknown}" + (f" (did you mean {near[0]}?)" if near else "")
        print(f"{self.prog}: error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)
