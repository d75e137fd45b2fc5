"""Views of pictures: random-resized crop, flip and CutMix, drawn for each (epoch, picture) and for nothing else.

A view is a row of ten whole numbers. Drawing makes rows, rendering makes pixels of them; a stored row can be rendered
again at any time, in any process, in any order. Albumentations draws the crop and does the crop, resize and flip.
"""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import albumentations as A
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from focusdd_det.classify.classset import ClassSet
from focusdd_det.compose import resize
from focusdd_det.errors import ConfigError, DataError, VerifyError
from focusdd_det.scoring.decode import BadImage, decode
from focusdd_det.seeds import seed_of
from focusdd_det.types import Image

FIELDS = ("x", "y", "w", "h", "flip", "partner", "bx", "by", "bw", "bh")
EVAL_SHARE = 0.875  # side of the middle crop as a share of the short side: 224 of 256
CACHE_BYTES = 256 << 20  # decoded pictures that a process keeps

Row = NDArray[np.int32]  # [10], see FIELDS
In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class ViewSettings:
    """How views are drawn.

    Attributes:
        size: side of a view, px.
        scale: area of the crop as a share of the picture's, from and to.
        ratio: width / height of the crop, from and to.
        flip: probability of a horizontal flip.
        cutmix: probability that a box of another picture's view is pasted; its share is drawn from Beta(beta, beta).
        seed: of everything that is drawn.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    cutmix: float = 1.0
    beta: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = [
            (self.size >= 8, "size", "at least 8 px"),
            (len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1, "scale", "0 < from <= to <= 1"),
            (len(self.ratio) == 2 and 0 < self.ratio[0] <= self.ratio[1], "ratio", "0 < from <= to"),
            (0 <= self.flip <= 1, "flip", "a probability"),
            (0 <= self.cutmix <= 1, "cutmix", "a probability"),
            (self.beta > 0, "beta", "above 0"),
        ]
        problems = [f"{key}={getattr(self, key)!r}: expected {text}" for ok, key, text in checks if not ok]
        if problems:
            raise ConfigError("the views are not valid:\n  " + "\n  ".join(problems))


class Labels(Protocol):
    """Stored views with what the teacher said of them (store.LogitStore)."""

    folder: Path
    pool: int

    def row(self, epoch: int, index: int) -> tuple[Row, dict[str, Tensor]]:
        """The view and the soft targets of (epoch, index)."""

    def view(self, epoch: int, index: int) -> Row:
        """The view alone."""


def draw(
    settings: ViewSettings,
    epoch: int,
    index: int,
    keys: Sequence[str],
    shapes: Mapping[int, tuple[int, int]] | Sequence[tuple[int, int]],
) -> Row:
    """The view of a picture in an epoch. Depends on the settings, the epoch, the picture's key, place and shape, and on
    the number of pictures; never on a batch, a worker or the order of the calls.

    Args:
        epoch: from 0.
        index: of the picture.
        keys: of all pictures; see ClassSet.
        shapes: (height, width) in px, needed for `index` alone: the partner is shown in its own view.

    Returns:
        int32 [10], see FIELDS: crop in px of the picture, flip 0 or 1, the partner's index or -1, and the box of the
        partner's view that replaces the same box of this view, in px of the view.
    """
    rng = random.Random(seed_of("view", settings.seed, epoch, keys[index]))
    crop = _crop(settings.size, settings.scale, settings.ratio, threading.get_ident())
    crop.py_random = rng
    height, width = shapes[index]
    x0, y0, x1, y1 = crop.get_params_dependent_on_data({"shape": (height, width, 3)}, {})["crop_coords"]
    flip = int(rng.random() < settings.flip)
    mixes = rng.random() < settings.cutmix and len(keys) > 1
    partner, box = -1, (0, 0, 0, 0)
    if mixes:
        partner = rng.randrange(len(keys) - 1)
        partner += partner >= index  # never itself
        box = _box(settings.size, rng.betavariate(settings.beta, settings.beta), rng)
        if not box[2] * box[3]:
            partner, box = -1, (0, 0, 0, 0)
    return np.array((x0, y0, x1 - x0, y1 - y0, flip, partner, *box), np.int32)


def _box(size: int, share: float, rng: random.Random) -> tuple[int, int, int, int]:
    """CutMix's box: sides sqrt(1 - share) of the view's around a centre that is drawn anywhere, cut at the border."""
    side = int(size * (1 - share) ** 0.5)
    x, y = rng.randrange(size), rng.randrange(size)
    x0, y0 = max(0, x - side // 2), max(0, y - side // 2)
    x1, y1 = min(size, x - side // 2 + side), min(size, y - side // 2 + side)
    return x0, y0, x1 - x0, y1 - y0


@lru_cache(maxsize=64)
def _crop(size: int, scale: tuple[float, float], ratio: tuple[float, float], thread: int) -> Any:
    """Albumentations' transform, made once a thread: its generator is replaced for every draw."""
    return A.RandomResizedCrop(size=(size, size), scale=scale, ratio=ratio, area_for_downscale="image", p=1.0)


