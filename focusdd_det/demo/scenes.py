"""Drawn pictures: planned from a seed as plain numbers, then rendered with the exact boxes of their objects.

A plan is separate from its rendering so that the same picture can be drawn again without one of its objects.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from focusdd_det.demo.objects import CLASSES, CLUTTER, OBJECTS, draw, pick_color
from focusdd_det.types import Floats, Image

SIDES = (160, 320)  # smallest and largest side of a picture of one object, px
_VISIBLE = 0.3  # a pixel belongs to an object when at least this much of it is the object's
_HIDDEN = 0.3  # an object of which less than this share can be seen is not annotated


def seeded(*parts: object) -> np.random.Generator:
    """A generator that depends on `parts` alone, not on what was drawn before."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


@dataclass(frozen=True)
class Item:
    """One drawing in a picture.

    Attributes:
        kind: a name of OBJECTS or CLUTTER.
        x, y: centre in pixels of the picture; it may lie outside.
        size: side in pixels of the square the drawing fills before it is stretched and turned.
        angle: rotation in degrees.
        stretch: width over height, relative to the drawing's own.
        flip: mirrored left to right.
        opacity: 0 to 1; below 1 the background shows through.
        key: seeds the drawing's colours and variants.
    """

    kind: str
    x: float
    y: float
    size: float
    angle: float
    stretch: float
    flip: bool
    opacity: float
    key: str


@dataclass(frozen=True)
class Scene:
    """The plan of a picture: size in pixels, items in drawing order, blur and noise (sigmas), the seed."""

    width: int
    height: int
    items: tuple[Item, ...]
    blur: float
    noise: float
    key: str


@dataclass(frozen=True)
class Picture:
    """A rendered scene.

    Attributes:
        image: [H, W, 3] uint8 RGB.
        boxes: [n, 4] float32, x1 y1 x2 y2 in pixels, tight on what can be seen of each annotated object.
        classes: [n] int64, positions in CLASSES.
        areas: [n] float32, visible pixels of each object.
    """

    image: Image
    boxes: Floats
    classes: NDArray[np.int64]
    areas: Floats


def _background(scene: Scene) -> Floats:
    """[H, W, 3] float32, 0 to 255: a gradient, noise of several grains, sometimes stripes or speckle."""
    rng = seeded(scene.key, "background")
    h, w = scene.height, scene.width
    x, y = np.arange(w, dtype=np.float32)[None] / w, np.arange(h, dtype=np.float32)[:, None] / h
    turn = rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    ramp = (cos * x + sin * y)[..., None] * np.float32(0.5) + np.float32(0.5)
    one, two = (np.array(pick_color(rng, (0.15, 0.95)), np.float32) for _ in range(2))
    canvas = one + ramp * (two - one)
    for grain in (3, 9, 27):
        coarse = rng.standard_normal((grain, grain, 3), np.float32)
        coarse = (coarse * 0.5 + coarse.mean(2, keepdims=True) * 0.85) * np.float32(rng.uniform(2, 22))
        canvas += cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC)
    if rng.random() < 0.35:
        step = np.float32(rng.uniform(0.15, 0.9))
        canvas += (np.sin((cos * y * h + sin * x * w) * step) * np.float32(rng.uniform(5, 30)))[..., None]
    if rng.random() < 0.3:
        canvas += (rng.random((h, w, 1), np.float32) < 0.03) * np.float32(rng.uniform(-60, 60))
    return np.clip(canvas, 0, 255)


def _place(item: Item, width: int, height: int) -> tuple[slice, slice, NDArray[np.float32], float]:
    """The rows and columns an item reaches, its RGBA there [h, w, 4] (as `draw`), and its area in pixels."""
    side = int(np.clip(2 * item.size, 24, 400))  # twice the final size: the warp then averages, not aliases
    art = draw(item.kind, seeded(item.key), side)
    turn, grow = np.radians(item.angle), item.size / side
    sx = grow * np.sqrt(item.stretch) * (-1 if item.flip else 1)
    sy = grow / np.sqrt(item.stretch)
    linear = np.array([[np.cos(turn) * sx, -np.sin(turn) * sy], [np.sin(turn) * sx, np.cos(turn) * sy]])
    reach = np.abs(linear).sum(1) * side / 2 + 2
    x1, x2 = (int(np.clip(item.x + sign * reach[0], 0, width)) for sign in (-1, 1))
    y1, y2 = (int(np.clip(item.y + sign * reach[1], 0, height)) for sign in (-1, 1))
    whole = float(art[..., 3].sum()) * grow**2
    if x2 <= x1 or y2 <= y1:
        return slice(0, 0), slice(0, 0), np.zeros((0, 0, 4), np.float32), whole
    centre = np.array([item.x - x1, item.y - y1]) - 0.5 - linear @ np.array([side / 2 - 0.5] * 2)
    matrix = np.concatenate([linear, centre[:, None]], 1)
    layer: NDArray[np.float32] = cv2.warpAffine(art, matrix, (x2 - x1, y2 - y1), flags=cv2.INTER_LINEAR)
    return slice(y1, y2), slice(x1, x2), layer, whole


