"""Eight drawn objects, and clutter that is none of them: the project's own art, in unit coordinates.

Every drawing lives in the square [-1, 1] x [-1, 1], x to the right, y down, and is drawn at any resolution.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

Color = tuple[float, float, float]  # RGB, 0 to 255
_SHIFT = 4  # sub-pixel bits that OpenCV's drawing functions take


class Pen:
    """Draws anti-aliased shapes in unit coordinates on a transparent square canvas.

    Attributes:
        rgba: [side, side, 4] float32, RGB in 0 to 255 premultiplied by alpha in 0 to 1.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        self.rgba: NDArray[np.float32] = np.zeros((side, side, 4), np.float32)

    def polygon(self, points: Sequence[tuple[float, float]] | NDArray[np.float64], color: Color) -> None:
        """Fill a polygon (convex or not) given as x, y pairs."""
        # One pixel is kept free at the rim of the canvas, so that the edge of a shape is never cut hard.
        pixels = (np.asarray(points, np.float64) * (self.side / 2 - 2) + self.side / 2 - 0.5) * (1 << _SHIFT)
        fixed = np.floor(pixels + 0.5).astype(np.int32)
        x1, y1 = np.maximum(fixed.min(0) // (1 << _SHIFT) - 2, 0)
        x2, y2 = np.minimum(fixed.max(0) // (1 << _SHIFT) + 3, self.side)
        if x2 <= x1 or y2 <= y1:
            return
        mask = np.zeros((y2 - y1, x2 - x1), np.uint8)
        offset = np.array([x1, y1], np.int32) * (1 << _SHIFT)
        cv2.fillPoly(mask, [fixed - offset], 255, cv2.LINE_AA, _SHIFT)
        alpha = (mask.astype(np.float32) / 255)[..., None]
        paint = np.array([*color, 1], np.float32)
        area = self.rgba[y1:y2, x1:x2]
        area[:] = area * (1 - alpha) + paint * alpha

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, color: Color, start: float = 0, end: float = 360
    ) -> None:
        """Fill an ellipse, or the sector from `start` to `end` degrees."""
        t = np.radians(np.linspace(start, end, max(int(abs(end - start) / 8), 3) + 1))
        points = np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], 1)
        if abs(end - start) < 360:
            points = np.concatenate([points, [[x, y]]])
        self.polygon(points, color)

    def ring(
        self, x: float, y: float, outer: float, inner: float, color: Color, start: float = 0, end: float = 360
    ) -> None:
        """Fill the band between two circles, from `start` to `end` degrees."""
        t = np.radians(np.linspace(start, end, 48))
        circle = np.stack([np.cos(t), np.sin(t)], 1)
        self.polygon(np.concatenate([circle * outer, circle[::-1] * inner]) + np.array([x, y]), color)

    def box(self, x1: float, y1: float, x2: float, y2: float, color: Color) -> None:
        """Fill an upright rectangle."""
        self.polygon([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], color)

    def line(self, points: Sequence[tuple[float, float]], width: float, color: Color) -> None:
        """Draw a polyline of the given width with round joints."""
        for (ax, ay), (bx, by) in pairwise(points):
            dx, dy = bx - ax, by - ay
            norm = width / 2 / max(float(np.hypot(dx, dy)), 1e-6)
            nx, ny = -dy * norm, dx * norm
            corners = [(ax + nx, ay + ny), (bx + nx, by + ny), (bx - nx, by - ny), (ax - nx, ay - ny)]
            self.polygon(corners, color)
            self.ellipse(bx, by, width / 2, width / 2, color)
        self.ellipse(*points[0], width / 2, width / 2, color)


def pick_color(rng: np.random.Generator, value: tuple[float, float] = (0.35, 1.0)) -> Color:
    """A random colour: any hue, any saturation, brightness in the given range of 0 to 1."""
    hue, saturation = float(rng.random()), float(rng.uniform(0.25, 1))
    r, g, b = colorsys.hsv_to_rgb(hue, saturation, float(rng.uniform(*value)))
    return 255 * r, 255 * g, 255 * b


