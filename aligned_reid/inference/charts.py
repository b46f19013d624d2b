"""Line charts as numbers that templates/charts.html draws in SVG: pages need no script and no library for them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aligned_reid.evaluation.kernels import BIN_SHIFT
from aligned_reid.evaluation.protocol import TITLES
from aligned_reid.evaluation.verification import DECIDING_RATE, Counts
from aligned_reid.inference.findings import BROWSED

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 20, 12, 40
HISTOGRAM_BARS = 60
MAX_DOTS = 60  # of a line; longer lines have none
EPOCH_LINE = re.compile(r"^Ep (\d+), [^\n]*", re.MULTILINE)
FIGURE = re.compile(r", ([a-z]\w*(?:\.\d+)?) (-?[\d.]+)(%?)(?=,|$)", re.IGNORECASE)
# Figures of the log's epoch lines and their labels, by the chart that shows them; see docs/training.md.
TRAINING_CHARTS = {
    "Losses": {
        "loss": "total",
        "gL": "global triplet",
        "lL": "local triplet",
        "idL": "identity",
        "cL": "center",
        "pmL": "mutual, probabilities",
        "gdmL": "mutual, global distances",
        "ldmL": "mutual, local distances",
    },
    "Mean global distance of the mined pairs": {"gd_ap": "same person", "gd_an": "different people"},
    "Mean local distance of the mined pairs": {"ld_ap": "same person", "ld_an": "different people"},
    "Triplets in the right order": {"gp": "global", "lp": "local"},
}


class Line(NamedTuple):
    label: str
    points: list[tuple[float, float]]  # x, y


class Axis(NamedTuple):
    """The range of an axis, and its ticks with their labels."""

    title: str
    low: float
    high: float
    ticks: list[tuple[float, str]]

    def place(self, value: float, start: float, end: float) -> float:
        return round(start + (value - self.low) / (self.high - self.low) * (end - start), 2)


def chart(
    title: str, lines: Sequence[Line], x: Axis, y: Axis, *, mark: tuple[float, str] | None = None, filled: bool = False
) -> dict[str, Any]:
    """What templates/charts.html draws. mark: an x with a vertical line, and its label."""

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return x.place(point[0], LEFT, WIDTH - RIGHT), y.place(point[1], HEIGHT - BOTTOM, TOP)

    return {
        "title": title,
        "size": (WIDTH, HEIGHT),
        "frame": (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
        "lines": [
            {
                "label": line.label,
                "points": [at(point) for point in line.points],
                "values": [f"{value[0]:.4g}: {value[1]:.4g}" for value in line.points],
            }
            for line in lines
        ],
        "dots": len(lines[0].points) <= MAX_DOTS and not filled,
        "x": {"title": x.title, "ticks": [(x.place(at_, LEFT, WIDTH - RIGHT), text) for at_, text in x.ticks]},
        "y": {"title": y.title, "ticks": [(y.place(at_, HEIGHT - BOTTOM, TOP), text) for at_, text in y.ticks]},
        "mark": mark and (x.place(mark[0], LEFT, WIDTH - RIGHT), mark[1]),
        "filled": filled,
    }


def linear_axis(title: str, low: float, high: float, *, share: bool = False) -> Axis:
    """An axis with four to nine round ticks; share: written in per cent."""
    high = high if high > low else low + 1
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    numbers = [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return Axis(title, low, high, [(one, f"{one:.0%}" if share else f"{one:.6g}") for one in numbers])


def cmc_chart(cmcs: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """cmcs: rank@1, rank@2, ... by distance."""
    lines = [
        Line(TITLES[name], [(rank, share) for rank, share in enumerate(cmcs[name], 1)])
        for name in BROWSED
        if name in cmcs
    ]
    lowest = min(share for line in lines for _, share in line.points)
    x = linear_axis("rank", 1, max(len(line.points) for line in lines))
    y = linear_axis("queries with a match", math.floor(lowest * 10) / 10 if lowest < 1 else 0.9, 1, share=True)
    return chart("Cumulative matches (CMC)", lines, x, y)


def roc_chart(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """records: verification records by distance."""
    lowest = -5
    lines = [
        Line(
            TITLES[name],
            [
                (math.log10(fmr), tmr)
                for fmr, tmr in zip(record["roc"]["fmr"], record["roc"]["tmr"], strict=True)
                if fmr >= 10**lowest
            ],
        )
        for name, record in records.items()
    ]
    ticks = [(float(power), f"{100 * 10.0**power:g}%") for power in range(lowest, 1)]
    x = Axis("pairs of different people below the threshold", lowest, 0, ticks)
    at = next(iter(records.values()))["at_fmr"][DECIDING_RATE]
    mark = at and (-3.0, f"threshold {at['threshold']:.2f}")
    return chart(
        "Verification (ROC), other cameras only", lines, x, linear_axis("same person", 0, 1, share=True), mark=mark
    )


def histogram_chart(title: str, counts: Counts, threshold: float | None) -> dict[str, Any]:
    """Distances of pairs of one person and of different people, each adding up to 1.

    Of each kind, the farthest 1 in 1,000 may lie outside: one odd image would make the rest too narrow to see.
    """
    nearer = counts.cumsum(axis=1)  # [2, NUM_BINS]
    used = np.flatnonzero(((nearer > 0) & (nearer - counts < 0.999 * nearer[:, -1:])).any(axis=0))
    first, last = int(used[0]), int(used[-1])
    edges = (np.arange(first, last + 2, dtype=np.int32) << BIN_SHIFT).view(np.float32)  # of the bins
    middles = (edges[:-1] + edges[1:]) / 2
    lines = []
    for label, values in zip(("same person", "different people"), counts[:, first : last + 1], strict=True):
        heights, bars = np.histogram(middles, HISTOGRAM_BARS, (edges[0], edges[-1]), weights=values)
        heights = heights / max(values.sum(), 1)
        lines.append(Line(label, list(zip(((bars[:-1] + bars[1:]) / 2).tolist(), heights.tolist(), strict=True))))
    x = linear_axis("distance", float(edges[0]), float(edges[-1]))
    y = linear_axis("pairs", 0, max(share for line in lines for _, share in line.points), share=True)
    mark = None if threshold is None else (threshold, f"threshold {threshold:.2f}")
    return chart(title, lines, x, y, mark=mark, filled=True)


def training_charts(log: str) -> list[dict[str, Any]]:
    """Curves of the figures in a log's epoch lines; of an epoch that was run twice, the later line counts."""
    epochs: dict[int, dict[str, float]] = {}
    for found in EPOCH_LINE.finditer(log):
        values = {name: float(text) / (100 if per_cent else 1) for name, text, per_cent in FIGURE.findall(found[0])}
        epochs[int(found[1])] = values
    charts = []
    for title, labels in TRAINING_CHARTS.items():
        lines = [
            Line(label, [(epoch, values[name]) for epoch, values in sorted(epochs.items()) if name in values])
            for name, label in labels.items()
        ]
        lines = [line for line in lines if line.points]
        if lines:
            top = max(value for line in lines for _, value in line.points)
            share = title.startswith("Triplets")
            x = linear_axis("epoch", 1, max(max(epochs), 2))
            charts.append(chart(title, lines, x, linear_axis("", 0, 1 if share else top, share=share)))
    return charts
