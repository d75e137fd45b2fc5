"""Cases timed side by side. Every round runs each case once, in a rotating order, so that whatever slows the machine
down for a while slows all of them down; what is quoted is a ratio of times of one round."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")
LOW, HIGH = 0.1, 0.9  # of the rounds' ratios: the spread that is printed


class Ratio(NamedTuple):
    """How many times as long one thing takes as another: the median over rounds and its LOW and HIGH quantiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def settle() -> None:
    """Wait for the GPU, if one is at work: what was only handed to it has not been done yet."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def compare(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    *,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], None] = settle,
    tick: Callable[[str], None] = lambda _name: None,
) -> dict[str, list[float]]:
    """Seconds of every case in every round.

    Round r begins with case r (modulo their number) and goes on in their order, so that over as many rounds as there
    are cases each has had every place once.

    Args:
        cases: name -> what is timed; what it returns is dropped.
        rounds: at least 1.
        warmup: rounds that are run before and not counted.
        clock: seconds; `time.process_time` counts the processor's instead, for a machine that others use too.
        wait: called before each reading of the clock.
        tick: called with the name of each case that has run, warm-up included.

    Raises:
        ValueError: no case, or no round.
    """
    if not cases or rounds < 1 or warmup < 0:
        raise ValueError(
            f"expected some cases, at least 1 round and no negative warm-up, got {len(cases)}, {rounds}, {warmup}"
        )
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        for name in rotated(names, turn):
            wait()
            started = clock()
            cases[name]()
            wait()
            taken = clock() - started
            if turn >= 0:
                seconds[name].append(taken)
            tick(name)
    return seconds


def in_turns(points: Sequence[Callable[[], T]], rounds: int) -> list[list[T]]:
    """What points say that measure themselves, [rounds][points]; their turns are those of the cases of `compare`."""
    said: list[list[T]] = []
    for turn in range(rounds):
        answers = {place: points[place]() for place in rotated(range(len(points)), turn)}
        said.append([answers[place] for place in range(len(points))])
    return said


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """All of them, beginning with number `turn` (modulo their number)."""
    first = turn % len(items)
    return [*items[first:], *items[:first]]


def ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """a / b, paired by round.

    Raises:
        ValueError: not as many rounds of the one as of the other, none, or a time of b that is not above 0.
    """
    if len(a) != len(b) or not a or min(b) <= 0:
        raise ValueError(f"expected as many times above 0 of both, got {len(a)} and {len(b)}")
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return Ratio(*(float(q) for q in np.quantile(ratios, (0.5, LOW, HIGH))))


def together(*cases: Sequence[float]) -> list[float]:
    """The times of several cases added up, round by round."""
    return [sum(times) for times in zip(*cases, strict=True)]
