"""What a build will do, found out before any model loads: classes, sources, coverage, and all problems at once."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from focusdd_det.classmap import ClassMap, find_map, read_class_map, read_folder_map
from focusdd_det.config import BuildConfig, SetConfig, suggest
from focusdd_det.disk import is_folder_name
from focusdd_det.errors import ConfigError, DataError
from focusdd_det.layouts import Layout, Layouts
from focusdd_det.methods import METHODS, Method
from focusdd_det.plugins import load_plugins
from focusdd_det.sources import Located, Root, folder_names, stream

log = logging.getLogger("focusdd")
_SYNSET = re.compile(r"n\d{8}")
_MOST_COMPARED = 20_000  # files read to find copies before a build; fixed-size formats would mean reading everything


@dataclass(frozen=True)
class Group:
    """A class that composites are made for.

    Attributes:
        name: the class, or the folder with `ipc_unit: imagenet`.
        class_name, class_index: the class of the set it stands for.
        folders: class folders that feed it, sorted.
        sources: picture files found, undecoded.
        ipc: composites that will be made.
    """

    name: str
    class_name: str
    class_index: int
    folders: tuple[str, ...]
    sources: int
    ipc: int


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before a picture is opened."""

    class_map: ClassMap
    map_sha256: dict[str, str]  # of the class map and of each root's own
    roots: tuple[Root, ...]
    groups: tuple[Group, ...]
    short: dict[str, tuple[int, int]]  # class -> (composites it can fill, composites asked for)
    uncovered: tuple[str, ...]  # classes of the set that no source stands for
    notes: tuple[str, ...]

    @property
    def composites(self) -> int:
        """How many composites will be made, if enough sources can be used."""
        return sum(group.ipc for group in self.groups)

    @property
    def sources(self) -> int:
        """Picture files of all classes."""
        return sum(group.sources for group in self.groups)

    def stream(self) -> Iterator[Located]:
        """Every source of the planned classes, with its group as the class."""
        group_of = {(group.class_name, folder): group.name for group in self.groups for folder in group.folders}
        folders = {folder for _, folder in group_of}
        for root in self.roots:
            for located in stream(root, folders):
                s = located.source
                group = group_of.get((s.group, s.folder))
                if group is not None:
                    yield located if s.group == group else replace(located, source=replace(s, group=group))

    def table(self) -> str:
        """The plan as text, for `--dry-run` and the log."""
        lines = [
            f"{len(self.groups)} classes, {self.sources} sources, {self.composites} composites planned",
            f"covered: {len(self.covered)} of {len(self.class_map.names)} classes",
        ]
        if self.uncovered:
            lines.append(f"not covered ({len(self.uncovered)}): {', '.join(self.uncovered)}")
        if self.short:
            shown = ", ".join(f"{name} {have}/{want}" for name, (have, want) in sorted(self.short.items()))
            lines.append(f"too few sources for the ipc ({len(self.short)}): {shown}")
        width = max((len(group.name) for group in self.groups), default=5)
        lines.append(f"{'class':{width}}  sources  composites")
        lines += [f"{group.name:{width}}  {group.sources:7d}  {group.ipc:10d}" for group in self.groups]
        return "\n".join([*lines, *self.notes])

    @property
    def covered(self) -> tuple[str, ...]:
        """Classes of the set that get at least one composite, in the order of the set."""
        have = {group.class_name for group in self.groups if group.ipc}
        return tuple(name for name in self.class_map.names if name in have)


