"""What a teacher found in class folders -> a table, and suggestions for the class map. Values in, values out.

Nothing is ever applied: a suggestion is a map beside the old one, to be read by a person.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from focusdd_det.classmap import LEVELS

FAR = 2  # another class that is found so many times as often makes a folder move
HARDLY = 0.2  # of found_share: below that a folder is dropped rather than lowered

Kind = Literal["lower", "drop", "move", "add"]


@dataclass
class Tally:
    """What was found in the pictures of one folder.

    Attributes:
        root, folder: where it is; title: what the map's comment calls it.
        class_name, level: of the map; None when the map does not name the folder. A map without levels is `exact`.
        own_map: whether a suggestion belongs into a map of this source alone, not into the one that all share.
        has_levels: whether its map has levels, so that it can be lowered.
        pictures: looked at; bad: those of the draw that could not be used.
        found: class -> pictures in which it is.
        main: class -> pictures in which its box is the largest of all.
    """

    root: str
    folder: str
    title: str = ""
    class_name: str | None = None
    level: str | None = None
    own_map: bool = False
    has_levels: bool = True
    pictures: int = 0
    bad: int = 0
    found: Counter[str] = field(default_factory=Counter)
    main: Counter[str] = field(default_factory=Counter)

    def share(self, name: str | None) -> float:
        """In what share of the pictures a class is; 0 without pictures."""
        return self.found[name] / self.pictures if name and self.pictures else 0.0

    def add(self, boxes: Mapping[str, tuple[float, float]], conf: float) -> None:
        """One more picture.

        Args:
            boxes: class -> score and area of its best box.
            conf: boxes of at most this score do not count.
        """
        self.pictures += 1
        seen = {name: area for name, (score, area) in boxes.items() if score > conf}
        self.found.update(list(seen))
        if seen:
            self.main[max(sorted(seen), key=lambda name: seen[name])] += 1


@dataclass(frozen=True)
class Change:
    """A suggestion for one folder; the class and level that it has, and those it should have (None: none)."""

    kind: Kind
    root: str
    folder: str
    own_map: bool
    old: str | None
    old_level: str | None
    new: str | None
    new_level: str | None
    why: str

    def line(self) -> str:
        """In words."""
        old = f"{self.old} ({self.old_level})"
        told = {
            "lower": f"{old} -> {self.new_level}",
            "drop": f"drop from {old}",
            "move": f"{old} -> {self.new} ({self.new_level})",
            "add": f"add to {self.new} ({self.new_level})",
        }
        return f"{told[self.kind]}: {self.why}"


def changes(tallies: Sequence[Tally], found_share: float, add_share: float, least: int) -> list[Change]:
    """Suggestions, folder by folder.

    - move: another class is found in at least `found_share` of the pictures, and at least twice as often as the
      mapped one. To `strong`, whose meaning is just that.
    - drop, lower: the mapped class is found in less than `found_share`. Dropped when it is found in less than a fifth
      of that, or when there is no lower level; else lowered to `near`, which a build leaves out unless asked.
    - add: no class is mapped, and one is found in at least `add_share`. To `strong`.

    A class only moves or adds a folder when its box is the largest in at least half of the pictures it is found in:
    people stand beside very many things.

    A folder of several sources that the shared map speaks of is one folder: its pictures are counted together, and
    every source has the same suggestion for it.

    Args:
        least: folders with fewer pictures are left alone.
    """
    pools: dict[tuple[str | None, str], list[Tally]] = {}
    for tally in tallies:
        pools.setdefault((tally.root if tally.own_map else None, tally.folder), []).append(tally)
    made = []
    for pool in pools.values():
        tally = _together(pool)
        change = _change(tally, found_share, add_share) if tally.pictures >= max(least, 1) else None
        made += [replace(change, root=one.root) for one in pool if change is not None]
    return made


def _together(pool: Sequence[Tally]) -> Tally:
    return replace(
        pool[0],
        pictures=sum(tally.pictures for tally in pool),
        bad=sum(tally.bad for tally in pool),
        found=sum((tally.found for tally in pool), Counter()),
        main=sum((tally.main for tally in pool), Counter()),
    )


def once(wanted: Sequence[Change]) -> list[Change]:
    """The changes of the maps: what several sources have in common is one."""
    return list({(change.root if change.own_map else None, change.folder): change for change in wanted}.values())


def _change(tally: Tally, found_share: float, add_share: float) -> Change | None:
    def change(kind: Kind, new: str | None, level: str | None, why: str) -> Change:
        return Change(kind, tally.root, tally.folder, tally.own_map, tally.class_name, tally.level, new, level, why)

    own = tally.class_name
    rival = _leader(tally)
    count = f"of {tally.pictures}"
    if own is None:
        if rival is not None and tally.share(rival) >= add_share:
            return change("add", rival, "strong", f"{rival} found in {tally.found[rival]} {count}")
        return None
    both = f"{own} found in {tally.found[own]} {count}"
    if rival is not None and tally.share(rival) >= found_share and tally.found[rival] >= FAR * max(tally.found[own], 1):
        return change("move", rival, "strong", f"{both}, {rival} in {tally.found[rival]}")
    share = tally.share(own)
    if share >= found_share:
        return None
    if tally.level == "near" or not tally.has_levels or share < HARDLY * found_share:
        return change("drop", None, None, both)
    return change("lower", own, "near", both)


def _leader(tally: Tally) -> str | None:
    """The class that is found most, the mapped one and mere company left out."""
    names = [name for name, count in tally.found.items() if name != tally.class_name and 2 * tally.main[name] >= count]
    return min(names, key=lambda name: (-tally.found[name], name)) if names else None


def wilson(found: int, pictures: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927); (0, 1) without pictures."""
    if not pictures:
        return 0.0, 1.0
    z, p = 1.96, found / pictures
    middle = p + z * z / (2 * pictures)
    spread = z * math.sqrt(p * (1 - p) / pictures + z * z / (4 * pictures * pictures))
    scale = 1 + z * z / pictures
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


