"""Pictures of what the model sees: the alignment of two images, and where its trunk responds. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligned_reid.errors import InputError

FORMATS = (".png", ".svg")
MAX_SIDE = 512  # pixels of a photo's longer side in a picture
COLOUR_MAP = "YlGnBu_r"  # of stripe costs: dark is alike
PATH_COLOUR = "#f2711c"
TEXT = {"family": "sans-serif", "size": 9, "color": "#333333"}

Pixels = NDArray[np.uint8]


def draw_alignment(
    path: str | Path, images: Sequence[Pixels], cost: Any, cells: Sequence[tuple[int, int]], local_distance: float
) -> None:
    """Write a picture of two images' alignment, PNG or SVG by the ending of `path`.

    images: two photos, uint8 [h, w, 3] (RGB). cost [H, G]: of each stripe pair; cells: the shortest path through it;
    local_distance: its sum, the aligned distance (`distance.alignment_path` gives all three). Left, the photos with
    their stripes, joined along the path: the cheaper a pair, the thicker its line. Right, the costs with the path. The
    title compares it with `diagonal_distance`. Raises InputError for another ending, and if matplotlib is missing.
    """
    cost = np.asarray(cost, dtype=np.float64)
    figure = new_figure(path, (9, 4.2))
    photos, matrix, bar = figure.subplots(1, 3, width_ratios=(1.4, 1, 0.04))
    draw_joined_photos(photos, images, cost, cells)
    shades = matrix.imshow(cost, cmap=COLOUR_MAP)
    rows, columns = np.array(cells).T
    for width, colour in ((5, "white"), (2.5, PATH_COLOUR)):
        matrix.plot(columns, rows, color=colour, linewidth=width, marker="o", markersize=width, solid_joinstyle="round")
    matrix.set_xticks(range(cost.shape[1]), range(1, cost.shape[1] + 1), **TEXT)
    matrix.set_yticks(range(cost.shape[0]), range(1, cost.shape[0] + 1), **TEXT)
    matrix.set_xlabel("stripe of the right photo", **TEXT)
    matrix.set_ylabel("stripe of the left photo", **TEXT)
    figure.colorbar(shades, cax=bar).set_label("cost of a stripe pair (dark: alike)", **TEXT)
    for axes in (matrix, bar):
        axes.tick_params(length=0, labelsize=8, labelcolor=TEXT["color"])
        axes.spines[:].set_visible(False)
    title = f"aligned distance {local_distance:.2f}"
    if cost.shape[0] == cost.shape[1]:
        title += f", along the diagonal {diagonal_distance(cost):.2f}"
    figure.suptitle(title, fontsize=11, color=TEXT["color"])
    save_figure(figure, path)


def draw_joined_photos(
    axes: Any, images: Sequence[Pixels], cost: NDArray[Any], cells: Sequence[tuple[int, int]]
) -> None:
    """Two photos at the same height, their stripes, and a line for each pair of stripes on the path."""
    left, right = (shrink(image) for image in images)
    widths = [image.shape[1] / image.shape[0] for image in (left, right)]  # at height 1
    gap = 0.45
    start = widths[0] + gap
    for image, begin, width, stripes in (
        (left, 0.0, widths[0], cost.shape[0]),
        (right, start, widths[1], cost.shape[1]),
    ):
        axes.imshow(image, extent=(begin, begin + width, 1, 0), aspect="equal", interpolation="bilinear")
        for edge in range(1, stripes):
            axes.plot([begin, begin + width], [edge / stripes] * 2, color="white", linewidth=0.8, alpha=0.8)
    spread = max(float(np.ptp(cost)), 1e-6)
    for i, j in cells:
        alike = 1 - (cost[i, j] - cost.min()) / spread  # 1 for the cheapest pair, 0 for the dearest
        ends = [(i + 0.5) / cost.shape[0], (j + 0.5) / cost.shape[1]]
        axes.plot(
            [widths[0], start],
            ends,
            color=PATH_COLOUR,
            linewidth=0.6 + 4.4 * alike,
            alpha=0.35 + 0.65 * alike,
            solid_capstyle="butt",
        )
    axes.set_xlim(0, start + widths[1])
    axes.set_ylim(1, 0)
    axes.set_axis_off()


def diagonal_distance(cost: NDArray[Any]) -> float:
    """The distance without alignment, of cost [H, H]: the mean over the paths along the diagonal.

    These take, between two pairs (i, i), either (i, i + 1) or (i + 1, i). They visit 2 H - 1 pairs, as the shortest
    path does, so the aligned distance is never larger.
    """
    between = (np.diagonal(cost, 1) + np.diagonal(cost, -1)) / 2
    return float(np.trace(cost) + between.sum())


def draw_heat_map(path: str | Path, image: Pixels, feature_map: Any) -> None:
    """Write a picture of where the trunk responds: its last feature map [C, h, w] over the photo, uint8 [H, W, 3].

    The response is the sum of squares over the channels, divided by its largest value (Zagoruyko and Komodakis,
    "Paying More Attention to Attention", arXiv:1612.03928, section 3.1). PNG or SVG by the ending of `path`. Raises
    InputError as `draw_alignment` does, and for a feature map of another shape.
    """
    response = np.square(np.asarray(feature_map, dtype=np.float64))
    if response.ndim != 3 or 0 in response.shape:
        raise InputError(f"draw_heat_map: needs a feature map [C, h, w], got {list(response.shape)}")
    response = response.sum(axis=0)
    response /= max(float(response.max()), 1e-12)
    image = shrink(image)
    height, width = image.shape[:2]
    figure = new_figure(path, (2 * 3.6 * width / height + 1.2, 3.9))
    plain, overlaid, bar = figure.subplots(1, 3, width_ratios=(1, 1, 0.06))
    for axes in (plain, overlaid):
        axes.imshow(image, extent=(0, width, height, 0), interpolation="bilinear")
        axes.set_axis_off()
    shades = overlaid.imshow(
        response, extent=(0, width, height, 0), cmap="inferno", alpha=0.6, interpolation="bicubic", vmin=0, vmax=1
    )
    figure.colorbar(shades, cax=bar).set_label("response, of its largest", **TEXT)
    bar.tick_params(length=0, labelsize=8, labelcolor=TEXT["color"])
    bar.spines[:].set_visible(False)
    save_figure(figure, path)


def new_figure(path: str | Path, size: tuple[float, float]) -> Any:
    """An empty figure of `size` inches. Raises InputError if `path` has another ending or matplotlib is missing."""
    if Path(path).suffix.lower() not in FORMATS:
        raise InputError(f"{path}: pictures are written as {' or '.join(FORMATS)}")
    try:
        from matplotlib.figure import Figure  # a second to import; without pyplot no display is touched
    except ImportError as error:
        raise InputError("pictures need the package matplotlib: pip install matplotlib") from error
    return Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")


def save_figure(figure: Any, path: str | Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def shrink(image: Pixels) -> Pixels:
    """The photo, by whole steps no larger than MAX_SIDE: the size of a picture does not depend on the camera."""
    step = -(-max(image.shape[:2]) // MAX_SIDE)
    return image[::step, ::step]
