"""The distilled set on disk: written atomically, verified by hashes, never executed.

data.yaml           Ultralytics form, no `path:`, so that the set can be moved
images/train/*.jpg  labels/train/*.txt  soft/train/*.safetensors     a detection set
train/<class>/*.jpg                                                  a classification set
manifest.jsonl      a line per composite, in plan order
build.yaml          what determines the bytes;  build.log.json: what does not
README.md           dataset card;  COMPLETE: hashes of the four files above, written last
gallery.html        every composite on one page, outside the hashes; so is contact_sheet.jpg
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import yaml
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from focusdd_det.config import parse_yaml
from focusdd_det.disk import append_lines, is_folder_name, sha256, write_atomic
from focusdd_det.errors import ConfigError, DiskError, VerifyError
from focusdd_det.labels import parse_rows
from focusdd_det.types import Detections

HASHED = ("manifest.jsonl", "data.yaml", "build.yaml", "README.md")  # what COMPLETE vouches for
WORKING = (".lock", "scores.sqlite")  # of a set that is being built
FREE = ("build.log.json", "COMPLETE", "quarantine.jsonl", "contact_sheet.jpg", "gallery.html")
_ID = re.compile(r"\w[\w.-]{0,120}", re.ASCII)  # of an item: a plain file name everywhere
_LEFTOVER = re.compile(
    r"\..*\.tmp|\d{3,}_[a-z0-9-]*_\d{5}\.(jpg|txt|safetensors)"
)  # what only a build can have written
PARTS = {"images": ".jpg", "labels": ".txt", "soft": ".safetensors"}  # of a composite, and what its file ends with
TASKS = {"detect": tuple(PARTS), "classify": ("images",)}
_CACHES = ("labels/train.cache", "train.cache")  # stock Ultralytics leaves them; nothing here ever opens one


@dataclass(frozen=True)
class Cell:
    """One cell of a composite. `crop` is x, y, side in px of the source; None: the whole source, letterboxed."""

    kind: str  # key | background
    root: str
    path: str
    folder: str
    sha256: str
    width: int
    height: int
    crop: tuple[int, int, int] | None
    p: float
    share: float
    confirmed: bool


@dataclass(frozen=True)
class Item:
    """One composite: a line of the manifest.

    Attributes:
        id: file name without extension.
        class_name, class_index: the class it was made for (the label file may hold others).
        group: the class of the selection: the same, or a folder with `ipc_unit: imagenet`.
        index: its place in the group, from 0; proposal: its place before composites without objects were replaced.
        seed: drew the order of the cells.
        cells: in row order.
        boxes: rows in the label file.
        sha256: of each file, by part: images, labels, soft; in a classification set images alone.
    """

    id: str
    class_name: str
    class_index: int
    group: str
    index: int
    proposal: int
    seed: int
    cells: tuple[Cell, ...]
    boxes: int
    sha256: dict[str, str]

    @property
    def grid(self) -> int:
        """n of the composite's n x n cells."""
        return math.isqrt(len(self.cells))

    def line(self) -> str:
        """The manifest line, with its newline."""
        return json.dumps(asdict(self), ensure_ascii=True, sort_keys=True, separators=(",", ":")) + "\n"

    @staticmethod
    def parse(line: str) -> Item:
        """A manifest line.

        Raises:
            ValueError: not one, or with an id or path that leads outside.
        """
        try:
            raw = json.loads(line)
            if not isinstance(raw["cells"], list):
                raise TypeError("cells must be a list")
            cells = tuple(
                Cell(**{**cell, "crop": None if cell["crop"] is None else tuple(cell["crop"])}) for cell in raw["cells"]
            )
            item = Item(**{**raw, "cells": cells})
            if item.grid**2 != len(cells):
                raise TypeError(f"{len(cells)} cells do not make a square")
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a manifest line ({error})") from error
        numbers = [item.class_index, item.index, item.proposal, item.seed, item.boxes]
        numbers += [v for c in cells for v in (c.width, c.height, *(c.crop or ()))]
        texts = [item.id, item.class_name, item.group]
        texts += [v for c in cells for v in (c.kind, c.root, c.path, c.folder, c.sha256)]
        if not all(type(v) is int and 0 <= v < 1 << 64 for v in numbers):
            raise ValueError("indices, counts, seed, sizes and crops must be whole numbers from 0")
        if any(
            min(c.width, c.height) < 1 or (c.crop is not None and (len(c.crop) != 3 or not c.crop[2])) for c in cells
        ):
            raise ValueError("a crop is x, y and side, a side at least 1")
        if not all(type(v) in (int, float) and 0 <= v <= 1 for c in cells for v in (c.p, c.share)):
            raise ValueError("p and share must be in [0, 1]")
        if not isinstance(item.sha256, dict) or not all(isinstance(v, str) for v in [*texts, *item.sha256.values()]):
            raise ValueError("names, paths and hashes must be text")
        if not all(type(c.confirmed) is bool for c in cells):
            raise ValueError("confirmed must be true or false")
        if not _ID.fullmatch(item.id):
            raise ValueError(f"the id {item.id[:60]!r} is not a plain file name")
        for cell in cells:
            path = PurePosixPath(cell.path)
            if path.is_absolute() or ".." in path.parts or "\0" in cell.path:
                raise ValueError(f"the path {cell.path!r} leads outside its root")
        if set(item.sha256) not in [set(parts) for parts in TASKS.values()]:
            raise ValueError(f"expected hashes of {', '.join(PARTS)}, or of images alone")
        if "labels" not in item.sha256 and not is_folder_name(item.class_name):
            raise ValueError(f"the class {item.class_name[:60]!r} is not the name of a folder")
        return item


