"""The cameras: what each looks at, and how its pictures degrade."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from aligned_reid.synthetic.figure import Figure
from aligned_reid.synthetic.painting import CREASE_CHOICES, NEUTRAL, Layers, Pose
from aligned_reid.synthetic.person import pick, sample_person
from aligned_reid.synthetic.street import SCENE_HEIGHT, SCENE_WIDTH, Image, draw_scene

HEIGHT, WIDTH = 128, 64  # pixels, of the images
CANVAS_HEIGHT, CANVAS_WIDTH = 2 * HEIGHT, 2 * WIDTH  # painted at twice the size and shrunk, for smooth edges


@dataclass(frozen=True)
class Camera:
    """A fixed camera: its scene, and how its pictures degrade."""

    scene: Image  # [SCENE_HEIGHT, SCENE_WIDTH, 3]
    yaw: float  # of people who walk past, or the opposite
    pitch: float
    light: float  # -1 from the left to 1 from the right
    colour: NDArray[np.float32]  # [3, 3], multiplied with RGB: tint and saturation
    gamma: float
    contrast: float
    brightness: float  # added, of 255
    resolution: float  # of the sensor, as a fraction of the image's
    blur: float  # standard deviation, pixels
    noise: NDArray[np.int16]  # [2 HEIGHT, 2 WIDTH, 3]; a random part is added to each image
    jpeg_quality: int


def make_camera(rng: np.random.Generator, place: int) -> Camera:
    """Draw a camera; `place` chooses the kind of scene."""
    gains = np.exp(rng.normal(0, 0.04, 3))
    saturation = rng.uniform(0.82, 1.12)
    grey = np.full((3, 3), (1 - saturation) / 3) + saturation * np.eye(3)
    noise = rng.normal(0, 1, (2 * HEIGHT, 2 * WIDTH, 1)) + 0.5 * rng.normal(0, 1, (2 * HEIGHT, 2 * WIDTH, 3))
    return Camera(
        scene=draw_scene(rng, place),
        yaw=rng.uniform(0, math.pi),
        pitch=rng.uniform(0.03, 0.25),
        light=rng.uniform(0.4, 1) * pick(rng, (-1, 1)),
        colour=(gains[:, None] * grey).astype(np.float32),
        gamma=math.exp(rng.uniform(-0.16, 0.16)),
        contrast=rng.uniform(0.86, 1.06),
        brightness=rng.uniform(-8, 12),
        resolution=rng.uniform(0.7, 1),
        blur=rng.uniform(0.2, 0.6),
        noise=np.rint(noise * rng.uniform(1, 4)).astype(np.int16),
        jpeg_quality=int(rng.integers(45, 86)),
    )


def take_picture(camera: Camera, figure: Figure | None, rng: np.random.Generator) -> Image:
    """A detector's box around a person, uint8 [HEIGHT, WIDTH, 3]; person None: a false detection."""
    pose = _sample_pose(camera, rng)
    layers = Layers(_background(camera, rng), np.full((CANVAS_HEIGHT, CANVAS_WIDTH), NEUTRAL, np.uint8))
    if rng.random() < 0.06:
        _paint_passer_by(layers, pose, rng, is_nearer=False)
    if figure is not None:
        figure.paint(layers, pose)
    if rng.random() < 0.1:
        occlude = pick(rng, (_paint_pole, _paint_bush, _paint_car, _paint_nearer_passer_by))
        occlude(layers, pose, rng)
    light = cv2.GaussianBlur(layers.light, (5, 5), 0)
    scene = cv2.multiply(layers.colour, cv2.cvtColor(light, cv2.COLOR_GRAY2BGR), scale=1 / NEUTRAL)
    return _expose(camera, np.asarray(scene, np.uint8), rng)


def _sample_pose(camera: Camera, rng: np.random.Generator) -> Pose:
    """A walking pose in a box that is mostly right, and sometimes too tight, too loose, too high or too low."""
    box, zoom = rng.random(), rng.uniform(0.93, 1.06)
    if box < 0.08:
        zoom = rng.uniform(1.1, 1.22)
    elif box < 0.18:
        zoom = rng.uniform(0.76, 0.9)
    drop = rng.normal(0, 0.015) + (pick(rng, (-1, 1)) * rng.uniform(0.05, 0.11) if 0.18 < box < 0.34 else 0)
    scale = 0.9 * CANVAS_HEIGHT * zoom
    bends = rng.uniform(0.05, 0.5, 2)
    if rng.random() < 0.18:
        bends[pick(rng, (0, 1))] = rng.uniform(1.2, 2.1)  # carries something, or is on the phone
    return Pose(
        x=CANVAS_WIDTH * (0.5 + rng.normal(0, 0.045)),
        y=CANVAS_HEIGHT * (0.5 + drop) + 0.49 * scale,
        scale=scale,
        yaw=camera.yaw + pick(rng, (0, math.pi)) + rng.normal(0, 0.4),
        pitch=camera.pitch,
        phase=rng.uniform(0, 2 * math.pi),
        stride=rng.uniform(0.25, 1.1),
        elbows=(bends[0], bends[1]),
        light=camera.light,
        creases=(int(rng.integers(CREASE_CHOICES)), int(rng.integers(CREASE_CHOICES))),
    )


def _background(camera: Camera, rng: np.random.Generator) -> Image:
    """A random part of the scene, [CANVAS_HEIGHT, CANVAS_WIDTH, 3]."""
    zoom = rng.uniform(1.0, 1.5)
    height, width = int(CANVAS_HEIGHT / zoom), int(CANVAS_WIDTH / zoom)
    left = int(rng.integers(SCENE_WIDTH - width))
    top = int(rng.integers(SCENE_HEIGHT - height))
    piece = camera.scene[top : top + height, left : left + width]
    return np.asarray(cv2.resize(piece, (CANVAS_WIDTH, CANVAS_HEIGHT), interpolation=cv2.INTER_LINEAR), np.uint8)


