"""Drawn pictures on disk: class folders of sources, and a validation set in COCO and in Ultralytics form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from focusdd_det.compose import encode_jpeg
from focusdd_det.demo.objects import CLASSES
from focusdd_det.demo.scenes import POOR, Picture, plan_many, plan_single, render, seeded

# Gaps on purpose, as in COCO's own ids: a program that takes positions for ids fails on this set.
CATEGORY_IDS: tuple[int, ...] = (1, 3, 4, 8, 13, 17, 44, 90)
QUALITY = 92  # of the JPEGs
_POOR_SHARE = 0.35  # of the sources; photographs from the web are no better


def yolo_labels(picture: Picture) -> str:
    """Label lines `class centre_x centre_y width height`, relative to the picture's size."""
    height, width = picture.image.shape[:2]
    lines = []
    for (x1, y1, x2, y2), cls in zip(picture.boxes.tolist(), picture.classes.tolist(), strict=True):
        row = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(f"{cls} " + " ".join(f"{value:.6f}" for value in row) + "\n")
    return "".join(lines)


def write_sources(out: Path, per_class: int, seed: int = 0) -> int:
    """Draw single-object pictures into `<out>/<class>/NNN.jpg`; about a third of them are poor on purpose.

    Args:
        out: folder to write to; files in it are overwritten.
        per_class: pictures of each class.
        seed: the same seed draws the same bytes.

    Returns:
        The number of pictures.
    """
    for kind in CLASSES:
        folder = out / kind
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            key = f"{seed}/source/{kind}/{index}"
            rng = seeded(key, "poor")
            poor = POOR[int(rng.integers(len(POOR)))] if rng.random() < _POOR_SHARE else None
            (folder / f"{index:03d}.jpg").write_bytes(encode_jpeg(render(plan_single(key, kind, poor)).image, QUALITY))
    return per_class * len(CLASSES)


def write_val(out: Path, count: int, seed: int | str = 0) -> Path:
    """Draw multi-object pictures with their annotations.

    Writes `images/val/*.jpg`, `labels/val/*.txt` (class, centre x, centre y, width, height; relative),
    `annotations/instances_val.json` (COCO) and `data.yaml` (Ultralytics, no absolute path).

    Args:
        out: folder to write to; files in it are overwritten.
        count: number of pictures.
        seed: the same seed draws the same bytes.

    Returns:
        The path of the COCO annotations.
    """
    for name in ("images/val", "labels/val", "annotations"):
        (out / name).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        picture = render(plan_many(f"{seed}/val/{index}"))
        height, width = picture.image.shape[:2]
        stem = f"{index + 1:06d}"
        (out / f"images/val/{stem}.jpg").write_bytes(encode_jpeg(picture.image, QUALITY))
        images.append({"id": index + 1, "file_name": f"{stem}.jpg", "width": width, "height": height})
        (out / f"labels/val/{stem}.txt").write_text(yolo_labels(picture), encoding="utf-8")
        for (x1, y1, x2, y2), cls, area in zip(
            picture.boxes.tolist(), picture.classes.tolist(), picture.areas.tolist(), strict=True
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": CATEGORY_IDS[cls],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": round(area, 1),
                    "segmentation": [],
                    "iscrowd": 0,
                }
            )
    categories = [
        {"id": number, "name": name, "supercategory": "drawn"}
        for number, name in zip(CATEGORY_IDS, CLASSES, strict=True)
    ]
    info = {"description": "drawn scenes of focusdd_det.demo", "version": "1"}
    coco = {"info": info, "licenses": [], "images": images}
    coco.update(annotations=annotations, categories=categories)
    target = out / "annotations" / "instances_val.json"
    target.write_text(json.dumps(coco), encoding="utf-8")
    data = {"train": "images/val", "val": "images/val", "names": dict(enumerate(CLASSES))}
    (out / "data.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return target
