"""Cameras that look at drawn people: where each hangs, its light, its lens, and its snapshots."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data_shards.sources.synthetic.figure import SIZE, draw_person
from data_shards.sources.synthetic.people import (
    Appearance,
    Colour,
    Pose,
    draw_appearance,
    shade,
)

WIDE = 4 * SIZE[0]  # a backdrop is wider than a picture, so that no two show the same piece
HORIZON = 250


@dataclass(frozen=True)
class Camera:
    """A place and a lens.

    Attributes:
        backdrop: RGB, `WIDE` pixels.
        gain: what it does to red, green and blue.
        gamma: above 1 darkens.
        contrast: around mid grey.
        blur: pixels of the finished picture.
        noise: of 255.
        quality: of its JPEGs.
        height: pixels of its pictures; they are half as wide.
        yaw: radians from facing it in which people mostly walk by.
        squash: how much shorter people look from up where it hangs.
        obstacle: how often something stands in the way.
        light: -1 from the left to 1 from the right.
    """

    backdrop: Image.Image
    gain: np.ndarray
    gamma: float
    contrast: float
    blur: float
    noise: float
    quality: int
    height: int
    yaw: float
    squash: float
    obstacle: float
    light: float


def install_camera(seed: int, number: int) -> Camera:
    """The camera of this number: always the same for the same seed."""
    rng = np.random.default_rng([seed, 1, number])
    scenes = (_street, _park, _corridor, _plaza, _platform)
    warmth = rng.uniform(-0.16, 0.16)
    gain = np.array([1 + warmth, 1 + rng.uniform(-0.06, 0.06), 1 - warmth], np.float32)
    return Camera(
        backdrop=scenes[number % len(scenes)](rng),
        gain=gain,
        gamma=float(rng.uniform(0.75, 1.45)),
        contrast=float(rng.uniform(0.75, 1.1)),
        blur=float(rng.uniform(0.0, 0.9)),
        noise=float(rng.uniform(1.0, 6.0)),
        quality=int(rng.integers(72, 94)),
        height=int(rng.choice([128, 144, 160, 192])),
        yaw=float(rng.uniform(-math.pi, math.pi)),
        squash=float(rng.uniform(0.88, 1.0)),
        obstacle=float(rng.uniform(0.1, 0.3)),
        light=float(rng.uniform(-1, 1)),
    )


def photograph(camera: Camera, who: Appearance, rng: np.random.Generator) -> bytes:
    """One picture of one person, cropped as a detector would.

    Returns:
        A JPEG.
    """
    left = int(rng.integers(WIDE - SIZE[0] + 1))
    picture = camera.backdrop.crop((left, 0, left + SIZE[0], SIZE[1]))
    turn = camera.yaw + (math.pi if rng.random() < 0.3 else 0.0) + rng.normal(0, 0.5)
    pose = Pose(turn, rng.uniform(0, 2 * math.pi), rng.uniform(0.03, 0.12))
    centre, base = 128 + rng.uniform(-14, 14), 486 + rng.uniform(-8, 8)
    scale = rng.uniform(420, 465) * camera.squash
    _shadow(picture, centre, base, camera.light)
    person = draw_person(who, pose, centre, base, scale)
    picture.paste(person, (0, 0), person)
    _light(picture, person, camera.light)
    if rng.random() < camera.obstacle:
        _obstruct(picture, rng)
    return _develop(camera, picture, rng)


def _develop(camera: Camera, picture: Image.Image, rng: np.random.Generator) -> bytes:
    """Crop, shrink, and do what the lens and the sensor do."""
    box = (
        rng.uniform(0, 22),
        rng.uniform(0, 30),
        256 - rng.uniform(0, 22),
        512 - rng.uniform(0, 8),
    )
    size = (camera.height // 2, camera.height)
    small = picture.resize(size, Image.Resampling.BOX, box=box, reducing_gap=None)
    blur = camera.blur * rng.uniform(0.6, 1.3)
    if blur > 0.25:
        small = small.filter(ImageFilter.GaussianBlur(blur))
    light = np.asarray(small, np.float32) / 255 * (camera.gain * rng.uniform(0.88, 1.12))
    light = np.clip(light, 0, 1) ** camera.gamma
    light = (light - 0.5) * camera.contrast + 0.5
    light += rng.standard_normal(light.shape, np.float32) * (camera.noise / 255)
    pixels = np.clip(light * 255 + 0.5, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=camera.quality)
    return file.getvalue()


def _shadow(picture: Image.Image, centre: float, base: float, light: float) -> None:
    veil = Image.new("L", SIZE)
    x = centre - 26 * light
    ImageDraw.Draw(veil).ellipse((x - 70, base - 22, x + 70, base + 6), fill=95)
    picture.paste((20, 22, 34), (0, 0), veil)


def _light(picture: Image.Image, person: Image.Image, light: float) -> None:
    """Darken the side of a person that is turned from the light."""
    ramp = np.linspace(-1, 1, SIZE[0], dtype=np.float32) * -light * 1.6
    depth = np.clip(ramp, 0, 1) * 90
    veil = Image.fromarray(np.broadcast_to(depth.astype(np.uint8), SIZE[::-1]).copy())
    black = Image.new("L", SIZE)
    picture.paste((16, 16, 34), (0, 0), Image.composite(veil, black, person.getchannel("A")))


def _obstruct(picture: Image.Image, rng: np.random.Generator) -> None:
    """Put something between the camera and the person."""
    pen, kind = ImageDraw.Draw(picture), int(rng.integers(4))
    if kind == 0:  # a lamp post
        x = float(rng.choice([rng.uniform(20, 90), rng.uniform(160, 230)]))
        pen.rectangle((x, 0, x + 16, SIZE[1]), fill=(72, 76, 80))
        pen.rectangle((x + 3, 0, x + 6, SIZE[1]), fill=(118, 122, 126))
    elif kind == 1:  # a hedge
        top = rng.uniform(390, 450)
        for _ in range(60):
            x, y, r = rng.uniform(-10, 266), rng.uniform(top, 520), rng.uniform(10, 24)
            green = (int(rng.uniform(40, 80)), int(rng.uniform(90, 130)), int(rng.uniform(40, 70)))
            pen.ellipse((x - r, y - r, x + r, y + r), fill=green)
    elif kind == 2:  # a sign
        x, y = rng.uniform(-40, 200), rng.uniform(330, 420)
        pen.rectangle((x, y, x + 100, y + 190), fill=(226, 222, 210), outline=(90, 90, 90), width=5)
        for line in range(4):
            pen.rectangle(
                (x + 14, y + 24 + 26 * line, x + 80, y + 34 + 26 * line), fill=(120, 126, 140)
            )
    else:  # someone else, half in the picture
        other = Pose(rng.uniform(0, 2 * math.pi), rng.uniform(0, 6), 0.08)
        x = float(rng.choice([rng.uniform(-14, 16), rng.uniform(240, 270)]))
        passer = draw_person(draw_appearance(rng), other, x, 500, 450)
        picture.paste(passer, (0, 0), passer)


# Backdrops: each a wall or a view above the horizon, and a ground below it.


def _ground(rng: np.random.Generator, top: Colour, bottom: Colour) -> Image.Image:
    """A sheet whose lower part fades from one colour, far away, to another, close by."""
    ramp = np.clip((np.arange(SIZE[1]) - HORIZON) / (SIZE[1] - HORIZON), 0, 1)[:, None, None]
    column = (1 - ramp) * np.array(top) + ramp * np.array(bottom)
    grain = rng.normal(0, 4, (SIZE[1], WIDE, 1))
    return Image.fromarray(np.clip(column + grain, 0, 255).astype(np.uint8))


def _tiles(pen: ImageDraw.ImageDraw, colour: Colour, step: int) -> None:
    """Joints between paving stones, in perspective."""
    for n in range(-2 * WIDE // step, 3 * WIDE // step):
        pen.line(
            (WIDE / 2 + (n * step - WIDE / 2) * 0.45, HORIZON, n * step, SIZE[1]),
            fill=colour,
            width=2,
        )
    y, gap = float(HORIZON), 8.0
    while y < SIZE[1]:
        pen.line((0, y, WIDE, y), fill=colour, width=2)
        y, gap = y + gap, gap * 1.35


def _street(rng: np.random.Generator) -> Image.Image:
    image = _ground(rng, (126, 124, 122), (158, 154, 148))
    pen = ImageDraw.Draw(image)
    walls = ((186, 122, 98), (208, 184, 148), (160, 152, 146), (196, 164, 120), (150, 104, 92))
    x = 0
    while x < WIDE:
        width = int(rng.integers(180, 300))
        wall = shade(walls[int(rng.integers(len(walls)))], rng.uniform(0.85, 1.15))
        pen.rectangle((x, 0, x + width, HORIZON), fill=wall)
        for wx in range(x + 24, x + width - 50, 74):
            for wy in (14, 120):
                glass = shade((70, 92, 112), rng.uniform(0.7, 1.5))
                pen.rectangle(
                    (wx, wy, wx + 44, wy + 74), fill=glass, outline=(232, 228, 220), width=4
                )
        pen.line((x, 0, x, HORIZON), fill=shade(wall, 0.6), width=5)
        x += width
    pen.rectangle((0, HORIZON - 8, WIDE, HORIZON + 10), fill=(176, 174, 168))
    _tiles(pen, (136, 132, 128), 96)
    return image


def _park(rng: np.random.Generator) -> Image.Image:
    image = _ground(rng, (112, 150, 84), (150, 178, 104))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, WIDE, HORIZON - 40), fill=(186, 212, 230))
    for _ in range(46):
        x, y, r = rng.uniform(0, WIDE), rng.uniform(60, HORIZON - 20), rng.uniform(40, 80)
        pen.rectangle((x - 6, y, x + 6, HORIZON + 8), fill=(104, 78, 58))
        pen.ellipse((x - r, y - r, x + r, y + r), fill=shade((84, 138, 74), rng.uniform(0.7, 1.25)))
    path = [(0, 400), (WIDE, 380), (WIDE, 500), (0, 512)]
    pen.polygon(path, fill=(206, 190, 156))
    return image


def _corridor(rng: np.random.Generator) -> Image.Image:
    image = _ground(rng, (150, 152, 158), (196, 198, 202))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, WIDE, HORIZON + 40), fill=(222, 216, 200))
    pen.rectangle((0, 150, WIDE, HORIZON + 40), fill=(172, 186, 178))
    for x in range(int(rng.integers(20, 90)), WIDE, int(rng.integers(210, 280))):
        door = shade((150, 104, 70), rng.uniform(0.8, 1.3))
        pen.rectangle((x, 20, x + 104, HORIZON + 40), fill=door, outline=(96, 70, 52), width=5)
        pen.ellipse((x + 82, 150, x + 94, 162), fill=(222, 196, 110))
    pen.rectangle((0, HORIZON + 32, WIDE, HORIZON + 46), fill=(120, 116, 112))
    for x in range(60, WIDE, 230):  # ceiling lamps mirrored in the floor
        pen.ellipse((x, 360, x + 90, 500), fill=(212, 214, 218))
    return image


def _plaza(rng: np.random.Generator) -> Image.Image:
    image = _ground(rng, (176, 160, 140), (206, 190, 168))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, WIDE, HORIZON), fill=(206, 218, 226))
    for _ in range(22):
        x, width, top = rng.uniform(-60, WIDE), rng.uniform(70, 150), rng.uniform(20, 170)
        pen.rectangle(
            (x, top, x + width, HORIZON), fill=shade((150, 156, 170), rng.uniform(0.7, 1.4))
        )
        for wy in range(int(top) + 14, HORIZON - 16, 26):
            pen.line((x + 10, wy, x + width - 10, wy), fill=(198, 206, 214), width=7)
    _tiles(pen, (164, 148, 130), 128)
    return image


def _platform(rng: np.random.Generator) -> Image.Image:
    image = _ground(rng, (92, 96, 104), (120, 124, 132))
    pen = ImageDraw.Draw(image)
    train = tuple(int(v) for v in rng.uniform((60, 90, 110), (190, 150, 180)))
    pen.rectangle((0, 0, WIDE, 40), fill=(52, 56, 66))
    pen.rectangle((0, 40, WIDE, HORIZON), fill=train)
    pen.rectangle((0, 176, WIDE, 194), fill=(238, 236, 230))
    for x in range(int(rng.integers(10, 60)), WIDE, 130):
        pen.rounded_rectangle(
            (x, 66, x + 92, 150), 12, fill=(58, 72, 86), outline=(226, 226, 224), width=4
        )
    pen.rectangle((0, HORIZON, WIDE, HORIZON + 26), fill=(40, 42, 48))
    pen.rectangle((0, HORIZON + 40, WIDE, HORIZON + 60), fill=(232, 190, 62))
    return image