def part_path(folder: Path, part: str, item: Item) -> Path:
    """Where a part (images, labels, soft) of an item lies in a set."""
    return folder / _place(part, item)


def _place(part: str, item: Item) -> str:
    if "labels" in item.sha256:
        return f"{part}/train/{item.id}{PARTS[part]}"
    return f"train/{item.class_name}/{item.id}{PARTS[part]}"


def write_part(folder: Path, part: str, item: Item, data: bytes) -> None:
    """A file of a composite, in the folder of its class where the set has such.

    Raises:
        DiskError: as `write_atomic`.
    """
    path = part_path(folder, part, item)
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise DiskError(
            f"cannot make {path.parent}: {error.strerror}; fix that and run the same command again"
        ) from error
    write_atomic(path, data)


def soft_bytes(found: Detections) -> bytes:
    """The soft targets of a composite: `conf` [n] and `scores` [n, nc], float16, one row per label row."""
    return bytes(save_tensors({"conf": found.conf.astype(np.float16), "scores": found.scores.astype(np.float16)}))


def read_soft(path: Path) -> dict[str, np.ndarray]:
    """`conf` [n] and `scores` [n, nc] of a composite.

    Raises:
        VerifyError: not such a file.
    """
    try:
        tensors = load_tensors(path.read_bytes())
        if set(tensors) != {"conf", "scores"} or tensors["scores"].ndim != 2:
            raise ValueError(f"holds {sorted(tensors)}, expected conf and scores")
    except Exception as error:
        raise VerifyError(f"{path} is not a soft-target file: {error}") from error
    return dict(tensors)


def read_manifest(folder: Path, tolerant: bool = False) -> Iterator[Item]:
    """The items of a set, line by line.

    Args:
        tolerant: pass over lines that cannot be read (a build that was killed may have cut the last one).

    Raises:
        VerifyError: the manifest is missing, or a line is damaged, naming the line.
    """
    path = folder / "manifest.jsonl"
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    if not line.endswith("\n"):
                        raise ValueError("cut short")
                    yield Item.parse(line)
                except ValueError as error:
                    if not tolerant:
                        raise VerifyError(f"{path}, line {number}: {error}; rebuild the set or get it again") from error
    except FileNotFoundError:
        if not tolerant:
            raise VerifyError(f"{path} is missing; {folder} is not a distilled set, or not all of it") from None


def append(folder: Path, item: Item) -> None:
    """Add a line to the manifest: only now does the composite exist.

    Raises:
        DiskError: full disk, no permission.
    """
    append_lines(folder / "manifest.jsonl", item.line().encode())


def sweep(folder: Path, items: Iterable[Item], aside: Path) -> None:
    """Clear a set that is being built of what is no part of it.

    What an interrupted build left behind (files of no item, temporary files) is removed; anything else is moved into
    `aside`: it may be somebody's.
    """
    for path in list(_strays(folder, _places(items))):
        if path.name in WORKING:
            continue
        if _left_over(path):
            path.unlink()
        elif path.is_dir() and not path.is_symlink() and all(map(_left_over, path.iterdir())):
            shutil.rmtree(path)  # of a class, begun and left
        else:
            _move(path, aside / path.relative_to(folder))


def _left_over(path: Path) -> bool:
    """Whether a file can only have been written by a build that was stopped."""
    return bool(_LEFTOVER.fullmatch(path.name)) and path.is_file() and not path.is_symlink()


