"""A teacher's thinned head outputs for the augmented views of a set, on disk: what training without it reads.

store.json               what determines the bytes: the set, the teacher, how views are drawn, floor, top k, versions
mixed_00000.safetensors  an epoch of the pool: for N pictures with M kept anchors in all, K classes each, R bins a side
                         offsets int64 [N + 1] of the pictures' anchors in what follows
                         anchors int32 [M]; boxes float16 [M, 4 R]; values float16 and classes int16 [M, K];
                         rest float16 [M]; background float16 [N, classes]; total float32 [N]  (see sparse_heads)
                         looks uint8 [N, 48]: the mean colours of the view, to know it again
closed_00000.safetensors the same for the epochs after mosaic is closed
COMPLETE                 the sha256 of every file above, written last;  store.log.json: command, times

Files are memory-mapped and checked against their hashes when they are first used. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from focusdd_det.disk import sha256
from focusdd_det.errors import ConfigError, VerifyError
from focusdd_det.sealed import SEAL, Kind, check_file, open_sealed, short
from focusdd_det.training.replay import LOOK, Pool, View
from focusdd_det.training.sparse_heads import SparseHeads, join

KIND = Kind("focusdd_det soft targets 1", "soft targets", "tools/store_targets.py")
MIXING = ("mosaic", "mixup", "cutmix", "copy_paste")  # what Ultralytics' close_mosaic sets to 0
AUGMENTATION = (  # every key of Ultralytics that decides the pixels of a training view
    *MIXING, "copy_paste_mode", "degrees", "translate", "scale", "shear", "perspective", "flipud", "fliplr", "bgr",
    "hsv_h", "hsv_s", "hsv_v", "augmentations",
)  # fmt: skip
VIEWS = ("imgsz", "seed", *AUGMENTATION)
SAME_LOOK = 2  # grey levels by which a tile's mean colour may differ, from machine to machine
_OPEN_EPOCHS = 4


def epoch_name(closed: bool, epoch: int) -> str:
    """File of an epoch of the pool."""
    return f"{'closed' if closed else 'mixed'}_{epoch:05d}.safetensors"


def pool_files(pool: Pool) -> list[str]:
    """All files of a pool, in order."""
    return [epoch_name(closed, epoch) for closed in (False, True) for epoch in range(pool[closed])]


def closed_epochs(mixed: int, close_mosaic: int, views: Mapping[str, Any]) -> int:
    """How many epochs of views a pool needs for the time after mosaic is closed; 0 where closing changes nothing."""
    return min(mixed, close_mosaic) if any(views[key] for key in MIXING) else 0


def bytes_of_anchor(topk: int, reg_max: int) -> int:
    """Size of a kept anchor."""
    return 4 + 4 * topk + 2 + 8 * reg_max


def bytes_of_view(classes: int) -> int:
    """Size of a view, without its anchors."""
    return 8 + 4 + 2 * classes + 3 * LOOK**2


def as_stored(augmentations: Any) -> list[Any]:
    """Albumentations transforms, as dicts or as such, as JSON holds them: equal ones are equal."""
    dicts = [t if isinstance(t, Mapping) else t.to_dict() for t in augmentations or ()]
    found: list[Any] = json.loads(json.dumps(dicts))
    return found


class TargetStore:
    """A finished store, read view by view.

    Attributes:
        folder: where it lies.
        sha256: hash of all of it.
        description: store.json.
        names: the classes, in the order of the logits.
        pool: epochs of views that it holds.
        reg_max, strides, topk, floor: of the teacher's head, and how it was thinned.
        teacher_sha256: of the checkpoint.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a store.

        Raises:
            VerifyError: none, an unfinished or a damaged one.
        """
        self.folder = Path(folder)
        self.description, self._hashes = open_sealed(self.folder, KIND)
        try:
            described = self.description
            self.sha256 = sha256((self.folder / SEAL).read_bytes())
            self.names = tuple(described["set"]["names"])
            self._set, self._pictures = str(described["set"]["sha256"]), int(described["set"]["n"])
            self.views: dict[str, Any] = {key: described["views"][key] for key in VIEWS}
            self.pool = Pool(int(described["pool"]["mixed"]), int(described["pool"]["closed"]))
            self.reg_max, self.topk = int(described["teacher"]["reg_max"]), int(described["topk"])
            self.strides = [float(stride) for stride in described["teacher"]["strides"]]
            self.teacher_sha256, self.floor = str(described["teacher"]["sha256"]), float(described["floor"])
            self._anchors = sum((int(self.views["imgsz"]) // int(stride)) ** 2 for stride in self.strides)
            if self.pool.mixed < 1 or self.pool.closed < 0:
                raise ValueError(f"a pool of {self.pool.mixed} + {self.pool.closed} epochs")
        except (KeyError, TypeError, ValueError, ZeroDivisionError, OSError) as error:
            raise VerifyError(
                f"{self.folder / 'store.json'}: not a description of a store ({error!r}); {KIND.again}"
            ) from error
        if set(self._hashes) != set(pool_files(self.pool)):
            raise VerifyError(f"{self.folder / SEAL} does not name the epochs of store.json; {KIND.again}")
        self._checked: set[str] = set()
        self._open: OrderedDict[str, _Epoch] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # file handles stay in their process

    @property
    def exact(self) -> bool:
        """Whether nothing was left out."""
        return self.floor == 0 and self.topk == len(self.names)

    # ---- what it can be used for ----

    def check_set(self, folder: Path, manifest_sha256: str, pictures: int, names: Sequence[str]) -> None:
        """Refuse other pictures and other classes than the store was made for.

        Raises:
            VerifyError: saying what differs.
        """
        if tuple(names) != self.names:
            same = sorted(names) == sorted(self.names)
            other = "these classes in another order" if same else f"{len(self.names)} other classes"
            raise VerifyError(
                f"{self.folder} was made for {other}: {_some(self.names)}\n  the set has: {_some(names)}\n"
                f"{KIND.again.capitalize()}"
            )
        if manifest_sha256 != self._set or pictures != self._pictures:
            raise VerifyError(
                f"{self.folder} was made for another set ({self._pictures} pictures, manifest {self._set[:12]}) than "
                f"{folder} ({pictures} pictures, manifest {manifest_sha256[:12] or 'none'}); {KIND.again} for this set"
            )

    def check_views(self, asked: Mapping[str, Any], epochs: int, close_mosaic: int, pool: int) -> Pool:
        """The pool that a training cycles through; refuses other views than the teacher saw.

        Args:
            asked: the training's value of each of VIEWS.
            epochs, close_mosaic: of the training.
            pool: how many epochs of different views are wanted; 0: whatever the store holds.

        Raises:
            ConfigError: naming every key that differs.
        """
        differing = [
            f"{key}: {short(self.views[key])} in the store, {short(asked[key])} asked for"
            for key in VIEWS
            if self.views[key] != asked[key]
        ]
        if differing:
            raise ConfigError(
                f"the teacher saw other views, as {self.folder} says:\n  " + "\n  ".join(differing) + "\ntrain with "
                f"the store's values, or {KIND.again} with these"
            )
        if pool > self.pool.mixed:
            raise ConfigError(
                f"{self.folder} holds {self.pool.mixed} epochs of views, but targets_pool={pool} are asked for; give "
                f"at most that, or {KIND.again} with pool={pool}"
            )
        if not self.pool.closed and closed_epochs(1, min(close_mosaic, epochs), asked):
            raise ConfigError(
                f"{self.folder} holds no views without mosaic, but close_mosaic={close_mosaic} closes it; train with "
                f"close_mosaic=0, or {KIND.again} with close_mosaic={close_mosaic}"
            )
        return Pool(*(min(held, pool) if pool else held for held in self.pool))

    def check_student(self, reg_max: int, strides: Sequence[float], name: str) -> None:
        """Refuse a student whose head has no counterpart in the store.

        Raises:
            ConfigError: other bins or other anchors.
        """
        if reg_max != self.reg_max:
            raise ConfigError(
                f"{self.folder} holds {self.reg_max} bins a box side, but {name} has reg_max={reg_max}; train a "
                "student with as many (every YOLO11 has 16), or ask the teacher in the training with teacher="
            )
        if list(strides) != self.strides:
            raise ConfigError(
                f"{self.folder} holds anchors at strides {self.strides}, but {name} has {list(strides)}; train a "
                "student with the teacher's strides"
            )

    # ---- reading ----

    def heads(self, views: Sequence[View], looks: Sequence[Tensor] | None = None) -> SparseHeads:
        """The teacher's outputs on a batch of views, float16 on the CPU.

        Args:
            views: which.
            looks: how the pictures look that they are for (see `replay.look_of`); refused where they are not those
                that the teacher saw.

        Raises:
            VerifyError: an epoch's file is missing or damaged; other pixels.
        """
        parts = []
        for place, view in enumerate(views):
            epoch = self._epoch(view.closed, view.epoch)
            if looks is not None:
                difference = (looks[place].to(torch.int16) - epoch.looks[view.picture].to(torch.int16)).abs().max()
                if difference > SAME_LOOK:
                    raise VerifyError(
                        f"picture {view.picture} in epoch {view.epoch} of the pool is not the view that the teacher "
                        f"saw (mean colours differ by {int(difference)} of 255): the pictures, OpenCV or Ultralytics "
                        f"draw otherwise than when {self.folder} was made; {KIND.again} here"
                    )
            parts.append(epoch.head(view.picture))
        whole = join(parts)
        if bool((whole.anchor >= self._anchors).any()) or bool((whole.classes >= len(self.names)).any()):
            raise VerifyError(f"{self.folder} names anchors or classes that its own store.json has not; {KIND.again}")
        return whole

    def _epoch(self, closed: bool, epoch: int) -> _Epoch:
        name = epoch_name(closed, epoch)
        file = self._open.get(name)
        if file is not None:
            return file
        path = self.folder / name
        if name not in self._hashes:
            raise VerifyError(f"{self.folder} holds no {name}; its pool is {self.pool}")
        if name not in self._checked:
            check_file(path, self._hashes[name], KIND)
            self._checked.add(name)
        file = _Epoch(path, self._pictures, len(self.names), self.topk, self.reg_max)
        self._open[name] = file
        while len(self._open) > _OPEN_EPOCHS:
            self._open.popitem(last=False)
        return file


class _Epoch:
    """An open epoch: what each view has one of in memory, anchors memory-mapped."""

    def __init__(self, path: Path, pictures: int, classes: int, topk: int, reg_max: int) -> None:
        try:
            file: Any = safe_open(str(path), framework="pt")  # type: ignore[no-untyped-call]
            found = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  (no mapping)
            kept = found["anchors"][0]
            shapes = {
                "offsets": [pictures + 1],
                "looks": [pictures, 3 * LOOK**2],
                "background": [pictures, classes],
                "total": [pictures],
                "anchors": [kept],
                "values": [kept, topk],
                "classes": [kept, topk],
                "rest": [kept],
                "boxes": [kept, 4 * reg_max],
            }
            if found != shapes:
                raise ValueError(f"holds {found}, expected {shapes}")
            self.looks: Tensor = file.get_tensor("looks")
            self._background, self._total = file.get_tensor("background"), file.get_tensor("total")
            self._offsets: list[int] = file.get_tensor("offsets").tolist()
            if self._offsets != sorted(self._offsets) or (self._offsets[0], self._offsets[-1]) != (0, kept):
                raise ValueError(f"offsets do not run from 0 to {kept}")
            self._slices = {key: file.get_slice(key) for key in ("anchors", "values", "classes", "rest", "boxes")}
            self._empty = {key: torch.zeros([0, *shapes[key][1:]], dtype=torch.float16) for key in self._slices}
        except Exception as error:  # safetensors raises its own kinds
            raise VerifyError(f"{path}: {error!r}; {KIND.again}") from error

    def head(self, index: int) -> SparseHeads:
        """The head of one picture, a batch of one."""
        first, last = self._offsets[index], self._offsets[index + 1]
        rows = {k: part[first:last] for k, part in self._slices.items()} if last > first else self._empty
        return SparseHeads(
            picture=torch.zeros(last - first, dtype=torch.int64),
            anchor=rows["anchors"].long(),
            values=rows["values"],
            classes=rows["classes"].long(),
            rest=rows["rest"],
            boxes=rows["boxes"],
            background=self._background[index : index + 1],
            total=self._total[index : index + 1],
        )


def tensors_of(heads: Sequence[SparseHeads], looks: Sequence[Tensor]) -> dict[str, NDArray[Any]]:
    """The tensors of an epoch's file from its pictures' heads, batches in order, and their looks."""
    whole = join(heads).half()
    counts = torch.bincount(whole.picture, minlength=len(whole.total))
    tensors = {
        "offsets": torch.cat((counts.new_zeros(1), counts.cumsum(0))),
        "anchors": whole.anchor.to(torch.int32),
        "values": whole.values,
        "classes": whole.classes.to(torch.int16),
        "rest": whole.rest,
        "boxes": whole.boxes,
        "background": whole.background,
        "total": whole.total,
        "looks": torch.stack(list(looks)),
    }
    return {key: value.contiguous().numpy() for key, value in tensors.items()}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f", ... ({len(names)})" if len(names) > 20 else "")
