"""Coresets: whole pictures that stand for their class in the ViT's feature space. The baselines of the paper's Table 7.

Both see one class at a time and its features in blocks of float32, so that memory stays that of the float16 features.
Distances are rounded before they decide; ties go to the least content hash.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from focusdd_det.config import SetConfig
from focusdd_det.errors import ConfigError
from focusdd_det.methods.baselines import Whole
from focusdd_det.seeds import uniform
from focusdd_det.select import Candidates, Order, ranked

Features = NDArray[np.float16]
Vectors = NDArray[np.float64]

_BLOCK = 8192  # features that are float32 at a time
_DECIMALS = 6  # of squared distances between vectors of length 1
_ITERATIONS = 50  # of k-means; it ends when nothing moves, most often before the 20th
_LEAST_HERDED = 1000  # pictures; the same for every small ipc, so that a set can be grown


class _Coreset(Whole, ABC):
    """Whole pictures, no grid, as `whole` takes them, but in an order that the features give."""

    needs_selector = True
    needs_features = True

    def backgrounds(self, candidates: Candidates, config: SetConfig, group: str) -> Order:
        by_hash = ranked(candidates, np.zeros(len(candidates), np.int64), False)
        if candidates.features is None:
            raise ConfigError(f"{type(self).__name__} needs the features of the candidates, and there are none")
        if not len(by_hash):
            return by_hash
        sorted_already = bool((by_hash[1:] > by_hash[:-1]).all())  # the store's are: no copy of them
        features = candidates.features if sorted_already else candidates.features[by_hash]
        return by_hash[self.choose(features, config, group)]

    @abstractmethod
    def choose(self, features: Features, config: SetConfig, group: str) -> Order:
        """Positions, first choice first, of sources that are sorted by content hash."""


class Herding(_Coreset):
    """One picture after the other, each such that the mean feature of those chosen stays nearest to the mean of the
    class (Welling 2009; iCaRL, Rebuffi et al. 2017, Algorithm 4). The features have length 1; means are not made so
    again."""

    def choose(self, features: Features, config: SetConfig, group: str) -> Order:
        return by_herding(features, max(_LEAST_HERDED, 4 * config.ipc * config.grid**2))


class KMeans(_Coreset):
    """As many clusters as pictures are wanted (k-means++, Arthur and Vassilvitskii 2007), and of each the picture
    nearest to its centroid; replacements are the next nearest, cluster by cluster. Another ipc is another clustering:
    such a set cannot be grown."""

    growable = False

    def adapt(self, config: SetConfig) -> SetConfig:
        return dataclasses.replace(super().adapt(config), selection="paper")

    def choose(self, features: Features, config: SetConfig, group: str) -> Order:
        return by_clusters(features, config.ipc * config.grid**2, lambda i: uniform("kmeans", config.seed, group, i))


def by_herding(features: Features, length: int) -> Order:
    """Greedy herding: choice i is argmin over the unused x of |mean - (chosen + x) / i|.

    With w = i * mean - sum of the chosen that is argmax of 2 x.w - |x|^2: one product a step, O(n * length * d).

    Args:
        features: [n, d] float16; equally good ones are taken in this order.
        length: so many are herded; the others follow by their nearness to the mean.

    Returns:
        [n] positions.
    """
    n = len(features)
    blocks = _Blocks(features)
    mean = blocks.sum() / n
    squares = blocks.each(lambda block: np.square(block).sum(axis=1))
    chosen = np.zeros_like(mean)
    taken = np.zeros(n, np.bool_)
    order = []
    for i in range(1, min(length, n) + 1):
        gain = np.round(2 * blocks.times(i * mean - chosen) - squares, _DECIMALS)
        gain[taken] = -np.inf
        best = int(gain.argmax())  # the first of equals
        taken[best] = True
        chosen += features[best].astype(np.float64)
        order.append(best)
    rest = np.flatnonzero(~taken)
    nearness = np.round(2 * blocks.times(mean) - squares, _DECIMALS)[rest]
    return np.concatenate([np.array(order, np.int64), rest[np.argsort(-nearness, kind="stable")]])


def by_clusters(features: Features, clusters: int, draw: Callable[[int], float]) -> Order:
    """k-means++ and Lloyd's iterations; then, in turns over the clusters, the nearest to each centroid.

    Args:
        features: [n, d] float16; equally near ones are taken in this order.
        clusters: k; at most n are made.
        draw: i -> a number in (0, 1), for the i-th first centroid.

    Returns:
        [n] positions. The largest cluster comes first in each turn.
    """
    n = len(features)
    blocks = _Blocks(features)
    centroids = _plus_plus(features, blocks, min(clusters, n), draw)
    labels, distance = blocks.nearest(centroids)
    for _ in range(_ITERATIONS):
        sums, counts = blocks.sums_by(labels, len(centroids))
        filled = counts > 0  # an empty cluster stays where it is
        centroids[filled] = sums[filled] / counts[filled, None]
        before = labels
        labels, distance = blocks.nearest(centroids)
        if np.array_equal(before, labels):
            break
    inside = np.lexsort((np.arange(n), distance, labels))
    counts = np.bincount(labels, minlength=len(centroids))
    starts = np.cumsum(counts) - counts
    turn = np.empty(n, np.int64)
    turn[inside] = np.arange(n) - starts[labels[inside]]
    first = np.full(len(centroids), n)
    np.minimum.at(first, labels, np.arange(n))
    return np.lexsort((first[labels], -counts[labels], turn))


def _plus_plus(features: Features, blocks: _Blocks, clusters: int, draw: Callable[[int], float]) -> Vectors:
    """First centroids [k, d]: each a feature, drawn in proportion to its squared distance from those before it."""
    n = len(features)
    chosen = [int(draw(0) * n)]
    nearest = blocks.distance_to(features[chosen[0]])
    for i in range(1, clusters):
        nearest[chosen[-1]] = 0.0
        heights = np.cumsum(nearest)
        if heights[-1] <= 0:  # all that is left are copies of what was chosen
            unused = np.setdiff1d(np.arange(n), chosen)
            chosen += unused[: clusters - i].tolist()
            break
        chosen.append(int(np.searchsorted(heights, draw(i) * heights[-1], side="right")))
        nearest = np.minimum(nearest, blocks.distance_to(features[chosen[-1]]))
    return features[chosen].astype(np.float64)


class _Blocks:
    """Products with a class' features, float32 a block at a time; one block is kept, more are not."""

    def __init__(self, features: Features) -> None:
        self.features = features
        self.only = features.astype(np.float32) if len(features) <= _BLOCK else None

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        if self.only is not None:
            yield self.only
            return
        for start in range(0, len(self.features), _BLOCK):
            yield self.features[start : start + _BLOCK].astype(np.float32)

    def each(self, work: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Vectors:
        """A number for each feature: [n]."""
        return np.concatenate([work(block) for block in self]).astype(np.float64)

    def times(self, vector: Vectors) -> Vectors:
        """Inner products with one vector: [n]."""
        small = vector.astype(np.float32)
        return self.each(lambda block: block @ small)

    def sum(self) -> Vectors:
        """[d]."""
        return np.asarray(sum(block.sum(axis=0, dtype=np.float64) for block in self), np.float64)

    def distance_to(self, feature: NDArray[np.float16]) -> Vectors:
        """Squared distances to one of the features: [n], at least 0, rounded."""
        point = feature.astype(np.float32)
        return np.round(self.each(lambda block: np.square(block - point).sum(axis=1)), _DECIMALS)

    def nearest(self, centroids: Vectors) -> tuple[NDArray[np.int64], Vectors]:
        """The nearest centroid of each feature, the first of equals, and its squared distance, rounded: [n], [n]."""
        small = centroids.astype(np.float32)
        squares = np.square(centroids).sum(axis=1)
        labels, distances = [], []
        for block in self:
            own = np.square(block).sum(axis=1, dtype=np.float64)
            table = np.round(squares + own[:, None] - 2 * (block @ small.T).astype(np.float64), _DECIMALS)
            labels.append(table.argmin(axis=1))
            distances.append(table.min(axis=1))
        return np.concatenate(labels), np.concatenate(distances)

    def sums_by(self, labels: NDArray[np.int64], clusters: int) -> tuple[Vectors, NDArray[np.int64]]:
        """Sum [k, d] and number [k] of the features of each cluster."""
        sums = np.zeros((clusters, self.features.shape[1]))
        start = 0
        for block in self:
            own = labels[start : start + len(block)]
            by_label = np.argsort(own, kind="stable")
            present, first = np.unique(own[by_label], return_index=True)
            sums[present] += np.add.reduceat(block[by_label].astype(np.float64), first, axis=0)
            start += len(block)
        return sums, np.bincount(labels, minlength=clusters)