def intact(folder: Path, item: Item) -> bool:
    """Whether all files of an item are what its line says."""
    for part, digest in item.sha256.items():
        try:
            if sha256(part_path(folder, part, item).read_bytes()) != digest:
                return False
        except OSError:
            return False
    return True


def is_ours(folder: Path) -> bool:
    """Whether a folder holds a set (or part of one) that this package wrote."""
    return task_of(folder) is not None


def refuse_inside(out: Path) -> None:
    """No output inside a set, which is sealed by its hashes.

    Raises:
        ConfigError: naming the set.
    """
    for folder in (out.resolve(), *out.resolve().parents):
        if is_ours(folder):
            raise ConfigError(
                f"out={out} lies in the set {folder}, which is sealed by its hashes; choose another `out`"
            )


def task_of(folder: Path) -> str | None:
    """What a set is for, detect or classify; None if the folder holds no set of this package."""
    try:
        content = parse_yaml((folder / "build.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("format") != "focusdd_det set":
        return None
    task = content.get("task", "detect")
    return str(task) if task in TASKS else None


def verify(folder: Path) -> list[str]:
    """Everything that is not as the set's own records say, each naming its file; an empty list means it is intact.

    Checks COMPLETE's hashes, each item's files against the manifest, label rows, data.yaml, and that nothing is missing
    or stray.
    """
    problems = []
    try:
        text = (folder / "COMPLETE").read_text(encoding="utf-8")
        sealed = json.loads(text)
        if not isinstance(sealed, dict) or set(sealed) != set(HASHED) or text != _seal_text(sealed):
            raise ValueError("expected the hashes of " + ", ".join(HASHED))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{folder / 'COMPLETE'}: {error}")
        sealed = {}
    for name in HASHED:
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            problems.append(f"{folder / name}: {error.strerror}")
            continue
        if sealed and sha256(data) != sealed[name]:
            problems.append(f"{folder / name}: not the bytes that {folder / 'COMPLETE'} names")
    names: list[str] = []
    try:
        names = read_data_yaml(folder)
    except VerifyError as error:
        problems.append(str(error))
    known: set[str] = set()
    parts = TASKS[task_of(folder) or "detect"]
    try:
        for item in read_manifest(folder):
            if set(item.sha256) != set(parts):
                problems.append(f"{folder / 'manifest.jsonl'}: {item.id} has other parts than {', '.join(parts)}")
                continue
            places = _places([item])
            if places & known:
                problems.append(f"{folder / 'manifest.jsonl'}: {item.id} twice")
            known |= places
            problems += _verify_item(folder, item, names)
    except VerifyError as error:
        problems.append(str(error))
    problems += [f"{path}: not part of the set" for path in _strays(folder, known)]
    return problems


def _verify_item(folder: Path, item: Item, names: Sequence[str]) -> Iterator[str]:
    if names and dict(enumerate(names)).get(item.class_index) != item.class_name:
        told = f"its class is {item.class_index} `{item.class_name}`, which data.yaml does not say"
        yield f"{folder / 'manifest.jsonl'}: {item.id}: {told}"
    classes = len(names)
    for part in item.sha256:
        path = part_path(folder, part, item)
        try:
            data = path.read_bytes()
        except OSError as error:
            yield f"{path}: {error.strerror}"
            continue
        if sha256(data) != item.sha256[part]:
            yield f"{path}: not the bytes that the manifest names"
        elif part == "labels" and classes:
            try:
                count = len(parse_rows(data.decode("utf-8"), classes))
                if count != item.boxes:
                    yield f"{path}: {count} rows, the manifest says {item.boxes}"
            except (ValueError, UnicodeDecodeError) as error:
                yield f"{path}: {error}"


def _places(items: Iterable[Item]) -> set[str]:
    """The files of items, relative to their set."""
    return {_place(part, item) for item in items for part in item.sha256}


def _strays(folder: Path, known: set[str]) -> Iterator[Path]:
    """What lies in a set without being part of it; `known` are its composites' files, relative to it."""
    classify = task_of(folder) == "classify"
    tops = ("train",) if classify else tuple(f"{part}/train" for part in PARTS)
    expected = {*HASHED, *FREE, *(top.partition("/")[0] for top in tops)}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        # Ultralytics writes beside labels/: not elsewhere, please
        if (path.name not in expected and not (classify and path.name in _CACHES)) or path.is_symlink():
            yield path
    for top in tops:
        above = folder / top.partition("/")[0]
        for path in sorted(above.iterdir()) if "/" in top and above.is_dir() else []:
            if path.relative_to(folder).as_posix() not in _CACHES and (path.name != "train" or path.is_symlink()):
                yield path
        inner = folder / top
        folders = sorted({place.rpartition("/")[0] for place in known}) if classify else [top]
        for path in sorted(inner.iterdir()) if classify and inner.is_dir() else []:
            if path.relative_to(folder).as_posix() not in folders or path.is_symlink() or not path.is_dir():
                yield path
        for name in folders:
            for path in sorted((folder / name).iterdir()) if (folder / name).is_dir() else []:
                if path.relative_to(folder).as_posix() not in known or path.is_symlink() or path.is_dir():
                    yield path


def data_yaml(names: Iterable[str], task: str = "detect") -> bytes:
    """data.yaml of a set. `val` names the training images only because Ultralytics wants one."""
    if task == "classify":
        classes = {"train": "train", "names": dict(enumerate(names))}
        return (yaml.safe_dump(classes, sort_keys=False, allow_unicode=False)).encode()
    content = {"train": "images/train", "val": "images/train", "names": dict(enumerate(names))}
    note = "# val repeats the training images because Ultralytics wants a val: key; give eval_data= for a real one\n"
    return (note + yaml.safe_dump(content, sort_keys=False, allow_unicode=False)).encode()


def read_data_yaml(folder: Path) -> list[str]:
    """The class names of a set; refuses a data.yaml that does anything but name the set's own images.

    Raises:
        VerifyError: keys such as `download:` or `path:`, or folders other than images/train.
    """
    path = folder / "data.yaml"
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VerifyError(f"{path}: cannot be read ({error})") from error
    classify = task_of(folder) == "classify"
    places = {"train": "train"} if classify else {"train": "images/train", "val": "images/train"}
    if not isinstance(content, dict) or set(content) != {*places, "names"}:
        keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise VerifyError(f"{path}: expected the keys {', '.join(places)} and names and no other, got {keys}")
    if any(content[key] != place for key, place in places.items()):
        raise VerifyError(f"{path}: expected {places}, got { ({key: content[key] for key in places}) }")
    names = content["names"]
    numbered = isinstance(names, dict) and list(names) == list(range(len(names))) and bool(names)
    if not numbered or not all(isinstance(name, str) for name in names.values()):
        raise VerifyError(f"{path}: expected names as 0: first, 1: second, ...")
    return list(names.values())


def set_strays_aside(folder: Path, aside: Path, begun: bool = False) -> None:
    """Move everything that is not part of a set into a folder beside it: it may be somebody's.

    Args:
        begun: the set is not finished: what a build keeps beside it stays, and files of composites not yet listed.
    """
    known = _places(read_manifest(folder, tolerant=True))
    for path in list(_strays(folder, known)):
        if begun and (path.parent != folder or path.name.startswith((".", "scores.sqlite"))):
            continue
        _move(path, aside / path.relative_to(folder))


def _move(path: Path, target: Path) -> None:
    """Move a file or folder; what is at the target already keeps its place, and the newcomer gets a number."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = (target.with_name(f"{target.name}.{i}" if i else target.name) for i in range(10_000))
        path.rename(next(place for place in free if not os.path.lexists(place)))
    except (OSError, StopIteration) as error:
        raise DiskError(f"cannot move {path} to {target}: {error}; it is not part of the set: move it away") from error


def seals(folder: Path, name: str, data: bytes) -> bool:
    """Whether COMPLETE names the hash of `data` for a file: the file, if it differs, was damaged later."""
    try:
        table = json.loads((folder / "COMPLETE").read_text(encoding="utf-8"))
        return bool(table[name] == sha256(data))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def seal(folder: Path) -> bytes:
    """The content of COMPLETE."""
    table = {name: sha256((folder / name).read_bytes()) for name in HASHED}
    return _seal_text(table).encode()


def _seal_text(table: dict[str, str]) -> str:
    return json.dumps(table, indent=1, sort_keys=True) + "\n"


def remove_ours(folder: Path) -> None:
    """Delete a set of ours (`overwrite`), build.yaml last: what is left of a removal that was cut off is still ours.

    Raises:
        DiskError: the folder is not one, or cannot be removed.
    """
    if not is_ours(folder):
        raise DiskError(f"{folder} holds no build.yaml of this program; it is not removed. Choose another `out`")
    try:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != "build.yaml":
                path.unlink()
        (folder / "build.yaml").unlink()
        folder.rmdir()
    except OSError as error:
        raise DiskError(f"cannot remove {folder}: {error}; remove it yourself") from error
