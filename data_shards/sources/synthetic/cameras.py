"""Cameras that look at drawn people: where each hangs, its light, its lens, and its pictures."""

import io
import math
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageFilter

from data_shards.sources.synthetic.people import Colour, Figure, Person, shade

HEIGHT, WIDTH = 512, 256  # of the canvas, several times the size of a picture
WIDE = 4 * WIDTH  # a backdrop is wider than a picture, so that pictures show different pieces
HORIZON = 250


class Camera:
    """A place and a lens; the same for the same seed and number."""

    def __init__(self, seed: int, number: int) -> None:
        rng = np.random.default_rng([seed, 1, number])
        warmth, tint = rng.uniform((-0.16, -0.06), (0.16, 0.06))
        self.backdrop = _backdrop(number, rng)
        self.gain = np.array([1 + warmth, 1 + tint, 1 - warmth], np.float32)  # of the colours
        self.gamma = rng.uniform(0.75, 1.45)  # above 1 darkens
        self.blur = rng.uniform(0, 0.9)  # pixels of the finished picture
        self.noise = rng.uniform(1, 6)  # standard deviation, of 255
        self.quality = int(rng.integers(72, 94))  # of its JPEGs
        self.height = int(rng.choice([128, 144, 160, 192]))  # pixels; pictures are half as wide
        self.yaw = rng.uniform(-math.pi, math.pi)  # radians from facing it in which people walk by
        self.light = rng.uniform(-1, 1)  # from the left to the right

    def photograph(self, who: Person, rng: np.random.Generator) -> bytes:
        """Take one picture of one person, cropped as a detector would; return a JPEG."""
        left = int(rng.integers(WIDE - WIDTH + 1))
        canvas = self.backdrop[:, left : left + WIDTH].copy()
        x, y = 128 + rng.uniform(-14, 14), 486 + rng.uniform(-8, 8)
        shadow = (x - 26 * self.light, y - 8), (140, 28), 0
        cv2.ellipse(canvas, shadow, (70, 70, 76), cv2.FILLED)
        turn = self.yaw + (math.pi if rng.random() < 0.3 else 0) + rng.normal(0, 0.5)
        scale = rng.uniform(405, 465) * who.height
        Figure(canvas, who, (x, y), scale, turn, rng.uniform(-0.12, 0.12)).draw()
        if rng.random() < 0.1:  # someone else, half in the picture
            place = (rng.choice([0, WIDTH]) + rng.uniform(-15, 15), 500)
            Figure(canvas, Person(rng), place, 450, rng.uniform(-math.pi, math.pi), 0.06).draw()
        elif rng.random() < 0.1:  # a hedge
            for x, y, r, tone in rng.uniform((-20, 400, 10, 0.7), (276, 520, 24, 1.3), (60, 4)):
                cv2.circle(canvas, (int(x), int(y)), int(r), shade((60, 110, 55), tone), cv2.FILLED)
        box = (*rng.uniform(0, (22, 30)), WIDTH - rng.uniform(0, 22), HEIGHT - rng.uniform(0, 8))
        size = (self.height // 2, self.height)
        picture = Image.fromarray(canvas).resize(size, Image.Resampling.BOX, box=box)
        picture = picture.filter(ImageFilter.GaussianBlur(self.blur * rng.uniform(0.6, 1.3)))
        side = 1 + 0.15 * self.light * np.linspace(-1, 1, size[0], dtype=np.float32)[:, None]
        gain = side * self.gain * rng.uniform(0.88, 1.12)
        light = np.clip(np.asarray(picture, np.float32) / 255 * gain, 0, 1) ** self.gamma
        light += rng.standard_normal(light.shape, np.float32) * (self.noise / 255)
        file = io.BytesIO()
        pixels = np.clip(light * 255 + 0.5, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=self.quality)
        return file.getvalue()


class Row(NamedTuple):
    """Boxes along a backdrop, or ovals, which are not quite in line."""

    colour: Colour
    top: int
    wide: int
    high: int
    every: int = WIDE
    first: int = 0
    tones: tuple[float, float] = (1.0, 1.0)  # of their colours
    oval: bool = False


def _backdrop(number: int, rng: np.random.Generator) -> np.ndarray:
    """A (HEIGHT, WIDE, 3) uint8 image of one of the scenes."""
    far, near, rows = SCENES[number % len(SCENES)]
    ramp = np.clip((np.arange(HEIGHT) - HORIZON) / (HEIGHT - HORIZON), 0, 1)[:, None, None]
    colour = (1 - ramp) * np.array(far) + ramp * np.array(near)
    canvas = np.clip(colour + rng.normal(0, 4, (HEIGHT, WIDE, 1)), 0, 255).astype(np.uint8)
    for row in rows:
        for x in range(row.first, WIDE, row.every):
            fill = shade(row.colour, rng.uniform(*row.tones))
            if row.oval:
                centre = x + rng.uniform(-45, 45), row.top + rng.uniform(-45, 45)
                cv2.ellipse(canvas, (centre, (row.wide, row.high), 0), fill, cv2.FILLED)
            else:
                canvas[row.top : row.top + row.high, x : x + row.wide] = fill
    return canvas


# The ground's colour far away and close by, and what stands on it.
SCENES: list[tuple[Colour, Colour, list[Row]]] = [
    ((126, 124, 122), (158, 154, 148), [  # a street
        Row((178, 136, 112), 0, 236, HORIZON, 240, tones=(0.7, 1.5)),
        Row((232, 228, 220), 10, 48, 82, 80, 16), Row((232, 228, 220), 116, 48, 82, 80, 16),
        Row((70, 92, 112), 14, 40, 74, 80, 20, (0.7, 1.5)),
        Row((70, 92, 112), 120, 40, 74, 80, 20, (0.7, 1.5)),
        Row((176, 174, 168), HORIZON - 8, WIDE, 18),
    ]),
    ((112, 150, 84), (150, 178, 104), [  # a park
        Row((186, 212, 230), 0, WIDE, HORIZON - 40),
        Row((104, 78, 58), 100, 12, 158, 60, 30),
        *[Row((84, 138, 74), y, 130, 130, 55, 0, (0.7, 1.25), oval=True) for y in (100, 180)],
        Row((206, 190, 156), 390, WIDE, 110),
    ]),
    ((150, 152, 158), (196, 198, 202), [  # a corridor, its lamps mirrored in the floor
        Row((222, 216, 200), 0, WIDE, 150), Row((172, 186, 178), 150, WIDE, HORIZON - 110),
        Row((96, 70, 52), 15, 114, HORIZON + 25, 240, 55),
        Row((150, 104, 70), 20, 104, HORIZON + 20, 240, 60, (0.8, 1.3)),
        Row((120, 116, 112), HORIZON + 32, WIDE, 14),
        Row((212, 214, 218), 430, 90, 140, 230, oval=True),
    ]),
    ((92, 96, 104), (120, 124, 132), [  # a platform
        Row((52, 56, 66), 0, WIDE, 40), Row((110, 120, 150), 40, WIDE, 210, tones=(0.7, 1.3)),
        Row((238, 236, 230), 176, WIDE, 18), Row((226, 226, 224), 62, 96, 92, 130, 30),
        Row((58, 72, 86), 66, 88, 84, 130, 34), Row((40, 42, 48), HORIZON, WIDE, 26),
        Row((232, 190, 62), HORIZON + 40, WIDE, 20),
    ]),
]  # fmt: skip
