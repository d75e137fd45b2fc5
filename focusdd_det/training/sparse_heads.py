"""The teacher's head outputs thinned to what supervises a student, and the KL terms on them.

Kept of a picture: the anchors where f, the teacher's highest class probability, is at least a floor; of such an
anchor the box bins and the logits of its K most probable classes. Of everything else one number stands for many:

- the other classes of a kept anchor have the mean of their probabilities (`rest`);
- a class at all left-out anchors of a picture has the mean of its probabilities there (`background`);
- the boxes of left-out anchors diverge, on the f-weighted average, as those of the kept anchors of the batch do.

The sum of f over all anchors is kept as it is, so N is that of a live teacher. At floor 0 with all classes nothing is
left out, and the terms are those of `losses.supervision_terms`. The means are taken at T = 1: at another T they are
off, and only what is kept is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from focusdd_det.losses import Supervision, bernoulli_kl, bins_kl

LEAST_LOGIT = -30.0  # stands for the logarithm of zero in a mean over nothing


@dataclass(frozen=True)
class SparseHeads:
    """One head's outputs on B pictures, M anchors kept in all, K classes each.

    Attributes:
        picture, anchor: [M] int64, which anchor of which picture; by picture, then by anchor.
        values: [M, K] logits, the highest first.
        classes: [M, K] int64, their classes.
        rest: [M] logit of the mean probability of the other classes; not read when K is all of them.
        boxes: [M, 4 * R] logits of the bins.
        background: [B, nc] logit of each class's mean probability over the left-out anchors.
        total: [B] float32, the sum of f over all anchors.
    """

    picture: Tensor
    anchor: Tensor
    values: Tensor
    classes: Tensor
    rest: Tensor
    boxes: Tensor
    background: Tensor
    total: Tensor

    def to(self, device: torch.device | str) -> SparseHeads:
        """On that device; what goes to a GPU is not waited for, and so has to lie in pinned memory."""
        ahead = torch.device(device).type == "cuda"
        whole = self.pin_memory() if ahead and self.total.device.type == "cpu" else self
        return SparseHeads(**{name: getattr(whole, name).to(device, non_blocking=ahead) for name in _NAMES})

    def pin_memory(self) -> SparseHeads:
        """In pinned memory; torch's DataLoader calls it by this name. What is pinned stays as it is."""
        return SparseHeads(**{name: getattr(self, name).pin_memory() for name in _NAMES})

    def half(self) -> SparseHeads:
        """Logits in float16, as they are stored."""
        logits = ("values", "rest", "boxes", "background")
        return replace(self, **{name: getattr(self, name).half() for name in logits})

    def split(self) -> list[SparseHeads]:
        """The pictures one by one, each as a batch of one."""
        parts = []
        for b in range(len(self.total)):
            mine = self.picture == b
            rows = {name: getattr(self, name)[mine] for name in _NAMES if name not in _OF_PICTURES}
            rows["picture"] = torch.zeros_like(rows["picture"])
            parts.append(SparseHeads(**rows, **{name: getattr(self, name)[b : b + 1] for name in _OF_PICTURES}))
        return parts


_NAMES = tuple(field.name for field in fields(SparseHeads))
_OF_PICTURES = ("background", "total")  # one row a picture, where the others have one an anchor


def join(parts: Sequence[SparseHeads]) -> SparseHeads:
    """Batches one after the other, as one."""
    whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in _NAMES}
    pictures = [len(part.total) for part in parts]
    before = [sum(pictures[:place]) for place in range(len(parts))]
    whole["picture"] = torch.cat([part.picture + first for part, first in zip(parts, before, strict=True)])
    return SparseHeads(**whole)


def thin(head: Mapping[str, Tensor], floor: float, topk: int) -> SparseHeads:
    """A teacher's dense head without what hardly supervises.

    Args:
        head: {"boxes": [B, 4 * R, A], "scores": [B, nc, A]} logits.
        floor: anchors with f >= floor are kept; 0 keeps all.
        topk: classes kept of an anchor; 0: all.

    Returns:
        In the precision of `head`, `total` in float32.
    """
    scores = head["scores"].detach()
    classes = scores.shape[1]
    k = min(topk, classes) if topk else classes
    probability = scores.float().sigmoid()
    foreground = probability.amax(1)
    keep = foreground >= floor
    picture, anchor = keep.nonzero(as_tuple=True)
    rows = scores[picture, :, anchor]
    values, order = rows.topk(k, dim=1)
    kept = probability[picture, :, anchor]
    others = kept.scatter(1, order, 0).sum(1) / max(1, classes - k)
    left = (~keep).sum(1)
    background = (probability * ~keep[:, None]).sum(2) / left.clamp(min=1)[:, None]
    return SparseHeads(
        picture,
        anchor,
        values,
        order,
        _logit(others).to(scores.dtype),
        head["boxes"].detach()[picture, :, anchor],
        _logit(background).to(scores.dtype),
        foreground.sum(1),
    )


