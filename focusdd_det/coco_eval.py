"""Official COCO mAP: any Ultralytics detector on any COCO annotations file, scored by pycocotools.

Pictures go through Ultralytics' own validation pipeline (rectangular batches, confidence 0.001, NMS IoU 0.7, 300
boxes); classes are matched by category name and pictures by file name, never by position or number.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from ultralytics.data.build import build_dataloader
from ultralytics.data.utils import IMG_FORMATS, exif_size
from ultralytics.utils import DEFAULT_CFG, LOGGER, TQDM, nms, ops

from focusdd_det.checkpoints import safe_checkpoint
from focusdd_det.devices import in_parts
from focusdd_det.disk import file_sha256, write_atomic
from focusdd_det.errors import ConfigError, DataError, WeightsError
from focusdd_det.teacher import STRIDE
from focusdd_det.training.clean_data import CleanDataset, refuse_cut_jpegs

EVALUATOR = "pycocotools"
# name -> (precision or recall, IoU or None for 0.50:0.95, area, detections per picture): COCO's twelve numbers.
NUMBERS: dict[str, tuple[str, float | None, str, int]] = {
    "AP": ("precision", None, "all", 100),
    "AP50": ("precision", 0.5, "all", 100),
    "AP75": ("precision", 0.75, "all", 100),
    "AP_small": ("precision", None, "small", 100),
    "AP_medium": ("precision", None, "medium", 100),
    "AP_large": ("precision", None, "large", 100),
    "AR_1": ("recall", None, "all", 1),
    "AR_10": ("recall", None, "all", 10),
    "AR_100": ("recall", None, "all", 100),
    "AR_small": ("recall", None, "small", 100),
    "AR_medium": ("recall", None, "medium", 100),
    "AR_large": ("recall", None, "large", 100),
}


@dataclass(frozen=True)
class CocoResult:
    """What an evaluation found and how.

    Attributes:
        weights, weights_sha256, annotations, annotations_sha256: what was evaluated on what.
        evaluator: name and version.
        settings: conf, iou, max_det, imgsz, batch, end2end.
        images: number evaluated; images_annotated: number in the annotations file.
        detections: number of boxes scored.
        all: the twelve numbers over all categories, in [0, 1]; None where there is no ground truth.
        covered: the same over `covered_classes`; None if those were not given.
        per_class: AP (0.50:0.95) by category name.
    """

    weights: str
    weights_sha256: str
    annotations: str
    annotations_sha256: str
    evaluator: str
    settings: dict[str, Any]
    images: int
    images_annotated: int
    detections: int
    all: dict[str, float | None]
    covered: dict[str, float | None] | None
    covered_classes: tuple[str, ...] = ()
    per_class: dict[str, float | None] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def table(self, per_class: bool = True) -> str:
        """The numbers as text, in percent."""
        share = f"{self.images} of {self.images_annotated} annotated images"
        if self.images < self.images_annotated:
            share += " (a SUBSET)"
        lines = [
            f"COCO mAP by {self.evaluator}, {share}, {self.detections} detections",
            f"weights      {self.weights}",
            f"annotations  {self.annotations}",
            f"{'':12}{'all':>10}" + (f"{'covered':>10}  ({len(self.covered_classes)} classes)" if self.covered else ""),
        ]
        for name in NUMBERS:
            row = f"{name:12}{_percent(self.all[name]):>10}"
            lines.append(row + (f"{_percent(self.covered[name]):>10}" if self.covered else ""))
        if per_class:
            lines.append("AP per class")
            lines += [f"  {name:24}{_percent(value):>8}" for name, value in self.per_class.items()]
        return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


# ---- what is evaluated on what ----


def read_annotations(path: str | Path) -> dict[str, Any]:
    """The content of a COCO annotations file, as it is.

    Raises:
        DataError: missing, not JSON, without images, annotations or categories, or with rows that contradict each
            other; pycocotools would score such a file without a word.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(
            f"annotations not found: {file}; the official COCO mAP needs them (for COCO: instances_val2017.json from "
            "http://images.cocodataset.org). No other metric is quoted in their place"
        )
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{file} is not a JSON file ({error}); expected COCO annotations; get it again") from error
    missing = [k for k in ("images", "annotations", "categories") if not isinstance(content, dict) or k not in content]
    if missing:
        raise DataError(f"{file} has no {', '.join(missing)}; expected COCO annotations (instances_*.json)")
    try:
        problem = _contradiction(content)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{file} is not in COCO's format ({type(error).__name__}: {error}); get it again") from error
    if problem:
        raise DataError(f"{file} cannot be trusted: {problem}; get it again or mend it")
    return content


