"""What compare, search and group share: their flags, the model, tables, and images that cannot be used."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from aligned_reid.cli import OneLineParser, parse_path
from aligned_reid.errors import InputError

if TYPE_CHECKING:  # torch takes seconds to import
    from aligned_reid.inference import ReID


def make_parser(name: str, description: str | None, example: str) -> argparse.ArgumentParser:
    """The parser of `aligned-reid <name>`, with the flags of the model and the output."""
    parser = OneLineParser(
        prog=f"aligned-reid {name}",
        allow_abbrev=False,
        description=description,
        epilog=f"example: aligned-reid {name} {example}",
    )
    parser.add_argument(
        "--model", type=parse_path, required=True, help="run folder, or weights: .pth, .safetensors, .onnx"
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="npu, cuda, cpu, one of several such as npu:1, or auto: the first available kind",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def open_model(arguments: argparse.Namespace) -> ReID:
    from aligned_reid.inference import ReID

    return ReID.from_pretrained(arguments.model, arguments.device, log=note)


def note(line: str) -> None:
    """Print a line beside the results."""
    print(line, file=sys.stderr, flush=True)


class BadImages:
    """Reports each image that cannot be used, and remembers how many there were."""

    def __init__(self) -> None:
        self.num = 0

    def __call__(self, line: str) -> None:
        self.num += 1
        note(" ".join(line.split()))

    def check(self) -> None:
        """Raise InputError if there were some, once the others are served."""
        if self.num:
            raise InputError(f"{self.num:,} of the images could not be used, as listed above; the others are served")


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=2))


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns, the last of which is to the left and not padded."""
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads) - 1)]
    for line in lines:
        print("  ".join([*(cell.rjust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]))
