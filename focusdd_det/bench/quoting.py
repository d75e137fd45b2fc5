"""When numbers should not be quoted: the machine had other work, or a ratio is another one from round to round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

BUSY = 0.5  # load at the start, as a share of the processors
WIDE = 1.5  # times as high: a ratio's 90 % quantile over its 10 % quantile


def busy(load: float | None, processors: int) -> list[str]:
    """A note if the machine had work before the benchmark began; `load` is the mean of the last minute."""
    if load is None or load <= BUSY * processors:
        return []
    told = f"the machine was busy before this began (load {load:.2f} on {processors} processors)"
    return [f"{told}: its numbers should not be quoted"]


def wide(part: Mapping[str, Any]) -> list[str]:
    """A note if ratios of a part's result, or of what it holds, have a wide spread."""
    names = [name for name, value in _ratios(part) if value["high"] > WIDE * value["low"]]
    if not names:
        return []
    return [f"wide spread (90 % of the rounds over 10 % is above {WIDE}), not to be quoted: {'; '.join(names)}"]


def _ratios(part: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float]]]:
    yield from part.get("ratios", {}).items()
    for value in part.values():
        if isinstance(value, Mapping):
            yield from _ratios(value)