def shade(color: Color, factor: float) -> Color:
    """The colour made darker (factor below 1) or mixed with white (above 1, up to 2)."""
    if factor <= 1:
        return color[0] * factor, color[1] * factor, color[2] * factor
    mix = factor - 1
    return tuple(c + (255 - c) * mix for c in color)  # type: ignore[return-value]


def _ball(pen: Pen, rng: np.random.Generator) -> None:
    one, two = pick_color(rng), pick_color(rng, (0.7, 1.0))
    pen.ellipse(0, 0, 1, 1, shade(one, 0.45))
    for sector in range(6):
        pen.ellipse(0, 0, 0.93, 0.93, one if sector % 2 else two, sector * 60, sector * 60 + 60)
    pen.ellipse(0, 0, 0.22, 0.22, shade(one, 0.6))
    pen.ellipse(-0.4, -0.45, 0.16, 0.11, (250, 250, 250))


def _star(pen: Pen, rng: np.random.Generator) -> None:
    color, inner = pick_color(rng), float(rng.uniform(0.4, 0.5))
    t = np.radians(np.arange(10) * 36 - 90)
    spikes = np.stack([np.cos(t), np.sin(t)], 1) * np.where(np.arange(10) % 2, inner, 1.0)[:, None]
    pen.polygon(spikes, shade(color, 0.5))
    pen.polygon(spikes * 0.86, color)
    pen.polygon(spikes * 0.5, shade(color, 1.6))
    pen.ellipse(0, 0, 0.13, 0.13, shade(color, 0.4))


def _house(pen: Pen, rng: np.random.Generator) -> None:
    wall, roof, door = pick_color(rng, (0.55, 1)), pick_color(rng, (0.3, 0.8)), pick_color(rng, (0.2, 0.7))
    side = 1 if rng.random() < 0.5 else -1
    pen.box(0.38 * side - 0.12, -0.95, 0.38 * side + 0.12, -0.3, shade(roof, 0.6))
    pen.box(-0.75, -0.15, 0.75, 0.95, shade(wall, 0.6))
    pen.box(-0.7, -0.15, 0.7, 0.9, wall)
    pen.polygon([(-0.98, -0.1), (0, -0.9), (0.98, -0.1)], roof)
    pen.polygon([(-0.6, -0.2), (0, -0.7), (0.6, -0.2)], shade(roof, 1.3))
    pen.box(-0.16 - 0.3 * side, 0.3, 0.16 - 0.3 * side, 0.9, door)
    for y in (0.08, 0.5):
        pen.box(0.32 * side - 0.2, y, 0.32 * side + 0.2, y + 0.28, (60, 60, 70))
        pen.box(0.32 * side - 0.15, y + 0.05, 0.32 * side + 0.15, y + 0.23, (235, 240, 190))
        pen.box(0.32 * side - 0.02, y, 0.32 * side + 0.02, y + 0.28, (60, 60, 70))


def _tree(pen: Pen, rng: np.random.Generator) -> None:
    leaf, trunk = pick_color(rng, (0.3, 0.8)), pick_color(rng, (0.25, 0.55))
    pen.box(-0.13, 0.3, 0.13, 0.98, trunk)
    if rng.random() < 0.5:
        for top, width, tone in ((-0.05, 0.8, 0.7), (-0.5, 0.65, 0.9), (-0.95, 0.48, 1.1)):
            pen.polygon([(-width, top + 0.6), (0, top), (width, top + 0.6)], shade(leaf, tone))
    else:
        for x, y, r, tone in ((-0.42, 0.05, 0.45, 0.7), (0.42, 0.05, 0.45, 0.85), (0, -0.45, 0.52, 1.1)):
            pen.ellipse(x, y, r, r, shade(leaf, tone))
    fruit = pick_color(rng, (0.8, 1))
    for x, y in ((-0.3, 0.2), (0.28, 0.12), (0.02, -0.2), (-0.1, -0.55)):
        pen.ellipse(x, y, 0.09, 0.09, fruit)


