"""People at random, drawn from the shoes up as chains of ellipses.

Lengths are in body heights: u to the right, and v up from the ground between the feet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import cv2
import numpy as np

T = TypeVar("T")
Colour = tuple[int, int, int]
Ellipse = tuple[float, float, float, float]  # u and v of its centre, its radii along u and v

_TURN = np.linspace(0, 2 * math.pi, 24, endpoint=False)
_CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=-1)

# Few colours, so that many people share each one and no colour identifies a person.
CLOTHES: list[Colour] = [
    (238, 234, 226), (36, 38, 44), (192, 52, 50), (44, 92, 160), (92, 140, 84), (230, 184, 66),
    (122, 74, 128), (216, 122, 74), (120, 168, 196), (128, 126, 122), (110, 76, 48),
]  # fmt: skip
BOTTOMS: list[Colour] = [(40, 44, 58), (62, 84, 122), (118, 142, 170), (170, 152, 120)]
SKINS: list[Colour] = [(250, 216, 190), (226, 176, 140), (164, 112, 80), (92, 62, 48)]
HAIRS: list[Colour] = [(34, 28, 28), (70, 46, 34), (120, 78, 44), (206, 166, 96), (176, 174, 170)]
CUTS = ("t-shirt", "shirt", "jacket", "coat", "hoodie")
PATTERNS = ("plain", "plain", "stripes", "bars", "checks", "block", "print")
LEGWEAR = ("trousers", "trousers", "trousers", "shorts", "skirt", "long skirt")
HAIRCUTS = ("short", "short", "bob", "long", "bald", "cap", "beanie")
BAGS = ("none", "backpack", "tote")


class Person:
    """What one person looks like before every camera; lengths are in body heights."""

    def __init__(self, rng: np.random.Generator) -> None:
        def choose(values: Sequence[T]) -> T:
            return values[int(rng.integers(len(values)))]

        self.cut, self.pattern, self.legwear = choose(CUTS), choose(PATTERNS), choose(LEGWEAR)
        self.haircut, self.bag = choose(HAIRCUTS), choose(BAGS)
        self.top, self.bottom = choose(CLOTHES), choose(BOTTOMS)
        self.accent = choose([c for c in CLOTHES if math.dist(c, self.top) > 90])
        self.shoes, self.bag_colour = choose(CLOTHES), choose(CLOTHES)
        self.skin, self.hair = choose(SKINS), choose(HAIRS)
        self.pitch = rng.uniform(0.04, 0.076)  # period of the pattern
        self.girth, self.height = rng.uniform(0.86, 1.28), rng.uniform(0.9, 1.04)
        self.beard = self.haircut not in ("bob", "long") and rng.random() < 0.35


def shade(colour: Colour, factor: float) -> Colour:
    """A darker (factor < 1) or lighter colour."""
    return tuple(min(255, int(channel * factor)) for channel in colour)  # type: ignore


@dataclass
class Figure:
    """A person in one pose on a canvas."""

    canvas: np.ndarray  # (H, W, 3) uint8, RGB
    who: Person
    ground: tuple[float, float]  # pixels from the left and the top to between the feet
    scale: float  # pixels in a body height
    angle: float  # radians from facing the camera; π shows the back, ±π/2 a side
    stride: float  # how far the right foot is ahead of the left one

    def __post_init__(self) -> None:
        self.facing, self.side = math.cos(self.angle), math.sin(self.angle)
        wide = math.hypot(self.facing, 0.62 * self.side) * self.who.girth
        self.shoulder, self.waist, self.hip = 0.115 * wide**0.8, 0.088 * wide, 0.092 * wide

    def draw(self) -> None:
        """Draw the person, back to front."""
        near = -1 if self.side > 0 else 1
        self._backpack(self.facing > -0.2)
        self._arm(-near)
        self._leg(-near)
        self._leg(near)
        self._torso()
        self._backpack(self.facing <= -0.2)
        self._arm(near)
        self._head()

    def _chain(self, colour: Colour, *ellipses: Ellipse, edge: bool = True) -> list[np.ndarray]:
        """Fill the hulls of neighbouring ellipses; outline all of them first."""
        centres = np.array(self.ground) + self.scale * np.array([(u, -v) for u, v, *_ in ellipses])
        radii = self.scale * np.array([radii for _, _, *radii in ellipses])
        rings = (centres[:, None] + _CIRCLE * radii[:, None]).astype(np.int32)
        hulls = [cv2.convexHull(np.concatenate(pair)) for pair in pairwise(rings)] or [rings[0]]
        if edge:
            width = max(1, round(0.014 * self.scale))
            cv2.polylines(self.canvas, hulls, True, shade(colour, 0.62), width)
        for hull in hulls:
            cv2.fillConvexPoly(self.canvas, hull, colour)
        return hulls

    def _leg(self, which: int) -> None:
        who, girth = self.who, 0.6 + 0.4 * self.who.girth
        hip = which * 0.048 * abs(self.facing) * who.girth
        foot, lift = 1.1 * hip + which * self.stride * self.side, max(0, -0.2 * which * self.stride)
        knee, toe = ((hip + foot) / 2 + 0.03 * self.side, 0.27 + lift), foot + 0.06 * self.side
        self._chain(who.shoes, (foot, 0.026 + lift, 0.03, 0.028), (toe, 0.022 + lift, 0.025, 0.022))
        thigh, wide = (hip, 0.5, 0.066 * girth, 0.066 * girth), who.legwear == "trousers"
        calf = (*knee, 0.046 * girth, 0.046 * girth)
        ankle = (foot, 0.062 + lift, (0.036 if wide else 0.025) * girth, 0.02)
        self._chain(who.bottom if wide else who.skin, thigh, calf, ankle)
        if who.legwear == "shorts":
            self._chain(who.bottom, thigh, (0.3 * hip + 0.7 * knee[0], 0.34, 0.06 * girth, 0.02))

    def _torso(self) -> None:
        who, middle = self.who, 0.03 * self.side
        if length := {"skirt": 0.3, "long skirt": 0.12}.get(who.legwear):
            wide = self.hip * (2.2 - 1.6 * length) + 0.6 * abs(self.stride * self.side)
            self._chain(who.bottom, (0, 0.55, self.waist, 0.01), (0, length, wide, 0.012))
        hem = {"coat": 0.36, "jacket": 0.475, "hoodie": 0.48}.get(who.cut, 0.495)
        shoulders = [(0, 0.82, 0.05, 0.018), (0, 0.78, self.shoulder, 0.022)]
        body = [(0, 0.62, self.waist, 0.02), (0, 0.53, self.hip, 0.02)]
        end = (0, hem, self.hip * (1.2 if who.cut == "coat" else 1.05), 0.012)
        self._pattern(self._chain(who.top, *shoulders, *body, end))
        if who.cut in ("jacket", "coat") and self.facing > 0.25:  # open, over something else
            self._chain(who.accent, (middle, 0.815, 0.024, 0.008), (middle, hem, 0.032, 0.008))
        elif who.cut == "hoodie" and self.facing > 0.25:
            pocket = shade(who.top, 0.88)
            self._chain(pocket, (middle, 0.585, 0.048, 0.01), (middle, 0.53, 0.062, 0.012))

    def _pattern(self, hulls: list[np.ndarray]) -> None:
        """Paint the pattern of the top, which is fixed to the body, inside the hulls."""
        mask = np.zeros(self.canvas.shape[:2], np.uint8)
        for hull in hulls:
            cv2.fillConvexPoly(mask, hull, 1)
        y, x = np.nonzero(mask)
        u, v = (x - self.ground[0]) / self.scale, (self.ground[1] - y) / self.scale
        across, up = u / self.who.pitch + 0.25, v / self.who.pitch
        painted = {
            "stripes": up % 2 < 1,
            "bars": across % 2 < 0.5,
            "checks": (up % 2 < 0.5) | (across % 2 < 0.5),
            "block": v > 0.66,
            "print": np.hypot(u - 0.03 * self.side, v - 0.69) < 0.045 * (self.facing > 0.1),
        }.get(self.who.pattern, np.zeros(0, np.int64))
        self.canvas[y[painted], x[painted]] = self.who.accent

    def _arm(self, which: int) -> None:
        who, swing, flat = self.who, -which * self.stride * self.side, abs(self.facing)
        x, out = which * (self.shoulder - 0.016) * (0.25 + 0.75 * flat), which * 0.03 * flat
        wide, elbow = 0.036 * (0.9 + 0.1 * who.girth), x + out + 0.45 * swing
        upper = [(x, 0.772, wide, wide), (elbow, 0.635, wide, wide)]
        u, v = x + 1.2 * out + 0.9 * swing + 0.02 * self.side, 0.5 + 0.06 * abs(swing)
        self._chain(who.skin, *upper[1:], (u, v, 0.026, 0.026))
        sleeve = shade(who.accent if who.pattern == "block" else who.top, 0.93)
        if who.cut == "t-shirt":
            self._chain(sleeve, upper[0], ((x + elbow) / 2, 0.7, 1.1 * wide, 1.1 * wide))
        else:
            self._chain(sleeve, *upper, (u, v + 0.025, 0.028, 0.022))
        if who.bag == "tote" and which > 0:
            self._chain(shade(who.bag_colour, 0.6), (u, v, 0.006, 0.006), (u, v - 0.09, 0.03, 0.01))
            self._chain(who.bag_colour, (u, v - 0.09, 0.06, 0.01), (u, v - 0.21, 0.066, 0.012))

    def _backpack(self, visible: bool) -> None:
        if visible and self.who.bag == "backpack":
            u, flat = -0.1 * self.side * (1 - abs(self.facing)), abs(self.facing)
            wide = 0.055 + 0.035 * flat + 0.03 * (self.facing > 0.35)
            self._chain(self.who.bag_colour, (u, 0.74, wide, 0.06), (u, 0.62, wide, 0.06))
            self._chain(shade(self.who.bag_colour, 0.85), (u, 0.62, wide * 0.7, 0.045))

    def _head(self) -> None:
        who, cut, x, face = self.who, self.who.haircut, 0.022 * self.side, self.facing > -0.3
        back = x - 0.02 * self.side
        length = {"long": 0.11, "bob": 0.05}.get(cut, 0.02)
        fall = [(back, 0.92, 0.064, 0.074), (back, 0.9 - length, 0.045 + 0.15 * length, 0.02)]
        scalp = who.skin if cut == "bald" else who.hair
        if face:
            self._chain(scalp, *fall)
        self._chain(shade(who.skin, 0.88), (0.5 * x, 0.83, 0.027, 0.02), (x, 0.87, 0.026, 0.02))
        self._chain(scalp, (x - 0.006 * self.side, 0.922, 0.064, 0.074))
        if face:
            self._face(x + 0.012 * self.side)
        elif cut in ("long", "bob"):
            self._chain(who.hair, *fall)
        if cut in ("cap", "beanie"):
            self._chain(who.accent, (x, 0.948, 0.066, 0.01), (x, 0.965, 0.05, 0.036))
            peak = x + 0.1 * self.side * (cut == "cap")
            self._chain(shade(who.accent, 0.85), (x, 0.945, 0.06, 0.012), (peak, 0.942, 0.04, 0.01))

    def _face(self, x: float) -> None:
        middle, spread = x + 0.016 * self.side, 0.024 * max(0.35, abs(self.facing))
        self._chain(self.who.skin, (x, 0.903, 0.055, 0.062), edge=False)
        if self.who.beard:
            self._chain(self.who.hair, (middle * 0.95, 0.864, 0.036, 0.022), edge=False)
        for eye in (middle - spread, middle + spread) if abs(self.side) < 0.8 else (middle,):
            self._chain((40, 32, 34), (eye, 0.913, 0.008, 0.01), edge=False)
        mouth = [(middle + u, 0.876, 0.004, 0.004) for u in (-0.012, 0.012)]
        self._chain(shade(self.who.skin, 0.6), *mouth, edge=False)
