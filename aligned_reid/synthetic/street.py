"""The scenes: walls, shop fronts, parks, plazas, halls and roads, each a long picture; images show parts of it.

Their scale is that of the figures: a person there is 230 pixels high.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from aligned_reid.synthetic.person import Colour, pick

Image = NDArray[np.uint8]  # [H, W, 3], RGB

SCENE_HEIGHT, SCENE_WIDTH = 400, 1600
HORIZON = 170  # row at which the ground begins
HAZE = np.float32(140)  # gray mixed into the scene
# Share of the scene, the rest is haze; 1 makes images twice as hard to tell apart by pixels.
CLEARNESS = np.float32(0.65)


def draw_scene(rng: np.random.Generator, place: int) -> Image:
    """A scene, uint8 [SCENE_HEIGHT, SCENE_WIDTH, 3]; `place` selects its kind, the generator everything else."""
    scene = np.zeros((SCENE_HEIGHT, SCENE_WIDTH, 3), np.uint8)
    kinds = (_brick_street, _shop_front, _park, _plaza, _hall, _road)
    kinds[place % len(kinds)](scene, rng)
    return _weather(scene, rng)


def _brick_street(scene: Image, rng: np.random.Generator) -> None:
    _bricks(scene, rng, pick(rng, ((150, 92, 74), (168, 128, 100), (140, 130, 122))))
    for x in range(int(rng.integers(30, 100)), SCENE_WIDTH, 170):
        _window(scene, (x, 14, x + 84, 112), rng)
    cv2.rectangle(scene, (0, HORIZON - 22), (SCENE_WIDTH, HORIZON), (112, 108, 104), cv2.FILLED)
    _paving(scene, rng, (158, 154, 148), step=34)
    _bicycles(scene, rng, HORIZON + 34, spacing=(120, 420))


def _shop_front(scene: Image, rng: np.random.Generator) -> None:
    _fill(scene, 0, HORIZON, (38, 44, 52), (26, 30, 36))
    for x in range(0, SCENE_WIDTH, 130):
        shade = int(rng.integers(0, 40))
        cv2.rectangle(scene, (x, 0), (x + 122, HORIZON), (30 + shade, 36 + shade, 44 + shade), cv2.FILLED)
        glare = np.array([(x + 20, HORIZON), (x + 70, 0), (x + 96, 0), (x + 46, HORIZON)], np.int32)
        cv2.fillConvexPoly(scene, glare, (58 + shade, 68 + shade, 78 + shade))
        cv2.rectangle(scene, (x - 5, 0), (x + 5, HORIZON), (150, 152, 156), cv2.FILLED)
        if rng.random() < 0.4:
            _poster(scene, (x + 24, 40, x + 84, 130), rng)
    cv2.rectangle(
        scene, (0, 0), (SCENE_WIDTH, 22), pick(rng, ((150, 40, 40), (40, 70, 130), (196, 190, 178))), cv2.FILLED
    )
    _paving(scene, rng, (188, 184, 174), step=46)


def _park(scene: Image, rng: np.random.Generator) -> None:
    _fill(scene, 0, HORIZON, (120, 146, 110), (70, 96, 60))
    _leaves(scene, rng, 2600, (0, HORIZON - 6), (62, 96, 50))
    for x in range(int(rng.integers(40, 160)), SCENE_WIDTH, 260):
        width = int(rng.integers(12, 24))
        cv2.rectangle(scene, (x, 0), (x + width, HORIZON + 12), (84, 66, 50), cv2.FILLED)
        cv2.rectangle(scene, (x + width - 5, 0), (x + width, HORIZON + 12), (58, 46, 36), cv2.FILLED)
    _fill(scene, HORIZON, HORIZON + 70, (104, 132, 66), (116, 142, 72))
    _leaves(scene, rng, 1500, (HORIZON, HORIZON + 66), (98, 128, 62), size=3)
    _fill(scene, HORIZON + 70, SCENE_HEIGHT, (176, 164, 142), (190, 178, 156))
    cv2.rectangle(scene, (0, HORIZON + 66), (SCENE_WIDTH, HORIZON + 74), (150, 146, 138), cv2.FILLED)


def _plaza(scene: Image, rng: np.random.Generator) -> None:
    _fill(scene, 0, HORIZON, (196, 200, 204), (170, 172, 172))
    for x in range(-40, SCENE_WIDTH, 210):
        shade = int(rng.integers(-24, 24))
        cv2.rectangle(scene, (x, 0), (x + 160, HORIZON), (150 + shade, 148 + shade, 140 + shade), cv2.FILLED)
        for row in range(12, HORIZON - 30, 44):
            for column in range(x + 14, x + 140, 36):
                cv2.rectangle(scene, (column, row), (column + 22, row + 26), (82, 92, 104), cv2.FILLED)
    for x in range(0, SCENE_WIDTH, 22):
        cv2.line(scene, (x, HORIZON - 58), (x, HORIZON), (70, 74, 78), 3)
    cv2.line(scene, (0, HORIZON - 58), (SCENE_WIDTH, HORIZON - 58), (70, 74, 78), 5)
    _paving(scene, rng, (142, 142, 146), step=26)
    _bicycles(scene, rng, HORIZON + 26, spacing=(46, 110))


def _hall(scene: Image, rng: np.random.Generator) -> None:
    wall = pick(rng, ((206, 202, 190), (186, 194, 200), (200, 186, 164)))
    _fill(scene, 0, HORIZON, wall, tuple(int(0.88 * value) for value in wall))
    for x in range(0, SCENE_WIDTH, 150):
        cv2.line(scene, (x, 0), (x, HORIZON), (150, 148, 142), 2)
        choice = rng.random()
        if choice < 0.35:
            _poster(scene, (x + 30, 26, x + 110, 120), rng)
        elif choice < 0.6:
            cv2.rectangle(scene, (x + 24, 0), (x + 126, HORIZON), (112, 84, 60), cv2.FILLED)
            cv2.rectangle(scene, (x + 24, 0), (x + 126, HORIZON), (70, 54, 40), 4)
            cv2.circle(scene, (x + 112, 96), 5, (206, 196, 150), cv2.FILLED)
    cv2.rectangle(scene, (0, HORIZON - 14), (SCENE_WIDTH, HORIZON), (92, 88, 84), cv2.FILLED)
    reflection = cv2.GaussianBlur(cv2.flip(scene[:HORIZON], 0), (1, 31), 0)
    _paving(scene, rng, (172, 168, 158), step=60)
    mirrored = scene[HORIZON : 2 * HORIZON]
    mirrored[:] = cv2.addWeighted(mirrored, 0.72, reflection, 0.28, 0)


def _road(scene: Image, rng: np.random.Generator) -> None:
    _fill(scene, 0, HORIZON, (172, 168, 158), (150, 146, 138))
    _leaves(scene, rng, 900, (0, 70), (84, 106, 66))
    _fill(scene, HORIZON, SCENE_HEIGHT, (98, 98, 102), (116, 116, 120))
    for x in range(int(rng.integers(0, 120)), SCENE_WIDTH, 330):
        _car(scene, x, HORIZON + 14, rng)
    cv2.rectangle(scene, (0, HORIZON + 50), (SCENE_WIDTH, HORIZON + 58), (170, 168, 162), cv2.FILLED)
    for x in range(0, SCENE_WIDTH, 140):
        stripe = np.array([(x, 330), (x + 54, 330), (x + 44, 348), (x - 10, 348)], np.int32)
        cv2.fillConvexPoly(scene, stripe, (216, 214, 206))


def _fill(scene: Image, top: int, bottom: int, first: Colour | tuple[int, ...], last: Colour | tuple[int, ...]) -> None:
    """A vertical gradient from one color to the other in the rows from `top` to `bottom`."""
    blend = np.linspace(0, 1, bottom - top)[:, None, None]
    scene[top:bottom] = np.rint((1 - blend) * np.array(first) + blend * np.array(last))


def _bricks(scene: Image, rng: np.random.Generator, colour: Colour) -> None:
    _fill(scene, 0, HORIZON, (172, 164, 154), (160, 152, 142))
    for row, y in enumerate(range(0, HORIZON, 11)):
        for x in range(-13 * (row % 2), SCENE_WIDTH, 26):
            shade = rng.uniform(0.84, 1.1)
            paint = tuple(min(255, int(shade * value)) for value in colour)
            cv2.rectangle(scene, (x, y), (x + 23, y + 8), paint, cv2.FILLED)


def _paving(scene: Image, rng: np.random.Generator, colour: Colour, step: int) -> None:
    """Slabs from the horizon down, larger when nearer."""
    dark = tuple(int(0.8 * value) for value in colour)
    _fill(scene, HORIZON, SCENE_HEIGHT, tuple(int(0.9 * value) for value in colour), colour)
    y, row = float(HORIZON), 0
    while y < SCENE_HEIGHT:
        depth = (y - HORIZON) / (SCENE_HEIGHT - HORIZON)
        below = y + step * (0.35 + 0.65 * depth)
        for x in range(-step * 8, SCENE_WIDTH, step * 2):
            # All slabs lean the same way, as if the camera looked down the street.
            shift = int((row % 2) * step + 0.3 * (y - HORIZON))
            cv2.line(scene, (x + shift, int(y)), (x + shift + int(0.3 * (below - y)), int(below)), dark, 2)
        cv2.line(scene, (0, int(below)), (SCENE_WIDTH, int(below)), dark, 2)
        y, row = below, row + 1


def _window(scene: Image, box: tuple[int, int, int, int], rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    shade = int(rng.integers(0, 50))
    cv2.rectangle(scene, (left - 6, top - 6), (right + 6, bottom + 8), (206, 202, 194), cv2.FILLED)
    cv2.rectangle(scene, (left, top), (right, bottom), (44 + shade, 54 + shade, 66 + shade), cv2.FILLED)
    cv2.line(scene, ((left + right) // 2, top), ((left + right) // 2, bottom), (206, 202, 194), 5)
    cv2.line(scene, (left, (top + bottom) // 2), (right, (top + bottom) // 2), (206, 202, 194), 4)


def _poster(scene: Image, box: tuple[int, int, int, int], rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    paint = tuple(rng.integers(60, 220, 3).tolist())
    cv2.rectangle(scene, (left, top), (right, bottom), paint, cv2.FILLED)
    for y in range(top + 12, bottom - 8, 14):
        cv2.line(scene, (left + 8, y), (int(rng.integers(left + 20, right - 4)), y), (236, 234, 228), 4)


def _leaves(
    scene: Image, rng: np.random.Generator, count: int, rows: tuple[int, int], colour: Colour, size: int = 9
) -> None:
    xs, ys = rng.integers(0, SCENE_WIDTH, count).tolist(), rng.integers(*rows, count).tolist()
    for x, y, shade in zip(xs, ys, rng.uniform(0.55, 1.3, count).tolist(), strict=True):
        paint = tuple(min(255, int(shade * value)) for value in colour)
        cv2.circle(scene, (x, y), size, paint, cv2.FILLED)


def _bicycles(scene: Image, rng: np.random.Generator, ground: int, spacing: tuple[int, int]) -> None:
    """Bicycles parked side by side, with their wheels on the row `ground`."""
    x = 0
    while x < SCENE_WIDTH:
        x += int(rng.integers(*spacing))
        paint = pick(rng, ((40, 40, 44), (120, 34, 34), (40, 60, 110), (150, 152, 156), (50, 90, 60)))
        rear, front, saddle, bar = (x, ground - 26), (x + 66, ground - 26), (x + 18, ground - 66), (x + 54, ground - 72)
        crank = (x + 30, ground - 28)
        for wheel in (rear, front):
            cv2.circle(scene, wheel, 25, (34, 34, 36), 4, cv2.LINE_AA)
        for start, end in ((rear, saddle), (rear, crank), (crank, saddle), (crank, bar), (saddle, bar), (bar, front)):
            cv2.line(scene, start, end, paint, 4, cv2.LINE_AA)
        cv2.line(scene, (x + 8, ground - 68), (x + 28, ground - 68), (28, 28, 28), 6)
        cv2.line(scene, (x + 46, ground - 78), (x + 60, ground - 74), (60, 60, 62), 4)


def _car(scene: Image, x: int, ground: int, rng: np.random.Generator) -> None:
    """A car parked at the curb, with its wheels on the row `ground`."""
    paint = pick(rng, ((190, 192, 196), (60, 62, 68), (150, 40, 42), (50, 74, 128), (226, 226, 222)))
    cv2.ellipse(scene, (x + 140, ground), (150, 12), 0, 0, 360, (60, 60, 64), cv2.FILLED)
    body = np.array(
        [(0, -20), (6, -56), (58, -66), (92, -104), (196, -106), (232, -68), (276, -60), (282, -18)], np.int32
    )
    cv2.fillPoly(scene, [body + (x, ground)], paint, cv2.LINE_AA)
    for pane in (((72, -66), (98, -98), (140, -99), (140, -66)), ((148, -66), (148, -99), (190, -99), (218, -66))):
        cv2.fillConvexPoly(scene, np.array(pane, np.int32) + (x, ground), (52, 62, 72), cv2.LINE_AA)
    for wheel in (60, 220):
        cv2.circle(scene, (x + wheel, ground - 20), 24, (30, 30, 32), cv2.FILLED, cv2.LINE_AA)
        cv2.circle(scene, (x + wheel, ground - 20), 11, (140, 142, 146), cv2.FILLED, cv2.LINE_AA)


def _weather(scene: Image, rng: np.random.Generator) -> Image:
    """Stains, grain, uneven light, and haze that separates the scene from the person in front of it."""
    light = np.ones((SCENE_HEIGHT, SCENE_WIDTH), np.float32)
    for cells, amount in (((4, 12), 0.06), ((26, 100), 0.05), ((SCENE_HEIGHT, SCENE_WIDTH), 0.03)):
        coarse = rng.normal(0, amount, cells).astype(np.float32)
        light += cv2.resize(coarse, (SCENE_WIDTH, SCENE_HEIGHT), interpolation=cv2.INTER_CUBIC)
    soft = HAZE + CLEARNESS * (cv2.GaussianBlur(scene, (3, 3), 0) - HAZE)
    return np.clip(soft * light[..., None], 0, 255).astype(np.uint8)