def load_annotations(path: str | Path) -> COCO:
    """A COCO annotations file, for pycocotools.

    Raises:
        DataError: as `read_annotations`.
    """
    content = read_annotations(path)
    for number, row in enumerate(content["annotations"], 1):
        # pycocotools takes an object numbered 0 for not found, and insists on `area` and `iscrowd`
        row.update(id=number, area=row.get("area", row["bbox"][2] * row["bbox"][3]), iscrowd=row.get("iscrowd", 0))
    truth = COCO()
    truth.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def _contradiction(content: dict[str, Any]) -> str:
    """What is wrong with the rows of an annotations file; empty if nothing is."""
    for part, key in (("images", "id"), ("images", "file_name"), ("categories", "id"), ("categories", "name")):
        twice = _twice(row[key] for row in content[part])
        if twice is not None:
            return f"two {part} have the {key} {twice!r}"
    if not all(type(row["id"]) is int for part in ("images", "categories") for row in content[part]):
        return "ids must be whole numbers"
    twice = _twice(row["id"] for row in content["annotations"] if "id" in row)
    if twice is not None:
        return f"two annotations have the id {twice!r}"
    images, categories = ({row["id"] for row in content[part]} for part in ("images", "categories"))
    for row in content["annotations"]:
        box = row["bbox"]
        if row["image_id"] not in images:
            return f"an annotation belongs to image {row['image_id']!r}, which is not listed"
        if row["category_id"] not in categories:
            return f"an annotation has the category {row['category_id']!r}, which is not listed"
        numbers = [*box, row.get("area", 0)]
        if len(box) != 4 or not all(math.isfinite(v) for v in numbers) or min(*box[2:], numbers[4]) < 0:
            return f"the annotation {row.get('id')!r} of image {row['image_id']!r} has the box {box}"
    return ""


def _twice(values: Iterable[Any]) -> Any:
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def usual_annotations(data: dict[str, Any]) -> Path | None:
    """Where a YOLO data set in COCO's layout keeps them: annotations/instances_<split>.json, in the nearest folder
    around the pictures (or the list of them) up to the data set's own."""
    val = data.get("val")
    if not isinstance(val, str):
        return None
    top = Path(data["path"]).resolve()
    for folder in Path(val).resolve().parents:
        file = folder / "annotations" / f"instances_{Path(val).stem}.json"
        if file.is_file():
            return file
        if folder == top:
            break
    return None


def class_map(names: Sequence[str], truth: COCO) -> dict[int, int]:
    """Model class number -> category id, by name. Classes of the model that have no category are left out.

    Raises:
        DataError: a category that the model has no class for, with both lists.
    """
    categories = {str(c["name"]): int(c["id"]) for c in truth.dataset["categories"]}
    missing = [name for name in categories if name not in names]
    if missing:
        raise DataError(
            f"the model has no class for {len(missing)} of the {len(categories)} categories: {', '.join(missing)}.\n"
            f"  model: {', '.join(names)}\n  annotations: {', '.join(categories)}\n"
            "Classes are matched by name; use annotations with the model's names"
        )
    return {i: categories[name] for i, name in enumerate(names) if name in categories}


