"""Mean, spread and paired differences over seeds, and when a ranking may be claimed. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEAST_SEEDS = 3  # pairs below which nothing is claimed
FLOOR = 3.0  # mAP in percent that both arms must be above
STANDARD_ERRORS = 2.0  # that a difference must exceed
CONFIDENCE = 0.95  # two-sided, that it must reach as well: with three pairs two standard errors are 82 % only
# Student's t at CONFIDENCE: degrees of freedom -> quantile. Between them it is nearly linear in 1 / degrees of freedom.
_STUDENT = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
    15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, math.inf: 1.960,
}  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """Values of one arm.

    Attributes:
        n: how many; mean: of them; sd: sample standard deviation (n - 1), None for one value.
    """

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Difference:
    """An arm minus its baseline, paired by seed.

    Attributes:
        n: seeds that both have; mean: of the differences; se: standard error of that mean, None for one pair.
    """

    n: int
    mean: float
    se: float | None


def summary(values: Sequence[float]) -> Summary | None:
    """Mean and sample standard deviation; None of no values."""
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    return Summary(len(values), mean, _sd(values, mean))


def paired_difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Arm minus baseline over the seeds that both have; None if there is none.

    Args:
        arm, baseline: seed -> value.
    """
    differences = [arm[seed] - baseline[seed] for seed in sorted(set(arm) & set(baseline))]
    if not differences:
        return None
    n, mean = len(differences), math.fsum(differences) / len(differences)
    sd = _sd(differences, mean)
    return Difference(n, mean, None if sd is None else sd / math.sqrt(n))


def student(pairs: int) -> float:
    """How many standard errors a mean of so many differences (at least 2) must exceed at CONFIDENCE."""
    freedom = pairs - 1
    below, above = max(n for n in _STUDENT if n <= freedom), min(n for n in _STUDENT if n >= freedom)
    if below == above:
        return _STUDENT[below]
    part = (1 / below - 1 / freedom) / (1 / below - 1 / above)
    return _STUDENT[below] + part * (_STUDENT[above] - _STUDENT[below])


def verdict(difference: Difference | None, means: Sequence[float], floor: float | None = FLOOR) -> tuple[str, str]:
    """Whether a ranking may be claimed.

    Args:
        difference: of the arm to its baseline.
        means: of the two arms, over the seeds of the difference.
        floor: value that both must be above; None: there is none.

    Returns:
        `better`, `worse` or `not resolved`, and why it is not resolved (empty otherwise).
    """
    if difference is None:
        return "not resolved", "no seed in common"
    reasons = []
    if difference.n < LEAST_SEEDS:
        reasons.append(f"{difference.n} of at least {LEAST_SEEDS} seeds")
    if difference.se is not None and not abs(difference.mean) > STANDARD_ERRORS * difference.se:
        reasons.append(f"within {STANDARD_ERRORS:g} SE")
    elif difference.se is not None and not abs(difference.mean) > student(difference.n) * difference.se:
        sure = f"{100 * CONFIDENCE:g} % with {difference.n} seeds"
        reasons.append(f"more than twice its standard error, but not at {sure}")
    if floor is not None and not all(mean > floor for mean in means):
        reasons.append(f"not above {floor:g} mAP")
    if reasons:
        return "not resolved", ", ".join(reasons)
    return ("better" if difference.mean > 0 else "worse"), ""


def _sd(values: Sequence[float], mean: float) -> float | None:
    if len(values) < 2:
        return None
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
