"""Pictures by class, from a set of ours or from class folders. Classes are matched by name, never by position."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from focusdd_det import detset, disk
from focusdd_det.errors import DataError, VerifyError
from focusdd_det.sources import EXTENSIONS
from focusdd_det.tree import entries_below

log = logging.getLogger("focusdd")

SPLITS = ("train", "val", "test")  # folder names that are no classes


@dataclass(frozen=True)
class ClassSet:
    """Pictures with one class each. Paths are plain strings: ImageNet has 1.3 million of them.

    Attributes:
        folder: what the paths are relative to.
        names: class names; the position is the class index.
        paths: relative, with forward slashes; by class folder and name, in plan order for a set of ours.
        classes: [N] int64 indices into `names`.
        keys: for each picture the hex digest that its views are drawn from: of its bytes in a set of ours, of its
            relative path otherwise.
        sha256: of the manifest of a set of ours, else of the listing with the files' sizes.
        is_ours: whether it is a set that this package built.
    """

    folder: Path
    names: tuple[str, ...]
    paths: list[str]
    classes: NDArray[np.int64]
    keys: list[str]
    sha256: str
    is_ours: bool

    def __post_init__(self) -> None:
        if not len(self.paths) == len(self.classes) == len(self.keys):
            raise ValueError(f"{len(self.paths)} paths, {len(self.classes)} classes, {len(self.keys)} keys")

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def place(self) -> Path:
        """The folder that holds the class folders; equal for two readings of the same pictures."""
        first = Path(self.paths[0]) if self.paths else Path()
        depth = first.parts.index(self.names[int(self.classes[0])]) if self.paths and not self.is_ours else 0
        return self.folder.resolve().joinpath(*first.parts[:depth])

    def only(self, names: Sequence[str]) -> ClassSet:
        """The pictures of these classes, numbered in their order.

        Raises:
            DataError: names that are not classes of this set.
        """
        _require(names, self.names, self.folder)
        new_index = np.full(len(self.names), -1, np.int64)
        new_index[[self.names.index(name) for name in names]] = np.arange(len(names))
        classes = new_index[self.classes]
        kept = np.flatnonzero(classes >= 0)
        digest = hashlib.sha256(json.dumps([self.sha256, list(names)]).encode()).hexdigest()
        return ClassSet(
            folder=self.folder,
            names=tuple(names),
            paths=[self.paths[i] for i in kept],
            classes=classes[kept],
            keys=[self.keys[i] for i in kept],
            sha256=digest,
            is_ours=self.is_ours,
        )


def read_class_set(data: str | Path, split: Literal["train", "val"], names: Sequence[str] | None = None) -> ClassSet:
    """The pictures of a set of ours, or of class folders.

    Args:
        data: a set of ours (its folder or its data.yaml), which is verified; or a folder with `<split>/<class>/*` or
            `<class>/*`.
        split: of class folders. A set of ours has only `train`.
        names: the classes in the order that is wanted, for evaluation data; None takes all, in the set's own order, or
            sorted by folder name. Folders of other classes are passed over, which is said once in the log.

    Raises:
        DataError: no such folder, a detection set, a set of ours as `val`, no pictures, or classes without a folder.
        VerifyError: a set of ours that is damaged or unfinished.
    """
    folder = Path(data)
    if folder.name == "data.yaml" and folder.is_file():
        folder = folder.parent
    if not folder.is_dir():
        raise DataError(f"{data} is not a folder; expected a classification set, or a folder of class folders")
    found = _read_ours(folder, split) if detset.is_ours(folder) else _read_folders(folder, split, names)
    return found if names is None or tuple(names) == found.names else found.only(names)


# --- a set of ours


def _read_ours(folder: Path, split: str) -> ClassSet:
    if detset.task_of(folder) != "classify":
        raise DataError(
            f"{folder} is a detection set: its composites hold objects of many classes. Build a classification set: "
            "python tools/build_cls_set.py --source imagenet/train --ipc 10"
        )
    if split != "train":
        raise DataError(
            f"{folder} is a distilled set and has no {split} pictures; accuracy is measured on real ones: give the "
            "class folders of the original data set"
        )
    problems = detset.verify(folder)
    if problems:
        shown = "\n  ".join(problems[:20])
        raise VerifyError(f"{folder} is not intact; build it again or get it again:\n  {shown}")
    names = detset.read_data_yaml(folder)
    position = {name: i for i, name in enumerate(names)}
    paths, classes, keys = [], [], []
    for item in detset.read_manifest(folder):
        path = detset.part_path(folder, "images", item)
        paths.append(path.relative_to(folder).as_posix())
        classes.append(position[item.class_name])
        keys.append(item.sha256["images"])
    if not paths:
        raise DataError(f"{folder}: its manifest lists no picture")
    manifest = disk.sha256((folder / "manifest.jsonl").read_bytes())
    return ClassSet(folder, tuple(names), paths, np.array(classes, np.int64), keys, manifest, True)


# --- class folders


def _read_folders(folder: Path, split: str, wanted: Sequence[str] | None) -> ClassSet:
    base = folder / split
    prefix = f"{split}/"
    if not base.is_dir():
        others = [name for name in SPLITS if (folder / name).is_dir()]
        if others:
            raise DataError(f"{folder} has {', '.join(others)} but no {split}; expected class folders in {base}")
        base, prefix = folder, ""
    with os.scandir(base) as entries:
        present = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not present:
        raise DataError(f"{base} holds no class folders; expected one folder of pictures for each class")
    names = tuple(present if wanted is None else wanted)
    _require(names, present, base)
    if len(names) < len(present):
        log.info("%s: %d of its %d class folders are used", base, len(names), len(present))
    paths: list[str] = []
    classes: list[NDArray[np.int64]] = []
    digest = hashlib.sha256(json.dumps(names).encode())
    for index, name in enumerate(names):
        before = len(paths)
        for file, size in sorted(_pictures(base / name)):
            paths.append(f"{prefix}{name}/{file}")
            digest.update(f"\n{name}/{file}\t{size}".encode(errors="surrogateescape"))
        if len(paths) == before:
            raise DataError(f"{base / name} holds no picture ({', '.join(EXTENSIONS)})")
        classes.append(np.full(len(paths) - before, index, np.int64))
    start = len(prefix)
    keys = [_path_key(path[start:]) for path in paths]
    return ClassSet(folder, names, paths, np.concatenate(classes), keys, digest.hexdigest(), False)


def _pictures(folder: Path) -> Iterator[tuple[str, int]]:
    """(path relative to the class folder, size) of every picture, also in folders inside."""
    start = len(str(folder)) + 1
    for entry in entries_below(folder):
        if entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
            yield entry.path[start:], entry.stat().st_size


def _path_key(path: str) -> str:
    return hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def _require(names: Sequence[str], present: Sequence[str], where: Path) -> None:
    if len(set(names)) != len(names) or not names:
        raise DataError(f"expected different class names, at least one; got {', '.join(names) or 'none'}")
    known = set(present)
    missing = [name for name in names if name not in known]
    if missing:
        raise DataError(
            f"{where} has no pictures of {len(missing)} of the {len(names)} classes: {_shown(missing)}.\n"
            f"  asked for: {_shown(names)}\n  it has: {_shown(present)}\nClasses are matched by the name of their "
            "folder: rename the folders, or choose the data that the set was made from"
        )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:40]) + (f", ... ({len(names)})" if len(names) > 40 else "")
