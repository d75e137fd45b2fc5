"""Supervision by the teacher's raw head outputs: pure functions of tensors, no files, no trainer.

Shapes: B pictures, nc classes, A anchors, R = reg_max bins. Logits are taken before the sigmoid (classes) and
before the softmax (bins). Everything is computed in float32, whatever the autocast. Formulas: DESIGN section
3, "KL supervision".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ONE2MANY, ONE2ONE = "one2many", "one2one"
_EPS = 1e-7  # against division by an empty union


class Supervision(NamedTuple):
    """The two terms of one batch, scalars, not yet multiplied by the run's gains or by the batch size."""

    cls: Tensor
    box: Tensor


def bernoulli_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(Bernoulli(sigmoid(t / T)) || Bernoulli(sigmoid(s / T))) for every element.

    Equal to BCE(s / T, q) - BCE(t / T, q) with q = sigmoid(t / T), written with log-sigmoids so that large
    logits do not cancel. Both terms are needed: one alone can be negative.

    Args:
        teacher: logits, any shape. No gradient flows into it.
        student: logits of the same shape.
        temperature: T > 0.

    Returns:
        float32 of that shape, >= -1e-6, exactly 0 where the logits are equal.
    """
    t = teacher.detach().float() / temperature
    s = student.float() / temperature
    return t.sigmoid() * (F.logsigmoid(t) - F.logsigmoid(s)) + (-t).sigmoid() * (F.logsigmoid(-t) - F.logsigmoid(-s))


def bins_kl(teacher: Tensor, student: Tensor, reg_max: int) -> Tensor:
    """Mean over the four box sides of KL(softmax(teacher bins) || softmax(student bins)).

    Args:
        teacher, student: [B, 4 * R, A] logits, side by side as in YOLO's `boxes` output.
        reg_max: R > 1.

    Returns:
        [B, A] float32, >= -1e-6, 0 where the distributions are equal.
    """
    b, _, a = student.shape
    t = teacher.detach().float().view(b, 4, reg_max, a).log_softmax(2)
    s = student.float().view(b, 4, reg_max, a).log_softmax(2)
    return (t.exp() * (t - s)).sum(2).mean(1)


def decode_boxes(boxes: Tensor, anchors: Tensor, reg_max: int) -> Tensor:
    """Distances to the four sides -> corners.

    Args:
        boxes: [B, 4 * R, A] raw output: logits of R bins per side, or the distances themselves when R is 1.
        anchors: [2, A] cell centres, in cells of each anchor's own level.
        reg_max: R.

    Returns:
        [B, 4, A] float32 x1 y1 x2 y2, in cells of each anchor's own level.
    """
    distance = boxes.float()
    if reg_max > 1:
        b, _, a = distance.shape
        bins = torch.arange(reg_max, device=boxes.device, dtype=torch.float32).view(1, 1, reg_max, 1)
        distance = (distance.view(b, 4, reg_max, a).softmax(2) * bins).sum(2)
    left_top, right_bottom = distance[:, :2], distance[:, 2:]
    return torch.cat((anchors - left_top, anchors + right_bottom), dim=1)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of paired boxes (Rezatofighi et al. 2019, arXiv 1902.09630).

    Args:
        a, b: [B, 4, A] x1 y1 x2 y2 in the same unit. A box turned inside out counts as empty.

    Returns:
        [B, A] in [-1, 1].
    """
    size_a = (a[:, 2:] - a[:, :2]).clamp(min=0)
    size_b = (b[:, 2:] - b[:, :2]).clamp(min=0)
    inner = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    outer = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).clamp(min=0)
    overlap, hull = inner.prod(1), outer.prod(1)
    union = size_a.prod(1) + size_b.prod(1) - overlap
    return (overlap + _EPS) / (union + _EPS) - (hull - union) / (hull + _EPS)


def paired_head(teacher: Mapping[str, Any], branch: str | None) -> Mapping[str, Tensor]:
    """The teacher's outputs that supervise one of the student's heads.

    Args:
        teacher: {"boxes", "scores"} of a single head, or {"one2many": ..., "one2one": ...}.
        branch: which of its heads the student asks for; None for a student with a single head.

    Returns:
        The dict of the head of the same kind. A teacher with a single head supervises both of the student's;
        a student with a single head learns from one2many, which is the kind it has.
    """
    if ONE2MANY not in teacher:
        return teacher
    head: Mapping[str, Tensor] = teacher[branch or ONE2MANY]
    return head


def supervision_terms(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    *,
    student_reg_max: int,
    teacher_reg_max: int,
    anchors: Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 1.0,
) -> Supervision:
    """Class and box terms for one head on one batch (DESIGN section 3).

    Each anchor's weight is f, the teacher's highest class score there; N = max(1, sum of f over the batch)
    divides both terms. Equal numbers of bins: f-weighted KL of the bins. A head without bins on either side:
    f-weighted 1 - GIoU of the decoded boxes.

    Args:
        student: {"boxes": [B, 4 * Rs, A], "scores": [B, nc, A]} with gradient.
        teacher: {"boxes": [B, 4 * Rt, A], "scores": [B, nc, A]}, same anchors, classes in the student's
            order.
        student_reg_max, teacher_reg_max: Rs and Rt.
        anchors: [2, A] cell centres in cells of each anchor's own level; only needed where boxes are decoded: without
            equal numbers of bins.
        temperature: T > 0 of the class term; its factor T^2 is included. The weight w stays at T = 1.
        beta: exponent of w = |sigmoid(t) - sigmoid(s)|^beta, no gradient; 0 is plain KL.

    Returns:
        Two scalars, float32. The caller multiplies by the gains and by B.

    Raises:
        ValueError: shapes that do not pair, or boxes to decode without anchors.
    """
    t_scores, s_scores = teacher["scores"], student["scores"]
    if t_scores.shape != s_scores.shape:
        raise ValueError(
            f"teacher and student scores must have one shape [B, nc, A], got {tuple(t_scores.shape)} "
            f"and {tuple(s_scores.shape)}"
        )
    with torch.autocast(s_scores.device.type, enabled=False):
        divergence, foreground = _ClassTerm.apply(s_scores.float(), t_scores.detach(), temperature, beta)  # type: ignore[no-untyped-call]
        total = foreground.sum().clamp(min=1)
        if student_reg_max == teacher_reg_max > 1:
            box = _BinsTerm.apply(student["boxes"].float(), teacher["boxes"].detach(), foreground, student_reg_max)  # type: ignore[no-untyped-call]
        elif anchors is None:
            raise ValueError(f"boxes of {student_reg_max} and {teacher_reg_max} bins are decoded, which takes anchors")
        else:
            target = decode_boxes(teacher["boxes"].detach(), anchors, teacher_reg_max)
            box = (foreground * (1 - giou(target, decode_boxes(student["boxes"], anchors, student_reg_max)))).sum()
        return Supervision(divergence * temperature**2 / total, box / total)