def list_images(where: str | Path | Sequence[str | Path]) -> list[Path]:
    """Picture files in a folder (with its subfolders), or listed in a text file, or given.

    Raises:
        DataError: the place does not exist or holds no picture.
    """
    if not isinstance(where, (str, Path)):
        return [file for part in where for file in list_images(part)]
    place = Path(where)
    if place.is_dir():
        found = sorted(p for p in place.rglob("*") if p.suffix[1:].lower() in IMG_FORMATS)
    elif place.suffix == ".txt" and place.is_file():
        lines = place.read_text(encoding="utf-8-sig").split("\n")
        found = [place.parent / line.strip() for line in lines if line.strip()]
    elif place.is_file():
        found = [place]
    else:
        raise DataError(f"images not found: {place}; expected a folder, or a text file with one path a line")
    if not found:
        raise DataError(f"no pictures in {place} (looked for {', '.join(sorted(IMG_FORMATS))})")
    return found


def match_images(truth: COCO, files: Sequence[Path], subset: bool) -> dict[Path, int]:
    """Picture file -> image id, by file name (`file_name` may hold folders; then the end of the path must agree).

    Args:
        subset: evaluate only those that are there, instead of refusing.

    Raises:
        DataError: annotated pictures without a file (unless `subset`), or none at all, or an ambiguous name.
    """
    by_name: dict[str, list[Path]] = {}
    for file in files:
        by_name.setdefault(file.name, []).append(file)
    found: dict[Path, int] = {}
    missing = []
    for image in truth.dataset["images"]:
        wanted = Path(str(image["file_name"]))
        candidates = by_name.get(wanted.name, [])
        if len(candidates) > 1:
            candidates = [c for c in candidates if c.parts[-len(wanted.parts) :] == wanted.parts]
        if len(candidates) > 1:
            raise DataError(f"{wanted} is ambiguous: {', '.join(map(str, candidates[:3]))}; give one images folder")
        if candidates and candidates[0] in found:
            raise DataError(
                f"{wanted} and another annotated image both lead to {candidates[0]}; give one images folder"
            )
        if candidates and candidates[0].is_file():
            found[candidates[0]] = int(image["id"])
        else:
            missing.append(str(wanted))
    if not found or (missing and not subset):
        raise DataError(
            f"{len(missing)} of {len(truth.dataset['images'])} annotated images have no file, first {missing[0]} "
            f"(looked among {len(files)} files); fix images=, or evaluate on the {len(found)} that are there "
            "with subset=True (the result says so)"
            if missing
            else "the annotations list no image"
        )
    return found


# ---- boxes ----


class _Pictures(CleanDataset):
    """Validation pictures without labels: no label file can drop a picture from the evaluation."""

    def get_img_files(self, img_path: Any) -> list[str]:
        return [str(p) for p in img_path]

    def get_labels(self) -> list[dict[str, Any]]:
        refuse_cut_jpegs(self.im_files, rewritten=False)
        return [
            {
                "im_file": name,
                "shape": height_width(name),
                "cls": np.zeros((0, 1), np.float32),
                "bboxes": np.zeros((0, 4), np.float32),
                "segments": [],
                "keypoints": None,
                "normalized": True,
                "bbox_format": "xywh",
            }
            for name in self.im_files
        ]


def height_width(name: str) -> tuple[int, int]:
    """Of a picture file as it is shown, turned as its EXIF says, px.

    Raises:
        DataError: it is no picture.
    """
    try:
        with PILImage.open(name) as picture:
            width, height = exif_size(picture)
    except (OSError, ValueError, ImportError) as error:  # Ultralytics answers an unknown format with an import
        raise DataError(f"{name} is not a readable picture ({error}); replace it") from error
    return height, width


