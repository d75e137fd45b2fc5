"""A detection set as COCO JSON: labels become annotations in pixels, the teacher's confidence stays as `score`.

<out>/annotations/instances_train.json   <out>/train/*.jpg (images=copy)   <out>/export.json
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image as PILImage

from focusdd_det import detset, disk
from focusdd_det.detset import Item
from focusdd_det.disk import write_atomic
from focusdd_det.errors import ConfigError, DataError, VerifyError
from focusdd_det.interop.finished import FinishedSet
from focusdd_det.interop.folders import new_folder
from focusdd_det.labels import parse_rows

Numbering = Literal["auto", "coco", "contiguous"]
NUMBERINGS = ("auto", "coco", "contiguous")
IMAGES = ("copy", "set")
ANNOTATIONS = "annotations/instances_train.json"
# COCO's 80 classes with their official ids, by supercategory; the gaps are classes that were never annotated.
_COCO = {
    "person": {1: "person"},
    "vehicle": dict(
        enumerate(("bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"), 2)
    ),
    "outdoor": {10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench"},
    "animal": dict(
        enumerate(("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"), 16)
    ),
    "accessory": {27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase"},
    "sports": dict(
        enumerate(
            (
                "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard",
                "surfboard", "tennis racket",
            ),
            34,
        )
    ),
    "kitchen": {
        44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife", 50: "spoon", 51: "bowl",
    },
    "food": dict(
        enumerate(
            (
                "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake",
            ),
            52,
        )
    ),
    "furniture": {62: "chair", 63: "couch", 64: "potted plant", 65: "bed", 67: "dining table", 70: "toilet"},
    "electronic": dict(enumerate(("tv", "laptop", "mouse", "remote", "keyboard", "cell phone"), 72)),
    "appliance": dict(enumerate(("microwave", "oven", "toaster", "sink", "refrigerator"), 78)),
    "indoor": dict(enumerate(("book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"), 84)),
}  # fmt: skip
COCO_IDS = {name: (number, above) for above, group in _COCO.items() for number, name in group.items()}


def categories(names: Sequence[str], numbering: Numbering = "auto") -> list[dict[str, Any]]:
    """COCO's `categories` of a set, in the order of its classes.

    Args:
        numbering: `coco`: the official ids (1 to 90 with gaps), by class name; `contiguous`: 1 to n in the set's order;
            `auto`: the official ones if every class is one of COCO's.

    Raises:
        ConfigError: `coco` for classes that COCO does not have.
    """
    others = [name for name in names if name not in COCO_IDS]
    if numbering == "coco" and others:
        raise ConfigError(
            f"categories=coco: COCO has no class {', '.join(others[:10])}; use categories=contiguous, 1 to {len(names)}"
        )
    if numbering == "contiguous" or others:
        return [{"id": i, "name": name, "supercategory": "none"} for i, name in enumerate(names, 1)]
    return [{"id": COCO_IDS[name][0], "name": name, "supercategory": COCO_IDS[name][1]} for name in names]


def boxes_of(table: np.ndarray, width: int, height: int) -> np.ndarray:
    """Label rows [n, 5] (class, cx, cy, w, h in [0, 1]) -> boxes [n, 4] float64 (left, top, width, height in px)."""
    scale = np.array([width, height, width, height], np.float64)
    corner = table[:, 1:3] - table[:, 3:5] / 2
    return np.asarray(np.concatenate([corner, table[:, 3:5]], axis=1) * scale)


def record(category: int, box: np.ndarray) -> dict[str, Any]:
    """What an annotation says of its object; `box` as of `boxes_of`."""
    return {
        "category_id": category,
        "bbox": [round(float(v), 4) for v in box],
        "area": round(float(box[2] * box[3]), 4),
        "iscrowd": 0,
        "segmentation": [],
    }


def export_coco(
    source: FinishedSet,
    out: Path,
    numbering: Numbering = "auto",
    images: Literal["copy", "set"] = "copy",
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, int]:
    """Write a detection set as COCO JSON. Memory does not grow with the set.

    Args:
        images: `copy` them into `out`; with `set` they stay where they are, and `file_name` is their path in the set.

    Returns:
        Numbers of `images`, `annotations` and `categories`.

    Raises:
        ConfigError: categories that cannot be numbered so.
        DataError: a classification set.
        VerifyError: a file of the set is damaged.
        DiskError: `out` exists or cannot be written.
    """
    require_detection(source)
    kinds = categories(source.names, numbering)
    disk.refuse_overlap(out, [source.folder])
    count = {"images": 0, "annotations": 0, "categories": len(kinds)}
    with new_folder(out) as work:
        (work / "annotations").mkdir()
        if images == "copy":
            (work / "train").mkdir()

        def pictures() -> Iterator[dict[str, Any]]:
            for item in source.items():
                count["images"] += 1
                data = source.read("images", item)
                if images == "copy":
                    write_atomic(work / "train" / f"{item.id}.jpg", data)
                yield _picture(count["images"], item, data, images)
                progress(1)

        def rows() -> Iterator[dict[str, Any]]:
            for number, item in enumerate(source.items(), 1):
                for row in _rows(source, item, number, kinds):
                    count["annotations"] += 1
                    yield {"id": count["annotations"], **row}

        info = {
            "description": f"distilled set {source.manifest_sha256[:12]}; boxes and scores are a teacher's",
            "manifest_sha256": source.manifest_sha256,
            "version": "1",
        }
        parts = {
            "info": info,
            "licenses": [],
            "images": pictures(),
            "annotations": rows(),
            "categories": kinds,
        }
        with (work / ANNOTATIONS).open("w", encoding="ascii") as file:
            file.writelines(json_pieces(parts))
        about = {
            "format": "coco",
            "manifest_sha256": source.manifest_sha256,
            "file_names": "in train/ of this folder" if images == "copy" else "in the folder of the set itself",
            "annotations": ANNOTATIONS,
            **count,
        }
        write_atomic(work / "export.json", (json.dumps(about, indent=1) + "\n").encode())
    return count


def require_detection(source: FinishedSet) -> None:
    """DataError for a classification set."""
    if source.task != "detect":
        raise DataError(
            f"{source.folder} is a classification set: it has no boxes. format=coco wants a detection set; "
            "format=ddranking and format=rethinkdc take this one"
        )


def _picture(number: int, item: Item, data: bytes, images: str) -> dict[str, Any]:
    try:
        with PILImage.open(io.BytesIO(data)) as picture:
            width, height = picture.size
    except (OSError, ValueError) as error:
        raise VerifyError(f"{item.id} is not a readable picture: {error}") from error
    name = f"{item.id}.jpg" if images == "copy" else f"images/train/{item.id}.jpg"
    return {"id": number, "file_name": name, "width": width, "height": height}


def _rows(source: FinishedSet, item: Item, number: int, kinds: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    text = source.read("labels", item).decode("utf-8", "replace")
    source.read("soft", item)
    try:
        table = parse_rows(text, len(source.names))
    except ValueError as error:
        raise VerifyError(f"{detset.part_path(source.folder, 'labels', item)}: {error}") from error
    confidence = detset.read_soft(detset.part_path(source.folder, "soft", item))["conf"]
    if confidence.shape != (len(table),):
        raise VerifyError(f"{item.id}: {len(table)} label rows, but soft targets of shape {list(confidence.shape)}")
    width, height = _size(source, item) if len(table) else (1, 1)
    for row, box, score in zip(table, boxes_of(table, width, height), confidence, strict=True):
        yield {"image_id": number, **record(kinds[int(row[0])]["id"], box), "score": round(float(score), 4)}


def _size(source: FinishedSet, item: Item) -> tuple[int, int]:
    with PILImage.open(detset.part_path(source.folder, "images", item)) as picture:
        return picture.size


def json_pieces(parts: Mapping[str, Any]) -> Iterator[str]:
    """A JSON object whose lists may be iterators: written a line an element, never held."""
    opening = "{\n"
    for key, value in parts.items():
        yield f"{opening}{json.dumps(key)}:"
        if isinstance(value, dict):
            yield json.dumps(value)
        else:
            between = "[\n"
            for element in value:
                yield between + json.dumps(element, separators=(",", ":"))
                between = ",\n"
            yield "[]" if between == "[\n" else "\n]"
        opening = ",\n"
    yield "\n}\n"
