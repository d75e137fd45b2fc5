"""The keys that training a classifier adds to Ultralytics' own; cfg/train_cls.yaml says what each means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from focusdd_det.config import KeyedOptions, suggest
from focusdd_det.errors import ConfigError

Labels = Literal["store", "live", "hard"]
LABELS = ("store", "live", "hard")
PRECISIONS = ("auto", "fp32", "bf16")
NOT_GIVEN = ""  # of eval_data: measuring nothing has to be asked for
NOT_OURS = (  # of Ultralytics: what it does to its own views of the pictures, which are not the ones here
    "fraction", "flipud", "degrees", "translate", "shear", "perspective", "bgr", "mosaic", "mixup", "copy_paste",
    "hsv_h", "hsv_s", "hsv_v", "erasing", "auto_augment", "multi_scale", "cls_pw",
)  # fmt: skip
_TEXTS = ("teacher", "teacher_weights", "store", "weights")


def leaves_one_over(pictures: int, batch: int) -> bool:
    """Whether an epoch would end in a batch of a single picture, which BatchNorm cannot use; it is left out then."""
    return pictures > batch > 1 and pictures % batch == 1


def not_for_classifiers(values: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    """What is wrong with Ultralytics' keys that have no place here, or would change nothing.

    Args:
        values: the training's keys.
        usual: Ultralytics' defaults.
    """
    off = (0, None, False, "", "none")
    problems = [
        f"{key} is not for this trainer; leave it out" for key in ("distill_model", "single_cls") if values.get(key)
    ]
    if isinstance(values.get("pretrained"), (str, Path)):
        problems.append(f"pretrained={values['pretrained']}: give weights=<file> instead")
    if values.get("freeze") and not _is_yolo(str(values.get("model"))):
        problems.append(f"freeze={values['freeze']}: counts the layers of YOLO models alone; leave it out")
    idle = [key for key in NOT_OURS if key in values and values[key] not in (usual[key], *off)]
    if idle:
        problems.append(
            f"{', '.join(idle)}: without effect here, where a view is a crop (scale), a flip (fliplr) and a CutMix "
            "(cutmix) of a picture; leave it out"
        )
    return problems


def _is_yolo(model: str) -> bool:
    return Path(model).suffix in (".yaml", ".yml", ".pt") or model.startswith("yolo")


@dataclass(frozen=True)
class Options(KeyedOptions):
    """How a classifier is supervised, measured and started.

    `labels` is never None afterwards: without a choice it is store if `store` is given, else live if `teacher` is.
    `eval_data` is None where nothing is measured.

    Raises:
        ConfigError: all wrong values at once.
    """

    teacher: str | None = None
    teacher_weights: str | None = None
    labels: Labels | None = None
    store: str | None = None
    pool: int = 0
    temperature: float = 20.0
    ema: bool = False
    every: int = 0
    eval_data: str | None = NOT_GIVEN
    subset_ipc: int = 0
    weights: str | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    download: bool = False

    def __post_init__(self) -> None:
        if self.labels is None:
            object.__setattr__(self, "labels", "store" if self.store else "live" if self.teacher else None)
        if isinstance(self.eval_data, str) and self.eval_data.lower() in ("none", "null"):
            object.__setattr__(self, "eval_data", None)
        problems = [*self._wrong_types(), *self._wrong_combinations()]
        if problems:
            raise ConfigError("the options of the training are not valid:\n  " + "\n  ".join(problems))

    def _wrong_types(self) -> list[str]:
        problems = []
        for key in _TEXTS:
            value = getattr(self, key)
            if value is not None and (not isinstance(value, str) or not value):
                problems.append(f"{key}={value!r}: expected a name or a path")
        for key in ("pool", "every", "subset_ipc"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                problems.append(f"{key}={value!r}: expected a whole number from 0 on")
        number = isinstance(self.temperature, (int, float)) and not isinstance(self.temperature, bool)
        if not number or not math.isfinite(self.temperature) or self.temperature <= 0:
            problems.append(f"temperature={self.temperature!r}: expected a number > 0")
        for key in ("ema", "download"):
            if not isinstance(getattr(self, key), bool):
                problems.append(f"{key}={getattr(self, key)!r}: expected True or False")
        for key, choices in (("labels", LABELS), ("precision", PRECISIONS)):
            value = getattr(self, key)
            if value is not None and value not in choices:
                problems.append(f"{key}={value!r}: expected {', '.join(choices)}{suggest(str(value), choices)}")
        if self.precision is None:
            problems.append(f"precision=None: expected {', '.join(PRECISIONS)}")
        if self.eval_data is not None and not isinstance(self.eval_data, str):
            problems.append(f"eval_data={self.eval_data!r}: expected a folder, or none")
        return problems

    def _wrong_combinations(self) -> list[str]:
        problems = []
        if self.labels is None:
            problems.append(
                "there is nothing to learn from: give store=<folder> (labels made beforehand by relabel), "
                "teacher=<name or checkpoint> (asked during the training), or labels=hard (the class folders)"
            )
        if self.labels == "store" and not self.store:
            problems.append("labels=store needs store=<folder>, as relabel writes it")
        if self.labels == "live" and not self.teacher:
            problems.append("labels=live needs teacher=<name or checkpoint>, e.g. teacher=resnet18")
        if self.teacher_weights and not self.teacher:
            problems.append("teacher_weights= needs teacher=<name of its architecture>")
        if self.store and self.labels in ("live", "hard"):
            problems.append(f"store= and labels={self.labels} contradict each other; leave one out")
        if self.teacher and self.labels in ("store", "hard"):
            problems.append(f"teacher= is not asked anything with labels={self.labels}; leave it out")
        if self.eval_data == NOT_GIVEN:
            problems.append(
                "eval_data= is missing: give the class folders that the accuracy is measured on, or eval_data=none to "
                "train without measuring"
            )
        if self.subset_ipc and self.labels == "store":
            problems.append("subset_ipc= draws new pictures every epoch, which no store has labels for; give teacher=")
        if self.subset_ipc and self.pool:
            problems.append("subset_ipc= and pool= contradict each other; leave one out")
        return problems

    def interval(self, epochs: int) -> int:
        """Epochs between two measurements and checkpoints."""
        return self.every or max(1, epochs // 50)
