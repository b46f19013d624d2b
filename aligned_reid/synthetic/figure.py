"""A person that can be painted in any pose and view.

A figure has its own coordinates: x to its left, y up, z forward, the ground at y = 0, its height as the unit. A view
rotates and projects it; shapes are painted from far to near. A picture takes a millisecond because the shapes of a
person are listed once; each pose only projects them, all together.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from aligned_reid.synthetic.painting import (
    POINTS_PER_LIMB,
    Layers,
    Points,
    Pose,
    View,
    capsules,
    crease,
    paint,
    paint_shadow,
    rounded,
)
from aligned_reid.synthetic.person import TEXTURE_SIZE, Cloth, Colour, Person

Row = tuple[float, float, float]

CIRCLE = [(math.cos(i * math.pi / 10), math.sin(i * math.pi / 10)) for i in range(20)]
BOX = [(-1, -0.8), (-0.8, -1), (0.8, -1), (1, -0.8), (1, 0.85), (0.85, 1), (-0.85, 1), (-1, 0.85)]

# The cover of a shape: one of the garments, or a color.
UPPER, LOWER = "upper", "lower"
Cover = str | Colour

# Painting order. A limb's nearness, less than 0.5, is added.
FAR, LEGS, SKIRT, TORSO, ARMS, HEAD = -3.0, -2.0, -1.0, 0.0, 0.6, 1.0
# Rows of the limbs and their covers: left, followed by right.
THIGHS, SHINS, FEET, UPPER_ARMS, FOREARMS, HANDS, SHORT_SLEEVES, THIGH_STRIPES, SHIN_STRIPES = range(0, 18, 2)


class Shape(NamedTuple):
    """A rigid shape."""

    order: float
    cover: Cover
    vertices: list[tuple[float, ...]]  # spine point x, y, z; signed half width and half depth there; way down
    seen_from: float = -1.0  # not painted if its first spine point is farther than this
    behind: tuple[float, float] = (-1.0, 0.0)  # if it is no nearer than the first number, the second is its order
    hand: int | None = None  # 0 or 1: positioned relative to the left or right hand


class Part(NamedTuple):
    """A part to paint in one picture. Parts with the same order and cover are shaded together."""

    order: float
    cover: Cover
    points: slice  # of all outlines


def _column(rows: list[Row], lean: float = 0, z: float = 0) -> list[tuple[float, ...]]:
    """Vertices of an upright body; `rows` lists height, half width and half depth from the top down."""
    right = [(0, height, z + lean * (height - 0.5), -width, -depth, 0) for height, width, depth in rows]
    left = [(0, height, z + lean * (height - 0.5), width, depth, 0) for height, width, depth in reversed(rows)]
    return [*right, *left]


def _strap(start: Row, end: Row, half_width: float) -> list[tuple[float, ...]]:
    """Vertices of a band between two points, the higher one first."""
    w = half_width
    return [(*start, -w, -w, 0), (*end, -w, -w, 0), (*end, w, w, 0), (*start, w, w, 0)]


def _around(centre: Row, axes: Row, outline: list[tuple[float, float]] | None = None) -> list[tuple[float, ...]]:
    """Vertices of an ellipsoid or, with `outline`, of another form; `axes`: half width, half height, half depth."""
    width, height, depth = axes
    return [(*centre, width * x, depth * x, height * y) for x, y in outline or CIRCLE]


def _darker(colour: Colour, factor: float) -> Colour:
    return int(factor * colour[0]), int(factor * colour[1]), int(factor * colour[2])


class Figure:
    """A person who can be painted any number of times."""

    def __init__(self, person: Person) -> None:
        self.person = person
        self.hem = person.leg_length + {"coat": -0.2, "jacket": -0.035, "hoodie": -0.03}.get(person.upper, -0.015)
        shapes = [*self._hips(), *self._torso(), *self._chest(), *self._head(), *self._face(), *self._bag()]
        self.shapes = shapes
        ends = np.cumsum([len(shape.vertices) for shape in shapes]).tolist()
        self.slices = [slice(end - len(shape.vertices), end) for end, shape in zip(ends, shapes, strict=True)]
        self.vertices = np.array([vertex for shape in shapes for vertex in shape.vertices], float)  # [V, 6]
        self.radii = self._limb_radii()  # [18, 2]

    def paint(self, layers: Layers, pose: Pose) -> None:
        """Paint the person and the shadow at their feet."""
        paint_shadow(layers.light, pose)
        limbs = _limbs(self.person, pose)  # [18, 2, 3]
        vertices = self._placed(limbs)
        view = View(pose)
        joints, nearness = view.project(limbs)
        spine, near = view.project(vertices[:, :3])
        offsets = np.stack([view.seen(vertices[:, 3], vertices[:, 4]), pose.scale * vertices[:, 5]], 1)
        limb_spine, limb_offsets = capsules(joints, self.radii * pose.scale)
        outlines = rounded(np.concatenate([spine, limb_spine]), np.concatenate([offsets, limb_offsets]), pose.light)
        parts = [*self._shape_parts(near), *self._limb_parts(nearness.mean(1).tolist(), len(vertices))]
        parts.sort(key=lambda part: part.order)
        cloths = self._worn(view, layers.light.shape)
        for (_, cover), group in itertools.groupby(parts, key=lambda part: (part.order, part.cover)):
            cloth = cloths[cover] if isinstance(cover, str) else Cloth(cover)
            paint(layers, cloth, [outlines[:, part.points] for part in group])
        crease(layers.light, pose.creases)

    def _placed(self, limbs: Points) -> Points:
        """The vertices, [V, 6], with shapes that hang on a hand moved to it."""
        vertices = self.vertices
        for shape, points in zip(self.shapes, self.slices, strict=True):
            if shape.hand is not None:
                vertices = vertices.copy()
                vertices[points, :3] += limbs[HANDS + shape.hand, 1]
        return vertices

    def _shape_parts(self, near: NDArray[np.float64]) -> Iterator[Part]:
        for shape, points in zip(self.shapes, self.slices, strict=True):
            nearness = near[points.start]
            if nearness > shape.seen_from:
                order = shape.order if nearness > shape.behind[0] else shape.behind[1]
                yield Part(order, shape.cover, points)

    def _limb_parts(self, near: list[float], first: int) -> Iterator[Part]:
        """Parts of the limbs, `near` the camera as given, whose outlines begin at point `first`."""
        person = self.person
        thigh: Cover = person.skin if "skirt" in person.lower else LOWER
        shin: Cover = LOWER if person.lower == "trousers" else person.skin
        sleeve: Cover = person.sleeve_colour or UPPER
        short, bare = person.upper == "t-shirt", person.upper == "vest"
        for side in (0, 1):
            leg = LEGS + near[THIGHS + side] + 0.1 * near[SHINS + side]
            arm = near[FOREARMS + side]
            arm = FAR + arm if arm < -0.06 else ARMS + 0.1 * arm
            covers = [
                (THIGHS, leg, thigh),
                (SHINS, leg - (0.001 if shin != thigh else 0), shin),
                (FEET, leg - 0.002, person.shoes),
                (UPPER_ARMS, arm, person.skin if short or bare else sleeve),
                (FOREARMS, arm, person.skin if short or bare else sleeve),
                (HANDS, arm - 0.001, person.skin),
            ]
            if short:
                covers.append((SHORT_SLEEVES, arm + 0.001, sleeve))
            if person.side_stripe:
                rows = (THIGH_STRIPES, SHIN_STRIPES) if person.lower == "trousers" else (THIGH_STRIPES,)
                covers += [(row, leg + 0.001, person.side_stripe) for row in rows]
            for row, order, cover in covers:
                start = first + (row + side) * POINTS_PER_LIMB
                yield Part(order, cover, slice(start, start + POINTS_PER_LIMB))

    def _limb_radii(self) -> NDArray[np.float64]:
        """Half the thickness of each limb at its start and end, [18, 2]."""
        person = self.person
        legs = {"trousers": (0.056, 0.043, 0.036), "shorts": (0.062, 0.05, 0.025)}.get(
            person.lower, (0.046, 0.036, 0.024)
        )
        shin = 0.043 if person.lower == "trousers" else 0.034
        sleeve = 1.16 if person.upper in ("jacket", "coat", "hoodie") else 1.0
        arms = [(0.038 * sleeve, 0.031 * sleeve), (0.031 * sleeve, 0.022 * sleeve), (0.019, 0.017)]
        rows = [
            (legs[0], legs[1]),
            (shin, legs[2]),
            (0.023, 0.018),
            *arms,
            (0.041, 0.038),
            (0.01, 0.009),
            (0.009, 0.008),
        ]
        return np.repeat(np.array(rows), 2, 0) * person.girth

    def _hips(self) -> Iterator[Shape]:
        person, hip = self.person, self.person.leg_length
        wide, deep = 0.1 * person.girth, 0.082 * person.girth
        if "skirt" in person.lower:
            hem = 0.27 if person.lower == "skirt" else 0.1
            rows = [
                (hip + 0.12, wide * 0.85, deep * 0.9),
                (hip, wide * 1.08, deep * 1.2),
                (hem, wide * 1.4, deep * 1.8),
            ]
        else:
            rows = [(hip + 0.1, wide * 0.9, deep * 0.9), (hip, wide * 1.02, deep), (hip - 0.06, wide * 0.7, deep * 0.7)]
        yield Shape(SKIRT, LOWER, _column(rows))

    def _torso(self) -> Iterator[Shape]:
        person, shoulder, hem = self.person, self.person.shoulder_width, self.hem
        thick = person.girth * (1.08 if person.upper in ("jacket", "coat", "hoodie") else 1.0)
        flare = 1.2 if person.upper == "coat" else 1.0
        rows = [
            (0.862, 0.038, 0.036),
            (0.838, shoulder * 0.78, 0.05),
            (0.815, shoulder * 1.08, 0.06),
            (0.77, shoulder * 1.1, 0.07 * thick),
            (0.68, (shoulder + 0.1 * thick) / 2, 0.078 * thick),
            (0.6, 0.092 * thick, 0.08 * thick),
            (min(0.5, hem + 0.02), 0.105 * thick, 0.086 * thick),
            (hem, 0.106 * thick * flare, 0.09 * thick * flare),
        ]
        yield Shape(TORSO, UPPER, _column(rows, lean=0.05))
        if person.upper == "hoodie":
            hood = (0, 0.845, -0.035)
            yield Shape(
                TORSO + 0.3,
                person.upper_cloth.colour,
                _around(hood, (0.074, 0.036, 0.06)),
                behind=(0, TORSO + 0.1),
            )
        neck = [(0.9, 0.032, 0.034), (0.84, 0.034, 0.036)]
        yield Shape(TORSO + 0.2, person.skin, _column(neck, z=0.006))

    def _chest(self) -> Iterator[Shape]:
        """Shapes that are visible from the front only."""
        person, hem = self.person, self.hem
        if person.inner_colour:
            rows = [(0.852, 0.02, 0.0), (0.7, 0.036, 0.0), (hem, 0.05, 0.0)]
            yield Shape(TORSO + 0.1, person.inner_colour, _column(rows, z=0.08), seen_from=-0.01)
        elif person.upper in ("jacket", "coat", "shirt"):
            rows = [(0.85, 0.006, 0.0), (hem, 0.006, 0.0)]
            yield Shape(TORSO + 0.1, _darker(person.upper_cloth.colour, 0.6), _column(rows, z=0.08), seen_from=0.01)
        if person.upper in ("vest", "t-shirt"):
            low = 0.79 if person.upper == "vest" else 0.825
            yield Shape(
                TORSO + 0.1, person.skin, _column([(0.865, 0.042, 0.0), (low, 0.014, 0.0)], z=0.05), seen_from=0
            )
        size, centre = 0.046, (0.0, 0.72, 0.08)
        if person.logo == "round":
            yield Shape(TORSO + 0.15, person.logo_colour, _around(centre, (size, size, 0)), seen_from=0.01)
        if person.logo == "square":
            yield Shape(TORSO + 0.15, person.logo_colour, _around(centre, (size, size, 0), BOX), seen_from=0.01)
        if person.logo == "lines":
            for height in (0.765, 0.725, 0.685):
                line = _around((0, height, 0.08), (0.06, 0.011, 0), BOX)
                yield Shape(TORSO + 0.15, person.logo_colour, line, seen_from=0.01)

    def _head(self) -> Iterator[Shape]:
        person = self.person
        wide, high = 0.05 * person.head_size, 0.066 * person.head_size
        hair = person.skin if person.hair_style == "bald" else person.hair
        yield Shape(HEAD, hair, _around((0, 0.93, 0.012), (wide, high, wide * 1.05)))
        if person.hair_style == "long":
            rows = [(0.95, wide, wide * 0.9), (0.9, wide * 1.14, wide), (0.8, wide * 1.02, wide * 0.7)]
            yield Shape(HEAD + 0.05, hair, _column(rows, z=-0.014), behind=(0, TORSO + 0.15))
        if person.hair_style == "ponytail":
            tail = _around((0, 0.885, -0.056), (0.02, 0.055, 0.02))
            yield Shape(HEAD + 0.05, hair, tail, behind=(0, TORSO + 0.15))
        if person.hair_style == "bun":
            bun = _around((0, 0.98, -0.032), (0.028, 0.026, 0.028))
            yield Shape(HEAD + 0.05, hair, bun, behind=(0, HEAD - 0.05))

    def _face(self) -> Iterator[Shape]:
        """Skin, eyes, mouth and cap."""
        person = self.person
        wide, high = 0.05 * person.head_size, 0.066 * person.head_size
        middle, front = 0.93 - 0.16 * high, 0.012 + 0.4 * wide
        skin = _around((0, middle, front), (0.84 * wide, 0.82 * high, 0.66 * wide))
        yield Shape(HEAD + 0.1, person.skin, skin, seen_from=-0.4 * front)
        for x in (-0.36 * wide, 0.36 * wide):
            eye = _around((x, middle + 0.1 * high, front + 0.45 * wide), (0.006, 0.0045, 0.004))
            yield Shape(HEAD + 0.2, (70, 48, 44), eye, seen_from=0.1 * wide)
        mouth = _around((0, middle - 0.48 * high, front + 0.4 * wide), (0.014, 0.004, 0.004))
        yield Shape(HEAD + 0.2, _darker(person.skin, 0.66), mouth, seen_from=0.2 * wide)
        if person.hair_style == "cap":
            dome = [*CIRCLE[10:], (1.0, 0.12), (-1.0, 0.12)]
            yield Shape(HEAD + 0.3, person.cap, _around((0, 0.945, 0.01), (1.1 * wide, 0.84 * high, 1.15 * wide), dome))
            brim = _around((0, 0.944, 0.012 + 0.9 * wide), (0.9 * wide, 0.2 * high, 0.6 * wide))
            yield Shape(HEAD + 0.4, _darker(person.cap, 0.85), brim, seen_from=-0.5 * wide)

    def _bag(self) -> Iterator[Shape]:
        bag, colour, side = self.person.bag, self.person.bag_colour, self.person.bag_side
        if bag == "backpack":
            behind = (0.02, TORSO - 0.2)
            yield Shape(HEAD - 0.06, colour, _around((0, 0.7, -0.125), (0.092, 0.125, 0.06), BOX), behind=behind)
            pocket = _around((0, 0.65, -0.15), (0.066, 0.052, 0.06), BOX)
            yield Shape(HEAD - 0.05, _darker(colour, 0.78), pocket, seen_from=0.06)
            for x in (-0.066, 0.066):
                strap = _strap((x, 0.84, 0.045), (1.1 * x, 0.66, 0.085), 0.015)
                yield Shape(TORSO + 0.25, colour, strap, seen_from=-0.02)
        elif bag == "shoulder bag":
            for z in (0.085, -0.085):  # the strap crosses the chest and the back
                strap = _strap((-0.06 * side, 0.84, 0.5 * z), (0.11 * side, 0.53, z), 0.014)
                yield Shape(TORSO + 0.25, colour, strap, seen_from=0)
            box = _around((0.135 * side, 0.47, -0.02), (0.05, 0.07, 0.088), BOX)
            yield Shape(ARMS + 0.2, colour, box, behind=(-0.05, TORSO - 0.3))
        elif bag == "handbag":
            box = _around((0, -0.085, 0), (0.042, 0.072, 0.078), BOX)
            yield Shape(ARMS + 0.1, colour, box, behind=(-0.1, FAR - 0.2), hand=0 if side == 1 else 1)
        elif bag == "suitcase":
            handle = _strap((0.2 * side, 0.45, -0.13), (0.2 * side, 0.3, -0.14), 0.02)
            yield Shape(0.9, (74, 74, 78), handle, behind=(0, FAR - 0.4))
            box = _around((0.2 * side, 0.17, -0.14), (0.085, 0.15, 0.055), BOX)
            yield Shape(0.91, colour, box, behind=(0, FAR - 0.3))

    def _worn(self, view: View, shape: tuple[int, ...]) -> dict[str, Cloth]:
        """The cloths, scaled to a picture of `shape` [H, W]."""
        person = self.person
        return {
            UPPER: self._hung(person.upper_cloth, (0.85, self.hem), view, shape),
            LOWER: self._hung(person.lower_cloth, (person.leg_length + 0.06, 0.2), view, shape),
        }

    def _hung(self, cloth: Cloth, rows: tuple[float, float], view: View, shape: tuple[int, ...]) -> Cloth:
        """A cloth scaled over the picture, given the heights of the garment's top and bottom."""
        if cloth.texture is None:
            return cloth
        ((x, top), (_, bottom)), _ = view.project(np.array([(0, rows[0], 0), (0, rows[1], 0)]))
        across = view.seen(np.array(0.11 * self.person.girth), np.array(0.09)).item() / (TEXTURE_SIZE / 4)
        down = (bottom - top) * 1.5 / TEXTURE_SIZE
        to_picture = np.array([(across, 0, x - across * TEXTURE_SIZE / 2), (0, down, top - down * TEXTURE_SIZE / 6)])
        # The nearest pixel suffices, since the picture is shrunk later, and is four times as fast.
        flags, border = cv2.INTER_NEAREST, cv2.BORDER_REPLICATE
        worn = cv2.warpAffine(cloth.texture, to_picture, (shape[1], shape[0]), flags=flags, borderMode=border)
        return Cloth(cloth.colour, np.asarray(worn, np.uint8))