class _ClassTerm(torch.autograd.Function):
    """The sum of w * bernoulli_kl over everything, and f.

    The gradient of an element is w (sigmoid(s/T) - q) / T, had on the way: value and gradient in one pass, nothing else
    kept for the backward pass, and on a CPU picture by picture, so that a picture's scores stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, beta: float) -> tuple[Tensor, Tensor]:
        """A scalar and f.

        Args:
            ctx: of autograd.
            student: [B, nc, A] logits, float32.
            teacher: the same shape, any precision.

        Returns:
            float32: the sum, and [B, A] the teacher's highest probability at T = 1, without gradient.
        """
        gradient = torch.empty_like(student)
        foreground = student.new_empty(student.shape[0], student.shape[2])
        total = student.new_zeros(())
        size = 1 if student.device.type == "cpu" else len(student)
        parts = (torch.split(whole, size) for whole in (student, teacher, gradient, foreground))  # type: ignore[no-untyped-call]
        hot, cold, probability, weight, spare = (torch.empty_like(student[:size]) for _ in range(5))
        for s, t, into, highest in zip(*parts, strict=True):
            hot.copy_(t)
            torch.sigmoid(hot, out=probability)
            torch.amax(probability, 1, out=highest)
            if temperature == 1:
                torch.sub(torch.sigmoid(s, out=into), probability, out=into)
                torch.abs(into, out=weight)
                cold.copy_(s)
            else:
                torch.sub(probability, torch.sigmoid(s, out=into), out=weight).abs_()
                torch.sigmoid(hot.div_(temperature), out=probability)
                torch.sigmoid(torch.div(s, temperature, out=cold), out=into).sub_(probability).div_(temperature)
            divergence = _divergence_(hot, cold, probability, spare)
            if beta:
                weight = weight if beta == 1 else weight.pow_(beta)
                divergence *= weight
                into *= weight
            total += divergence.sum()
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(foreground)
        return total, foreground

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        """To the student alone."""
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(outer), None, None, None


class _BinsTerm(torch.autograd.Function):
    """The sum over anchors of f * `bins_kl`: value and gradient in one pass, as in `_ClassTerm`.

    The gradient of a student's bin is f (softmax(s) - softmax(t)) / 4.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, foreground: Tensor, reg_max: int) -> Tensor:
        """A scalar.

        Args:
            ctx: of autograd.
            student: [B, 4 * R, A] logits, float32.
            teacher: the same shape, any precision.
            foreground: [B, A] f.
            reg_max: R.
        """
        gradient = torch.empty_like(student)
        total = student.new_zeros(())
        size = 1 if student.device.type == "cpu" else len(student)
        parts = (torch.split(whole, size) for whole in (student, teacher, gradient, foreground))  # type: ignore[no-untyped-call]
        for s, t, into, f in zip(*parts, strict=True):
            sides = (len(s), 4, reg_max, s.shape[2])
            weight = (f / 4)[:, None, None]
            log_s, log_t = s.view(sides).log_softmax(2), t.float().view(sides).log_softmax(2)
            wanted = log_t.exp()
            torch.sub(torch.exp(log_s, out=into.view(sides)), wanted, out=into.view(sides)).mul_(weight)
            total += (wanted.mul_(log_t.sub_(log_s)).sum(2, keepdim=True) * weight).sum()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        """To the student alone."""
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(outer), None, None, None


def _divergence_(t: Tensor, s: Tensor, q: Tensor, spare: Tensor) -> Tensor:
    """`bernoulli_kl` at T = 1, without gradient: softplus(s) - softplus(t) - q (s - t).

    It is the same for both signs of the logits, and taken on the side where q <= 1/2: there nothing large cancels. The
    difference of the softplus is log(1 + (e^s - e^t) / (1 + e^t)), for s > 80 with s - 80 beside it.

    Args:
        t, s, q, spare: logits of teacher and student, sigmoid(t), anything; all are overwritten.

    Returns:
        One of them.
    """
    s.copysign_(torch.mul(s, t, out=spare)).neg_()  # s for t < 0, -s for t > 0
    t.abs_().neg_()
    torch.minimum(q, torch.sub(1, q, out=spare), out=q)  # sigmoid of this t
    torch.sub(s, t, out=spare).mul_(q)  # q (s - t)
    spare.sub_(torch.clamp(s, min=80).sub_(80))
    torch.sub(s.clamp_(max=80).exp_(), t.exp_(), out=s)
    return s.mul_(q.neg_().add_(1)).log1p_().sub_(spare)
