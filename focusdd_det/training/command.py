"""`train` and `val_coco`: command line -> options, with every key of Ultralytics beside ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from focusdd_det import coco_eval
from focusdd_det.checkpoints import resolve_weights
from focusdd_det.commandline import spelled, wants_help
from focusdd_det.config import cfg_dir, describe, read_yaml
from focusdd_det.disk import file_sha256
from focusdd_det.errors import ConfigError
from focusdd_det.training.arguments import check_stock, device_here, listed, parse, train_keys, with_recipe
from focusdd_det.training.precision import check_precision
from focusdd_det.training.run_files import model_argument
from focusdd_det.training.run_guard import run_to_end
from focusdd_det.training.start import start_argument
from focusdd_det.training.supervision import Options, refuse_unsupported
from focusdd_det.training.targets import TargetStore
from focusdd_det.training.traindata import load_yolo_data, resolve_data

SHIPPED = "train_det.yaml"

VAL_DEFAULTS: dict[str, Any] = {
    "model": None,
    "annotations": None,
    "images": None,
    "data": None,
    "set": None,
    "covered": None,
    "out": None,
    "subset": False,
    "imgsz": 640,
    "batch": 16,
    "conf": 0.001,
    "iou": 0.7,
    "max_det": 300,
    "device": None,
    "end2end": False,
    "download": False,
}

TRAIN_USAGE = """Train a detector on a distilled set, supervised by its boxes and by a teacher's raw outputs.

  python tools/train_det.py model=yolo11n.yaml data=datasets/focusdd teacher=yolo11x.pt epochs=100 eval_data=coco.yaml
  python tools/train_det.py --model yolo11s.yaml --data datasets/focusdd --supervision labels --epochs 100
  python tools/train_det.py model=yolo11n.yaml data=datasets/focusdd teacher=yolo11x.pt kl_cls=0.5 batch=32 device=0
  python tools/train_det.py model=yolo11n.yaml data=datasets/focusdd targets=datasets/focusdd_targets epochs=100
  python tools/train_det.py resume=runs/detect/train/weights/last.pt
  python tools/train_det.py data=datasets/focusdd teacher=yolo11x.pt --dry-run

`key=value` or `--key value`; every key of `yolo train` and the ones below. --dry-run prints the plan and stops.
"""

VAL_USAGE = """Official COCO mAP (pycocotools) of any Ultralytics detector on any COCO annotations file.

  python tools/val_coco.py model=best.pt annotations=coco/annotations/instances_val2017.json images=coco/images/val2017
  python tools/val_coco.py --model best.pt --data coco.yaml --set datasets/focusdd --out coco_eval.json
  python tools/val_coco.py model=yolo11n.pt annotations=mine.json images=pictures subset=True device=0

  model          checkpoint (.pt)
  annotations    COCO instances JSON; with data=, looked for in its annotations/ folder
  images         folder of the pictures, or a text file with one path a line; with data=, its val split
  data           YOLO data.yaml that names both
  set            a distilled set: a second column averages over the classes that it covers
  covered        the same with class names: covered=person,dog
  out            JSON with all numbers (default: coco_eval.json beside the checkpoint; out=none writes none)
  subset         True evaluates the annotated pictures that are there; the result says so (default False)
  imgsz, batch, conf, iou, max_det, device      640, 16, 0.001, 0.7, 300, first GPU or cpu
  end2end        True uses the one-to-one head of YOLO26 without NMS (default False, as in `yolo val`)
  download       True lets Ultralytics fetch a missing official checkpoint
