"""How the teacher supervises a student inside Ultralytics: the options, and the criterion that adds the KL terms.

The criterion is attached as `model.criterion`; what it needs of the teacher comes in the batch under TEACHER_KEY. So
the model stays a stock DetectionModel, and its checkpoints stay stock checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss
from ultralytics.utils.tal import make_anchors

from focusdd_det.config import KeyedOptions, suggest
from focusdd_det.errors import ConfigError
from focusdd_det.losses import ONE2MANY, ONE2ONE, Supervision, paired_head, supervision_terms
from focusdd_det.training.aside import Begun
from focusdd_det.training.sparse_heads import SparseHeads, sparse_supervision_terms

TEACHER_KEY = "teacher_heads"
Mode = Literal["labels", "kl", "both"]
MODES = ("labels", "kl", "both")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Options(KeyedOptions):
    """The keys that this package adds to Ultralytics' own; cfg/train_det.yaml says what each means.

    Raises:
        ConfigError: all wrong values at once.
    """

    teacher: str | None = None
    targets: str | None = None
    targets_pool: int = 0
    backbone: str | None = None
    supervision: Mode = "both"
    kl_cls: float = 1.0
    kl_dfl: float = 1.0
    kl_beta: float = 1.0
    kl_temperature: float = 1.0
    eval_data: str | None = None
    eval_annotations: str | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    download: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.supervision not in MODES:
            near = suggest(str(self.supervision), MODES)
            problems.append(f"supervision={self.supervision!r}: expected labels, kl or both{near}")
        if self.precision not in PRECISIONS:
            near = suggest(str(self.precision), PRECISIONS)
            problems.append(f"precision={self.precision!r}: expected fp32 or bf16{near}")
        for key, positive in (("kl_cls", False), ("kl_dfl", False), ("kl_beta", False), ("kl_temperature", True)):
            value = getattr(self, key)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (positive and value == 0):
                problems.append(f"{key}={value!r}: expected a number {'> 0' if positive else '>= 0'}")
        for key in ("teacher", "targets", "backbone", "eval_data", "eval_annotations"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, str):
                problems.append(f"{key}={value!r}: expected a path")
        if not isinstance(self.download, bool):
            problems.append(f"download={self.download!r}: expected True or False")
        if isinstance(self.targets_pool, bool) or not isinstance(self.targets_pool, int) or self.targets_pool < 0:
            problems.append(f"targets_pool={self.targets_pool!r}: expected a whole number from 0 on")
        if self.supervision in ("kl", "both") and not self.teacher and not self.targets:
            problems.append(
                f"supervision={self.supervision} needs teacher=<checkpoint>, e.g. teacher=yolo11x.pt, or "
                "targets=<folder>; supervision=labels trains on the boxes alone"
            )
        if self.teacher and self.targets:
            problems.append("teacher= and targets= are two ways to the same: give the one that is to be used")
        if problems:
            raise ConfigError("the options of the training are not valid:\n  " + "\n  ".join(problems))

    @property
    def uses_teacher(self) -> bool:
        """Whether a teacher is asked in the training."""
        return self.supervision != "labels" and self.teacher is not None

    @property
    def uses_targets(self) -> bool:
        """Whether what a teacher said beforehand is read."""
        return self.supervision != "labels" and self.targets is not None


def refuse_unsupported(args: Mapping[str, Any], options: Options) -> None:
    """What Ultralytics takes and a training of this package cannot do.

    Raises:
        ConfigError: the first of it.
    """
    if str(args.get("cache")).lower() == "disk":
        raise ConfigError("cache=disk writes beside the pictures; give cache=ram, or leave it out")
    if args.get("split") not in (None, "val"):
        raise ConfigError(f"split={args['split']}: a training is measured on the val split of eval_data= alone")
    if args.get("distill_model") is not None:
        raise ConfigError(
            "distill_model is Ultralytics' own feature distillation, another method; use it with the stock "
            "trainer (yolo train ...), or drop it and give teacher= here"
        )
    if args.get("quantize") is not None and options.uses_teacher:
        raise ConfigError("quantize= tries the student before the teacher is there; leave it out, or use targets=")
    if args.get("single_cls") and (options.uses_teacher or options.uses_targets):
        raise ConfigError("single_cls=True merges the classes that the teacher tells apart; use supervision=labels")


class SupervisedLoss(v8DetectionLoss):  # type: ignore[misc]
    """Ultralytics' detection loss on the pseudo boxes plus the KL terms of one head.

    Loss names: the three of Ultralytics, then kl_cls_loss and kl_dfl_loss (kl_box_loss when a head has no bins).
    All are always there: a term that is off is zero, and validation, which has no teacher, logs zeros for the KL.
    """

    def __init__(
        self,
        model: nn.Module,
        tal_topk: int = 10,
        tal_topk2: int | None = None,
        *,
        options: Options,
        teacher_reg_max: int,
    ) -> None:
        super().__init__(model, tal_topk=tal_topk, tal_topk2=tal_topk2)
        self.options = options
        self.teacher_reg_max = teacher_reg_max
        self.branch: str | None = None
        bins = self.reg_max == teacher_reg_max > 1
        self.kl_names = ("kl_cls_loss", "kl_dfl_loss" if bins else "kl_box_loss")

    def loss(self, preds: dict[str, Any], batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """One head's terms.

        Args:
            preds: {"boxes": [B, 4 * R, A], "scores": [B, nc, A], "feats": feature maps} of the student.
            batch: Ultralytics' batch; under TEACHER_KEY, while training, the teacher's raw heads (which may still be in
                the making) or stored ones.

        Returns:
            Vector of five terms times B, and a dict of the terms, detached, not times B.
        """
        size = preds["boxes"].shape[0]
        teacher = batch.get(TEACHER_KEY)
        if preds["scores"].device.type == "cpu":
            preds = in_float32(preds)
        if teacher is not None and self.options.supervision == "kl":
            vector = torch.zeros(3, device=preds["scores"].device)
            items = dict.fromkeys(self.loss_names, vector[0])
        else:
            with torch.autocast("cpu", enabled=False):  # that of a GPU stays as Ultralytics has it
                vector, items = super().loss(preds, batch)
        kl = torch.zeros(2, device=vector.device)
        if teacher is not None:
            terms = self._kl_terms(preds, teacher)
            gains = self.options.kl_cls * self.hyp.cls, self.options.kl_dfl * self.hyp.dfl
            kl = torch.stack((terms.cls * gains[0], terms.box * gains[1]))
        return torch.cat((vector, kl * size)), {**items, **dict(zip(self.kl_names, kl.detach(), strict=True))}

    def _kl_terms(self, preds: dict[str, Any], teacher: Any) -> Supervision:
        # Ultralytics' anchors make the host wait for a GPU, so not after the wait for the teacher, and only if need be.
        decoded = not isinstance(teacher, SparseHeads) and not self.reg_max == self.teacher_reg_max > 1
        anchors = make_anchors(preds["feats"], self.stride, 0.5)[0].T.float() if decoded else None
        teacher = teacher.take() if isinstance(teacher, Begun) else teacher
        how = {"temperature": self.options.kl_temperature, "beta": self.options.kl_beta}
        if isinstance(teacher, SparseHeads):
            return sparse_supervision_terms(preds, teacher, reg_max=self.reg_max, **how)
        return supervision_terms(
            preds,
            paired_head(teacher, self.branch),
            student_reg_max=self.reg_max,
            teacher_reg_max=self.teacher_reg_max,
            anchors=anchors,
            **how,
        )


def in_float32(preds: dict[str, Any]) -> dict[str, Any]:
    """A head's outputs in float32. Feature maps are only asked for shape and type, so theirs hold nothing else."""
    feats = [torch.zeros((), device=f.device).expand(f.shape) for f in preds["feats"]]
    return {**preds, "boxes": preds["boxes"].float(), "scores": preds["scores"].float(), "feats": feats}


def build_criterion(model: nn.Module, options: Options, teacher_reg_max: int) -> Any:
    """The criterion for a student: one loss, or one for each of the two heads of an end-to-end student.

    Args:
        model: Ultralytics DetectionModel, already on its device.
        teacher_reg_max: R of the teacher; the student's own when there is no teacher.
    """
    loss = partial(SupervisedLoss, options=options, teacher_reg_max=teacher_reg_max)
    head: Any = model.model[-1]  # type: ignore[index]
    if getattr(head, "one2one_cv2", None) is None:
        return loss(model)
    both = E2ELoss(model, loss)
    both.one2many.branch, both.one2one.branch = ONE2MANY, ONE2ONE
    return both
