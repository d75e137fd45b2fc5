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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from ultralytics.data import dataset as ultralytics_dataset
from ultralytics.data.build import InfiniteDataLoader
from ultralytics.data.dataset import YOLODataset

from focusdd_det.errors import DataError


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


@contextlib.contextmanager
def no_label_cache() -> Iterator[None]:
    """Inside, Ultralytics writes no labels.cache."""

    def keep_in_memory(prefix: str, path: Path, x: dict[str, Any], version: str) -> None:
        x["version"] = version

    before = ultralytics_dataset.save_dataset_cache_file
    ultralytics_dataset.save_dataset_cache_file = keep_in_memory
    try:
        yield
    finally:
        ultralytics_dataset.save_dataset_cache_file = before


def refuse_cut_jpegs(files: Iterable[str]) -> None:
    """Refuse cut-short JPEGs before Ultralytics sees them: it would "restore" them by writing over the originals.

    Raises:
        DataError: naming the first such file.
    """
    for name in files:
        with Path(name).open("rb") as file:
            jpeg = file.read(2) == b"\xff\xd8"
            size = file.seek(0, 2)
            file.seek(max(0, size - 2))
            if size == 0 or (jpeg and file.read() != b"\xff\xd9"):
                raise DataError(
                    f"{name} is cut short ({size} bytes, no JPEG end marker); replace it or take it out of the data"
                )


class CleanDataset(YOLODataset):  # type: ignore[misc]
    """A YOLO data set that leaves its folder as it is: label caches (pickles) are neither read nor written.

    Raises:
        DataError: a JPEG that is cut short, which Ultralytics would rewrite.

    Attributes:
        dropped: messages about pictures or labels that Ultralytics left out or complained about.
        missing_labels: number of pictures without a label file.
    """

    def _load_or_scan_cache(self, cache_path: Path, cache_hash: str) -> tuple[dict[str, Any], bool]:
        refuse_cut_jpegs(self.im_files)
        with no_label_cache():
            cache: dict[str, Any] = self.cache_labels(cache_path)
        self.dropped = [str(message) for message in cache["msgs"]]
        self.missing_labels = int(cache["results"][1])
        return cache, False

    def get_image_and_label(self, index: int) -> dict[str, Any]:
        """As in Ultralytics, on a copy of the pixels: colour jitter writes into them and they may be
        cached."""
        label: dict[str, Any] = super().get_image_and_label(index)
        label["img"] = label["img"].copy()
        return label


class ReplayDataset(CleanDataset):
    """Training data whose item (epoch, index) always has the same pixels and boxes.

    Args:
        seed: the run's seed.
        Everything else as YOLODataset.
    """

    def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
        self.seed = seed
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
        seed = sample_seed(self.seed, epoch, index)
        for transform in _walk(self.transforms):
            compose: Any = getattr(transform, "transform", None)  # Albumentations keeps generators of its own
            if hasattr(compose, "set_random_seed"):
                compose.set_random_seed(seed & 0xFFFFFFFF)
        with seeded(seed):
            sample: dict[str, Any] = super().__getitem__(index)
        return sample


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
) -> InfiniteDataLoader:
    """Ultralytics' endless loader over an `EpochSampler`.

    Args:
        dataset: takes (epoch, index) and has a collate_fn, as `ReplayDataset`.
        batch: pictures per batch on this process.
        workers: processes that load; the pixels do not depend on it. A single batch is loaded in this
            process.
        rank: of this process; -1 without DDP.
        sampler: instead of one over the whole data set.
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
        collate_fn=dataset.collate_fn,
        generator=torch.Generator().manual_seed(seed),
        drop_last=drop_last,
    )
