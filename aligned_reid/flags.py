"""How options become flags: the fields that declare them, the parser, --help and docs/flags.md, all from one place."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, field
from typing import Any, NamedTuple

from aligned_reid.cli import OneLineParser, parse_bool, parse_ints
from aligned_reid.errors import InputError

# What an option affects. A resumed run reports changes of TRAINING options; a test takes TEST options from the weight
# file unless they are given; ARCHITECTURE options are arguments of AlignedReID.
TRAINING, TEST, ARCHITECTURE = "training", "test", "architecture"
MODEL = (TRAINING, TEST, ARCHITECTURE)
NOTHING: tuple[str, ...] = ()


class Range(NamedTuple):
    """The values that a number may have: from `low` to `high`, `low` itself excluded if `above` is set."""

    low: float = 0
    high: float = math.inf
    above: bool = False

    def holds(self, value: float) -> bool:
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        return low if self.high == math.inf else f"{low}, at most {self.high:.10g}"


ANY, COUNT, SHARE = Range(), Range(1), Range(0, 1)
LARGEST = {int: 2**31 - 1, float: 1e9}  # of numbers whose range has no upper end

# How None is written on the command line. Other options that are None are left out.
NONE_AS = {"global_margin": "none", "local_margin": "none", "loss_scale": "dynamic", "use_local_distance": "auto"}


def option(
    group: str,
    default: Any,
    text: str,
    *,
    allowed: Range | Sequence[str] = ANY,
    affects: Sequence[str] = (TRAINING,),
    aliases: Sequence[str] = (),
    common: bool = False,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """A dataclass field that holds all there is to know of a flag.

    allowed: the range of a number, or the choices of a string. common: whether plain --help shows it.
    parse: turns the flag's text into its value; default: by the field's type.
    """
    metadata = {
        "group": group,
        "help": text,
        "allowed": allowed,
        "affects": affects,
        "aliases": aliases,
        "common": common,
        "parse": parse,
    }
    return field(default=default, metadata=metadata)


def check_value(one: Field, value: Any) -> None:
    """Raise InputError if the option's value is not allowed."""
    allowed = one.metadata["allowed"]
    if not isinstance(allowed, Range):
        if value not in allowed:
            raise InputError(f"--{one.name} {value}: choose from {', '.join(allowed)}")
        return
    for number in value if isinstance(value, tuple) else [value]:
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            bounded = allowed._replace(high=min(allowed.high, LARGEST[type(number)]))
            if not bounded.holds(number):
                raise InputError(f"--{one.name} is {bounded if number > 1 else allowed}, not {number:g}")


def parse_height_width(text: str) -> tuple[int, int]:
    """'256,128' or '(256, 128)' -> (256, 128), height before width."""
    size = parse_ints(text)
    if len(size) != 2 or min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not height,width such as 256,128")
    return size[0], size[1]


def or_word(word: str, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of what `parse` takes, or of `word`, which stands for None."""

    @functools.wraps(parse)  # argparse's errors name it
    def parse_or_none(text: str) -> Any:
        return None if text.strip().lower() == word else parse(text)

    return parse_or_none


parse_local_distance = or_word("auto", parse_bool)
PARSERS: dict[str, Callable[[str], Any]] = {
    "bool": parse_bool,
    "int": int,
    "float": float,
    "str": str,
    "tuple[int, int]": parse_height_width,
    "tuple[int, ...]": parse_ints,
}


def format_value(value: Any) -> str:
    """A value other than None as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def written_value(name: str, value: Any) -> str:
    """A value as it is written on the command line; empty if the flag is to be left out."""
    return NONE_AS.get(name, "") if value is None else format_value(value)


def make_parser(options: Sequence[Field], removed: Mapping[str, str]) -> argparse.ArgumentParser:
    """The parser of `options`. removed: flags of earlier versions, and what to use instead."""
    parser = OneLineParser(
        allow_abbrev=False,
        add_help=False,
        usage="%(prog)s --data_path=DIR [--flag=value ...]",
        description="Train AlignedReID and evaluate it, or evaluate only.",
        removed=removed,
    )

    class Help(argparse.Action):
        def __call__(self, called: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
            if values != "all":
                parser.epilog = f"These are the common flags. --help all lists all {len(options)}."
                for one in options:
                    if not one.metadata["common"]:
                        actions[one.name].help = argparse.SUPPRESS
            parser.print_help()
            parser.exit()

    parser.add_argument(
        "-h",
        "--help",
        nargs="?",
        metavar="all",
        action=Help,
        dest=argparse.SUPPRESS,
        help="list the common flags, or all",
    )
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(one.metadata["group"] for one in options)}
    actions = {}
    for one in options:
        default = written_value(one.name, one.default)
        parse = one.metadata["parse"] or PARSERS[str(one.type).removesuffix(" | None")]
        actions[one.name] = groups[one.metadata["group"]].add_argument(
            *flags_of(one),
            dest=one.name,
            default=argparse.SUPPRESS,  # what is not given is the recipe's
            type=or_word(NONE_AS[one.name], parse) if one.name in NONE_AS else parse,
            choices=choices_of(one),
            metavar=None if choices_of(one) else "X",
            help=one.metadata["help"].replace("%", "%%") + (f" (default: {default})" if default else ""),
        )
    return parser


def flags_of(one: Field) -> list[str]:
    return [f"--{one.name}", *one.metadata["aliases"]]


def choices_of(one: Field) -> Sequence[str] | None:
    return None if isinstance(one.metadata["allowed"], Range) else one.metadata["allowed"]


def flags_page(options: Sequence[Field]) -> str:
    """The text of docs/flags.md."""
    lines = [
        "# Flags",
        "",
        "All flags of `aligned-reid train`; `aligned-reid extract` takes them too. `--recipe` changes the defaults.",
        "This page is written by",
        "`python -c 'from aligned_reid import config, flags; print(flags.flags_page(config.OPTIONS), end=\"\")'`.",
    ]
    group = ""
    for one in options:
        if one.metadata["group"] != group:
            group = one.metadata["group"]
            lines += ["", f"## {group.capitalize()}", "", "| flag | default | what it does |", "| --- | --- | --- |"]
        flags = ", ".join(f"`{flag}`" for flag in flags_of(one))
        default = written_value(one.name, one.default)
        choices = f" ({', '.join(choices_of(one) or [])})" if choices_of(one) else ""
        lines.append(f"| {flags} | {default and f'`{default}`'} | {one.metadata['help']}{choices} |")
    return "\n".join(lines) + "\n"
