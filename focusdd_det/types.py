"""The values that flow between the stages, checked where they are made.

Conventions: pictures are uint8 RGB [H, W, 3]; pixels are measured from the top left corner; a box is x1 y1 x2 y2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # [H, W, 3] RGB
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Source:
    """One photograph with one class label.

    Attributes:
        root: name of the source folder or archive it comes from (a key of the build's `sources`).
        path: path relative to that root, with forward slashes; `archive.tar!member` inside an archive.
        folder: the class folder's name: a WordNet id for ImageNet, any name for a user's own folders.
        group: name of the class that composites are made for (a COCO class, or a synset with `ipc_unit: imagenet`).
    """

    root: str
    path: str
    folder: str
    group: str

    def __str__(self) -> str:
        return f"{self.root}:{self.path}"


@dataclass(frozen=True)
class View:
    """Where the square that the ViT saw lies in the original picture, in pixels of the original.

    A token grid of side g maps to it per axis: x = column / g * extent_x + offset_x (DESIGN: key patch in pixels).
    """

    width: int
    height: int
    offset_x: float
    offset_y: float
    extent_x: float
    extent_y: float

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 1 or min(self.extent_x, self.extent_y) <= 0:
            raise ValueError(f"a view needs a positive size, got {self}")


@dataclass(frozen=True)
class Crop:
    """A square of the original picture: left, top and side in whole pixels of the original."""

    x: int
    y: int
    side: int

    def __post_init__(self) -> None:
        if self.side < 1 or min(self.x, self.y) < 0:
            raise ValueError(f"a crop needs side >= 1 and x, y >= 0, got {self}")


@dataclass(frozen=True)
class Detections:
    """What a detector found in one picture, best first.

    Attributes:
        boxes: [n, 4] float32, x1 y1 x2 y2 in pixels of the picture, inside it.
        classes: [n] int64, indices into the class names that were asked for.
        conf: [n] float32 in [0, 1], the score of the box's own class.
        scores: [n, nc] float32 in [0, 1], independent scores of all classes at that anchor (sigmoid, not softmax).
    """

    boxes: Floats
    classes: NDArray[np.int64]
    conf: Floats
    scores: Floats

    def __post_init__(self) -> None:
        n = len(self.boxes)
        if self.boxes.shape != (n, 4) or self.classes.shape != (n,) or self.conf.shape != (n,):
            raise ValueError(
                f"detections need boxes [n, 4], classes [n], conf [n]; got {self.boxes.shape}, "
                f"{self.classes.shape}, {self.conf.shape}"
            )
        if self.scores.ndim != 2 or len(self.scores) != n:
            raise ValueError(f"detections need scores [n, nc], got {self.scores.shape} for n = {n}")
        if n and not (np.isfinite(self.boxes).all() and np.isfinite(self.scores).all()):
            raise ValueError("detections must be finite")

    def __len__(self) -> int:
        return len(self.boxes)

    def keep(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> Detections:
        """The rows that `index` (positions or a mask) picks."""
        return Detections(self.boxes[index], self.classes[index], self.conf[index], self.scores[index])

    @staticmethod
    def none(classes: int) -> Detections:
        """No objects, for `classes` class names."""
        return Detections(
            np.zeros((0, 4), np.float32),
            np.zeros(0, np.int64),
            np.zeros(0, np.float32),
            np.zeros((0, classes), np.float32),
        )


def round_half_up(value: float) -> int:
    """Round to the nearest integer, halves up: the same on every platform, unlike round() on halves."""
    return math.floor(value + 0.5)
