"""The data that the report's script draws rows and alignments from, in as few bytes as they need."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aligned_reid.data.prepare.sources import shown
from aligned_reid.evaluation.protocol import TITLES
from aligned_reid.inference.findings import BROWSED, Findings, Split


class Grid(NamedTuple):
    """Queries and the images of their rows."""

    data: dict[str, Any]  # for the page's script
    rows: list[int]  # of each image that is shown, among all images; the script counts them in this order


def make_grid(findings: Findings, split: Split, names: Sequence[str], queries: Sequence[int], stripes: int) -> Grid:
    """The grid of `queries`; names: of all images; stripes: of an image, 0 without a local branch.

    data: "person", "camera" and "name" of each shown image; "queries", the image of each; for each distance in
    "orders" each query's AP in thousandths (null without a match) and its hits: image, distance, image, distance, ...
    """
    orders = [name for name in BROWSED if name in findings.hits]
    rows = [int(split.query_rows[query]) for query in queries]
    found = {image for name in orders for query in queries for image, _ in findings.hits[name][query]}
    rows += [int(split.gallery_rows[image]) for image in sorted(found)]
    number = {int(split.gallery_rows[image]): len(queries) + place for place, image in enumerate(sorted(found))}

    def hits_of(name: str, query: int) -> list[float]:
        pairs = [
            (number[int(split.gallery_rows[image])], significant(dist)) for image, dist in findings.hits[name][query]
        ]
        return [value for pair in pairs for value in pair]

    person, camera = np.zeros((2, len(names)), np.int64)
    for array, values in ((person, split[0:2]), (camera, split[2:4])):
        array[split.query_rows], array[split.gallery_rows] = values
    data = {
        "stripes": stripes,
        "person": person[rows].tolist(),
        "camera": camera[rows].tolist(),
        "name": [shown(names[row]) for row in rows],
        "queries": list(range(len(queries))),
        "orders": [
            {
                "key": name,
                "title": TITLES[name],
                "ap": [None if (ap := findings.ap[name][query]) is None else round(1000 * ap) for query in queries],
                "hits": [hits_of(name, query) for query in queries],
            }
            for name in orders
        ],
    }
    return Grid(data, rows)


def significant(value: float) -> float:
    """Rounded to four digits, which is what is shown."""
    return float(f"{value:.4g}")


def pairs_of(grid: Grid, local_feat: Tensor, queries: Sequence[int]) -> dict[int, dict[int, list[Any]]]:
    """Alignments of some of the grid's queries with their hits: by query and image, [costs, moves, distance].

    local_feat [N, H, d]: of all images, as the test compares them. costs: base64 of H * H bytes, each a cost times 255;
    moves: the path from the first pair of stripes on, "d" down the query's stripes or "r" down the hit's; distance: the
    aligned distance.
    """
    wanted = [
        (query, image)
        for query in queries
        for image in sorted({image for order in grid.data["orders"] for image in order["hits"][query][::2]})
    ]
    rows = torch.tensor([[grid.rows[query], grid.rows[image]] for query, image in wanted])
    aligned = align_pairs(local_feat[rows[:, 0]], local_feat[rows[:, 1]])
    costs = np.rint(aligned.cost * 255).astype(np.uint8)
    pairs: dict[int, dict[int, list[Any]]] = {query: {} for query in queries}
    for place, (query, image) in enumerate(wanted):
        moves = "".join("rd"[int(down)] for down in aligned.moves[place])
        distance = significant(float(aligned.distance[place]))
        pairs[query][image] = [base64.b64encode(costs[place].tobytes()).decode(), moves, distance]
    return pairs


class Alignments(NamedTuple):
    """The alignment of N pairs of images."""

    cost: NDArray[np.float32]  # [N, H, G], of each pair of stripes
    moves: NDArray[np.bool_]  # [N, H + G - 2], the shortest path from pair (0, 0) on: True down, False to the right
    distance: NDArray[np.float64]  # [N], its total cost


def align_pairs(x: Tensor, y: Tensor) -> Alignments:
    """distance.alignment_path of image n of x and image n of y, for many pairs at once: [N, H, d], [N, G, d]."""
    cost = torch.tanh(torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") / 2).cpu().numpy()
    num_pairs, num_x, num_y = cost.shape
    total = np.full((num_pairs, num_x + 1, num_y + 1), np.inf)  # with a border above and to the left
    total[:, 0, 1] = 0
    for i in range(num_x):
        for j in range(num_y):
            total[:, i + 1, j + 1] = cost[:, i, j] + np.minimum(total[:, i, j + 1], total[:, i + 1, j])
    pairs = np.arange(num_pairs)
    rows, columns = np.full(num_pairs, num_x), np.full(num_pairs, num_y)
    moves = np.zeros((num_pairs, num_x + num_y - 2), np.bool_)
    for step in reversed(range(moves.shape[1])):
        moves[:, step] = total[pairs, rows - 1, columns] <= total[pairs, rows, columns - 1]
        rows -= moves[:, step]
        columns -= ~moves[:, step]
    return Alignments(cost, moves, total[:, -1, -1])
