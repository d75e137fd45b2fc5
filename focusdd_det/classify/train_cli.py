"""`focusdd classify train`: command line -> options, with every key of Ultralytics beside ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from focusdd_det.classify.options import Options
from focusdd_det.commandline import wants_help
from focusdd_det.config import cfg_dir, describe, read_yaml
from focusdd_det.training.arguments import check_stock, device_here, listed, parse, train_keys, with_recipe
from focusdd_det.training.run_guard import run_to_end

SHIPPED = "train_cls.yaml"

TRAIN_USAGE = """Train a classifier on a distilled set with a teacher's soft labels, and measure it on real pictures.

  python tools/train_cls.py model=resnet18 data=datasets/in10 store=datasets/in10_labels eval_data=imagenet/val
  python tools/train_cls.py --model resnet18 --data datasets/in10 --teacher resnet18 --teacher-weights resnet18.pth \\
      --eval-data imagenet/val --epochs 300
  python tools/train_cls.py model=yolo11n-cls.yaml data=datasets/in10 labels=hard eval_data=imagenet/val
  python tools/train_cls.py model=resnet18 weights=runs/classify/train/weights/last.json data=imagenet \\
      teacher=resnet18 teacher_weights=resnet18.pth subset_ipc=10 epochs=50 batch=64 lr0=2.5e-4 eval_data=imagenet/val
  python tools/train_cls.py resume=runs/classify/train
  python tools/train_cls.py data=datasets/in10 store=datasets/in10_labels eval_data=none --dry-run

`key=value` or `--key value`; those below and every key of `yolo classify train` that means something here (others are
refused by name). --dry-run prints the plan and stops.
"""


def train(argv: Sequence[str]) -> int:
    """`focusdd classify train`, tools/train_cls.py.

    Raises:
        ConfigError: unknown keys (with suggestions) or wrong values.
        DataError, WeightsError, VerifyError: as the trainer.
        Interrupted: stopped by the user, with the command that goes on.
    """
    if wants_help(argv):
        print(TRAIN_USAGE + "\n" + describe(SHIPPED))
        return 0
    overrides = checked_overrides(argv, {"dry_run": False})
    if overrides.pop("dry_run", False):
        print(plan(overrides))
        return 0
    from focusdd_det.classify.trainer import FocusDDClassificationTrainer

    return run_to_end(FocusDDClassificationTrainer(overrides=overrides), "classify train")


def checked_overrides(argv: Sequence[str], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a trainer from the command line and the YAML files, checked before anything is read.

    Args:
        extra: further keys that the command takes, with their defaults; those that are given come back among the rest.

    Raises:
        ConfigError: unknown keys (with suggestions) or wrong values.
    """
    given = parse(argv, {**train_keys(Options.keys()), **extra})
    own = {key: given.pop(key) for key in extra if key in given}
    overrides = train_overrides(given)
    if not overrides.get("resume"):
        Options.of(overrides)
    check_stock(overrides, "classify")
    device_here(overrides.get("device"))
    return {**overrides, **own}


def train_overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """Shipped YAML, then `cfg=`, then the command line; a resumed run only takes what was given."""
    asked = with_recipe(given, train_keys(Options.keys()))
    return asked if asked.get("resume") else {**read_yaml(cfg_dir() / SHIPPED), **asked}


def plan(overrides: Mapping[str, Any]) -> str:
    """What a training would do, after every check that it would make itself. Writes nothing."""
    from focusdd_det.classify.trainer import checked

    trainer = checked(overrides)
    options, data = trainer.options, trainer.train_set
    lines = [
        f"model         {trainer.args.model}",
        f"data          {data.folder}: {len(data)} pictures of {len(data.names)} classes (sha256 {data.sha256[:12]})",
    ]
    if options.labels == "store":
        lines.append(f"labels        of {options.store}")
    elif options.labels == "live":
        lines.append(f"labels        of {options.teacher} {options.teacher_weights or ''}, asked during the training")
    else:
        lines.append("labels        the class folders")
    if trainer.eval_set is not None:
        lines.append(f"evaluated on  {trainer.eval_set.folder}: {len(trainer.eval_set)} pictures")
    else:
        lines.append("evaluated on  nothing (eval_data=none): no accuracy will be quoted")
    lines.append(f"every         {options.interval(int(trainer.args.epochs))} epochs: measured and saved")
    if overrides.get("resume"):
        lines.insert(0, f"resume        {overrides['resume']}")
    told = ("labels", "store", "teacher", "teacher_weights", "eval_data", "every")
    ours = {key: value for key, value in dataclasses.asdict(options).items() if key not in told}
    stock = {k: v for k, v in overrides.items() if k not in (*Options.keys(), "model", "data") and v is not None}
    return "\n".join([*lines, f"training      {listed(ours)}", f"ultralytics   {listed(stock)}"])
