"""Trace of a loss's Hessian by Hutchinson's estimate: tr(H) = E[v^T H v] for v of random signs. Tensors only.

A flat minimum has a small trace. v^T H v takes two backward passes and H is never formed (Hutchinson 1990).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from focusdd_det.devices import whole_float32
from focusdd_det.seeds import seed_of

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Trace:
    """An estimate of the trace.

    Attributes:
        mean: of the probes.
        standard_error: of that mean; None with one probe.
        probes: each probe's v^T H v.
        loss: the loss itself.
        parameters: side of the Hessian.
    """

    mean: float
    standard_error: float | None
    probes: tuple[float, ...]
    loss: float
    parameters: int


def hessian_trace(
    loss: Callable[[Batch], Tensor],
    batches: Iterable[tuple[Batch, float]],
    parameters: Sequence[Tensor],
    probes: int,
    seed: int = 0,
) -> Trace:
    """The trace of the Hessian of sum over batches of weight * loss(batch), with respect to the parameters.

    A probe is the same vector in all batches, so the estimate is of the whole sum; one batch is in memory at a time.

    Args:
        loss: a batch -> a scalar that can be differentiated twice.
        batches: with their weights; (batch, pictures in it / pictures in all) gives the mean over the pictures.
        parameters: float32, requiring gradients.
        probes: at least 1.
        seed: of the random signs.

    Raises:
        ValueError: no probe, or no parameter.
    """
    if probes < 1 or not parameters:
        raise ValueError(f"expected at least one probe and one parameter, got {probes} and {len(parameters)}")
    values = [0.0] * probes
    total = 0.0
    for batch, weight in batches:
        with whole_float32(parameters[0]), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            value = loss(batch)
            gradients = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
            total += weight * float(value.detach())
            used = [(g, p) for g, p in zip(gradients, parameters, strict=True) if g is not None and g.requires_grad]
            for number in range(probes if used else 0):
                signs = _signs(parameters, seed, number)
                chosen = [v for v, g in zip(signs, gradients, strict=True) if g is not None and g.requires_grad]
                products = torch.autograd.grad(
                    [g for g, _ in used],
                    [p for _, p in used],
                    grad_outputs=chosen,
                    retain_graph=number + 1 < probes,
                    allow_unused=True,
                )
                dots = (
                    float((v.double() * h.double()).sum())
                    for v, h in zip(chosen, products, strict=True)
                    if h is not None
                )
                values[number] += weight * sum(dots)
    mean = sum(values) / probes
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (probes - 1) / probes) if probes > 1 else None
    return Trace(mean, spread, tuple(values), total, sum(p.numel() for p in parameters))


def _signs(parameters: Sequence[Tensor], seed: int, number: int) -> list[Tensor]:
    """Vectors of +1 and -1 (Rademacher), drawn on the CPU: the same on every device, and never kept."""
    generator = torch.Generator().manual_seed(seed_of("probe", seed, number) >> 1)
    return [
        (torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8) * 2 - 1).to(p.device, p.dtype)
        for p in parameters
    ]
