"""Real detection data that a set's boxes stand beside: COCO, measured once and shipped, or the user's annotations."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from focusdd_det.errors import DataError
from focusdd_det.stats.sizes import EDGES, Doubles, coco_kinds, size_shares


@dataclass(frozen=True)
class Reference:
    """The boxes of annotated photographs, crowds left out.

    Attributes:
        name: of the column and the curve.
        origin: where the numbers come from.
        pictures, boxes: how many.
        shares: [24] of the boxes by sqrt(area) / long side, the side that a letterbox makes the whole; bins of EDGES.
        sizes: 5th, 25th, 50th, 75th and 95th percentile of the same.
        kinds: shares of small, medium and large by COCO's borders, of the box's area in px.
        boxes_per_image: [k] pictures with 0, 1, ... boxes.
    """

    name: str
    origin: str
    pictures: int
    boxes: int
    shares: Doubles
    sizes: tuple[float, ...]
    kinds: tuple[float, float, float]
    boxes_per_image: np.ndarray

    @property
    def mean_boxes(self) -> float:
        """Boxes a picture."""
        return self.boxes / self.pictures


@dataclass(frozen=True)
class Boxes:
    """The n boxes of a COCO annotations file, crowds and boxes without area left out.

    Attributes:
        pictures: ids of all pictures.
        picture: [n] id of each box's picture.
        areas: [n] w * h, px^2.
        sizes: [n] sqrt(w * h) / long side of the picture.
    """

    pictures: tuple[int, ...]
    picture: tuple[int, ...]
    areas: Doubles
    sizes: Doubles


def read_boxes(path: str | Path) -> Boxes:
    """The boxes of a COCO annotations file.

    Raises:
        DataError: not such a file, or one without boxes.
    """
    from focusdd_det.coco_eval import load_annotations

    content = load_annotations(path).dataset
    sides = {picture["id"]: _side(picture, path) for picture in content["images"]}
    kept = [row for row in content["annotations"] if not row["iscrowd"] and min(row["bbox"][2:]) > 0]
    if not kept:
        raise DataError(f"{path} holds no box; expected a COCO file such as instances_val2017.json")
    areas = np.array([row["bbox"][2] * row["bbox"][3] for row in kept], np.float64)
    sizes = np.sqrt(areas) / np.array([sides[row["image_id"]] for row in kept])
    return Boxes(tuple(sides), tuple(row["image_id"] for row in kept), areas, sizes)


def _side(picture: dict[str, Any], path: str | Path) -> float:
    sides = [s for s in (picture.get("width"), picture.get("height")) if isinstance(s, (int, float)) and s > 0]
    if len(sides) < 2:
        raise DataError(
            f"{path}: image {picture['id']} has no width and height in px, which box sizes are told in; write them in"
        )
    return float(max(sides))


def measure(path: str | Path) -> Reference:
    """The reference of a COCO annotations file.

    Raises:
        DataError: as `read_boxes`.
    """
    found = read_boxes(path)
    per_picture = Counter(found.picture)
    return Reference(
        name=Path(path).stem,
        origin=f"{Path(path).name}: {len(found.pictures)} pictures, {len(found.sizes)} boxes",
        pictures=len(found.pictures),
        boxes=len(found.sizes),
        shares=size_shares(found.sizes),
        sizes=percentiles(found.sizes),
        kinds=coco_kinds(found.areas),
        boxes_per_image=np.bincount([per_picture[number] for number in found.pictures]),
    )


def percentiles(values: NDArray[Any]) -> tuple[float, ...]:
    """The 5th, 25th, 50th, 75th and 95th."""
    return tuple(round(float(v), 4) for v in np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]))


# What `measure` says of 177 of the 5,000 pictures of val2017, from a public sample: good for a look, not for a paper.
_COUNTS = (25, 17, 32, 41, 35, 60, 76, 75, 71, 71, 64, 75, 78, 88, 78, 59, 73, 69, 48, 46, 38, 24, 23, 8)
_PICTURES_WITH = (
    2, 11, 40, 16, 17, 13, 6, 14, 2, 5, 5, 3, 6, 5, 5, 3, 7, 5, 1, 2, 1, 1, 1, 0, 2, 1, 1, 0, 1, 1,
)  # fmt: skip
SHIPPED = Reference(
    name="COCO (177 pictures)",
    origin="177 pictures of COCO val2017 with 1,274 boxes, a small sample; give reference=instances_val2017.json",
    pictures=177,
    boxes=1274,
    shares=np.array(_COUNTS, np.float64) / 1274,
    sizes=(0.0171, 0.0416, 0.0989, 0.221, 0.535),
    kinds=(0.3155, 0.3438, 0.3407),
    boxes_per_image=np.array(_PICTURES_WITH),
)
assert len(_COUNTS) == len(EDGES) - 1
