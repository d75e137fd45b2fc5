"""Training pictures that depend on (seed, epoch, index) alone, not on the workers or on what came before.

Ultralytics draws its augmentations from the worker's global generators, and mosaic takes its partners from
the pictures that this worker loaded lately. Here the sampler hands (epoch, index) to the data set, which
seeds the generators for that one sample and lets mosaic choose from all pictures.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from ultralytics.data.build import InfiniteDataLoader
from ultralytics.data.dataset import YOLODataset

from focusdd_det.training.clean_data import CleanDataset


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """A 64-bit seed for one sample of one epoch, the same on every platform."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{index}".encode()).digest()[:8], "little")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python, NumPy and torch (CPU) draw from `seed` inside, and go on as before afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed >> 1)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class Pool(NamedTuple):
    """How many epochs of different views a run cycles through: epoch e sees view e % mixed, and view e % closed once
    mosaic and its like are closed (0: closing changes nothing)."""

    mixed: int
    closed: int


class View(NamedTuple):
    """One view of a pool: is mosaic closed, which epoch of the pool, which picture."""

    closed: bool
    epoch: int
    picture: int


LOOK = 4  # a view's look is the mean colour of so many by so many tiles


def look_of(image: Tensor) -> Tensor:
    """[3 * LOOK^2] uint8 of an image [3, H, W] uint8: enough to tell views apart, little enough to be stored."""
    thin = image[:, ::4, ::4]
    tiles = [part for row in thin.tensor_split(LOOK, 1) for part in row.tensor_split(LOOK, 2)]
    return torch.stack([tile.float().mean((1, 2)) for tile in tiles], 1).round().to(torch.uint8).flatten()


class ReplayDataset(CleanDataset):
    """Training data whose item (epoch, index) always has the same pixels and boxes.

    Args:
        seed: the run's seed.
        pool: only so many epochs have views of their own; a sample then says which `view` it is and how it looks
            (`look`, see `look_of`). None: every epoch has.
        Everything else as YOLODataset.
    """

    def __init__(self, *args: Any, seed: int, pool: Pool | None = None, **kwargs: Any) -> None:
        self.seed, self.pool, self.closed = seed, pool, False
        super().__init__(*args, **kwargs)

    def build_transforms(self, hyp: Any) -> Any:
        """Ultralytics' transforms, with mosaic partners drawn from the whole data set."""
        transforms = super().build_transforms(hyp)
        for transform in _walk(transforms):
            if hasattr(transform, "buffer_enabled"):
                transform.buffer_enabled = False
        return transforms

    def __getitem__(self, item: tuple[int, int] | int) -> dict[str, Any]:
        """The sample of (epoch, index); a plain index means epoch 0."""
        epoch, index = item if isinstance(item, tuple) else (0, item)
        view = View(False, epoch, index) if self.pool is None else pooled(self.pool, self.closed, epoch, index)
        seed = sample_seed(self.seed, view.epoch, index)
        for transform in _walk(self.transforms):
            compose: Any = getattr(transform, "transform", None)  # Albumentations keeps generators of its own
            if hasattr(compose, "set_random_seed"):
                compose.set_random_seed(seed & 0xFFFFFFFF)
        with seeded(seed):
            sample: dict[str, Any] = super().__getitem__(index)
        if self.pool is not None:
            sample["view"], sample["look"] = view, look_of(sample["img"])
        return sample

    @staticmethod
    def collate_fn(batch: list[dict[str, Any]]) -> dict[str, Any]:
        """Ultralytics' own; the looks as one tensor [B, 48]: alone each would cross processes in a file of its own."""
        joined: dict[str, Any] = YOLODataset.collate_fn(batch)
        if "look" in joined:
            joined["look"] = torch.stack(list(joined["look"]))
        return joined

    def close_mosaic(self, hyp: Any) -> None:
        """Ultralytics' own, remembered: views from now on are those of the closed part of a pool."""
        super().close_mosaic(hyp)
        self.closed = True


def pooled(pool: Pool, closed: bool, epoch: int, index: int) -> View:
    """The view of a picture in an epoch of a run."""
    if closed and pool.closed:
        return View(True, epoch % pool.closed, index)
    return View(False, epoch % pool.mixed, index)


def _walk(transform: Any) -> Iterator[Any]:
    yield transform
    for inner in getattr(transform, "transforms", ()) or ():
        yield from _walk(inner)
    if getattr(transform, "pre_transform", None) is not None:
        yield from _walk(transform.pre_transform)


class EpochSampler(Sampler[tuple[int, int]]):
    """Shuffled (epoch, index) pairs; every pass is the next epoch, and epoch e always has the same order.

    Args:
        length: pictures in the data set.
        seed: the run's seed.
        shuffle: False keeps the order (rectangular training).
        rank, world: this process among how many; the tail is filled from the start, so that all have as many.
    """

    def __init__(self, length: int, seed: int, shuffle: bool = True, rank: int = 0, world: int = 1) -> None:
        self.length, self.seed, self.shuffle, self.rank, self.world = length, seed, shuffle, rank, world
        self.next_epoch = 0

    def __len__(self) -> int:
        return math.ceil(self.length / self.world)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.next_epoch
        self.next_epoch += 1
        order = self.order(epoch)
        total = len(self) * self.world
        order = (order * math.ceil(total / max(1, self.length)))[:total]
        for index in order[self.rank : total : self.world]:
            yield epoch, index

    def order(self, epoch: int) -> list[int]:
        """Indices of an epoch in their order, of all processes together."""
        if not self.shuffle:
            return list(range(self.length))
        generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, -1) >> 1)
        order: list[int] = torch.randperm(self.length, generator=generator).tolist()
        return order

    def set_epoch(self, epoch: int) -> None:
        """Called by Ultralytics under DDP. Passes are counted here, because workers fetch ahead."""


def rewind(loader: Any, epoch: int) -> None:
    """Drop what was fetched ahead; the loader's next pass is `epoch`, with the data set as it is now."""
    loader.reset()
    loader.sampler.next_epoch = epoch


def replay_loader(
    dataset: Any,
    batch: int,
    workers: int,
    *,
    seed: int,
    shuffle: bool = True,
    rank: int = -1,
    world: int = 1,
    drop_last: bool = False,
    pin_memory: bool = False,
    sampler: EpochSampler | None = None,
    then: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> InfiniteDataLoader:
    """Ultralytics' endless loader over an `EpochSampler`.

    Args:
        dataset: takes (epoch, index) and has a collate_fn, as `ReplayDataset`.
        batch: pictures per batch on this process.
        workers: processes that load; the pixels do not depend on it. A single batch is loaded in this
            process.
        rank: of this process; -1 without DDP.
        sampler: instead of one over the whole data set.
        then: done with each batch by the process that loads it.
    """
    if sampler is None:
        sampler = EpochSampler(len(dataset), seed, shuffle, max(rank, 0), world if rank >= 0 else 1)
    size = min(batch, len(sampler))
    drop_last = drop_last and len(sampler) > size and len(sampler) % size != 0
    batches = len(sampler) // size if drop_last else math.ceil(len(sampler) / size)
    workers = min(workers, batches if batches > 1 else 0)
    return InfiniteDataLoader(
        dataset=dataset,
        batch_size=size,
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        collate_fn=partial(_collated, dataset.collate_fn, then) if then else dataset.collate_fn,
        generator=torch.Generator().manual_seed(seed),
        drop_last=drop_last,
    )


def _collated(collate: Callable[[Any], Any], then: Callable[[Any], Any], samples: Any) -> Any:
    return then(collate(samples))