@lru_cache(maxsize=16)
def _resized_crop(size: int) -> Any:
    """The same for pixels; it holds no state there, so threads share it."""
    return A.RandomResizedCrop(size=(size, size), interpolation=cv2.INTER_LINEAR, area_for_downscale="image", p=1.0)


_FLIP: Any = A.HorizontalFlip(p=1.0)


def render(row: Row, partner_row: Row | None, picture: Image, partner_picture: Image | None, size: int) -> Image:
    """The pixels of a view. Area averaging when shrinking, linear when enlarging.

    Args:
        row, partner_row: as from `draw`; the partner's row of the same epoch if `row` names one.
        picture, partner_picture: whole, uint8 RGB.

    Returns:
        uint8 [size, size, 3].

    Raises:
        ValueError: a crop that reaches outside its picture: the row is of another picture.
    """
    view = _alone(row, picture, size)
    if row[5] >= 0:
        if partner_row is None or partner_picture is None:
            raise ValueError("the view has a partner, but its row or picture was not given")
        x, y, w, h = (int(v) for v in row[6:])
        view[y : y + h, x : x + w] = _alone(partner_row, partner_picture, size)[y : y + h, x : x + w]
    return view


def _inside(row: Row, picture: Image) -> bool:
    x, y, w, h = (int(v) for v in row[:4])
    height, width = picture.shape[:2]
    return min(x, y) >= 0 and min(w, h) >= 1 and x + w <= width and y + h <= height


def _alone(row: Row, picture: Image, size: int) -> Image:
    x, y, w, h, flip = (int(v) for v in row[:5])
    height, width = picture.shape[:2]
    if not _inside(row, picture):
        raise ValueError(f"the crop {x}, {y}, {w} x {h} reaches outside a picture of {width} x {height} px")
    view = _resized_crop(size).apply(picture, crop_coords=(x, y, x + w, y + h))
    if flip:
        view = _FLIP.apply(view)
    elif view.base is not None or view is picture:
        view = view.copy()  # the box is pasted into it, and the picture may be cached
    return np.ascontiguousarray(view, np.uint8)


def share(row: Row, size: int) -> float:
    """Share of the view that is the picture's own."""
    return 1.0 - int(row[8]) * int(row[9]) / size**2


class Pictures:
    """Decoded pictures of a set, the latest ones kept up to a number of bytes. For threads; results never depend on
    what is kept."""

    def __init__(self, class_set: ClassSet, budget: int = CACHE_BYTES) -> None:
        self._folder, self._paths, self._budget = str(class_set.folder), class_set.paths, budget
        self._clear()

    def _clear(self) -> None:
        self._kept: OrderedDict[int, Image] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_paths": self._paths, "_budget": self._budget}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()

    def __getitem__(self, index: int) -> Image:
        """Pixels uint8 RGB, not to be written to.

        Raises:
            DataError: a file that is missing or no picture, by name.
        """
        with self._lock:
            picture = self._kept.get(index)
            if picture is not None:
                self._kept.move_to_end(index)
                return picture
        picture = self._decode(index)
        with self._lock:
            if index not in self._kept and picture.nbytes <= self._budget:
                self._kept[index] = picture
                self._bytes += picture.nbytes
                while self._bytes > self._budget:
                    self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return picture

    def _decode(self, index: int) -> Image:
        path = f"{self._folder}/{self._paths[index]}"
        try:
            with open(path, "rb") as file:  # noqa: PTH123  (a Path for each of millions of reads costs more than it says)
                data = file.read()
            return decode(data)[0]
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        except BadImage as error:
            raise DataError(f"{path} cannot be used: {error}; replace it or take it out of the data") from error