def make_plan(config: SetConfig) -> Plan:
    """Read the maps, list the folders, count the sources.

    Raises:
        ConfigError, DataError: every problem that was found, in one message.
    """
    if not config.sources:
        raise ConfigError(
            "no sources: give --source PATH (class folders such as n01440764/*.JPEG), as often as you like; "
            "--source PATH::MAP.yaml for folders with names of your own"
        )
    method = method_of(config)
    config = method.adapt(config)
    if isinstance(config, BuildConfig):
        class_map = read_class_map(find_map(config.class_map), config.levels)
    else:
        class_map = folder_classes(config)
    unknown = [
        f"classes: the set has no class `{name}`{suggest(name, class_map.names)}"
        for name in config.classes
        if name not in class_map.names
    ]
    problems: list[str] = []
    roots: list[Root] = []
    hashes = {"class_map": class_map.sha256}
    notes: list[str] = []
    for entry in config.sources:
        try:
            root, digest, more = _root(entry, class_map, {root.name for root in roots}, isinstance(config, BuildConfig))
        except (DataError, ConfigError) as error:
            problems.append(str(error))
            continue
        roots.append(root)
        hashes[root.name] = digest
        notes += more
    if method.all_keys:
        notes.append(f"method={config.method} makes no backgrounds: n_key= and background= do nothing")
    plan, more_problems = _groups(config, class_map, hashes, roots, notes)
    if method.needs_teacher and isinstance(config, BuildConfig):
        note = (
            f"method={config.method}: {Path(config.teacher).name} looks at each of the {plan.sources} sources at "
            f"{config.image_size} px before anything is composed (a pass of YOLO11x is about 20 times that of DeiT-S); "
            "scores=FILE keeps what it finds for the next build"
        )
        plan = replace(plan, notes=(*plan.notes, note))
    if roots and not (unknown and len(unknown) == len(config.classes)):
        problems += more_problems
    if unknown or problems:
        kind = DataError if problems else ConfigError
        raise kind("the build cannot start:\n  " + "\n  ".join(unknown + problems))
    return plan


def method_of(config: SetConfig) -> Method:
    """The method that `method=` names; the user's own files are loaded first.

    Raises:
        ConfigError: there is none of that name, a plugin fails, or the method cannot do what the config asks for.
    """
    load_plugins(config.plugins)
    if config.method not in METHODS:
        raise ConfigError(
            f"method={config.method}: expected one of {', '.join(METHODS)}{suggest(config.method, list(METHODS))}"
        )
    method = METHODS[config.method]
    if method.needs_teacher and not isinstance(config, BuildConfig):
        raise ConfigError(
            f"method={config.method} ranks windows by what a detection teacher finds in them, and a classification "
            "build has none; use method=realism (the crop that the classifier is surest of) or method=focusdd"
        )
    cells = method.adapt(config)
    if not method.all_keys and cells.n_key > cells.grid**2:
        raise ConfigError(f"n_key={cells.n_key}: expected 0 to grid^2 = {cells.grid**2} key patches")
    if config.grow_from and not method.growable:
        raise ConfigError(
            f"grow_from: method={config.method} chooses other sources for another ipc, so a smaller set is not the "
            "beginning of a larger one; build without grow_from, or use a method that can grow, such as herding"
        )
    return method


def layouts_of(config: SetConfig, method: Method) -> Layouts:
    """How the composites of a build are laid out; `config` as the method adapts it."""
    usual = Layout(config.grid, config.grid**2 if method.all_keys else config.n_key)
    return Layouts(usual, config.grids, config.seed)


def folder_classes(config: SetConfig) -> ClassMap:
    """Every class folder a class of its own name, or of the name that the source's own map gives it; sorted.

    Sorted synset ids are ImageNet-1K's order in timm and torchvision.

    Raises:
        ConfigError, DataError: no class folders, or a `classes` that names others.
    """
    folders: dict[str, str] = {}
    for entry in config.sources:
        path, own, _ = source_entry(entry)
        location = Path(path).expanduser()
        if not location.exists():
            raise DataError(f"no source folder {location}; expected class folders such as n01440764/*.JPEG, or a tar")
        there = {name for name in folder_names(Root("", location, {})) if not name.startswith(".")}
        if there and there <= {"train", "val", "test"}:
            raise DataError(f"{location} holds {', '.join(sorted(there))}: give the folder of the training pictures")
        table = read_folder_map(find_map(str(own))) if own else {name: name for name in there}
        folders |= {folder: name for folder, name in table.items() if folder in there}
    unusable = sorted(name for name in set(folders.values()) if not is_folder_name(name) or not name.isprintable())
    unknown = [name for name in config.classes if name not in folders.values()]
    if unknown:
        known = sorted(set(folders.values()))
        told = [f"classes: no source has a class `{name}`{suggest(name, known)}" for name in unknown]
        raise ConfigError("; ".join(told))
    if unusable or not folders:
        raise DataError(
            f"the sources have no class folders, or names that no folder can have: {unusable[:5]}; expected folders "
            "such as n01440764/*.JPEG"
        )
    if config.classes:
        folders = {folder: name for folder, name in folders.items() if name in config.classes}
    return ClassMap(tuple(sorted(set(folders.values()))), folders, dict.fromkeys(folders, "exact"))


