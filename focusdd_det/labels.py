"""Teacher detections -> label rows, and the rules by which boxes are dropped. Arrays only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from focusdd_det.types import Crop, Detections, Floats

SURE = 0.7  # a teacher with at least this confidence is believed over the folder that a source lies in
FILLS = 0.5  # share of a cell from which on a box stands for the cell's source
PLAUSIBLE = 0.1  # of the score of the teacher's choice: from here on it takes the source's class to be possible


def drop_slivers(found: Detections, min_side: float) -> Detections:
    """Without boxes whose shorter side is under `min_side` px, or 0: cut to a sliver, they teach nothing."""
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    return found.keep(sides.min(axis=1) >= max(min_side, 0.01)) if len(found) else found


def carry(found: Detections, crop: Crop, cell: tuple[float, float, float], min_visible: float) -> Detections:
    """Detections of a source, carried into its cell of the composite.

    Args:
        found: boxes in pixels of the source.
        crop: the square of the source that the cell shows.
        cell: left and top of the cell in the composite, and its side, in px.
        min_visible: a box with a smaller share of its area inside the crop is dropped.

    Returns:
        Boxes in pixels of the composite, clipped to the cell.
    """
    if not len(found):
        return found
    left, top, side = cell
    low = np.array([crop.x, crop.y, crop.x, crop.y], np.float32)
    inside = np.clip(found.boxes, low, low + crop.side)
    visible = _area(inside) / np.maximum(_area(found.boxes), 1e-6)
    scale = side / crop.side
    boxes = (inside - low) * scale + np.array([left, top, left, top], np.float32)
    moved = Detections(boxes.astype(np.float32), found.classes, found.conf, found.scores)
    return moved.keep((visible >= min_visible) & (_area(boxes) > 0))


def nms(boxes: NDArray[np.float64], classes: NDArray[np.int64], iou: float) -> NDArray[np.int64]:
    """Greedy non-maximum suppression within each class.

    Args:
        boxes: [n, 4] x1 y1 x2 y2, best first.
        classes: [n].
        iou: a box is dropped if it overlaps a kept one of its class by more than this.

    Returns:
        Positions of the kept boxes, ascending.
    """
    area = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    alive = np.ones(len(boxes), bool)
    for i in range(len(boxes)):
        if not alive[i]:
            continue
        rest = i + 1 + np.flatnonzero(alive[i + 1 :] & (classes[i + 1 :] == classes[i]))
        low = np.maximum(boxes[i, :2], boxes[rest, :2])
        high = np.minimum(boxes[i, 2:], boxes[rest, 2:])
        overlap = np.prod(np.maximum(high - low, 0), axis=1)
        union = np.maximum(area[i] + area[rest] - overlap, 1e-12)
        alive[rest[overlap / union > iou]] = False
    return np.flatnonzero(alive)


def join(parts: list[Detections], classes: int) -> Detections:
    """Detections of all cells as those of one composite, in the order given."""
    parts = [part for part in parts if len(part)]
    if not parts:
        return Detections.none(classes)
    return Detections(
        np.concatenate([p.boxes for p in parts]),
        np.concatenate([p.classes for p in parts]),
        np.concatenate([p.conf for p in parts]),
        np.concatenate([p.scores for p in parts]),
    )


def drop_repeats(found: Detections, size: int) -> Detections:
    """Without rows that would be written twice: boxes of one class that became equal when they were clipped."""
    seen: set[tuple[int, ...]] = set()
    keep = np.zeros(len(found), np.bool_)
    for i, (box, index) in enumerate(zip(found.boxes, found.classes, strict=True)):
        row = (int(index), *_steps(box, size))
        keep[i] = row not in seen
        seen.add(row)
    return found.keep(keep)


def rows(found: Detections, size: int) -> str:
    """YOLO label rows: `class cx cy w h`, relative to a picture of size x size px, six decimals, a line a box.

    The corners are rounded first, so that a row never describes a box that reaches outside.
    """
    lines = []
    for box, index in zip(found.boxes, found.classes, strict=True):
        x1, y1, x2, y2 = _steps(box, size)
        centre_and_size = ((x1 + x2) // 2, (y1 + y2) // 2, x2 - x1, y2 - y1)
        lines.append(f"{int(index)} " + " ".join(f"{v / 1e6:.6f}" for v in centre_and_size) + "\n")
    return "".join(lines)


def _steps(box: Floats, size: int) -> tuple[int, ...]:
    """Corners in millionths of the side, in whole steps of two, so that the centre has six decimals as well."""
    return tuple(min(max(round(float(v) / size * 5e5), 0), 500_000) * 2 for v in box)


def parse_rows(text: str, classes: int) -> np.ndarray:
    """Label rows -> [n, 5] float64 (class, cx, cy, w, h).

    Raises:
        ValueError: naming the line that is not five finite numbers in range.
    """
    table = []
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        try:
            values = [float(field) for field in fields]
        except ValueError:
            raise ValueError(f"line {number}: `{line[:60]}` is not numbers") from None
        if len(values) != 5 or not all(np.isfinite(values)):
            raise ValueError(f"line {number}: expected class cx cy w h, got {len(values)} columns")
        if values[0] != int(values[0]) or not 0 <= values[0] < classes:
            raise ValueError(f"line {number}: class {fields[0]} is not one of 0..{classes - 1}")
        if not all(0 <= v <= 1 for v in values[1:]) or min(values[3:]) <= 0:
            raise ValueError(f"line {number}: expected a box inside the picture, larger than 0: {line[:60]}")
        table.append(values)
    return np.array(table, np.float64).reshape(len(table), 5)


def own_class_first(found: Detections, index: int, conf: float, own_conf: float) -> Detections:
    """Without boxes under their threshold: `own_conf` for the class of the sources, `conf` for the others."""
    return found.keep(found.conf >= np.where(found.classes == index, own_conf, conf))


def settle_contradictions(
    found: Detections, index: int, cells: Sequence[tuple[float, float, float]], correct: bool
) -> Detections:
    """Boxes that contradict the known class of a cell's source, dropped or corrected.

    A contradiction is a box of another class that fills at least half of a cell in which the teacher finds nothing of
    the source's class, and of which it is not sure (conf under 0.7): a painted rooster called "person". With `correct`
    the box takes the class of the source where the teacher gives that class at least a tenth of the score of its own
    choice; it is dropped otherwise. A sure box of another class stays: a person with a ball.

    Args:
        found: boxes in px of the composite.
        index: the class of the sources.
        cells: left, top and side of each cell, px.
    """
    if not len(found):
        return found
    classes, conf, keep = found.classes.copy(), found.conf.copy(), np.ones(len(found), np.bool_)
    for cell in cells:
        if confirms(found, index, cell):
            continue
        for i in np.flatnonzero(_centred_in(found.boxes, cell) & (found.conf < SURE)):
            if _area(_clipped(found.boxes[i : i + 1], cell))[0] < FILLS * cell[2] ** 2:
                continue
            own = found.scores[i, index]
            if correct and own >= PLAUSIBLE * found.conf[i]:
                classes[i], conf[i] = index, own
            else:
                keep[i] = False
    return Detections(found.boxes, classes, conf, found.scores).keep(keep)


def _centred_in(boxes: Floats, cell: tuple[float, float, float]) -> NDArray[np.bool_]:
    left, top, side = cell
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 - np.array([left, top], np.float32)
    return np.asarray(((centres >= 0) & (centres < side)).all(axis=1))


def _clipped(boxes: Floats, cell: tuple[float, float, float]) -> Floats:
    left, top, side = cell
    low = np.array([left, top, left, top], np.float32)
    return np.asarray(np.clip(boxes, low, low + side), np.float32)


def confirms(found: Detections, class_index: int, cell: tuple[float, float, float]) -> bool:
    """Whether a box of the class has its centre in the cell (left, top, side in px): the teacher confirms it."""
    return bool((_centred_in(found.boxes, cell) & (found.classes == class_index)).any())


def _area(boxes: Floats) -> Floats:
    return np.asarray((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), np.float32)