def _limbs(person: Person, pose: Pose) -> Points:
    """Both ends of every limb, [18, 2, 3], in figure coordinates; the lower foot is on the ground."""
    swing = person.stride * pose.stride * math.sin(pose.phase)
    lift = 1.3 * person.stride * pose.stride * math.cos(pose.phase)
    limbs = np.empty((18, 2, 3))
    for i, side in enumerate((1, -1)):
        # The leg that swings forward bends its knee; the arm swings the other way.
        thigh = side * swing + 0.05
        hip = (side * person.hip_width, person.leg_length, 0.0)
        bone = (person.leg_length - 0.035) / 2
        knee = _hanging(hip, bone, thigh)
        ankle = _hanging(knee, bone, thigh - 0.08 - max(0.0, side * lift))
        heel = (ankle[0], ankle[1] - 0.018, ankle[2] - 0.012)
        toe = (ankle[0] + side * 0.015, ankle[1] - 0.02, ankle[2] + 0.085)
        bend = pose.elbows[i] * (0.3 if person.bag == "handbag" and person.bag_side == side else 1)
        upper_arm = -0.8 * side * swing + 0.25 * bend
        shoulder = (side * person.shoulder_width, 0.8, 0.0)
        elbow = _hanging(shoulder, 0.165, upper_arm, side * 0.02)
        wrist = _hanging(elbow, 0.14, upper_arm + bend, side * 0.004)
        hand = _hanging(wrist, 0.03, upper_arm + bend)
        sleeve_end = _hanging(shoulder, 0.1, upper_arm, side * 0.012)
        hip_seam, knee_seam, ankle_seam = ((x + side * 0.042, y, z) for x, y, z in (hip, knee, ankle))
        legs = ((hip, knee), (knee, ankle), (heel, toe))
        arms = ((shoulder, elbow), (elbow, wrist), (wrist, hand))
        limbs[i::2] = (*legs, *arms, (shoulder, sleeve_end), (hip_seam, knee_seam), (knee_seam, ankle_seam))
    limbs[:, :, 1] -= limbs[: FEET + 2, :, 1].min() - 0.018
    return limbs


def _hanging(start: Row, length: float, angle: float, aside: float = 0.0) -> Row:
    """The end of a segment that hangs from `start`, swung forward by an angle."""
    return start[0] + aside, start[1] - length * math.cos(angle), start[2] + length * math.sin(angle)
