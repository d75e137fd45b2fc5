"""The student's criterion, attached as `model.criterion`: soft labels of a teacher, or the classes of the pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from focusdd_det.classify.loss import mixed_cross_entropy, soft_cross_entropy, soft_cross_entropy_topk

SOFT_KEY = "soft"  # in a training batch: the teacher's logits, or its top k


@dataclass(frozen=True)
class SoftLabels:
    """(output, batch) -> (loss, {name: loss}); soft_ce with a teacher's logits in the batch, else cross-entropy.

    Validation batches have classes only. Their loss is the cross-entropy at temperature 1, under the name that training
    uses, because Ultralytics' validator knows no other; the trainer calls it val/ce.

    Attributes:
        temperature: T of both softmaxes.
        name: of the loss: soft_ce or ce.
    """

    temperature: float
    name: str

    def __call__(self, output: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        student: Tensor = output[-1] if isinstance(output, (list, tuple)) else output
        soft = batch.get(SOFT_KEY)
        if soft is not None and "logits" in soft:
            loss = soft_cross_entropy(student, soft["logits"], self.temperature)
        elif soft is not None:
            loss = soft_cross_entropy_topk(student, soft["values"], soft["indices"], soft["rest"], self.temperature)
        elif "share" in batch:
            loss = mixed_cross_entropy(student, batch["cls"], batch["partner_cls"], batch["share"])
        else:
            loss = F.cross_entropy(student.float(), batch["cls"])
        return loss, {self.name: loss.detach()}