"""


def train(argv: Sequence[str]) -> int:
    """`focusdd detect train`, tools/train_det.py.

    Raises:
        ConfigError: unknown keys (with suggestions) or wrong values.
        DataError, WeightsError, VerifyError: as the trainer.
        Interrupted: stopped by the user, with the command that goes on.
    """
    if wants_help(argv):
        print(TRAIN_USAGE + "\n" + describe(SHIPPED))
        return 0
    given = parse(argv, {**train_keys(Options.keys()), "dry_run": False})
    dry_run = bool(given.pop("dry_run", False))
    overrides = train_overrides(given)
    _check_values(overrides)
    if dry_run:
        print(plan(overrides))
        return 0
    from focusdd_det.trainer import FocusDDTrainer

    trainer = FocusDDTrainer(overrides=overrides)
    run_to_end(trainer, "detect train")
    if not trainer.options.eval_data:
        of_set = [] if trainer.source.folder is None else [f"set={trainer.source.folder}"]
        print(f"next: {spelled('detect val', f'model={trainer.last}', 'data=datasets/coco.yaml', *of_set)}")
    return 0


def train_overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """Shipped YAML, then `cfg=`, then the command line; a resumed run only takes what was given."""
    asked = with_recipe(given, train_keys(Options.keys()))
    if asked.get("resume"):
        if asked["resume"] is True and str(asked.get("model") or "").endswith(".pt"):
            asked["resume"] = asked.pop("model")  # yolo train resume model=path/to/last.pt
        return asked
    return {**read_yaml(cfg_dir() / SHIPPED), **asked}


def plan(overrides: Mapping[str, Any]) -> str:
    """What a training would do, after every check that needs no training. Writes nothing."""
    if overrides.get("resume"):
        return f"resume {overrides['resume']} with {listed({k: v for k, v in overrides.items() if k != 'resume'})}"
    options = Options.of(overrides)
    refuse_unsupported(overrides, options)
    check_precision(options.precision, overrides.get("device"), overrides.get("amp", True))
    model = model_argument(overrides.get("model"), options.download)
    data = resolve_data(overrides.get("data"))
    names = load_yolo_data(data.yaml, "train")["names"]
    lines = [f"model         {model}", f"data          {data}", f"classes       {len(names)}"]
    if options.backbone:
        file = Path(start_argument(overrides, options.download))
        lines.insert(1, f"backbone      {file} (sha256 {file_sha256(file)[:12]})")
    if options.uses_teacher:
        file = resolve_weights(str(options.teacher), options.download)
        lines.append(f"teacher       {file} (sha256 {file_sha256(file)[:12]})")
    if options.uses_targets:
        store = TargetStore(str(options.targets))
        store.check_set(data.yaml.parent, data.manifest_sha256, data.count, [str(names[i]) for i in range(len(names))])
        lines.append(
            f"targets       {store.folder} ({store.pool.mixed} + {store.pool.closed} epochs of views, teacher sha256 "
            f"{store.teacher_sha256[:12]})"
        )
    if options.eval_data:
        evaluation = load_yolo_data(resolve_data(options.eval_data).yaml, "val")
        annotations = options.eval_annotations or coco_eval.usual_annotations(evaluation)
        lines += [
            f"evaluated on  {evaluation['val']}",
            f"COCO mAP from {annotations or 'nothing: no annotations JSON was found; give eval_annotations='}",
        ]
    else:
        lines.append("evaluated on  nothing (no eval_data): no mAP will be quoted")
    ours = {
        k: v
        for k, v in dataclasses.asdict(options).items()
        if k not in ("teacher", "targets", "backbone", "eval_data", "eval_annotations")
    }
    stock = {k: v for k, v in overrides.items() if k not in (*Options.keys(), "model", "data") and v is not None}
    return "\n".join([*lines, f"supervision   {listed(ours)}", f"ultralytics   {listed(stock)}"])


def val_coco(argv: Sequence[str]) -> int:
    """`focusdd detect val`, tools/val_coco.py.

    Raises:
        ConfigError, DataError, WeightsError: as `coco_eval.evaluate`.
    """
    if wants_help(argv):
        print(VAL_USAGE)
        return 0
    given = parse(argv, VAL_DEFAULTS)
    options = {**VAL_DEFAULTS, **given}
    for key in ("imgsz", "batch", "max_det"):
        _expect(options, key, int)
    for key in ("conf", "iou"):
        _expect(options, key, float)
    for key in ("subset", "end2end", "download"):
        _expect(options, key, bool)
    if options["model"] is None:
        raise ConfigError("model= is missing; expected a checkpoint, e.g. model=runs/detect/train/weights/last.pt")
    weights = resolve_weights(options["model"], options["download"])
    annotations, images = options["annotations"], options["images"]
    if options["data"] is not None:
        data = load_yolo_data(resolve_data(options["data"]).yaml, "val")
        images = images or data["val"]
        annotations = annotations or coco_eval.usual_annotations(data)
    if annotations is None or images is None:
        raise ConfigError(
            "annotations= and images= are needed (or data= with an annotations/ folder beside its images); the "
            "official COCO mAP is computed from nothing else"
        )
    covered: Sequence[str] | None = _names(options["covered"])
    if options["set"] is not None:
        covered = resolve_data(options["set"]).covered
        if not covered:
            raise ConfigError(f"set={options['set']} is not a distilled set of ours; give covered=name,name instead")
        covered = coco_eval.known_of(covered, annotations)
    device = device_here(options["device"])
    numbers = {key: options[key] for key in ("imgsz", "batch", "conf", "iou", "max_det", "subset", "end2end")}
    result = coco_eval.evaluate(weights, annotations, images, device=str(device), covered=covered, **numbers)
    print(result.table())
    if options["out"] is not None or "out" not in given:
        out = Path(str(options["out"])) if options["out"] else weights.with_name("coco_eval.json")
        coco_eval.write_json(result.as_dict(), out)
        print(f"written to {out}")
    return 0


# ---- words -> keys and values ----


def _check_values(overrides: Mapping[str, Any]) -> None:
    """Wrong types and ranges of either kind, before anything is written."""
    if not overrides.get("resume"):
        Options.of(overrides)
    check_stock(overrides, "detect")
    device_here(overrides.get("device"))


def _expect(options: Mapping[str, Any], key: str, kind: type) -> None:
    value = options[key]
    fits = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
    if not fits or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(
            f"{key}={value!r}: expected {'True or False' if kind is bool else f'a number ({kind.__name__})'}"
        )


def _names(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(map(str, value))