def _car(pen: Pen, rng: np.random.Generator) -> None:
    paint, c, glass = pick_color(rng), float(rng.uniform(-0.1, 0.1)), (190, 220, 235)
    pen.polygon([(c - 0.6, 0), (c - 0.38, -0.5), (c + 0.3, -0.5), (c + 0.58, 0)], shade(paint, 0.7))
    pen.polygon([(c - 0.48, 0), (c - 0.32, -0.4), (c - 0.06, -0.4), (c - 0.06, 0)], glass)
    pen.polygon([(c + 0.04, 0), (c + 0.04, -0.4), (c + 0.25, -0.4), (c + 0.45, 0)], glass)
    pen.polygon([(-1, 0.35), (-0.97, 0.02), (-0.85, -0.05), (0.8, -0.05), (0.98, 0.1), (1, 0.35)], paint)
    pen.box(-0.95, 0.17, 0.95, 0.23, shade(paint, 0.55))
    pen.ellipse(0.9, 0.08, 0.08, 0.07, (250, 245, 170))
    for x in (-0.55, 0.55):
        pen.ellipse(x, 0.36, 0.25, 0.25, (35, 35, 40))
        pen.ellipse(x, 0.36, 0.12, 0.12, (200, 200, 205))


def _fish(pen: Pen, rng: np.random.Generator) -> None:
    body, fin = pick_color(rng), pick_color(rng)
    pen.polygon([(-0.45, 0), (-1, -0.5), (-0.85, 0), (-1, 0.5)], fin)
    pen.polygon([(-0.2, -0.35), (0.1, -0.75), (0.4, -0.3)], fin)
    pen.ellipse(0.2, 0, 0.78, 0.48, shade(body, 0.6))
    pen.ellipse(0.2, 0, 0.72, 0.42, body)
    for x in (-0.25, 0.0, 0.25):
        height = 0.4 * float(np.sqrt(1 - ((x - 0.2) / 0.72) ** 2)) + 0.02
        pen.box(x - 0.05, -height, x + 0.05, height, shade(fin, 0.8))
    pen.ellipse(0.62, -0.1, 0.12, 0.12, (250, 250, 250))
    pen.ellipse(0.65, -0.1, 0.06, 0.06, (15, 15, 20))


def _cup(pen: Pen, rng: np.random.Generator) -> None:
    clay, band = pick_color(rng), pick_color(rng, (0.7, 1))
    pen.ring(0.58, 0.1, 0.42, 0.26, shade(clay, 0.75), -100, 100)
    pen.polygon([(-0.85, -0.7), (0.6, -0.7), (0.42, 0.85), (-0.67, 0.85)], clay)
    pen.ellipse(-0.125, 0.85, 0.545, 0.12, clay)
    pen.polygon([(-0.81, -0.25), (0.55, -0.25), (0.5, 0.2), (-0.76, 0.2)], band)
    for x in (-0.55, -0.13, 0.29):
        pen.ellipse(x, -0.02, 0.12, 0.12, shade(clay, 0.5))
    pen.ellipse(-0.125, -0.7, 0.725, 0.2, shade(clay, 1.4))
    pen.ellipse(-0.125, -0.68, 0.6, 0.14, (70, 42, 25))


def _key(pen: Pen, rng: np.random.Generator) -> None:
    metal = pick_color(rng, (0.5, 1))
    pen.ring(-0.58, 0, 0.42, 0.2, shade(metal, 0.55))
    pen.ring(-0.58, 0, 0.37, 0.25, metal)
    pen.box(-0.2, -0.12, 0.98, 0.12, shade(metal, 0.55))
    pen.box(-0.2, -0.07, 0.94, 0.07, metal)
    for x in (0.45, 0.68, 0.88):
        length = float(rng.uniform(0.3, 0.5))
        pen.box(x - 0.08, 0.05, x + 0.08, length, shade(metal, 0.55))
        pen.box(x - 0.04, 0.05, x + 0.04, length - 0.05, metal)


