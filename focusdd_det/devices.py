"""The device to compute on, under the same names everywhere, and how many processors there are to work beside it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from focusdd_det.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

A_THREAD = 640**2  # pixels of a part of a batch: measured in docs/performance.md
_CPUINFO = Path("/proc/cpuinfo")
_MULTIPLY = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, ARM; avx_ne_convert only converts


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


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware; False where nobody tells. Never raises.

    Not `torch.ops.mkldnn._is_mkldnn_bf16_supported`, which is also true where bfloat16 is emulated on AVX-512.
    """
    with contextlib.suppress(OSError), _CPUINFO.open(errors="replace") as lines:
        for line in lines:
            key, _, flags = line.partition(":")
            if key.strip() in ("flags", "Features"):  # of the first processor
                return not _MULTIPLY.isdisjoint(flags.split())
    import torch

    ask = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # Windows, macOS; AMX never comes without it
    return bool(ask is not None and ask())


def at_once(pixels: int, a_thread: int = A_THREAD) -> int:
    """How many pictures of so many pixels a CPU should take through a frozen network at once, at least one.

    What a large batch makes of a network's layers fits no cache of a CPU, which then waits for its memory.

    Args:
        pixels: of a picture, as the network sees it.
        a_thread: pixels for each of torch's threads.
    """
    import torch

    return max(1, a_thread * torch.get_num_threads() // pixels)


def in_parts(x: Tensor, a_thread: int = A_THREAD) -> Sequence[Tensor]:
    """A batch as it should go through a frozen network that treats each picture by itself.

    Args:
        x: [B, C, H, W].
        a_thread: as in `at_once`.

    Returns:
        On a CPU parts of the batch, in order; else all of it.
    """
    import torch

    return torch.split(x, at_once(x.shape[2] * x.shape[3], a_thread)) if x.device.type == "cpu" else [x]


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
