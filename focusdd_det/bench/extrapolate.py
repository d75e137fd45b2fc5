"""What the times of a run mean for sets that nobody builds to measure: ImageNet-1K, and a class as in the paper.

Arithmetic: so many sources times the milliseconds of one, plus so many composites times those of one. Planning, models
that load and the finish of a set are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

IMAGENET_SOURCES, IMAGENET_CLASSES, IPC = 1_281_167, 1_000, 50
CLASS_SOURCES, CLASS_IPC = 1_300, 100  # of the paper's 8.67 s
PAPER_SECONDS, PAPER_GB = 8.67, 6.84  # RTX 4090, DeiT-S; DESIGN section 6
TARGET_SECONDS, TARGET_GB = 0.87, 2.0  # of a GPU
SCORING = "scoring, "  # how the names of cases begin that look at sources as a build does
THEN = " then "  # in the name of one that looks twice


class Meaning(NamedTuple):
    """Times of one way to look at sources, and what they mean.

    Attributes:
        source_ms, composite_ms: measured, of one.
        imagenet_hours: ImageNet-1K at IPC 50.
        class_seconds: one class of 1,300 pictures at IPC 100; None for a screening, which does not pay there.
    """

    source_ms: float
    composite_ms: float
    imagenet_hours: float
    class_seconds: float | None


def meaning(source_ms: float, composite_ms: float, screened: bool = False) -> Meaning:
    """What milliseconds of a source and of a composite mean."""
    imagenet = IMAGENET_SOURCES * source_ms + IMAGENET_CLASSES * IPC * composite_ms
    one = CLASS_SOURCES * source_ms + CLASS_IPC * composite_ms
    return Meaning(source_ms, composite_ms, imagenet / 3.6e6, None if screened else one / 1e3)


def extrapolated(
    seconds: Mapping[str, Sequence[float]], sources: int, composing: float, composites: int
) -> dict[str, Meaning]:
    """For each case of `seconds` that scores; empty where no composite was made.

    Args:
        seconds: case -> of all sources, in every round.
        sources: how many there were.
        composing: seconds that a whole build took to make so many `composites`.
    """
    if not composites:
        return {}
    each = composing / composites * 1e3
    return {
        name.removeprefix(SCORING): meaning(float(np.median(times)) / sources * 1e3, each, THEN in name)
        for name, times in seconds.items()
        if name.startswith(SCORING)
    }


def told(found: Mapping[str, Mapping[str, Any]], image_size: int, peak_gpu_gb: float | None) -> list[str]:
    """For people, in lines.

    Args:
        found: `extrapolated`, as plain values.
        image_size: side of the composites, px.
        peak_gpu_gb: of the whole build; None without a GPU.
    """
    if not found:
        return []
    lines = [f"Arithmetic from this run's times (looking and composing alone; composites of {image_size} px):"]
    for name, each in found.items():
        line = (
            f"{name}: ImageNet-1K: {IMAGENET_SOURCES:,} sources x {each['source_ms']:.2f} ms + {IMAGENET_CLASSES} "
            f"classes x IPC {IPC} composites x {each['composite_ms']:.1f} ms = {each['imagenet_hours']:.2f} hours"
        )
        if each["class_seconds"] is not None:
            line += f"; a class of {CLASS_SOURCES:,} at IPC {CLASS_IPC}: {each['class_seconds']:.2f} s"
        lines.append(f"- {line}")
    paper = f"The paper's class: {PAPER_SECONDS} s on an RTX 4090 with DeiT-S; target on a GPU {TARGET_SECONDS} s"
    if peak_gpu_gb is None:
        return [*lines, f"{paper}."]
    return [
        *lines,
        f"{paper}.",
        f"Peak GPU memory of a whole build: {peak_gpu_gb:.2f} GB; the paper's {PAPER_GB} GB; target {TARGET_GB:g} GB.",
    ]
