"""Class folder <-> class of the set.

Folders are keyed by name (a WordNet id for ImageNet, anything for a user's own), never by position.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from focusdd_det.config import cfg_dir, read_yaml, suggest
from focusdd_det.errors import DataError

LEVELS = ("exact", "strong", "near")


@dataclass(frozen=True)
class ClassMap:
    """Which folders stand for which class of the set.

    Attributes:
        names: the class names of the set; the position is the label's class index.
        folders: folder -> class name, for the levels that were asked for.
        levels: folder -> level (exact, strong, near), for the same folders.
    """

    names: tuple[str, ...]
    folders: Mapping[str, str]
    levels: Mapping[str, str]

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names) or not self.names:
            raise ValueError("class names must be present and different")
        unknown = set(self.folders.values()) - set(self.names)
        if unknown:
            raise ValueError(f"classes {sorted(unknown)} are not among the names")

    def folders_of(self, name: str) -> tuple[str, ...]:
        """The folders of one class, sorted."""
        return tuple(sorted(folder for folder, owner in self.folders.items() if owner == name))

    @property
    def sha256(self) -> str:
        """Hash of the content: names in order and the folders with their classes."""
        content = json.dumps([self.names, sorted(self.folders.items())], ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()


@lru_cache(maxsize=1)
def imagenet_synsets() -> tuple[str, ...]:
    """The 1,000 WordNet ids of ImageNet-1K in the order of every timm and torchvision classifier."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


@lru_cache(maxsize=1)
def lemmas() -> dict[str, str]:
    """WordNet id -> its English names, from timm's own table; empty if it has none (found without importing timm)."""
    spec = find_spec("timm")
    for place in (spec and spec.submodule_search_locations) or ():
        table = Path(place) / "data" / "_info" / "imagenet_synset_to_lemma.txt"
        if table.is_file():
            rows = (line.split("\t") for line in table.read_text(encoding="utf-8").splitlines())
            return {row[0]: row[1] for row in rows if len(row) == 2}
    return {}