def source_entry(entry: Any) -> tuple[str, str | None, str | None]:
    """Path, map and name of one of `sources`."""
    if isinstance(entry, dict):
        unknown = set(entry) - {"path", "map", "name"}
        if unknown or "path" not in entry:
            raise ConfigError(f"sources: {entry}: expected path, and optionally map and name")
        return str(entry["path"]), entry.get("map"), entry.get("name")
    path, _, own = str(entry).partition("::")
    return path, own or None, None


def _root(entry: Any, class_map: ClassMap, taken: set[str], strict: bool) -> tuple[Root, str, list[str]]:
    """A source, the hash of its map, and notes. `strict`: a map may name no class that the set lacks."""
    path, own, name = source_entry(entry)
    location = Path(path).expanduser()
    name = str(name or location.resolve().name.removesuffix(".tar") or "source")
    name = os.fsencode(name).decode("utf-8", "backslashreplace")
    if name in taken:
        name = next(f"{name}{i}" for i in range(2, 1000) if f"{name}{i}" not in taken)
    if not location.exists():
        raise DataError(f"no source folder {location}; expected class folders such as n01440764/*.JPEG, or a tar")
    if own:
        table = read_folder_map(find_map(str(own)), class_map.names if strict else None)
        table = {folder: owner for folder, owner in table.items() if owner in class_map.names}
        digest = ClassMap(class_map.names, table, {}).sha256
    else:
        table, digest = dict(class_map.folders), class_map.sha256
    there = folder_names(Root(name, location, table))
    used = {folder: owner for folder, owner in table.items() if folder in there}
    missing = sorted(set(table) - there)
    ignored = sorted(there - set(table))
    notes = []
    # A WordNet id that is not here is a class the user does not have; any other name that is not here is a mistake.
    wrong = [folder for folder in missing if own and not _SYNSET.fullmatch(folder)]
    if wrong:
        listed = "; ".join(f"`{folder}`{suggest(folder, ignored)}" for folder in wrong[:20])
        raise DataError(f"{own}: {len(wrong)} folders of the map are not in {location}: {listed}")
    if not used:
        hint = " (there is a train/ in it: give that)" if (location / "train").is_dir() else ""
        raise DataError(
            f"{location}{hint}: none of its folders is in the class map; found "
            f"{', '.join(ignored[:5]) or 'no folders'}{' ...' if len(ignored) > 5 else ''}, expected names such as "
            f"{', '.join(sorted(table)[:3])}. Give a map of your own: --source {path}::MAP.yaml"
        )
    both = sorted(f for f in used if (location / f).is_dir() and (location / f"{f}.tar").is_file())
    if both:
        notes.append(f"{name}: found as a folder and as an archive, taken together: {', '.join(both[:10])}")
    absent = [folder for folder in missing if own]
    if absent:
        notes.append(f"{name}: {len(absent)} folders of its map are not there: {', '.join(absent[:5])}")
    if ignored:
        shown = ", ".join(ignored[:5]) + (" ..." if len(ignored) > 5 else "")
        notes.append(f"{name}: {len(ignored)} folders that no class of the map names are left out: {shown}")
    return Root(name, location, used), digest, notes


