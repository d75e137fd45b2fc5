"""Whether mixed precision can be trusted on this GPU, without Ultralytics' download of a model to try it with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.engine import trainer as engine
from ultralytics.utils import LOGGER

from focusdd_det.losses import ONE2MANY


@contextlib.contextmanager
def local_amp_check() -> Iterator[None]:
    """Ultralytics checks mixed precision with a model that it downloads; this checks with the student."""
    before = engine.check_amp
    engine.check_amp = amp_is_sound
    try:
        yield
    finally:
        engine.check_amp = before


@torch.no_grad()
def amp_is_sound(model: nn.Module) -> bool:
    """Whether float16 autocast gives this model finite scores close to float32's on its GPU. False on a CPU."""
    parameter = next(model.parameters())
    if parameter.device.type != "cuda":
        return False
    training = model.training
    model.eval()
    generator = torch.Generator(parameter.device).manual_seed(0)
    x = torch.rand(2, 3, 256, 256, device=parameter.device, generator=generator)
    full = _scores(model(x)[1])
    with torch.autocast("cuda", dtype=torch.float16):
        half = _scores(model(x)[1])
    model.train(training)
    sound = bool(torch.isfinite(half).all()) and torch.allclose(full, half, atol=0.05)
    if not sound:
        LOGGER.warning("mixed precision is not sound on this GPU; training in float32")
    return sound


def _scores(raw: dict[str, Any]) -> Tensor:
    scores: Tensor = raw.get(ONE2MANY, raw)["scores"]
    return scores.float().sigmoid()
