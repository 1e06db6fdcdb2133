"""People at random: what one keeps from camera to camera, and what changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Colour = tuple[int, int, int]
T = TypeVar("T")

# Few colours, so that many people share each: a colour alone gives no one away.
TOPS: tuple[Colour, ...] = (
    (232, 230, 222), (44, 46, 52), (186, 48, 50), (46, 84, 150), (92, 140, 84),
    (224, 176, 64), (122, 74, 128), (216, 122, 74), (120, 168, 196), (128, 126, 122),
)  # fmt: skip
BOTTOMS: tuple[Colour, ...] = (
    (40, 44, 58), (62, 84, 122), (118, 142, 170), (170, 152, 120), (88, 82, 78),
    (98, 108, 76), (206, 200, 188), (110, 56, 60),
)  # fmt: skip
ACCENTS: tuple[Colour, ...] = (
    (240, 238, 230), (30, 30, 34), (210, 66, 56), (40, 110, 170), (240, 196, 70), (70, 150, 120),
)  # fmt: skip
SKINS: tuple[Colour, ...] = (
    (250, 216, 190), (236, 190, 156), (208, 156, 118), (164, 112, 80), (118, 78, 56), (84, 56, 44),
)  # fmt: skip
HAIRS: tuple[Colour, ...] = (
    (34, 28, 28), (70, 46, 34), (120, 78, 44), (206, 166, 96), (150, 66, 40), (176, 174, 170),
)  # fmt: skip

CUTS = ("t-shirt", "shirt", "jacket", "coat", "hoodie")
PATTERNS = ("plain", "plain", "stripes", "bars", "checks", "dots", "block", "print")
LEGWEAR = ("trousers", "trousers", "jeans", "shorts", "skirt", "long skirt")
HAIRCUTS = ("short", "short", "bob", "long", "bun", "ponytail", "bald", "cap", "beanie")
BAGS = ("none", "none", "backpack", "tote", "satchel")


@dataclass(frozen=True)
class Appearance:
    """What one person looks like, everywhere."""

    cut: str
    pattern: str
    legwear: str
    haircut: str
    bag: str
    top: Colour
    accent: Colour
    bottom: Colour
    shoes: Colour
    skin: Colour
    hair: Colour
    bag_colour: Colour
    pitch: int
    girth: float
    height: float
    glasses: bool
    beard: bool


@dataclass(frozen=True)
class Pose:
    """How they stand before the camera.

    Attributes:
        angle: radians from facing the camera; π shows the back, ±π/2 a side.
        phase: radians of the walk's cycle.
        stride: length of a step; 0 stands.
    """

    angle: float
    phase: float
    stride: float


def draw_appearance(rng: np.random.Generator) -> Appearance:
    """A person at random."""

    def choose(values: Sequence[T]) -> T:
        return values[int(rng.integers(len(values)))]

    top = choose(TOPS)
    others = [colour for colour in ACCENTS if math.dist(colour, top) > 90]
    haircut = choose(HAIRCUTS)
    return Appearance(
        cut=choose(CUTS),
        pattern=choose(PATTERNS),
        legwear=choose(LEGWEAR),
        haircut=haircut,
        bag=choose(BAGS),
        top=top,
        accent=choose(others),
        bottom=choose(BOTTOMS),
        shoes=choose((*ACCENTS, (96, 66, 44))),
        skin=choose(SKINS),
        hair=choose(HAIRS),
        bag_colour=choose((*ACCENTS, (120, 84, 52))),
        pitch=int(rng.integers(18, 34)),
        girth=float(rng.uniform(0.86, 1.28)),
        height=float(rng.uniform(0.9, 1.04)),
        glasses=bool(rng.random() < 0.25),
        beard=haircut in ("short", "bald", "cap", "beanie") and bool(rng.random() < 0.35),
    )


def shade(colour: Colour, factor: float) -> Colour:
    """A darker (factor < 1) or lighter colour."""
    if factor <= 1:
        return tuple(int(c * factor) for c in colour)  # type: ignore[return-value]
    return tuple(int(255 - (255 - c) / factor) for c in colour)  # type: ignore[return-value]