def find_map(name: str) -> Path:
    """A class map by path, or by the name of a file in cfg/."""
    path = Path(name).expanduser()
    for candidate in (path, cfg_dir() / name, cfg_dir() / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = sorted(p.name for p in cfg_dir().glob("*coco*.yaml"))
    raise DataError(f"no class map {name}: expected a YAML file, or one of cfg/: {', '.join(shipped)}")


def read_class_map(path: Path, levels: Sequence[str]) -> ClassMap:
    """A class map file, in either of two forms.

    With levels, as cfg/coco_imagenet.yaml: `class: {coco_id: 0, exact: [{n01440764: comment}], strong: [], near: []}`.
    Plain: `names: [ball, star]` and `folders: {folder: class}`; without `folders` every class has one of its own name.

    Raises:
        DataError: all problems at once: unknown synsets and classes, a folder in two classes of one level.
    """
    content = read_yaml(path)
    if "names" in content:
        return _plain(path, content)
    problems: list[str] = []
    order: dict[int, str] = {}
    rank: dict[str, tuple[int, str]] = {}
    undecided: set[str] = set()  # near to two classes: a picture of it could be either, so it stands for none
    known = set(imagenet_synsets())
    for name, entry in content.items():
        problems += _unusable(name)
        if not isinstance(entry, dict) or type(entry.get("coco_id")) is not int:
            problems.append(
                f"`{name}` needs a coco_id and lists {', '.join(LEVELS)}; for classes of your own write "
                "`names: [...]` and, where folders have other names, `folders: {folder: class}`"
            )
            continue
        if entry["coco_id"] in order:
            problems.append(f"`{name}` has the coco_id of `{order[entry['coco_id']]}`")
        order[entry["coco_id"]] = str(name)
        unknown_keys = set(entry) - {"coco_id", "status", "note", *LEVELS}
        problems += [
            f"`{name}`: unknown key `{key}`{suggest(str(key), LEVELS)}" for key in sorted(map(str, unknown_keys))
        ]
        for level in (level for level in LEVELS if level in levels):
            if not isinstance(entry.get(level) or [], list):
                problems.append(f"`{name}`: {level} must be a list of synsets")
                continue
            for item in entry.get(level) or []:
                folder = str(next(iter(item))) if isinstance(item, dict) and item else str(item)
                if folder not in known:
                    problems.append(
                        f"`{name}`: `{folder}` is not an ImageNet-1K synset{suggest(folder, sorted(known))}"
                    )
                    continue
                place = (LEVELS.index(level), str(name))
                if folder in rank and rank[folder][0] == place[0] and rank[folder][1] != place[1]:
                    if level == "near":
                        undecided.add(folder)
                    else:
                        problems.append(f"`{folder}` is {level} in `{rank[folder][1]}` and in `{name}`: choose one")
                rank[folder] = min(rank.get(folder, place), place)
    if not content:
        problems.append("it is empty; expected classes with their coco_id and synsets, or `names`")
    if sorted(order) != list(range(len(order))):
        problems.append(f"coco_id must run from 0 to {len(order) - 1} without gaps")
    _report(path, problems)
    rank = {
        folder: place for folder, place in rank.items() if folder not in undecided or place[0] < LEVELS.index("near")
    }
    return ClassMap(
        names=tuple(order[i] for i in sorted(order)),
        folders={folder: name for folder, (_, name) in rank.items()},
        levels={folder: LEVELS[level] for folder, (level, _) in rank.items()},
    )


def read_folder_map(path: Path, names: Sequence[str] | None = None) -> dict[str, str]:
    """A user's own map for one source folder: a YAML of `folder: class` lines (or those lines under `folders:`).

    Args:
        names: the classes there are; None: any.

    Raises:
        DataError: not such a file, or classes that are not among `names`, all at once.
    """
    content = read_yaml(path)
    table = content.get("folders", content)
    if not isinstance(table, dict) or not table:
        raise DataError(f"{path}: expected `folder: class` lines")
    problems = [problem for folder in table for problem in _unusable(folder)]
    problems += [
        f"`{folder}: {name}`: the set has no such class{suggest(str(name), list(names or ()))}"
        for folder, name in table.items()
        if names is not None and str(name) not in names
    ]
    _report(path, problems)
    return {str(folder): str(name) for folder, name in table.items()}


def _plain(path: Path, content: dict[str, Any]) -> ClassMap:
    names = content["names"]
    if isinstance(names, dict) and all(type(key) is int for key in names):
        names = [names[key] for key in sorted(names)]
    if not isinstance(names, list) or not names:
        raise DataError(f"{path}: `names` must be a list of class names")
    unusable = [problem for name in names for problem in _unusable(name)]
    names = tuple(str(name) for name in names)
    folders = content.get("folders", {name: name for name in names})
    problems = [
        f"unknown key `{key}`{suggest(str(key), ['names', 'folders'])}" for key in set(content) - {"names", "folders"}
    ]
    problems += unusable
    if len(set(names)) != len(names):
        problems.append("`names` has a class twice")
    if not isinstance(folders, dict):
        problems.append("`folders` must be `folder: class` lines")
        folders = {}
    problems += [problem for folder in folders for problem in _unusable(folder)]
    problems += [
        f"`{folder}: {name}`: not among names{suggest(str(name), names)}"
        for folder, name in folders.items()
        if str(name) not in names
    ]
    _report(path, problems)
    table = {str(folder): str(name) for folder, name in folders.items()}
    return ClassMap(names, table, dict.fromkeys(table, "exact"))


def _unusable(name: object) -> list[str]:
    """What is wrong with a class or folder name: it has to survive YAML, JSON, SQLite and a terminal."""
    if isinstance(name, (dict, list, tuple)) or name is None or not str(name).isprintable() or not str(name).strip():
        return [f"{name!r} is not a name: expected printable text"]
    return []


def _report(path: Path, problems: Sequence[str]) -> None:
    if problems:
        raise DataError(f"{path} is not a usable map:\n  " + "\n  ".join(problems))