def _logit(probability: Tensor) -> Tensor:
    return probability.double().logit().clamp(LEAST_LOGIT, -LEAST_LOGIT).float()


def sparse_supervision_terms(
    student: Mapping[str, Tensor], teacher: SparseHeads, *, reg_max: int, temperature: float = 1.0, beta: float = 1.0
) -> Supervision:
    """Class and box terms of `losses.supervision_terms`, for a thinned teacher.

    Args:
        student: {"boxes": [B, 4 * R, A], "scores": [B, nc, A]} with gradient.
        teacher: of the same B pictures, A anchors, nc classes and R bins.
        reg_max: R > 1.
        temperature, beta: as there.

    Returns:
        Two scalars, float32. The caller multiplies by the gains and by B.

    Raises:
        ValueError: shapes that do not pair.
    """
    scores = student["scores"]
    pairs = (tuple(teacher.background.shape), teacher.boxes.shape[1]), (tuple(scores.shape[:2]), 4 * reg_max)
    if pairs[0] != pairs[1] or student["boxes"].shape[1] != 4 * reg_max:
        raise ValueError(
            f"teacher and student must have the same (pictures, classes) and box logits, got {pairs[0]} and {pairs[1]}"
        )
    with torch.autocast(scores.device.type, enabled=False):
        s = scores.float()
        mass = teacher.total.sum()
        total = mass.clamp(min=1)
        where = teacher.picture, teacher.anchor
        kept = _kept_classes(s[where[0], :, where[1]], teacher, temperature, beta)
        outside = torch.ones_like(s[:, 0]).index_put(where, s.new_zeros(()))
        left_out = _LeftOut.apply(s, teacher.background.float(), outside, temperature, beta)  # type: ignore[no-untyped-call]
        foreground = teacher.values[:, 0].float().sigmoid()
        boxes = student["boxes"][where[0], :, where[1]]
        box = bins_kl(teacher.boxes.T[None], boxes.T[None], reg_max)[0]
        average = (foreground * box).sum() / foreground.sum().clamp(min=1e-9)  # with nothing kept: 0
        return Supervision((kept + left_out) * temperature**2 / total, average * mass / total)


def _kept_classes(s: Tensor, teacher: SparseHeads, temperature: float, beta: float) -> Tensor:
    """The class term of the kept anchors; s is [M, nc]."""
    t = teacher.rest.float()[:, None].expand_as(s).scatter(1, teacher.classes, teacher.values.float())
    divergence = bernoulli_kl(t, s, temperature)
    if beta:
        divergence = divergence * (t.sigmoid() - s.detach().sigmoid()).abs() ** beta
    return divergence.sum()


class _LeftOut(torch.autograd.Function):
    """The class term of the left-out anchors, whose teacher is one logit a class and picture.

    With one q for many, KL = softplus(s/T) - q s/T - H(q), and its gradient w (sigmoid(s/T) - q) / T is had on the way:
    value and gradient in one pass, on a CPU picture by picture, so that a picture's scores stay in the cache. Nothing
    large cancels, because q is below the floor.
    """

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, background: Tensor, outside: Tensor, temperature: float, beta: float
    ) -> Tensor:
        """The sum over elements.

        Args:
            ctx: of autograd.
            scores: [B, nc, A] of the student, float32.
            background: [B, nc] logits of the teacher.
            outside: [B, A], 1 where an anchor is left out, else 0.
        """
        gradient = torch.empty_like(scores)
        size = 1 if scores.device.type == "cpu" else len(scores)
        whole = (scores, background[..., None], outside[:, None], gradient)
        parts = (torch.split(part, size) for part in whole)  # type: ignore[no-untyped-call]
        total = scores.new_zeros(())
        for s, t, out, into in zip(*parts, strict=True):
            x, hot = (s, t) if temperature == 1 else (s / temperature, t / temperature)
            q = hot.sigmoid()
            off = torch.sigmoid(x, out=into).sub_(q)
            weight = off.abs() if temperature == 1 else (s.sigmoid() - t.sigmoid()).abs_()
            if beta != 1:
                weight.pow_(beta)
            weight *= out
            divergence = F.softplus(x).addcmul_(q, x, value=-1).sub_(F.softplus(hot) - q * hot)
            total += torch.dot(divergence.flatten(), weight.flatten())
            off.mul_(weight)
            if temperature != 1:
                off.div_(temperature)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        """To the scores alone."""
        (gradient,) = ctx.saved_tensors
        return gradient * outer, None, None, None, None
