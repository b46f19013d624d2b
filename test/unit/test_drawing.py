"""Pictures of an alignment and of the trunk's response."""

import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import refusal

from aligned_reid.distance import alignment_path
from aligned_reid.inference.drawing import diagonal_distance, draw_alignment, draw_heat_map

PHOTOS = [np.full((128, 64, 3), shade, np.uint8) for shade in (60, 200)]


def draw(path):
    aligned = alignment_path(torch.eye(4, 6), torch.eye(4, 6).roll(1, 0))
    draw_alignment(path, PHOTOS, aligned.cost, aligned.cells, float(aligned.distance))


def test_alignment_shows_both_photos_and_the_path_as_png_or_svg(tmp_path):
    draw(tmp_path / "pair.png")
    picture = cv2.imread(str(tmp_path / "pair.png"))
    assert min(picture.shape[:2]) > 400
    for colour in [(60, 60, 60), (200, 200, 200), (0x1C, 0x71, 0xF2)]:  # blue, green, red
        assert (picture == colour).all(axis=2).sum() > 500
    draw(tmp_path / "pair.svg")
    assert "<svg" in (tmp_path / "pair.svg").read_text()
    assert ".svg" in refusal(draw, tmp_path / "pair.gif")


def test_aligned_distance_is_never_above_the_diagonals():
    torch.manual_seed(0)
    for one, other in torch.randn(50, 2, 6, 4):
        aligned = alignment_path(one, other)
        assert aligned.distance <= diagonal_distance(aligned.cost.numpy()) + 1e-6
    assert diagonal_distance(np.array([[0.1, 0.4], [0.8, 0.2]])) == pytest.approx(0.9)


def test_heat_map_is_brightest_where_the_trunk_responds(tmp_path):
    upper, lower = np.zeros((2, 3, 8, 4))
    upper[:, 0], lower[:, 7] = 1, 1
    light = []
    for feature_map in (upper, lower):
        draw_heat_map(tmp_path / "map.png", PHOTOS[0], feature_map)
        picture = cv2.imread(str(tmp_path / "map.png"))
        light.append(picture[: len(picture) // 2].mean() - picture[len(picture) // 2 :].mean())
    assert light[0] > light[1] + 5
    assert "C, h, w" in refusal(draw_heat_map, tmp_path / "map.png", PHOTOS[0], upper[0])


def test_matplotlib_is_named_if_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refusal(draw, tmp_path / "pair.png")
