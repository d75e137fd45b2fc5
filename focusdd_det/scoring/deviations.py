"""How far a look in low precision can be from one in full, and what a source could therefore be worth. Pure arithmetic.

The two differ by about the same amount in the logit of p, whatever p is, and in the share of attention. The largest
difference among sources that were looked at twice, times SAFETY, is taken as what any source may be off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SAFETY = 2.0
LEAST_P = 1e-3  # a smaller difference of p is rounding, wherever on the scale it is
LEAST_LOGIT, LEAST_SHARE = 0.05, 2e-3  # what is taken at least, before anything was seen twice

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Deviation:
    """The largest differences seen between the two looks.

    Attributes:
        logit: of logit(p), p limited to [1e-3, 1 - 1e-3]; differences of p below 1e-3 do not count.
        share: of the attention share.
        sources: how many were looked at twice.
    """

    logit: float = 0.0
    share: float = 0.0
    sources: int = 0

    def joined(self, other: Deviation) -> Deviation:
        """The larger of both."""
        return Deviation(max(self.logit, other.logit), max(self.share, other.share), self.sources + other.sources)


def deviation(p: Values, p_again: Values, share: Values, share_again: Values) -> Deviation:
    """How far looks in low precision (p, share [n]) were from those in full (`again`). What is not a number, as in a
    half precision that overflowed, counts as infinitely far: then nothing is left to the first look."""
    if not len(p):
        return Deviation()
    far = np.where(np.abs(p - p_again) <= LEAST_P, 0.0, np.abs(_logit(p) - _logit(p_again)))
    logit, shares = (float(np.nan_to_num(values, nan=np.inf).max()) for values in (far, np.abs(share - share_again)))
    return Deviation(logit, shares, len(p))


def optimistic(p: Values, share: Values, seen: Deviation) -> tuple[Values, Values]:
    """The largest p and share [n] that sources can have which were looked at in low precision alone."""
    logit = _logit(p) + max(LEAST_LOGIT, SAFETY * seen.logit)
    most = np.maximum(1 / (1 + np.exp(-logit)), p + SAFETY * LEAST_P)
    return np.minimum(most, 1.0), np.minimum(share + max(LEAST_SHARE, SAFETY * seen.share), 1.0)


def _logit(p: Values) -> Values:
    limited = np.clip(p, LEAST_P, 1 - LEAST_P)
    return np.asarray(np.log(limited / (1 - limited)), np.float64)
