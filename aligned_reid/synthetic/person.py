"""An identity: build, skin, hair, clothes and bag, drawn from a random generator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]  # RGB
T = TypeVar("T")

TEXTURE_SIZE = 128  # pixels per side of a cloth's pattern: 4 half widths across, 1.5 garment lengths down

CLOTH_COLOURS: dict[str, Colour] = {
    "black": (30, 30, 34),
    "charcoal": (70, 72, 78),
    "grey": (128, 130, 134),
    "silver": (184, 186, 190),
    "white": (238, 238, 234),
    "cream": (232, 218, 180),
    "khaki": (176, 152, 108),
    "brown": (108, 70, 44),
    "navy": (30, 40, 96),
    "denim": (70, 100, 150),
    "blue": (34, 86, 204),
    "sky": (122, 184, 234),
    "teal": (14, 142, 142),
    "green": (32, 130, 60),
    "lime": (152, 206, 62),
    "olive": (94, 100, 50),
    "yellow": (240, 206, 46),
    "orange": (238, 122, 30),
    "red": (206, 30, 40),
    "maroon": (116, 22, 46),
    "pink": (240, 142, 180),
    "purple": (114, 54, 152),
}
TROUSER_COLOURS = ("black", "charcoal", "grey", "silver", "white", "khaki", "brown", "navy", "denim", "olive", "maroon")
SKIRT_COLOURS = (
    "black",
    "charcoal",
    "white",
    "khaki",
    "navy",
    "sky",
    "red",
    "pink",
    "purple",
    "teal",
    "yellow",
    "green",
)
SHOE_COLOURS = ("black", "white", "brown", "grey", "red", "navy", "lime")
SKIN_COLOURS: tuple[Colour, ...] = ((240, 200, 172), (226, 178, 144), (196, 144, 108), (150, 100, 72), (98, 66, 48))
HAIR_COLOURS: tuple[Colour, ...] = (
    (26, 22, 22),
    (54, 36, 28),
    (100, 64, 38),
    (194, 154, 92),
    (154, 152, 150),
    (142, 56, 32),
)

PATTERNS = ("plain", "stripes", "pinstripes", "check", "two-tone", "band", "dots", "sash")
UPPERS = ("t-shirt", "shirt", "vest", "jacket", "coat", "hoodie")
LOWERS = ("trousers", "shorts", "skirt", "long skirt")
HAIR_STYLES = ("short", "long", "bald", "bun", "cap", "ponytail")
LOGOS = ("none", "square", "round", "lines")
BAGS = ("none", "backpack", "shoulder bag", "handbag", "suitcase")


class Cloth(NamedTuple):
    """The cover of a body part."""

    colour: Colour
    texture: NDArray[np.uint8] | None = None  # RGB, [TEXTURE_SIZE, TEXTURE_SIZE, 3]; worn: of the picture's size


@dataclass(frozen=True)
class Person:
    """Everything that stays the same in all images of an identity. Lengths are in figure heights."""

    leg_length: float
    shoulder_width: float  # half of it; likewise the next
    hip_width: float
    girth: float  # factor for all thicknesses
    head_size: float
    stride: float  # angle of the legs' swing, radians
    skin: Colour
    hair: Colour
    hair_style: str
    cap: Colour
    upper: str
    upper_cloth: Cloth  # its texture is [TEXTURE_SIZE, TEXTURE_SIZE, 3]; likewise the lower one's
    sleeve_colour: Colour | None  # None: the sleeves have the same cloth
    inner_colour: Colour | None  # under an open jacket; None: closed
    logo: str
    logo_colour: Colour
    lower: str
    lower_cloth: Cloth
    side_stripe: Colour | None
    shoes: Colour
    bag: str
    bag_side: int  # 1: the figure's left, -1: its right
    bag_colour: Colour


def sample_person(rng: np.random.Generator) -> Person:
    """Draw an identity."""
    upper = pick(rng, UPPERS, (0.3, 0.2, 0.07, 0.18, 0.1, 0.15))
    lower = pick(rng, LOWERS, (0.58, 0.2, 0.14, 0.08))
    first, second, third = (_dyed(rng, name) for name in _different(rng, tuple(CLOTH_COLOURS), 3))
    lower_names = SKIRT_COLOURS if "skirt" in lower else TROUSER_COLOURS
    lower_first, lower_second = (_dyed(rng, name) for name in _different(rng, lower_names, 2))
    pattern = pick(rng, PATTERNS, (0.36, 0.16, 0.07, 0.1, 0.1, 0.1, 0.06, 0.05))
    lower_pattern = pick(rng, PATTERNS, (0.64, 0.08, 0.06, 0.14, 0, 0, 0.08, 0)) if lower != "trousers" else "plain"
    other_sleeves = upper in ("t-shirt", "shirt", "hoodie") and rng.random() < 0.22
    is_open = upper in ("jacket", "coat") and rng.random() < 0.5
    return Person(
        leg_length=rng.uniform(0.455, 0.505),
        shoulder_width=rng.uniform(0.092, 0.122),
        hip_width=rng.uniform(0.044, 0.058),
        girth=rng.uniform(0.84, 1.22),
        head_size=rng.uniform(0.94, 1.1),
        stride=rng.uniform(0.28, 0.46),
        skin=_jitter(rng, pick(rng, SKIN_COLOURS), 6),
        hair=_jitter(rng, pick(rng, HAIR_COLOURS, (0.34, 0.22, 0.18, 0.12, 0.08, 0.06)), 6),
        hair_style=pick(rng, HAIR_STYLES, (0.42, 0.22, 0.06, 0.08, 0.12, 0.1)),
        cap=_dyed(rng, pick(rng, tuple(CLOTH_COLOURS))),
        upper=upper,
        upper_cloth=Cloth(first, draw_texture(rng, pattern, first, second)),
        sleeve_colour=second if other_sleeves else None,
        inner_colour=third if is_open else None,
        logo=pick(rng, LOGOS, (0.55, 0.15, 0.15, 0.15)) if pattern == "plain" and not is_open else "none",
        logo_colour=third,
        lower=lower,
        lower_cloth=Cloth(lower_first, draw_texture(rng, lower_pattern, lower_first, lower_second)),
        side_stripe=(236, 236, 236) if lower in ("trousers", "shorts") and rng.random() < 0.12 else None,
        shoes=_dyed(rng, pick(rng, SHOE_COLOURS)),
        bag=pick(rng, BAGS, (0.36, 0.24, 0.2, 0.14, 0.06)),
        bag_side=1 if rng.random() < 0.5 else -1,
        bag_colour=_dyed(rng, pick(rng, tuple(CLOTH_COLOURS))),
    )


def pick(rng: np.random.Generator, values: Sequence[T], weights: Sequence[float] | None = None) -> T:
    """One of `values`, with equal probability or with `weights`, which sum to 1."""
    if weights is None:
        return values[int(rng.random() * len(values))]
    return values[min(int(np.searchsorted(np.cumsum(weights), rng.random(), side="right")), len(values) - 1)]


def _different(rng: np.random.Generator, names: tuple[str, ...], count: int) -> list[str]:
    return [names[i] for i in rng.permutation(len(names))[:count]]


def _dyed(rng: np.random.Generator, name: str) -> Colour:
    return _jitter(rng, CLOTH_COLOURS[name], 9)


def _jitter(rng: np.random.Generator, colour: Colour, amount: int) -> Colour:
    red, green, blue = np.clip(np.add(colour, rng.integers(-amount, amount + 1, 3)), 0, 255).tolist()
    return red, green, blue


def draw_texture(rng: np.random.Generator, pattern: str, ground: Colour, figure: Colour) -> NDArray[np.uint8] | None:
    """The cloth of a garment, uint8 [TEXTURE_SIZE, TEXTURE_SIZE, 3], with the collar a sixth down; None if plain.

    Nothing in it is finer than what is left to see when the figure is 110 pixels high.
    """
    if pattern == "plain":
        return None
    size = TEXTURE_SIZE
    texture = np.full((size, size, 3), ground, np.uint8)
    period = int(rng.integers(16, 29))
    width = int(period * rng.uniform(0.35, 0.6))
    start = int(rng.integers(period))
    if pattern in ("stripes", "check"):
        for y in range(start - period, size, period):
            cv2.rectangle(texture, (0, y), (size, y + width), figure, cv2.FILLED)
    if pattern in ("pinstripes", "check"):
        for x in range(start - period, size, period):
            cv2.rectangle(texture, (x, 0), (x + width, size), figure, cv2.FILLED)
    if pattern == "check":  # threads of both directions mix, except at crossings
        moved = np.roll(texture, period // 2, (0, 1))
        texture = np.asarray(cv2.addWeighted(texture, 0.5, moved, 0.5, 0), np.uint8)
    if pattern == "two-tone":
        texture[int(size * rng.uniform(0.4, 0.6)) :] = figure
    if pattern == "band":
        top = int(size * rng.uniform(0.3, 0.5))
        texture[top : top + int(size * rng.uniform(0.1, 0.2))] = figure
    if pattern == "dots":
        for y in range(0, size, 16):
            for x in range(y // 2 % 16, size, 16):
                cv2.circle(texture, (x, y), 5, figure, cv2.FILLED)
    if pattern == "sash":
        slope = 1 if rng.random() < 0.5 else -1
        cv2.line(texture, (64 - slope * 70, -6), (64 + slope * 70, 134), figure, int(rng.integers(16, 28)))
    return texture