# --- the suggested map


def titles(content: Mapping[str, Any]) -> dict[str, str]:
    """Folder -> what the comments of a map with levels call it, without ImageNet's number."""
    found = {}
    for entry in content.values():
        for level in LEVELS if isinstance(entry, dict) else ():
            for item in entry.get(level) or []:
                if isinstance(item, dict) and item:
                    folder, title = next(iter(item.items()))
                    found[str(folder)] = str(title or "").lstrip("0123456789 ")
    return found


def suggested_levels(content: Mapping[str, Any], wanted: Sequence[Change]) -> dict[str, Any]:
    """A map with levels (the content of such a file) with the changes in it; the old one is not touched.

    A folder that changes is taken out everywhere it is named, so that it stands for one class only.
    """
    result = copy.deepcopy(dict(content))
    named = titles(content)
    for change in wanted:
        for entry in result.values():
            for level in LEVELS:
                entry[level] = [item for item in entry.get(level) or [] if _folder(item) != change.folder]
        if change.new is not None and change.new_level is not None:
            title = "; ".join(text for text in (named.get(change.folder, ""), f"suggested: {change.why}") if text)
            result[change.new][change.new_level].append({change.folder: title})
    return result


def suggested_folders(folders: Mapping[str, str], wanted: Sequence[Change]) -> dict[str, str]:
    """A `folder: class` table with the changes in it."""
    result = dict(folders)
    for change in wanted:
        result.pop(change.folder, None)
        if change.new is not None:
            result[change.folder] = change.new
    return result


def _folder(item: Any) -> str:
    return str(next(iter(item))) if isinstance(item, dict) and item else str(item)


# --- what people read


