"""Drawing a person from the shoes up, at several times the size they will be seen at.

All lengths are in body heights: u to the right, and v up from the ground between the feet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from data_shards.sources.synthetic.people import Appearance, Colour, Pose, shade

Point = tuple[float, float]

SIZE = (256, 512)  # the canvas, in pixels: width, height


def draw_person(
    who: Appearance, pose: Pose, centre: float, base: float, scale: float
) -> Image.Image:
    """Draw one person.

    Args:
        who: the identity.
        pose: how they stand.
        centre: pixels from the left to the middle of their body.
        base: pixels from the top to the ground they stand on.
        scale: pixels of one body height.

    Returns:
        An RGBA image of `SIZE`, transparent around them.
    """
    return _Figure(who, pose, centre, base, scale * who.height).draw()


class _Figure:
    """A canvas in body heights, with the person's joints worked out once."""

    def __init__(self, who: Appearance, pose: Pose, centre: float, base: float, scale: float):
        self.who, self.centre, self.base, self.scale = who, centre, base, scale
        self.facing, self.side = math.cos(pose.angle), math.sin(pose.angle)
        self.image = Image.new("RGBA", SIZE, (0, 0, 0, 0))
        self.pen = ImageDraw.Draw(self.image)
        self.line = max(2, round(scale * 0.007))
        turn = math.hypot(self.facing, 0.62 * self.side)
        self.shoulder = 0.118 * turn * (0.6 + 0.4 * who.girth)
        self.waist = 0.088 * turn * who.girth
        self.hip = 0.092 * turn * who.girth
        swing = pose.stride * math.sin(pose.phase)
        lift = pose.stride * 0.22 * math.cos(pose.phase)
        self.legs = [self._leg(-1, swing, max(0.0, lift)), self._leg(1, -swing, max(0.0, -lift))]
        self.arms = [self._arm(-1, -swing), self._arm(1, swing)]
        # The limb on the far side is drawn first.
        if self.side > 0:
            self.legs.reverse()
            self.arms.reverse()

    def _leg(self, which: int, swing: float, lift: float) -> list[Point]:
        hip = which * 0.048 * abs(self.facing) * self.who.girth
        foot = hip * 1.1 + swing * self.side
        bend = 0.35 * lift * self.side + 0.012 * self.side
        return [(hip, 0.5), ((hip + foot) / 2 + bend, 0.27 + 0.3 * lift), (foot, 0.04 + lift)]

    def _arm(self, which: int, swing: float) -> list[Point]:
        shoulder = which * (self.shoulder - 0.016) * (0.25 + 0.75 * abs(self.facing))
        out = which * 0.03 * abs(self.facing)
        elbow = (shoulder + out + 0.45 * swing * self.side, 0.635)
        reach = 0.9 * swing * self.side + 0.02 * self.side
        return [(shoulder, 0.775), elbow, (shoulder + 1.2 * out + reach, 0.5 + 0.06 * abs(swing))]

    # Strokes

    def at(self, point: Point) -> Point:
        return self.centre + point[0] * self.scale, self.base - point[1] * self.scale

    def limb(self, points: Sequence[Point], radii: Sequence[float], colour: Colour) -> None:
        """A chain of tapered capsules with an outline."""
        placed = [self.at(point) for point in points]
        sizes = [radius * self.scale for radius in radii]
        for grow, fill in ((self.line, shade(colour, 0.62)), (0, colour)):
            for (x, y), size in zip(placed, sizes, strict=True):
                r = size + grow
                self.pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
            ends = zip(placed, placed[1:], sizes, sizes[1:], strict=False)
            for (x0, y0), (x1, y1), r0, r1 in ends:
                length = math.hypot(x1 - x0, y1 - y0) or 1.0
                nx, ny = (y0 - y1) / length, (x1 - x0) / length
                a, b = r0 + grow, r1 + grow
                corners = [(x0 + nx * a, y0 + ny * a), (x1 + nx * b, y1 + ny * b)]
                corners += [(x1 - nx * b, y1 - ny * b), (x0 - nx * a, y0 - ny * a)]
                self.pen.polygon(corners, fill=fill)

    def shape(
        self, points: Sequence[Point], colour: Colour, cloth: Image.Image | None = None
    ) -> None:
        """A closed outline, filled with a colour or with cloth."""
        placed = [self.at(point) for point in points]
        edge = shade(colour, 0.62)
        self.pen.line(
            [*placed, placed[0], placed[1]], fill=edge, width=2 * self.line, joint="curve"
        )
        if cloth is None:
            self.pen.polygon(placed, fill=colour)
            return
        mask = Image.new("L", SIZE)
        ImageDraw.Draw(mask).polygon(placed, fill=255)
        self.image.paste(cloth, (0, 0), mask)

    def oval(
        self, centre: Point, width: float, height: float, colour: Colour, edge: bool = True
    ) -> None:
        x, y = self.at(centre)
        grow = self.line if edge else 0
        for extra, fill in ((grow, shade(colour, 0.62)), (0, colour)):
            w, h = width * self.scale + extra, height * self.scale + extra
            self.pen.ellipse((x - w, y - h, x + w, y + h), fill=fill)

    # The person, back to front

    def draw(self) -> Image.Image:
        bag_behind = self.facing > -0.2
        if self.who.bag == "backpack" and bag_behind:
            self.backpack()
        self.arm(self.arms[0])
        self.leg(self.legs[0])
        self.leg(self.legs[1])
        self.skirt()
        self.torso()
        self.satchel()
        if self.who.bag == "backpack" and not bag_behind:
            self.backpack()
        self.arm(self.arms[1])
        self.tote()
        self.head()
        return self.image

    def leg(self, joints: list[Point]) -> None:
        who = self.who
        hip, knee, foot = joints
        girth = 0.6 + 0.4 * who.girth
        toe = (foot[0] + 0.06 * self.side, foot[1] - 0.02)
        ankle = (foot[0], foot[1] + 0.022)
        self.limb([(foot[0], foot[1] - 0.014), toe], [0.03, 0.025], who.shoes)
        if who.legwear in ("shorts", "skirt", "long skirt"):
            widths = [0.06 * girth, 0.041 * girth, 0.025 * girth]
            self.limb([hip, knee, ankle], widths, who.skin)
            if who.legwear == "shorts":
                self.limb([hip, knee], [0.07 * girth, 0.056 * girth], who.bottom)
            return
        hem = 0.03 if who.legwear == "jeans" else 0.037
        self.limb([hip, knee, ankle], [0.066 * girth, 0.048 * girth, hem * girth], who.bottom)
        if who.legwear == "jeans":  # turned up
            cuff = [(ankle[0] - 0.022, ankle[1]), (ankle[0] + 0.022, ankle[1])]
            self.limb(cuff, [0.012, 0.012], shade(who.bottom, 1.6))

    def skirt(self) -> None:
        if self.who.legwear not in ("skirt", "long skirt"):
            return
        hem = 0.3 if self.who.legwear == "skirt" else 0.12
        knees = [leg[1][0] for leg in self.legs]
        flare = 0.05 if self.who.legwear == "skirt" else 0.075
        left, right = min(*knees, -self.hip) - flare, max(*knees, self.hip) + flare
        waist = self.waist * 1.02
        points = [(-waist, 0.56), (waist, 0.56), (right, hem + 0.01), (0.0, hem - 0.008)]
        self.shape([*points, (left, hem + 0.01)], self.who.bottom)

    def torso(self) -> None:
        who, shoulder, waist, hip = self.who, self.shoulder, self.waist, self.hip
        hem = {"coat": 0.36, "jacket": 0.475, "hoodie": 0.48}.get(who.cut, 0.495)
        flare = 1.22 if who.cut == "coat" else 1.06
        right = [(0.045, 0.835), (shoulder * 0.82, 0.82), (shoulder, 0.785), (waist, 0.62)]
        right += [(hip * 1.04, 0.53), (hip * flare, hem)]
        outline = right + [(-u, v) for u, v in reversed(right)]
        self.shape(outline, who.top, self.cloth())
        middle = 0.03 * self.side
        if who.cut in ("jacket", "coat") and self.facing > 0.25:
            opening = [(middle - 0.026, 0.835), (middle + 0.026, 0.835)]
            opening += [(middle + 0.034, hem + 0.004), (middle - 0.034, hem + 0.004)]
            self.shape(opening, who.accent)
        elif who.cut == "hoodie":
            if self.facing < 0.2:
                self.oval((-0.02 * self.side, 0.81), 0.06, 0.04, shade(who.top, 0.85))
            else:
                pocket = [(middle - 0.05, 0.59), (middle + 0.05, 0.59)]
                pocket += [(middle + 0.062, 0.52), (middle - 0.062, 0.52)]
                self.shape(pocket, shade(who.top, 0.88))
        elif who.cut == "shirt" and self.facing > 0.25:
            ends = [self.at((middle, 0.82)), self.at((middle, hem + 0.01))]
            self.pen.line(ends, fill=shade(who.top, 0.7), width=self.line)
        if who.pattern == "print" and self.facing > 0.1 and who.cut not in ("jacket", "coat"):
            self.oval((middle, 0.69), 0.045 * self.facing, 0.045, who.accent, edge=False)

    def cloth(self) -> Image.Image | None:
        """The top's pattern over the whole canvas, fixed to the body; None where it is plain."""
        who = self.who
        if who.pattern in ("plain", "print"):
            return None
        cloth = Image.new("RGB", SIZE, who.top)
        pen, step = ImageDraw.Draw(cloth), who.pitch
        x0 = int(self.centre) % (2 * step) - 2 * step
        y0 = int(self.base) % (2 * step) - 2 * step
        across, down = range(x0, SIZE[0], 2 * step), range(y0, SIZE[1], 2 * step)
        if who.pattern == "stripes":
            for y in down:
                pen.rectangle((0, y, SIZE[0], y + step), fill=who.accent)
        elif who.pattern == "bars":
            for x in across:
                pen.rectangle((x, 0, x + step // 2, SIZE[1]), fill=who.accent)
        elif who.pattern == "checks":
            for y in down:
                pen.rectangle((0, y, SIZE[0], y + step // 2), fill=who.accent)
            for x in across:
                pen.rectangle((x, 0, x + step // 2, SIZE[1]), fill=shade(who.top, 0.6))
        elif who.pattern == "dots":
            for row, y in enumerate(range(y0, SIZE[1], step)):
                for x in range(x0 + step // 2 * (row % 2), SIZE[0], step):
                    pen.ellipse((x, y, x + step // 2, y + step // 2), fill=who.accent)
        else:  # block: the chest in the second colour
            chest = self.at((0.0, 0.66))[1]
            pen.rectangle((0, 0, SIZE[0], chest), fill=who.accent)
        return cloth

    def arm(self, joints: list[Point]) -> None:
        who = self.who
        shoulder, elbow, hand = joints
        width = 0.9 + 0.1 * who.girth
        short = who.cut == "t-shirt"
        sleeve = who.accent if who.pattern == "block" else who.top
        self.limb([hand], [0.027], who.skin)
        if short:
            half = ((shoulder[0] + elbow[0]) / 2, (shoulder[1] + elbow[1]) / 2)
            self.limb([shoulder, elbow, hand], [0.033, 0.03 * width, 0.022], who.skin)
            self.limb([shoulder, half], [0.038 * width, 0.042 * width], shade(sleeve, 0.93))
        else:
            wrist = (hand[0], hand[1] + 0.02)
            widths = [0.038 * width, 0.036 * width, 0.027]
            self.limb([shoulder, elbow, wrist], widths, shade(who.top, 0.93))
            if sleeve != who.top:
                self.limb([shoulder, elbow], widths[:2], shade(sleeve, 0.93))

    def backpack(self) -> None:
        colour = self.who.bag_colour
        if self.facing > 0.35:  # seen from the front: its sides, then the straps over the torso
            self.oval((0.0, 0.68), self.shoulder * 1.02, 0.12, colour)
            return
        behind = -0.1 * self.side * max(0.0, 1 - abs(self.facing))
        self.oval((behind, 0.685), 0.055 + 0.04 * abs(self.facing), 0.125, colour)
        pocket = 0.035 + 0.025 * abs(self.facing)
        self.oval((behind * 1.05, 0.63), pocket, 0.05, shade(colour, 0.85))

    def satchel(self) -> None:
        who = self.who
        if who.bag == "backpack" and self.facing > 0.35:
            for side in (-1, 1):
                strap = [(side * 0.07, 0.815), (side * 0.075, 0.62)]
                self.pen.line([self.at(p) for p in strap], fill=who.bag_colour, width=3 * self.line)
        if who.bag != "satchel":
            return
        side = 1 if self.facing > 0 else -1
        strap = [self.at((-0.08 * side, 0.815)), self.at((side * self.hip, 0.53))]
        self.pen.line(strap, fill=shade(who.bag_colour, 0.7), width=3 * self.line)
        x = side * self.hip * 1.1
        box = [(x - 0.055, 0.54), (x + 0.055, 0.54), (x + 0.06, 0.44), (x - 0.06, 0.44)]
        self.shape(box, who.bag_colour)

    def tote(self) -> None:
        if self.who.bag != "tote":
            return
        x, y = self.arms[1][2]
        handle = [self.at((x - 0.03, y - 0.09)), self.at((x, y)), self.at((x + 0.03, y - 0.09))]
        self.pen.line(handle, fill=shade(self.who.bag_colour, 0.6), width=2 * self.line)
        box = [
            (x - 0.06, y - 0.08),
            (x + 0.06, y - 0.08),
            (x + 0.066, y - 0.22),
            (x - 0.066, y - 0.22),
        ]
        self.shape(box, self.who.bag_colour)

    def head(self) -> None:
        who = self.who
        x = 0.022 * self.side
        long = who.haircut in ("long", "bob", "ponytail")
        if long and self.facing > -0.3:  # the hair that falls behind the neck
            length = 0.12 if who.haircut == "long" else 0.075
            back = -0.016 * self.side
            self.oval((x + back, 0.905 - length * 0.45), 0.068, 0.04 + length * 0.6, who.hair)
        self.limb([(x * 0.5, 0.83), (x, 0.87)], [0.027, 0.026], shade(who.skin, 0.88))
        self.oval((x, 0.915), 0.058, 0.073, who.skin)
        if self.facing > -0.2:
            self.face(x)
        self.hair(x)

    def face(self, x: float) -> None:
        who, spread = self.who, 0.024 * max(0.35, abs(self.facing))
        middle = x + 0.026 * self.side
        eyes = [middle + sign * spread for sign in (-1, 1)]
        if abs(self.side) > 0.8:
            eyes = [middle + 0.012 * self.side]
        if who.beard:
            self.oval((middle * 0.9, 0.868), 0.036, 0.024, who.hair, edge=False)
        for eye in eyes:
            self.oval((eye, 0.915), 0.0075, 0.0095, (40, 32, 34), edge=False)
            self.oval((eye + 0.006, 0.893), 0.009, 0.006, shade(who.skin, 0.9), edge=False)
            if who.glasses:
                cx, cy = self.at((eye, 0.915))
                r = 0.0185 * self.scale
                self.pen.ellipse(
                    (cx - r, cy - r, cx + r, cy + r), outline=(40, 36, 40), width=self.line
                )
        mouth = [self.at((middle - 0.012, 0.878)), self.at((middle + 0.012, 0.878))]
        self.pen.line(mouth, fill=shade(who.skin, 0.6), width=self.line)

    def hair(self, x: float) -> None:
        who, cut = self.who, self.who.haircut
        if cut == "bald":
            return
        if cut in ("cap", "beanie"):
            if self.facing < -0.3:
                self.oval((x, 0.91), 0.06, 0.068, who.hair)
            self.crown(x, 0.928, who.accent)
            if cut == "beanie":
                rim = [(x - 0.052, 0.938), (x + 0.052, 0.938)]
                self.limb(rim, [0.015, 0.015], shade(who.accent, 0.85))
            elif self.facing > -0.5:
                peak = [(x - 0.04 * self.facing, 0.946), (x + 0.04 * self.facing, 0.946)]
                if abs(self.side) > 0.6:
                    peak = [(x, 0.942), (x + 0.095 * self.side, 0.938)]
                self.limb(peak, [0.01, 0.01], shade(who.accent, 0.8))
            return
        if cut == "bun":
            self.oval((x - 0.035 * self.side, 0.995), 0.027, 0.025, who.hair)
        if self.facing < -0.3:  # from behind, hair is all there is to see
            length = {"long": 0.13, "bob": 0.05}.get(cut, 0.0)
            self.oval((x, 0.92 - length / 2), 0.064, 0.072 + length / 2, who.hair)
            if cut == "ponytail":
                self.limb(
                    [(x, 0.93), (x - 0.02 * self.side, 0.8)], [0.022, 0.012], shade(who.hair, 0.85)
                )
            return
        self.crown(x, 0.932 if self.facing > 0.5 else 0.918, who.hair)
        if abs(self.side) > 0.5:
            back = x - 0.048 * self.side * abs(self.side)
            self.oval((back, 0.918), 0.022 * abs(self.side), 0.048, who.hair, edge=False)
            if cut == "ponytail":
                tail = [(back - 0.02 * self.side, 0.94), (back - 0.055 * self.side, 0.83)]
                self.limb(tail, [0.02, 0.011], who.hair)

    def crown(self, x: float, brow: float, colour: Colour) -> None:
        """The upper part of an oval around the head, down to the brow."""
        cx, cy = self.at((x, 0.925))
        w, h = 0.066 * self.scale, 0.073 * self.scale
        drop = (brow - 0.925) * self.scale / h
        start = -180 + math.degrees(math.asin(max(-1.0, min(1.0, drop))))
        box = (cx - w, cy - h, cx + w, cy + h)
        for grow, fill in ((self.line, shade(colour, 0.62)), (0, colour)):
            grown = (box[0] - grow, box[1] - grow, box[2] + grow, box[3] + grow)
            self.pen.chord(grown, -180 - (-180 - start), -(start + 180), fill=fill)
