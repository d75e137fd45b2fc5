"""The arms of an experiment: named ones, or every combination of what is varied; and which is compared with which."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from focusdd_det.config import suggest
from focusdd_det.errors import ConfigError

SECTIONS = ("build", "targets", "relabel", "train", "eval")
ITERATIONS = "iterations"


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        name: unique.
        overrides: key with its section (`build.method`, `train.supervision`) or `iterations` -> value.
    """

    name: str
    overrides: Mapping[str, Any]


def qualified(key: str, sections: Mapping[str, Sequence[str]]) -> str:
    """A key with its section: `method` -> `build.method`.

    Args:
        sections: section -> its keys, of those where a key may be given without its section.

    Raises:
        ConfigError: unknown, or in two sections.
    """
    section, dot, rest = key.partition(".")
    if key == ITERATIONS or (dot and section in SECTIONS and rest):
        return key
    found = [name for name, keys in sections.items() if key in keys]
    if len(found) == 1:
        return f"{found[0]}.{key}"
    if found:
        raise ConfigError(f"arms: `{key}` is a key of {' and of '.join(found)}; write {found[0]}.{key}")
    known = [name for keys in sections.values() for name in keys]
    raise ConfigError(
        f"arms: no key `{key}`{suggest(key, known)} (a key of Ultralytics needs its section: train.{key})"
    )


def expand(blocks: Any, sections: Mapping[str, Sequence[str]]) -> tuple[Arm, ...]:
    """`arms:` of a file -> arms, in order.

    Args:
        blocks: {name: overrides}, or {"vary": {key: [values]}}, or a list of such.

    Raises:
        ConfigError: not in this form, two arms of one name, or none.
    """
    named: list[tuple[str | None, dict[str, Any]]] = []
    for block in blocks if isinstance(blocks, list) else [blocks]:
        if not isinstance(block, Mapping) or not block:
            raise ConfigError("arms: expected `name: {build.key: value}` or `vary: {key: [values]}`, or a list of such")
        if "vary" in block:
            if set(block) != {"vary"} or not isinstance(block["vary"], Mapping):
                raise ConfigError("arms: `vary` stands alone and holds `key: [values]`; use a list of blocks for more")
            named += [(None, overrides) for overrides in _product(block["vary"], sections)]
            continue
        for name, overrides in block.items():
            if overrides is not None and not isinstance(overrides, Mapping):
                raise ConfigError(f"arms: {name}: expected `{{build.key: value, ...}}`, got {overrides!r}")
            named.append((str(name), {qualified(str(k), sections): v for k, v in (overrides or {}).items()}))
    names = _names([overrides for name, overrides in named if name is None])
    arms = tuple(Arm(name if name is not None else names.pop(0), overrides) for name, overrides in named)
    seen: set[str] = set()
    for arm in arms:
        if arm.name in seen:
            raise ConfigError(f"arms: two arms are called `{arm.name}`; names must differ")
        seen.add(arm.name)
    return arms


def baseline_of(arm: Arm, arms: Sequence[Arm], baseline: str | Mapping[str, Any] | None) -> Arm | None:
    """The arm that another is compared with; None for the baseline itself, or where there is none.

    Args:
        baseline: name of an arm, or qualified overrides: then it is the arm that differs in just these keys.
    """
    if baseline is None:
        return None
    if isinstance(baseline, str):
        return next((other for other in arms if other.name == baseline and other is not arm), None)
    wanted = {**arm.overrides, **baseline}
    return next((other for other in arms if dict(other.overrides) == wanted and other is not arm), None)


def usual_baseline(arms: Sequence[Arm]) -> str | dict[str, Any] | None:
    """Random crops, where they are among the arms."""
    if any(arm.name == "random" for arm in arms):
        return "random"
    if any(arm.overrides.get("build.method") == "random" for arm in arms):
        return {"build.method": "random"}
    return None


def short(key: str) -> str:
    """A key without its section."""
    return key.partition(".")[2] or key


def _product(vary: Mapping[str, Any], sections: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    for key, values in vary.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"arms: vary: {key}: expected a list of values, got {values!r}")
    keys = [qualified(str(key), sections) for key in vary]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*vary.values())]


def _names(all_overrides: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names from what differs: a word stands for itself, other values come with their key."""
    keys = list(dict.fromkeys(key for overrides in all_overrides for key in overrides))
    absent = object()
    differing = [k for k in keys if len({repr(o.get(k, absent)) for o in all_overrides}) > 1] or keys
    plain = [", ".join(_part(k, o[k], False) for k in differing if k in o) for o in all_overrides]
    if len(set(plain)) == len(plain):
        return plain
    return [", ".join(_part(k, o[k], True) for k in differing if k in o) for o in all_overrides]


def _part(key: str, value: Any, with_key: bool) -> str:
    return value if isinstance(value, str) and not with_key else f"{short(key)}={value}"
