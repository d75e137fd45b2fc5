"""The device to compute on, under the same names everywhere, and how many processors there are to work beside it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from focusdd_det.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def device_of(name: str) -> str:
    """As torch has it.

    Args:
        name: auto (the first GPU, else cpu), cpu, cuda, cuda:1, or a GPU's number, as `yolo` takes it.

    Raises:
        ConfigError: there is no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    device = f"cuda:{name}" if name.isdecimal() else name
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        known = "auto, cpu or cuda:0" if torch.cuda.is_available() else "auto or cpu, as no GPU can be used here"
        raise ConfigError(f"device={name}: {str(error).splitlines()[0]}; expected {known}") from error
    return device


def processors() -> int:
    """Those that this process may use, at least one: on a shared machine fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parts(x: Tensor, pixels: int) -> Sequence[Tensor]:
    """A batch as it should go through a frozen network that treats each picture by itself.

    What a large batch makes of a network's first layers fits no cache of a CPU, which then waits for its memory.

    Args:
        x: [B, C, H, W].
        pixels: of a part, for each thread; a part has at least one picture.

    Returns:
        On a CPU parts of the batch, in order; else all of it.
    """
    import torch

    if x.device.type != "cpu":
        return [x]
    return torch.split(x, max(1, pixels * torch.get_num_threads() // (x.shape[2] * x.shape[3])))


@contextlib.contextmanager
def whole_float32(x: Tensor) -> Iterator[None]:
    """Inside, a GPU's convolutions of float32 are not rounded to TF32, which torch does unless told otherwise."""
    import torch

    if x.device.type != "cuda" or x.dtype != torch.float32:
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
