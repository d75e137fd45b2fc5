"""Whether two builds choose the same, and how far what they saw of the sources is apart. Pure arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from focusdd_det.bench.definition import Choice, Composite, Seen


class Look(NamedTuple):
    """What was seen of a source: confidence and attention share in [0, 1]; (row, column) of its window."""

    p: float
    share: float
    corner: tuple[int, int]


Part = Callable[[Composite], Sequence[object]]
Looks = Mapping[tuple[str, bytes], Look]  # (class, content hash) -> what was seen


def same_choice(mine: Choice, theirs: Choice) -> dict[str, float]:
    """How much of a choice is in another, as shares of the larger of both; 0 where nothing is chosen.

    Returns:
        chosen: sources of key patches; windows: those with the same window, too; backgrounds: sources shown whole.
            Wherever they stand in their class.
        composites: composites that are the same at the same place: keys in order, windows and backgrounds.
        of: how many composites there are.
    """
    parts: dict[str, Part] = {
        "chosen": lambda c: [key.sha for key in c.keys],
        "windows": lambda c: list(c.keys),
        "backgrounds": lambda c: list(c.backgrounds),
    }
    found = {name: _shared(_counted(mine, part), _counted(theirs, part)) for name, part in parts.items()}
    places = [
        {(name, i, each) for name, made in choice.items() for i, each in enumerate(made)} for choice in (mine, theirs)
    ]
    of = max(map(len, places))
    return {**found, "composites": len(places[0] & places[1]) / max(1, of), "of": of}


def _counted(choice: Choice, part: Part) -> Counter[object]:
    return Counter((name, each) for name, made in choice.items() for c in made for each in part(c))


def _shared(mine: Counter[object], theirs: Counter[object]) -> float:
    return (mine & theirs).total() / max(1, mine.total(), theirs.total())


def differences(mine: Looks, theirs: Looks, chosen: Iterable[tuple[str, bytes]]) -> dict[str, float]:
    """How far two looks at the same sources are apart.

    Args:
        chosen: class and content hash of some of them.

    Returns:
        p, share: the largest differences; p_chosen: that of p among the chosen.
        window: share of all sources that have the same window; one that only one of both could read has not.
        alone: how many those are.
    """
    both, every = mine.keys() & theirs.keys(), mine.keys() | theirs.keys()
    p = {place: abs(mine[place].p - theirs[place].p) for place in both}
    return {
        "p": max(p.values(), default=0.0),
        "p_chosen": max((p[place] for place in chosen if place in p), default=0.0),
        "share": max((abs(mine[place].share - theirs[place].share) for place in both), default=0.0),
        "window": sum(mine[place].corner == theirs[place].corner for place in both) / max(1, len(every)),
        "alone": len(every) - len(both),
    }


def looks_of(seen: Mapping[str, Iterable[Seen]]) -> dict[tuple[str, bytes], Look]:
    """Sources by class as `differences` wants them."""
    return {(name, s.sha): Look(s.p, s.share, s.corner) for name, sources in seen.items() for s in sources}


def sources_of(choice: Choice) -> set[tuple[str, bytes]]:
    """Class and content hash of all key patches."""
    return {(name, key.sha) for name, made in choice.items() for composite in made for key in composite.keys}