@torch.no_grad()
def detect(
    weights: str | Path,
    images: dict[Path, int],
    categories: dict[int, int],
    *,
    imgsz: int = 640,
    batch: int = 16,
    device: str = "cpu",
    conf: float = 0.001,
    iou: float = 0.7,
    max_det: int = 300,
    end2end: bool = False,
) -> list[dict[str, Any]]:
    """Boxes in COCO's result format, as `yolo val` would give them.

    Args:
        images: file -> image id.
        categories: model class -> category id; boxes of other classes are left out.
        end2end: use the one-to-one head without NMS, where the model has one (`yolo val nms=False`).

    Returns:
        [{"image_id", "category_id", "bbox": [x, y, w, h] px, "score"}], three and five decimals as Ultralytics writes.
    """
    model = safe_checkpoint(weights)
    if hasattr(model, "end2end"):
        model.end2end = end2end
    one2one = bool(getattr(model, "end2end", False))
    model = model.fuse(verbose=False).to(device).eval().requires_grad_(False)
    if one2one:
        model.set_head_attr(max_det=max_det)
    stride = max(int(model.stride.max()), STRIDE)
    dataset = _Pictures(
        img_path=list(images),
        imgsz=imgsz,
        batch_size=batch,
        augment=False,
        hyp=DEFAULT_CFG,
        rect=True,
        stride=stride,
        pad=0.5,
        data={"names": model.names, "channels": 3},
        task="detect",
    )
    workers = 0 if device == "cpu" else 4
    loader = build_dataloader(dataset, batch, workers, shuffle=False, rank=-1, pin_memory=device != "cpu")
    found: list[dict[str, Any]] = []
    for part in TQDM(loader, desc=f"{Path(weights).name} on {len(images)} images", total=len(loader)):
        x = part["img"].to(device).float() / 255
        raw = torch.cat([model(some)[0] for some in in_parts(x)])
        if not bool(torch.isfinite(raw).all()):  # NMS would drop such boxes without a word
            raise WeightsError(f"{weights} gives values that are not finite (NaN or infinity): its weights are damaged")
        predictions = nms.non_max_suppression(
            raw, conf, iou, multi_label=True, max_det=max_det, end2end=one2one, max_time_img=60.0
        )
        for k, rows in enumerate(predictions):
            image_id = images[Path(part["im_file"][k])]
            boxes = ops.scale_boxes(x.shape[2:], rows[:, :4], part["ori_shape"][k], ratio_pad=part["ratio_pad"][k])
            sides = boxes[:, 2:] - boxes[:, :2]
            table = torch.cat((boxes[:, :2], sides, rows[:, 4:6]), 1).tolist()
            for left, top, width, height, score, number in table:
                if int(number) in categories:
                    found.append(
                        {
                            "image_id": image_id,
                            "category_id": categories[int(number)],
                            "bbox": [round(v, 3) for v in (left, top, width, height)],
                            "score": round(score, 5),
                        }
                    )
    return found


# ---- scores ----


def score(truth: COCO, detections: list[dict[str, Any]], image_ids: Sequence[int]) -> COCOeval:
    """COCOeval after evaluate() and accumulate(), on these pictures only; no detections give zeros.

    Raises:
        DataError: values that are not finite, or detections on other pictures.
    """
    others = {row["image_id"] for row in detections} - set(truth.getImgIds())
    if others:
        raise DataError(f"detections on images that are not annotated: {sorted(others, key=str)[:5]}")
    if any(not math.isfinite(v) for row in detections for v in (*row["bbox"], row["score"])):
        raise DataError("the model gives boxes or scores that are not finite (NaN or infinity); nothing to evaluate")
    with contextlib.redirect_stdout(io.StringIO()):
        if detections:
            found = truth.loadRes(detections)
        else:  # loadRes cannot take an empty list
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        result = COCOeval(truth, found, "bbox")
        result.params.imgIds = sorted(image_ids)
        result.evaluate()
        result.accumulate()
    return result


def twelve(result: COCOeval, categories: Sequence[int] | None = None) -> dict[str, float | None]:
    """COCO's twelve numbers over some categories (all by default): the means that COCOeval.summarize() prints.

    Returns:
        name -> value in [0, 1], or None where there is no ground truth to score.
    """
    ids = list(result.params.catIds)
    chosen = [i for i, c in enumerate(ids) if categories is None or c in set(categories)]
    return {name: _mean(result, chosen, *spec) for name, spec in NUMBERS.items()}


