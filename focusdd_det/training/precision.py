"""In which precision a student is trained, and whether the machine can be trusted with it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.engine import trainer as engine
from ultralytics.utils import LOGGER

from focusdd_det.devices import has_bfloat16
from focusdd_det.errors import ConfigError
from focusdd_det.losses import ONE2MANY


def detector_scores(raw: Any) -> Tensor:
    """Class probabilities from a detector's output in eval mode."""
    heads = raw[1]
    scores: Tensor = heads.get(ONE2MANY, heads)["scores"]
    return scores.float().sigmoid()


def class_scores(raw: Any) -> Tensor:
    """Class probabilities from a classifier's output in eval mode: logits, or Ultralytics' pair that ends with them."""
    logits: Tensor = raw[-1] if isinstance(raw, (list, tuple)) else raw
    return logits.float().softmax(dim=1)


@contextlib.contextmanager
def local_amp_check(scores: Callable[[Any], Tensor] = detector_scores, size: int = 256) -> Iterator[None]:
    """Ultralytics checks mixed precision with a model that it downloads; this checks with the student.

    Args:
        scores: what of the student's output is compared, in [0, 1].
        size: side of the pictures that it is tried on.
    """
    before = engine.check_amp
    engine.check_amp = lambda model: amp_is_sound(model, scores, size)
    try:
        yield
    finally:
        engine.check_amp = before


def check_precision(precision: str, device: Any, amp: Any = True) -> None:
    """Refuse a precision that the device has another key for.

    Args:
        precision: fp32 or bf16, the key of this package.
        device, amp: Ultralytics' keys; no device means the first GPU if there is one.

    Raises:
        ConfigError: bf16 for a training on a GPU, or Ultralytics' bf16 for one on a CPU.
    """
    name = "" if device is None else str(device).lower()
    cpu = name == "cpu" or (not name and not torch.cuda.is_available())
    if precision == "bf16" and not cpu:
        raise ConfigError(
            f"precision=bf16 is for training on a CPU, but device={device or 0}. Mixed precision on a GPU is "
            "Ultralytics' own: give amp=bf16 (or leave amp=True, float16), or train with device=cpu"
        )
    if cpu and amp == "bf16" and precision != "bf16":
        raise ConfigError("amp=bf16 is for training on a GPU; on a CPU give precision=bf16")


def warn_if_slow() -> None:
    """Say so where bfloat16 is emulated: right, and slower than float32."""
    if not has_bfloat16():
        LOGGER.warning("this processor has no bfloat16 instructions: precision=bf16 is much slower here than fp32")


@contextlib.contextmanager
def bf16_on_cpu() -> Iterator[None]:
    """Ultralytics' training step has no mixed precision on a CPU; inside, its autocast is bfloat16."""
    before = engine.autocast
    engine.autocast = lambda *_args, **_kwargs: torch.autocast("cpu", dtype=torch.bfloat16)
    try:
        yield
    finally:
        engine.autocast = before


def amp_is_sound(model: nn.Module, scores: Callable[[Any], Tensor] = detector_scores, size: int = 256) -> bool:
    """Whether float16 autocast gives this model finite scores close to float32's on its GPU. False on a CPU.

    As Ultralytics has it, that is said of a GPU alone: elsewhere nobody asked for mixed precision.
    """
    if next(model.parameters()).device.type != "cuda":
        return False
    sound = half_is_close(model, scores, size)
    if not sound:
        LOGGER.warning("mixed precision is not sound on this GPU; training in float32")
    return sound


@torch.no_grad()
def half_is_close(model: nn.Module, scores: Callable[[Any], Tensor], size: int) -> bool:
    """Whether float16 autocast gives this model finite scores, on average within 0.05 of float32's, wherever it is.

    A hundred random layers move single ones further by rounding alone.

    BatchNorm takes the statistics of what it is shown, on a copy of the model: those of a student from scratch (mean 0,
    variance 1) normalise nothing, so that a deep one overflows as it never would in its training.
    """
    tried = copy.deepcopy(model).eval()
    for module in tried.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    parameter = next(tried.parameters())
    generator = torch.Generator(parameter.device).manual_seed(0)
    x = torch.rand(8, 3, size, size, device=parameter.device, generator=generator)
    full = scores(tried(x))
    with torch.autocast(parameter.device.type, dtype=torch.float16):
        half = scores(tried(x))
    return bool(torch.isfinite(half).all()) and float((full - half).abs().mean()) < 0.05