def _blob(pen: Pen, rng: np.random.Generator) -> None:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radius = np.full(40, 0.7)
    for waves in (2, 3, 4):
        radius += float(rng.uniform(-0.12, 0.12)) * np.sin(waves * t + rng.uniform(0, 6.3))
    pen.polygon(np.stack([np.cos(t), np.sin(t)], 1) * radius[:, None], pick_color(rng, (0.15, 1)))


def _bars(pen: Pen, rng: np.random.Generator) -> None:
    color, count = pick_color(rng, (0.15, 1)), int(rng.integers(1, 5))
    for x in np.linspace(-0.8, 0.8, count):
        pen.box(float(x) - 0.12, -1, float(x) + 0.12, 1, color)


def _tile(pen: Pen, rng: np.random.Generator) -> None:
    one, two = pick_color(rng, (0.15, 1)), pick_color(rng, (0.15, 1))
    step = 2 / int(rng.integers(2, 5))
    for i, y in enumerate(np.arange(-1, 0.99, step)):
        for j, x in enumerate(np.arange(-1, 0.99, step)):
            pen.box(float(x), float(y), float(x + step), float(y + step), one if (i + j) % 2 else two)


def _wedge(pen: Pen, rng: np.random.Generator) -> None:
    pen.polygon(rng.uniform(-1, 1, (int(rng.integers(3, 5)), 2)), pick_color(rng, (0.15, 1)))


def _hoops(pen: Pen, rng: np.random.Generator) -> None:
    for outer in (0.95, 0.6, 0.3)[: int(rng.integers(1, 4))]:
        pen.ring(0, 0, outer, outer - 0.14, pick_color(rng, (0.15, 1)), float(rng.uniform(0, 200)), 360)


def _squiggle(pen: Pen, rng: np.random.Generator) -> None:
    x = np.linspace(-0.9, 0.9, 9)
    y = rng.uniform(-0.6, 0.6, 9)
    points = [(float(a), float(b)) for a, b in zip(x, y, strict=True)]
    pen.line(points, float(rng.uniform(0.06, 0.2)), pick_color(rng, (0.15, 1)))


def _cross(pen: Pen, rng: np.random.Generator) -> None:
    color, width = pick_color(rng, (0.15, 1)), float(rng.uniform(0.1, 0.3))
    pen.box(-width, -0.95, width, 0.95, color)
    pen.box(-0.95, -width, 0.95, width, color)


Drawing = Callable[[Pen, np.random.Generator], None]
OBJECTS: dict[str, Drawing] = {
    "ball": _ball,
    "star": _star,
    "house": _house,
    "tree": _tree,
    "car": _car,
    "fish": _fish,
    "cup": _cup,
    "key": _key,
}
CLUTTER: dict[str, Drawing] = {
    "blob": _blob,
    "bars": _bars,
    "tile": _tile,
    "wedge": _wedge,
    "hoops": _hoops,
    "squiggle": _squiggle,
    "cross": _cross,
}
CLASSES: tuple[str, ...] = tuple(OBJECTS)


def draw(kind: str, rng: np.random.Generator, side: int) -> NDArray[np.float32]:
    """Draw one object or piece of clutter.

    Args:
        kind: a name of OBJECTS or CLUTTER.
        rng: gives colours and variants; the same generator state gives the same drawing.
        side: canvas side in pixels, at least 8.

    Returns:
        [side, side, 4] float32: RGB 0 to 255 premultiplied by alpha 0 to 1.

    Raises:
        KeyError: `kind` is neither an object nor clutter.
    """
    pen = Pen(side)
    (OBJECTS.get(kind) or CLUTTER[kind])(pen, rng)
    return pen.rgba
