"""Dynamic fine-tuning: every epoch another balanced random subset of the real pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from focusdd_det.classify.classset import ClassSet
from focusdd_det.classify.views import Row, ViewDataset, ViewSettings, draw
from focusdd_det.seeds import seed_of
from focusdd_det.training.replay import EpochSampler
from focusdd_det.types import Image


class Subsets:
    """For every epoch `ipc` pictures a class, without replacement; a class with fewer gives all it has.

    What is drawn depends on (seed, epoch, class) alone.

    Args:
        classes: [N] int64, the class of every picture.
    """

    def __init__(self, classes: NDArray[np.int64], ipc: int, seed: int) -> None:
        self.members = np.argsort(classes, kind="stable")  # pictures sorted by class: 8 bytes a picture, no lists
        self.bounds = np.concatenate(([0], np.cumsum(np.bincount(classes))))
        self.ipc, self.seed = ipc, seed
        self._last: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return int(np.minimum(np.diff(self.bounds), self.ipc).sum())

    def of(self, epoch: int) -> NDArray[np.int64]:
        """Indices of the epoch's pictures, rising."""
        if self._last is None or self._last[0] != epoch:
            drawn = []
            for label, (start, end) in enumerate(zip(self.bounds[:-1], self.bounds[1:], strict=True)):
                rng = np.random.default_rng(seed_of("subset", self.seed, epoch, label))
                drawn.append(self.members[start + rng.permutation(end - start)[: self.ipc]])
            self._last = epoch, np.sort(np.concatenate(drawn))
        return self._last[1]


class SubsetSampler(EpochSampler):
    """Shuffled (epoch, index) pairs of every epoch's subset."""

    def __init__(self, subsets: Subsets, seed: int, rank: int = 0, world: int = 1) -> None:
        self.subsets = subsets
        super().__init__(len(subsets), seed, rank=rank, world=world)

    def order(self, epoch: int) -> list[int]:
        """Indices into the whole data set."""
        indices: list[int] = self.subsets.of(epoch)[super().order(epoch)].tolist()
        return indices


class SubsetViews(ViewDataset):
    """Views whose CutMix partners are of the epoch's subset too: an epoch shows nothing else."""

    def __init__(self, class_set: ClassSet, settings: ViewSettings, subsets: Subsets) -> None:
        super().__init__(class_set, settings)
        self.subsets = subsets
        self._keys: tuple[int, list[str]] = (-1, [])  # of the subset of that epoch

    def _draw(self, epoch: int, index: int, picture: Image) -> Row:
        subset = self.subsets.of(epoch)
        if self._keys[0] != epoch:
            self._keys = epoch, [self.class_set.keys[i] for i in subset]
        place = int(np.searchsorted(subset, index))
        row = draw(self.settings, epoch, place, self._keys[1], {place: picture.shape[:2]})
        if row[5] >= 0:
            row[5] = subset[row[5]]
        return row