def per_class(result: COCOeval, truth: COCO) -> dict[str, float | None]:
    """AP at 0.50:0.95 by category name; None for a category without ground truth."""
    names = {int(c["id"]): str(c["name"]) for c in truth.dataset["categories"]}
    return {names[c]: _mean(result, [i], *NUMBERS["AP"]) for i, c in enumerate(result.params.catIds)}


def _mean(
    result: COCOeval, chosen: Sequence[int], kind: str, threshold: float | None, area: str, limit: int
) -> float | None:
    area_index = result.params.areaRngLbl.index(area)
    limit_index = result.params.maxDets.index(limit)
    # precision is [T, R, K, A, M] and recall [T, K, A, M], with -1 where undefined
    values: NDArray[np.float64] = result.eval[kind]
    values = values[..., area_index, limit_index][..., list(chosen)]
    if threshold is not None:
        values = values[np.isclose(result.params.iouThrs, threshold)]
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else None


def evaluate(
    weights: str | Path,
    annotations: str | Path,
    images: str | Path | Sequence[str | Path],
    *,
    imgsz: int = 640,
    batch: int = 16,
    device: str = "cpu",
    conf: float = 0.001,
    iou: float = 0.7,
    max_det: int = 300,
    end2end: bool = False,
    subset: bool = False,
    covered: Sequence[str] | None = None,
) -> CocoResult:
    """Official COCO mAP of a checkpoint.

    Args:
        weights: Ultralytics checkpoint, loaded safely.
        annotations: COCO instances JSON.
        images: folder, list file or files.
        subset: allow annotated pictures without a file.
        covered: class names to average over in a second column.

    Raises:
        ConfigError: options out of range, or a covered class that is no category.
        DataError: annotations or pictures missing, categories that the model lacks.
        WeightsError: the checkpoint.
    """
    if batch < 1 or imgsz < STRIDE or not (0 <= conf < 1 and 0 < iou <= 1) or max_det < 1:
        raise ConfigError(
            f"need batch >= 1, imgsz >= {STRIDE}, conf in [0, 1), iou in (0, 1], max_det >= 1; got batch={batch}, "
            f"imgsz={imgsz}, conf={conf}, iou={iou}, max_det={max_det}"
        )
    truth = load_annotations(annotations)
    files = match_images(truth, list_images(images), subset)
    names = safe_checkpoint(weights).names
    categories = class_map([str(names[i]) for i in range(len(names))], truth)
    ids = {str(c["name"]): int(c["id"]) for c in truth.dataset["categories"]}
    unknown = [name for name in covered or () if name not in ids]
    if unknown:
        raise ConfigError(f"covered: no category named {', '.join(unknown)}; categories: {', '.join(ids)}")
    options: dict[str, Any] = {"imgsz": imgsz, "batch": batch, "conf": conf, "iou": iou, "max_det": max_det}
    found = detect(weights, files, categories, device=device, end2end=end2end, **options)
    result = score(truth, found, list(files.values()))
    return CocoResult(
        weights=str(weights),
        weights_sha256=file_sha256(weights),
        annotations=str(annotations),
        annotations_sha256=file_sha256(annotations),
        evaluator=f"{EVALUATOR} {version(EVALUATOR)}",
        settings={**options, "end2end": end2end, "rect": True},
        images=len(files),
        images_annotated=len(truth.dataset["images"]),
        detections=len(found),
        all=twelve(result),
        covered=twelve(result, [ids[name] for name in covered]) if covered else None,
        covered_classes=tuple(covered or ()),
        per_class=per_class(result, truth),
    )


def known_of(covered: Sequence[str], annotations: str | Path) -> tuple[str, ...]:
    """Those of a set's classes that are categories of the annotations; the others are named in a warning."""
    categories = {str(kind["name"]) for kind in load_annotations(annotations).dataset["categories"]}
    dropped = [name for name in covered if name not in categories]
    if dropped:
        LOGGER.warning(f"{annotations} has no category {', '.join(dropped)}: left out of the covered classes")
    return tuple(name for name in covered if name in categories)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Results as JSON, replaced whole."""
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