class ViewDataset(Dataset[dict[str, Any]]):
    """Training pictures by (epoch, index).

    Args:
        class_set: the pictures.
        settings: how the views are drawn; with a store only its `size` counts.
        pool: that many epochs of different views, then the first ones again; 0: as many as there are epochs, or as the
            store holds.
        store: views that were drawn before, with their soft targets.
    """

    def __init__(self, class_set: ClassSet, settings: ViewSettings, pool: int = 0, store: Labels | None = None) -> None:
        self.class_set, self.settings, self.store = class_set, settings, store
        self.pool = pool or (store.pool if store else 0)
        if store is not None and self.pool > store.pool:
            raise ConfigError(f"pool={pool}, but the store holds only {store.pool} epochs of views")
        self.pictures = Pictures(class_set)

    def __len__(self) -> int:
        return len(self.class_set)

    def __getitem__(self, item: tuple[int, int] | int) -> dict[str, Any]:
        """The view of (epoch, index); a plain index means epoch 0.

        Returns:
            img uint8 [3, S, S]; cls and partner_cls (its own class without a partner), epoch and index int64; share
            float32; with a store `soft`, the tensors of the loss.

        Raises:
            DataError: a picture that cannot be read.
            VerifyError: a store that is damaged, or a crop of it that reaches outside its picture.
        """
        epoch, index = item if isinstance(item, tuple) else (0, item)
        of_view = epoch % self.pool if self.pool else epoch
        soft = None
        picture = self.pictures[index]
        if self.store is None:
            row = self._draw(of_view, index, picture)
        else:
            row, soft = self.store.row(of_view, index)
        view = self._render(row, of_view, index, picture)
        partner = int(row[5])
        classes = self.class_set.classes
        sample: dict[str, Any] = {
            "img": torch.from_numpy(view).permute(2, 0, 1).contiguous(),
            "cls": torch.tensor(int(classes[index])),
            "partner_cls": torch.tensor(int(classes[partner if partner >= 0 else index])),
            "share": torch.tensor(share(row, self.settings.size), dtype=torch.float32),
            "epoch": torch.tensor(epoch),
            "index": torch.tensor(index),
        }
        if soft is not None:
            sample["soft"] = soft
        return sample

    def _draw(self, epoch: int, index: int, picture: Image) -> Row:
        return draw(self.settings, epoch, index, self.class_set.keys, {index: picture.shape[:2]})

    def _render(self, row: Row, epoch: int, index: int, picture: Image) -> Image:
        partner = int(row[5])
        self._require_inside(row, epoch, index, picture)
        if partner < 0:
            return render(row, None, picture, None, self.settings.size)
        other = self.pictures[partner]
        other_row = self.store.view(epoch, partner) if self.store else self._draw(epoch, partner, other)
        self._require_inside(other_row, epoch, partner, other)
        return render(row, other_row, picture, other, self.settings.size)

    def _require_inside(self, row: Row, epoch: int, index: int, picture: Image) -> None:
        """A crop that was drawn here always lies in its picture; one that somebody stored may not."""
        if self.store is not None and not _inside(row, picture):
            x, y, w, h = (int(v) for v in row[:4])
            raise VerifyError(
                f"{self.store.folder}, epoch {epoch}: the crop {x}, {y}, {w} x {h} reaches outside "
                f"{self.class_set.paths[index]} of {picture.shape[1]} x {picture.shape[0]} px: the store is not of "
                "these pictures; make it again with tools/relabel_cls.py"
            )

    def drawn(self, epoch: int, index: int) -> tuple[Row, Image]:
        """The row and the pixels [S, S, 3] of a view that is drawn, not taken from a store."""
        picture = self.pictures[index]
        row = self._draw(epoch, index, picture)
        return row, self._render(row, epoch, index, picture)

    @staticmethod
    def collate_fn(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch: every entry stacked, those of `soft` too."""
        batch: dict[str, Any] = {}
        for key, first in samples[0].items():
            if isinstance(first, dict):
                batch[key] = {name: torch.stack([s[key][name] for s in samples]) for name in first}
            else:
                batch[key] = torch.stack([s[key] for s in samples])
        return batch


class EvalDataset(Dataset[dict[str, Any]]):
    """Pictures as a classifier is measured on: short side resized to size / 0.875, middle crop."""

    def __init__(self, class_set: ClassSet, size: int) -> None:
        self.class_set, self.size = class_set, size
        self.pictures = Pictures(class_set, budget=0)  # each is looked at once

    def __len__(self) -> int:
        return len(self.class_set)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """img uint8 [3, S, S] and cls int64."""
        view = middle(self.pictures[index], self.size)
        return {
            "img": torch.from_numpy(view).permute(2, 0, 1).contiguous(),
            "cls": torch.tensor(int(self.class_set.classes[index])),
        }

    collate_fn = staticmethod(ViewDataset.collate_fn)


def middle(picture: Image, size: int) -> Image:
    """The middle view: uint8 [size, size, 3]."""
    height, width = picture.shape[:2]
    short = round(size / EVAL_SHARE)
    scale = short / min(height, width)
    resized = resize(picture, max(short, round(width * scale)), max(short, round(height * scale)))
    y, x = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return np.ascontiguousarray(resized[y : y + size, x : x + size])