def _groups(
    config: SetConfig,
    class_map: ClassMap,
    hashes: dict[str, str],
    roots: Sequence[Root],
    notes: list[str],
) -> tuple[Plan, list[str]]:
    """The plan, and what makes it impossible."""
    problems: list[str] = []
    wanted = set(config.classes) or set(class_map.names)
    counts: Counter[tuple[str, str]] = Counter()  # (class, folder) -> files
    shared: dict[str, set[str]] = {}
    sizes: dict[str, array[int]] = defaultdict(lambda: array("q"))  # class -> bytes of each file
    left_out: Counter[str] = Counter()
    for root in roots:
        for located in stream(root, left_out=left_out):
            counts[located.source.group, located.source.folder] += 1
            sizes[located.source.group].append(located.size)
        for folder in root.folders:
            shared.setdefault(folder, set()).add(root.name)
    notes += _copies(roots, sizes)
    if left_out:
        kinds = ", ".join(sorted(left_out))
        notes.append(f"{sum(left_out.values())} files of formats that are not read are left out ({kinds}): make JPEGs")
    doubled = sorted(folder for folder, names in shared.items() if len(names) > 1)
    if doubled:
        notes.append(f"folders found in several sources, taken together: {', '.join(doubled[:10])}")
    layouts = layouts_of(config, method_of(config))
    groups: list[Group] = []
    short: dict[str, tuple[int, int]] = {}
    empty: list[str] = []
    for index, class_name in enumerate(class_map.names):
        folders = sorted({folder for (owner, folder) in counts if owner == class_name})
        mapped = {f for root in roots for f, owner in root.folders.items() if owner == class_name}
        empty += sorted(mapped - set(folders)) if class_name in wanted else []
        if class_name not in wanted or not folders:
            continue
        by_folder = isinstance(config, BuildConfig) and config.ipc_unit == "imagenet"
        units = [(f, (f,)) for f in folders] if by_folder else [(class_name, tuple(folders))]
        for name, members in units:
            available = sum(counts[class_name, folder] for folder in members)
            possible = layouts.possible(name, available, config.ipc)
            ipc = config.ipc
            if possible < config.ipc:
                short[name] = (possible, config.ipc)
                if config.short_class == "skip":
                    ipc = 0
                elif config.short_class == "reduce":
                    ipc = possible
                elif config.short_class == "reuse":
                    ipc = config.ipc if possible else 0
            if ipc:
                if any(group.name == name for group in groups):
                    problems.append(
                        f"the folder {name} stands for two classes; with ipc_unit=imagenet rename one of them"
                    )
                groups.append(Group(name, class_name, index, members, available, ipc))
    if empty:
        notes.append(f"folders without a picture: {', '.join(empty[:10])}")
    per_composite = " or ".join(str(n * n) for n in sorted(set(config.grids or (config.grid,))))
    if short and config.short_class == "error":
        listed = ", ".join(f"{name} ({have} of {want})" for name, (have, want) in sorted(short.items()))
        problems.append(
            f"{len(short)} classes have too few sources for ipc={config.ipc} ({per_composite} a composite): {listed}. "
            "Lower ipc, or choose short_class=reduce, reuse or skip"
        )
    elif not groups:
        problems.append(
            f"no class has the {per_composite} sources that one composite takes; "
            f"found {sum(counts.values())} pictures in {len(counts)} folders"
            + (f", and {sum(left_out.values())} files of formats that are not read ({kinds})" if left_out else "")
        )
    covered = {group.class_name for group in groups}
    uncovered = tuple(name for name in class_map.names if name not in covered)
    return Plan(class_map, hashes, tuple(roots), tuple(groups), short, uncovered, tuple(notes)), problems


def _copies(roots: Sequence[Root], sizes: Mapping[str, array[int]]) -> list[str]:
    """A note on files of one class that hold the same bytes; only files of a size that comes twice are read."""
    twice: dict[str, set[int]] = {}
    total = 0
    for group, values in sizes.items():
        size, count = np.unique(np.frombuffer(values, np.int64), return_counts=True)
        total += int(count[count > 1].sum())
        twice[group] = {int(v) for v in size[count > 1] if v > 0}
    if total > _MOST_COMPARED:
        return [f"{total} files share their size with another: copies among them are found when they are read"]
    names: dict[tuple[str, bytes], list[str]] = defaultdict(list)
    for root in roots:
        for located in stream(root):
            if located.problem is None and located.size in twice[located.source.group]:
                try:
                    digest = hashlib.sha256(located.read()).digest()
                except OSError:
                    continue  # it will be quarantined with its reason
                names[located.source.group, digest].append(str(located.source))
    found = sorted(sorted(paths) for paths in names.values() if len(paths) > 1)
    if not found:
        return []
    shown = "; ".join(" = ".join(paths[:3]) for paths in found[:5])
    return [f"the same picture under several names, used once: {len(found)}, such as {shown}"]