def render(scene: Scene, without: int | None = None) -> Picture:
    """Draw a planned scene.

    Args:
        scene: the plan.
        without: position in `scene.items` of an item to leave out; everything else stays the same.

    Returns:
        The picture and the boxes of all its objects that can be seen well enough.
    """
    canvas = _background(scene)
    seen: list[tuple[int, float, NDArray[np.float32]]] = []  # class, whole area, visible share of each pixel
    for index, item in enumerate(scene.items):
        if index == without:
            continue
        rows, columns, layer, whole = _place(item, scene.width, scene.height)
        alpha = layer[..., 3] * item.opacity
        canvas[rows, columns] *= (1 - alpha)[..., None]
        canvas[rows, columns] += layer[..., :3] * item.opacity
        for _, _, visible in seen:
            visible[rows, columns] *= 1 - alpha
        if item.kind in OBJECTS:
            shape = np.zeros((scene.height, scene.width), np.float32)
            shape[rows, columns] = layer[..., 3]
            seen.append((CLASSES.index(item.kind), whole, shape))
    if scene.blur > 0:
        canvas = cv2.GaussianBlur(canvas, (0, 0), scene.blur)
    canvas += seeded(scene.key, "noise").standard_normal(canvas.shape, np.float32) * scene.noise
    image = (np.clip(canvas, 0, 255) + 0.5).astype(np.uint8)

    boxes, classes, areas = [], [], []
    for cls, whole, visible in seen:
        y, x = np.nonzero(visible >= _VISIBLE)
        if len(y) == 0 or visible.sum() < _HIDDEN * whole:
            continue
        boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
        classes.append(cls)
        areas.append(float(visible.sum()))
    return Picture(
        image,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(classes, np.int64),
        np.array(areas, np.float32),
    )


def _item(rng: np.random.Generator, kind: str, x: float, y: float, size: float, key: str, opacity: float = 1) -> Item:
    turn = 180.0 if kind in CLUTTER else 40.0
    return Item(
        kind=kind,
        x=x,
        y=y,
        size=size,
        angle=float(rng.uniform(-turn, turn)),
        stretch=float(rng.uniform(0.75, 1.33)),
        flip=bool(rng.random() < 0.5),
        opacity=opacity,
        key=key,
    )


def _clutter(rng: np.random.Generator, width: int, height: int, count: int, key: str) -> list[Item]:
    kinds = list(CLUTTER)
    side = min(width, height)
    return [
        _item(
            rng,
            kinds[int(rng.integers(len(kinds)))],
            float(rng.uniform(0, width)),
            float(rng.uniform(0, height)),
            side * float(rng.uniform(0.08, 0.4)),
            f"{key}/clutter{i}",
        )
        for i in range(count)
    ]


POOR = ("tiny", "hidden", "cut", "faint")


def plan_single(key: str, kind: str, poor: str | None = None) -> Scene:
    """Plan a picture of one object among clutter, as a source.

    Args:
        key: seeds everything.
        kind: the object, a name of OBJECTS.
        poor: None or one of POOR: `tiny`, `hidden` (behind clutter), `cut` (at the border), `faint`.
    """
    rng = seeded(key, "plan")
    width, height = (int(v) for v in rng.integers(SIDES[0], SIDES[1] + 1, 2))
    size = float(np.sqrt(rng.uniform(0.24, 0.64) * width * height))
    size = min(size, 0.9 * min(width, height))
    if poor == "tiny":
        size = 0.14 * min(width, height) * float(rng.uniform(0.8, 1.3))
    margin_x, margin_y = min(size * 0.5, width / 2), min(size * 0.5, height / 2)
    x, y = float(rng.uniform(margin_x, width - margin_x)), float(rng.uniform(margin_y, height - margin_y))
    if poor == "cut":
        border = int(rng.integers(4))
        x = (x, x, 0.0, float(width))[border] + float(rng.uniform(-0.12, 0.12)) * size
        y = (0.0, float(height), y, y)[border] + float(rng.uniform(-0.12, 0.12)) * size
    opacity = float(rng.uniform(0.12, 0.25)) if poor == "faint" else 1.0
    thing = _item(rng, kind, x, y, size, f"{key}/object", opacity)
    items = [*_clutter(rng, width, height, int(rng.integers(2, 8)), key), thing]
    for i in range(int(rng.integers(3, 5)) if poor == "hidden" else 0):
        cover = ("blob", "tile", "wedge", "bars")[int(rng.integers(4))]
        dx, dy = (float(v) for v in rng.uniform(-0.35, 0.35, 2) * size)
        side = size * float(rng.uniform(0.5, 0.75))
        items.append(_item(rng, cover, x + dx, y + dy, side, f"{key}/cover{i}"))
    return Scene(width, height, tuple(items), float(rng.uniform(0.3, 0.8)), float(rng.uniform(1, 6)), key)


def plan_many(key: str, sides: tuple[int, int] = (192, 256)) -> Scene:
    """Plan a picture of one to five objects among clutter, as for validation.

    Args:
        key: seeds everything.
        sides: smallest and largest side of the picture in pixels.
    """
    rng = seeded(key, "plan")
    width, height = (int(v) for v in rng.integers(sides[0], sides[1] + 1, 2))
    items = _clutter(rng, width, height, int(rng.integers(1, 6)), key)
    placed: list[tuple[float, float, float]] = []
    for i in range(int(rng.integers(1, 6))):
        kind = CLASSES[int(rng.integers(len(CLASSES)))]
        for _ in range(12):  # tries to find a free place; a crowded picture gets fewer objects
            size = min(width, height) * float(rng.uniform(0.16, 0.5))
            x = float(rng.uniform(0.35 * size, width - 0.35 * size))
            y = float(rng.uniform(0.35 * size, height - 0.35 * size))
            if all(np.hypot(x - a, y - b) > 0.5 * (size + c) for a, b, c in placed):
                items.append(_item(rng, kind, x, y, size, f"{key}/object{i}"))
                placed.append((x, y, size))
                break
    return Scene(width, height, tuple(items), float(rng.uniform(0.3, 0.8)), float(rng.uniform(1, 6)), key)
