"""How different the pictures of a set are: mean distances over all pairs of their features. Arrays only.

Exact, and in memory that does not grow with the number of pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
_BLOCK = 512  # pictures a side of the blocks of distances


@dataclass(frozen=True)
class Diversity:
    """Mean over all pairs of pictures.

    Attributes:
        euclidean: |a - b|.
        squared: |a - b|^2.
        cosine: 1 - cos(a, b), in [0, 2].
        cosine_in_class: the same over the pairs of one class, and then over the classes; None without such a pair.
        pairs: number of all pairs.
    """

    euclidean: float
    squared: float
    cosine: float
    cosine_in_class: float | None
    pairs: int


def diversity(features: Floats, classes: NDArray[np.int64]) -> Diversity | None:
    """Mean distances; None with fewer than two pictures.

    Args:
        features: [n, d] finite.
        classes: [n].
    """
    n = len(features)
    if n < 2:
        return None
    inside = [mean_cosine(features[classes == index]) for index in np.unique(classes)]
    within = [value for value in inside if value is not None]
    return Diversity(
        euclidean=mean_euclidean(features),
        squared=mean_squared(features),
        cosine=mean_cosine(features) or 0.0,
        cosine_in_class=float(np.mean(within)) if within else None,
        pairs=n * (n - 1) // 2,
    )


def mean_squared(features: Floats) -> float:
    """Mean of |a - b|^2 over all pairs, n >= 2: twice the (n - 1)-variance, summed over the d axes."""
    return float(2 * features.astype(np.float64).var(axis=0, ddof=1).sum())


def mean_cosine(features: Floats) -> float | None:
    """Mean of 1 - cos(a, b) over all pairs; None with n < 2.

    With unit vectors u the sum of cos over ordered pairs is |sum u|^2 - n, so no pair has to be looked at.
    """
    n = len(features)
    if n < 2:
        return None
    units = features.astype(np.float64)
    units /= np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-12)
    total = units.sum(axis=0)
    return float(1 - (total @ total - (units * units).sum()) / (n * (n - 1)))


def mean_euclidean(features: Floats) -> float:
    """Mean of |a - b| over all pairs, n >= 2; the distances exist in blocks of 512 x 512 only."""
    n, total = len(features), 0.0
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)  # |a|^2 + |b|^2 - 2ab keeps digits
    squares = (centred * centred).sum(axis=1)
    for i in range(0, n, _BLOCK):
        for j in range(i, n, _BLOCK):
            a, b = centred[i : i + _BLOCK], centred[j : j + _BLOCK]
            block = np.sqrt(np.maximum(squares[i : i + len(a), None] + squares[j : j + len(b)] - 2 * a @ b.T, 0))
            total += float(np.triu(block, 1).sum() if i == j else block.sum())
    return total / (n * (n - 1) / 2)