def _paint_passer_by(layers: Layers, pose: Pose, rng: np.random.Generator, is_nearer: bool) -> None:
    side = pick(rng, (-1, 1))
    size = rng.uniform(1.0, 1.1) if is_nearer else rng.uniform(0.7, 0.95)
    away = rng.uniform(0.4, 0.55) if is_nearer else rng.uniform(0.25, 0.5)
    other = Pose(
        x=pose.x + side * away * CANVAS_WIDTH,
        y=pose.y + (size - 1) * 0.3 * pose.scale,
        scale=size * pose.scale,
        yaw=rng.uniform(0, 2 * math.pi),
        pitch=pose.pitch,
        phase=rng.uniform(0, 2 * math.pi),
        stride=rng.uniform(0.25, 1),
        elbows=(0.2, 0.2),
        light=pose.light,
        creases=pose.creases,
    )
    Figure(sample_person(rng)).paint(layers, other)


def _paint_nearer_passer_by(layers: Layers, pose: Pose, rng: np.random.Generator) -> None:
    _paint_passer_by(layers, pose, rng, is_nearer=True)


def _paint_pole(layers: Layers, pose: Pose, rng: np.random.Generator) -> None:
    x = round(pose.x + rng.uniform(-0.3, 0.3) * CANVAS_WIDTH)
    half = int(rng.integers(5, 12))
    grey = int(rng.integers(60, 190))
    cv2.rectangle(layers.colour, (x - half, -1), (x + half, CANVAS_HEIGHT), (grey, grey, grey + 6), cv2.FILLED)
    for inset, value in ((0, 140), (half // 3, 192), (2 * half // 3, 214)):
        cv2.rectangle(layers.light, (x - half + inset, -1), (x + half - inset, CANVAS_HEIGHT), (value,), cv2.FILLED)


def _paint_bush(layers: Layers, pose: Pose, rng: np.random.Generator) -> None:
    top = CANVAS_HEIGHT * rng.uniform(0.72, 0.88)
    centre, reach = rng.uniform(0.1, 0.9) * CANVAS_WIDTH, rng.uniform(0.3, 0.7) * CANVAS_WIDTH
    count = 60
    xs = centre + rng.uniform(-1, 1, count) * reach
    ys = np.sort(rng.uniform(top, CANVAS_HEIGHT + 8, count))
    greens = rng.uniform(0.5, 1.1, count)
    for x, y, green in zip(xs.tolist(), ys.tolist(), greens.tolist(), strict=True):
        colour = (int(52 * green), int(92 * green), int(40 * green))
        cv2.circle(layers.colour, (round(x), round(y)), 9, colour, cv2.FILLED)
        cv2.circle(layers.light, (round(x), round(y)), 9, (int(150 + 50 * green),), cv2.FILLED)


def _paint_car(layers: Layers, pose: Pose, rng: np.random.Generator) -> None:
    """The hood of a car at one side."""
    top = CANVAS_HEIGHT * rng.uniform(0.74, 0.86)
    paint = tuple(int(value) for value in pick(rng, ((180, 182, 186), (40, 42, 48), (150, 30, 34), (40, 60, 120))))
    reach = rng.uniform(0.4, 0.95) * CANVAS_WIDTH
    outline = np.array([(-20, -14), (0.55, -8), (0.85, 0), (1, 18), (1.02, 120), (-20, 120)])
    outline[:, 0] = np.where(outline[:, 0] < 0, outline[:, 0], outline[:, 0] * reach)
    if rng.random() < 0.5:
        outline[:, 0] = CANVAS_WIDTH - outline[:, 0]
    outline[:, 1] += top
    cv2.fillConvexPoly(layers.colour, np.rint(outline).astype(np.int32), paint, cv2.LINE_AA)
    for drop, value in ((0, 214), (10, 180), (26, 150)):
        cv2.fillConvexPoly(layers.light, np.rint(outline + (0, drop)).astype(np.int32), (value,), cv2.LINE_AA)


def _expose(camera: Camera, scene: Image, rng: np.random.Generator) -> Image:
    """A painted scene as the camera records it: tint, exposure, resolution, blur and noise."""
    resolution = min(1.0, camera.resolution * rng.uniform(0.85, 1.1))
    size = (round(WIDTH * resolution), round(HEIGHT * resolution))
    image = cv2.resize(scene, size, interpolation=cv2.INTER_AREA)
    image = cv2.LUT(cv2.transform(image, camera.colour), _tone_curve(camera, rng))
    image = cv2.GaussianBlur(image, (5, 5), camera.blur * rng.uniform(0.6, 1.4))
    left, top = int(rng.integers(WIDTH)), int(rng.integers(HEIGHT))
    image = cv2.add(image, camera.noise[top : top + size[1], left : left + size[0]], dtype=cv2.CV_8U)
    return np.asarray(cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR), np.uint8)


def _tone_curve(camera: Camera, rng: np.random.Generator) -> NDArray[np.uint8]:
    """uint8 [256]: gamma, contrast and brightness, slightly different each time, as when clouds pass."""
    gamma = camera.gamma * math.exp(rng.normal(0, 0.04))
    contrast = camera.contrast * math.exp(rng.normal(0, 0.04))
    curve = 255 * (np.arange(256) / 255) ** gamma
    curve = 128 + contrast * (curve - 128) + camera.brightness + rng.normal(0, 4)
    return np.clip(np.rint(curve), 0, 255).astype(np.uint8)
