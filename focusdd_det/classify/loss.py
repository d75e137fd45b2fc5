"""Losses of the student: cross-entropy with the teacher's distribution, whole or its top k, and hard labels.

Tensors in, scalars out. T softens both sides; there is no T^2 factor, so T = 20 means small gradients and the learning
rates of the paper fit them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of - sum_c softmax(t/T)_c log_softmax(s/T)_c, in float32 whatever the autocast.

    Args:
        student, teacher: logits [B, C].
        temperature: T > 0.

    Returns:
        A scalar; equal to the teacher's entropy at T when both agree.
    """
    with torch.autocast(student.device.type, enabled=False):
        p = (teacher.float() / temperature).softmax(dim=1)
        return -(p * (student.float() / temperature).log_softmax(dim=1)).sum(dim=1).mean()


def soft_cross_entropy_topk(
    student: Tensor, values: Tensor, indices: Tensor, rest: Tensor, temperature: float
) -> Tensor:
    """The same with only the teacher's k largest logits; all other classes are one bucket on both sides.

    Args:
        student: logits [B, C].
        values, indices: the teacher's k largest logits [B, K] and their classes [B, K] (whole numbers, K <= C).
        rest: [B], log of the sum of exp(t/T) over the other classes; -inf when there are none.
        temperature: the T that `rest` was made with.

    Returns:
        A scalar; equal to `soft_cross_entropy` when K = C.
    """
    with torch.autocast(student.device.type, enabled=False):
        t, rest, indices = values.float() / temperature, rest.float(), indices.long()
        log_q = (student.float() / temperature).log_softmax(dim=1)
        log_z = torch.logaddexp(t.logsumexp(dim=1), rest)
        p = (t - log_z[:, None]).exp()
        loss = -(p * log_q.gather(1, indices)).sum(dim=1)
        if indices.shape[1] < log_q.shape[1]:
            others = log_q.scatter(1, indices, float("-inf")).logsumexp(dim=1)
            loss = loss - (rest - log_z).exp() * others
        return loss.mean()


def mixed_cross_entropy(student: Tensor, cls: Tensor, partner_cls: Tensor, share: Tensor) -> Tensor:
    """Hard labels under CutMix: the mean over the batch of share * CE(own class) + (1 - share) * CE(partner's).

    Args:
        student: logits [B, C].
        cls, partner_cls: classes [B], int64.
        share: [B] float, the share of the view that is the picture's own.
    """
    with torch.autocast(student.device.type, enabled=False):
        log_q = student.float().log_softmax(dim=1)
        own = F.nll_loss(log_q, cls, reduction="none")
        partner = F.nll_loss(log_q, partner_cls, reduction="none")
        return (share * own + (1 - share) * partner).mean()
