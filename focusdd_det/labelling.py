"""What makes a composite's label: boxes that a teacher finds, or the class it was made for. `Labeller` is what the
composing asks of either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isqrt
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from focusdd_det.compose import letterbox
from focusdd_det.config import BuildConfig
from focusdd_det.detset import Cell, Item, part_path, soft_bytes
from focusdd_det.labels import (
    carry,
    confirms,
    drop_repeats,
    drop_slivers,
    join,
    own_class_first,
    parse_rows,
    rows,
    settle_contradictions,
)
from focusdd_det.layouts import squares
from focusdd_det.scoring.decode import decode
from focusdd_det.teacher import Detector
from focusdd_det.types import Crop, Detections, Image


@dataclass(frozen=True)
class Look:
    """A picture that the teacher is shown: a composite, or one of its sources in a letterbox.

    Attributes:
        pixels: [S, S, 3].
        scale, left, top: px of the look a px of the source, and the letterbox's borders.
    """

    pixels: Image
    scale: float = 1.0
    left: int = 0
    top: int = 0


@dataclass(frozen=True)
class Label:
    """What is written beside a composite's picture.

    Attributes:
        parts: part of the set -> bytes, the picture left out.
        cells: the composite's cells, with what the teacher confirms.
        boxes: rows in the label file.
    """

    parts: dict[str, bytes]
    cells: tuple[Cell, ...]
    boxes: int


class Labeller(Protocol):
    """One way to label composites."""

    @property
    def in_flight(self) -> int:
        """Composites that are worth having in work at once."""

    def look_at_source(self, picture: Image) -> list[Look]:
        """What the teacher has to be shown of a source, at most one look."""

    def look_at_composite(self, jpeg: bytes) -> list[Look]:
        """What the teacher has to be shown of a composite, at most one look."""

    def ask(self, looks: Sequence[Image]) -> list[Detections]:
        """The answers, one a look."""

    def label(
        self, looks: Sequence[Look], cells: tuple[Cell, ...], index: int, answers: list[Detections]
    ) -> Label | None:
        """The label of a composite of class `index`; None: nothing to learn from it, take the next candidates."""

    def sound(self, folder: Path, item: Item) -> bool:
        """Whether the label files of an item are what its line says, hashes aside."""


@dataclass(frozen=True)
class ClassLabels:
    """The class that a composite was made for; nobody is asked."""

    in_flight: int

    def look_at_source(self, picture: Image) -> list[Look]:
        return []

    def look_at_composite(self, jpeg: bytes) -> list[Look]:
        return []

    def ask(self, looks: Sequence[Image]) -> list[Detections]:
        return []

    def label(
        self, looks: Sequence[Look], cells: tuple[Cell, ...], index: int, answers: list[Detections]
    ) -> Label | None:
        return Label({}, cells, 0)

    def sound(self, folder: Path, item: Item) -> bool:
        return True


@dataclass(frozen=True)
class TeacherBoxes:
    """Boxes of a teacher, found in the composite or in its sources and carried into their cells."""

    config: BuildConfig
    detector: Detector
    classes: int
    in_flight: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "in_flight", self.config.teacher_batch)

    def look_at_source(self, picture: Image) -> list[Look]:
        return [Look(*letterbox(picture, self._side))] if self.config.label_on == "source" else []

    def look_at_composite(self, jpeg: bytes) -> list[Look]:
        # The teacher sees what the student will see: the file.
        return [Look(decode(jpeg)[0])] if self.config.label_on == "composite" else []

    def ask(self, looks: Sequence[Image]) -> list[Detections]:
        config = self.config
        return self.detector.detect(
            list(looks), min(config.conf, self._own_conf), config.iou, config.max_det, config.teacher_batch, self._side
        )

    def label(
        self, looks: Sequence[Look], cells: tuple[Cell, ...], index: int, answers: list[Detections]
    ) -> Label | None:
        config = self.config
        where = squares(config.image_size, isqrt(len(cells)))
        whole = config.label_on == "composite"
        found = answers[0] if whole else self._carried(looks, cells, answers, where)
        found = own_class_first(drop_slivers(found, config.min_side), index, config.conf, self._own_conf)
        if config.contradiction != "keep":
            found = settle_contradictions(found, index, where, config.contradiction == "correct")
        found = drop_repeats(found, config.image_size)
        if not len(found) and config.empty == "replace":
            return None
        seen = tuple(
            replace(cell, confirmed=confirms(found, index, square)) if cell.kind == "key" else cell
            for cell, square in zip(cells, where, strict=True)
        )
        return Label({"labels": rows(found, config.image_size).encode(), "soft": soft_bytes(found)}, seen, len(found))

    def sound(self, folder: Path, item: Item) -> bool:
        text = part_path(folder, "labels", item).read_text(encoding="utf-8", errors="replace")
        try:
            return len(parse_rows(text, self.classes)) == item.boxes
        except ValueError:
            return False

    @property
    def _own_conf(self) -> float:
        return self.config.conf if self.config.own_conf is None else self.config.own_conf

    @property
    def _side(self) -> int:
        """Side of the teacher's input: that of the composite, up to the next multiple of its stride."""
        return -(-self.config.image_size // 32) * 32

    def _carried(
        self,
        looks: Sequence[Look],
        cells: tuple[Cell, ...],
        answers: list[Detections],
        where: Sequence[tuple[float, float, float]],
    ) -> Detections:
        """label_on=source: boxes from each letterboxed source, through its crop, into its cell."""
        parts: list[Any] = []
        for look, cell, detections, square in zip(looks, cells, answers, where, strict=True):
            limits = np.array([cell.width, cell.height, cell.width, cell.height], np.float32)
            boxes = (detections.boxes - np.array([look.left, look.top] * 2, np.float32)) / look.scale
            on_source = replace(detections, boxes=np.clip(boxes, 0, limits).astype(np.float32))
            if cell.crop is not None:
                parts.append(carry(on_source, Crop(*cell.crop), square, self.config.min_visible))
                continue
            inner = square[2] / max(cell.width, cell.height)  # the letterboxed cell: the same picture, another scale
            border_x = (square[2] - round(cell.width * inner)) // 2
            border_y = (square[2] - round(cell.height * inner)) // 2
            offset = np.array([square[0] + border_x, square[1] + border_y] * 2, np.float32)
            parts.append(replace(on_source, boxes=(on_source.boxes * inner + offset).astype(np.float32)))
        return join(parts, self.classes)
