"""Painting: projection, shading, and the two layers of a picture.

The layers are color and light, which are multiplied at the end. A shape is an outline around a spine; brighter copies
of the outline, drawn towards the spine, give it volume.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from aligned_reid.synthetic.person import Cloth

Points = NDArray[np.float64]  # [..., 2] pixels, x then y; [..., 3] figure coordinates

NEUTRAL = 192  # the value in the light layer that does not change a color
CREASE_CHOICES = 64  # offsets in each direction at which creased cloth can be cut
_FRACTION_BITS = 4  # of OpenCV's fixed-point coordinates
# Copies of an outline: size, shift towards the light, value in the light layer.
_ROUNDING = np.array([(1, 0, 136), (0.82, 0.1, 166), (0.62, 0.2, 192), (0.36, 0.34, 210)])
_CAP = np.linspace(np.pi / 2, np.pi * 3 / 2, 7)  # angles of the outline around the end of a limb
POINTS_PER_LIMB = 2 * len(_CAP)


class Layers(NamedTuple):
    """The layers of a picture."""

    colour: NDArray[np.uint8]  # [H, W, 3], RGB
    light: NDArray[np.uint8]  # [H, W], NEUTRAL if unchanged


@dataclass(frozen=True)
class Pose:
    """How a person stands in one image: angles in radians, positions in pixels."""

    x: float  # of the point on the ground between the feet
    y: float
    scale: float  # pixels per figure height
    yaw: float  # 0: faces the camera, pi / 2: walks to the right of the picture, pi: shows its back
    pitch: float  # how far the camera looks down
    phase: float  # of the step
    stride: float  # factor for the person's stride
    elbows: tuple[float, float]  # angles of the left and right elbow
    light: float  # where the light comes from: -1 left to 1 right
    creases: tuple[int, int]  # offset in the creased cloth, each less than CREASE_CHOICES


class View:
    """A pose's projection."""

    def __init__(self, pose: Pose) -> None:
        self.pose = pose
        self.cos, self.sin = math.cos(pose.yaw), math.sin(pose.yaw)
        self.down, self.forward = math.cos(pose.pitch), math.sin(pose.pitch)

    def project(self, points: Points) -> tuple[Points, NDArray[np.float64]]:
        """Figure coordinates [..., 3] -> pixels [..., 2] and nearness to the camera [...], in figure heights."""
        x, y, z = points[..., 0], points[..., 1], points[..., 2]
        near = z * self.cos - x * self.sin
        pixels = np.empty((*near.shape, 2))
        pixels[..., 0] = self.pose.x + self.pose.scale * (x * self.cos + z * self.sin)
        pixels[..., 1] = self.pose.y + self.pose.scale * (near * self.forward - y * self.down)
        return pixels, near

    def seen(self, half_width: NDArray[np.float64], half_depth: NDArray[np.float64]) -> NDArray[np.float64]:
        """Half the width in pixels of bodies with elliptic cross-sections, with the sign of `half_width`, all [N]."""
        return np.copysign(self.pose.scale * np.hypot(half_width * self.cos, half_depth * self.sin), half_width)


def capsules(ends: Points, radii: NDArray[np.float64]) -> tuple[Points, Points]:
    """The outlines of limbs between `ends` [N, 2, 2], half as thick there as `radii` [N, 2].

    Returns spines and offsets from them, each [POINTS_PER_LIMB N, 2].
    """
    along = ends[:, 1] - ends[:, 0]
    angles = np.arctan2(along[:, 1], along[:, 0])[:, None] + _CAP  # [N, 7]
    arc = np.stack([np.cos(angles), np.sin(angles)], 2)  # [N, 7, 2]
    offsets = np.concatenate([arc * radii[:, :1, None], -arc * radii[:, 1:, None]], 1)
    return np.repeat(ends.reshape(-1, 2), len(_CAP), 0), offsets.reshape(-1, 2)


def rounded(spine: Points, offsets: Points, light: float) -> NDArray[np.int32]:
    """Outlines [levels, P, 2], fixed-point pixels: the shapes themselves first, then smaller ones, nearer the light."""
    sizes, shifts = _ROUNDING[:, :1, None], _ROUNDING[:, 1:2]
    outlines = spine + sizes * offsets
    outlines[..., 0] += shifts * light * np.abs(offsets[:, 0])
    return np.rint(outlines * (1 << _FRACTION_BITS)).astype(np.int32)


def paint(layers: Layers, cloth: Cloth, pieces: list[NDArray[np.int32]]) -> None:
    """Paint one body: the cloth of its pieces, outlines [levels, P, 2], then their light, level by level."""
    for piece in pieces:
        if cloth.texture is None:
            cv2.fillConvexPoly(layers.colour, piece[0], cloth.colour, cv2.LINE_AA, _FRACTION_BITS)
        else:
            _paste(layers.colour, cloth.texture, piece[0])
    for level, value in enumerate(_ROUNDING[:, 2].tolist()):
        for piece in pieces:
            cv2.fillConvexPoly(layers.light, piece[level], (value,), cv2.LINE_8, _FRACTION_BITS)


def _paste(canvas: NDArray[np.uint8], texture: NDArray[np.uint8], outline: NDArray[np.int32]) -> None:
    """Copy the inside of an outline (fixed-point pixels) from a picture of the canvas's size."""
    left, top, width, height = cv2.boundingRect(outline >> _FRACTION_BITS)
    right, bottom = min(left + width, canvas.shape[1]), min(top + height, canvas.shape[0])
    left, top = max(left, 0), max(top, 0)
    if right <= left or bottom <= top:
        return
    mask = np.zeros((bottom - top, right - left), np.uint8)
    offset = np.array((left, top), np.int32) << _FRACTION_BITS
    cv2.fillConvexPoly(mask, outline - offset, (255,), cv2.LINE_8, _FRACTION_BITS)
    cv2.copyTo(texture[top:bottom, left:right], mask, canvas[top:bottom, left:right])


def paint_shadow(light: NDArray[np.uint8], pose: Pose) -> None:
    """Darken the ground at a person's feet."""
    centre = (round(pose.x - 0.06 * pose.light * pose.scale), round(pose.y))
    axes = (round(0.16 * pose.scale), round((0.025 + 0.1 * pose.pitch) * pose.scale))
    cv2.ellipse(light, centre, axes, 0, 0, 360, (134,), cv2.FILLED)


def crease(light: NDArray[np.uint8], choice: tuple[int, int]) -> None:
    """Add creases to the painted parts."""
    height, width = light.shape
    left, top = choice
    piece = _creased_cloth(height, width)[top : top + height, left : left + width]
    cv2.add(light, piece, light, mask=(light != NEUTRAL).view(np.uint8), dtype=cv2.CV_8U)


@cache
def _creased_cloth(height: int, width: int) -> NDArray[np.int16]:
    """Light and dark folds, [height + CREASE_CHOICES, width + CREASE_CHOICES], always the same."""
    noise = np.random.default_rng(0).normal(0, 1, (height + CREASE_CHOICES, width + CREASE_CHOICES)).astype(np.float32)
    folds = cv2.GaussianBlur(noise, (0, 0), sigmaX=5, sigmaY=2)
    return np.rint(folds / folds.std() * 9).astype(np.int16)