def report(tallies: Sequence[Tally], wanted: Sequence[Change], head: Sequence[str], found_share: float) -> str:
    """audit.md: the mapped folders, worst first; the others in which a class is found; the classes."""
    told = {(change.root, change.folder): change for change in wanted}
    mapped = sorted((t for t in tallies if t.class_name), key=lambda t: (t.share(t.class_name), t.folder))
    lines = ["# Audit of the class map", "", *head, ""]
    counts = Counter(change.kind for change in once(wanted))
    told_kinds = ", ".join(f"{counts[kind]} {kind}" for kind in ("lower", "drop", "move", "add"))
    lines += [f"Suggestions: {told_kinds}. None is applied."]
    if bare := _left_bare(tallies, wanted):
        lines += [
            "",
            f"Classes that would be left without an exact or strong folder of these sources: {', '.join(bare)}.",
        ]
    if mapped:
        lines += ["", "## Folders of the map, worst first", ""]
        lines += ["| folder | | class (level) | pictures | found in | 95 % | others found | suggestion |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += [_mapped_row(tally, told.get((tally.root, tally.folder))) for tally in mapped]
    others = [t for t in tallies if t.class_name is None and _best(t) and t.share(_best(t)) >= found_share]
    if others:
        lines += ["", f"## Folders outside the map in which a class is found in {found_share:.0%} or more", ""]
        lines += ["| folder | pictures | found in | suggestion |", "|---|---|---|---|"]
        for tally in sorted(others, key=lambda t: (-t.share(_best(t)), t.folder)):
            change = told.get((tally.root, tally.folder))
            lines.append(
                f"| {tally.folder} | {tally.pictures} | {_found(tally, None)} | {change.line() if change else ''} |"
            )
    if mapped:
        lines += ["", "## Classes", "", "| class | folders | pictures | found in |", "|---|---|---|---|"]
        lines += _class_rows(mapped)
    return "\n".join(lines) + "\n"


def _left_bare(tallies: Sequence[Tally], wanted: Sequence[Change]) -> list[str]:
    """Classes that have folders which a build takes, and would have none of them with the changes."""
    gone = {(change.root, change.folder) for change in wanted}
    before = {t.class_name for t in tallies if t.class_name and t.level != "near"}
    kept = {t.class_name for t in tallies if t.level != "near" and (t.root, t.folder) not in gone}
    return sorted(before - kept - {change.new for change in wanted if change.new_level != "near"} - {None})  # type: ignore[type-var]


def _mapped_row(tally: Tally, change: Change | None) -> str:
    found = tally.found[tally.class_name or ""]
    low, high = wilson(found, tally.pictures)
    cells = [
        tally.folder,
        tally.title,
        f"{tally.class_name} ({tally.level})",
        f"{tally.pictures}" + (f" (+ {tally.bad} bad)" if tally.bad else ""),
        f"{found} ({tally.share(tally.class_name):.0%})",
        f"{low:.0%} to {high:.0%}",
        _found(tally, tally.class_name),
        change.line() if change else "",
    ]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _found(tally: Tally, without: str | None) -> str:
    """The three classes that are found most."""
    rest = sorted((-count, name) for name, count in tally.found.items() if name != without)
    return ", ".join(f"{name} {-count}" for count, name in rest[:3])


def _best(tally: Tally) -> str | None:
    return min(tally.found, key=lambda name: (-tally.found[name], name)) if tally.found else None


def _class_rows(mapped: Sequence[Tally]) -> list[str]:
    rows = []
    for name in {tally.class_name for tally in mapped if tally.class_name}:
        own = [tally for tally in mapped if tally.class_name == name]
        pictures, found = sum(t.pictures for t in own), sum(t.found[name] for t in own)
        rows.append(
            (
                found / max(pictures, 1),
                f"| {name} | {len(own)} | {pictures} | {found} ({found / max(pictures, 1):.0%}) |",
            )
        )
    return [row for _, row in sorted(rows)]
