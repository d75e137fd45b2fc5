"""Words of a command line -> options: one grammar for all commands but the trainings', which is Ultralytics'."""

from __future__ import annotations

import shlex
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

from focusdd_det.config import convert, load, shown, suggest, text_or_scalar
from focusdd_det.errors import ConfigError

T = TypeVar("T")
SCRIPTS = {
    "build": "build_det_set.py",
    "detect train": "train_det.py",
    "detect val": "val_coco.py",
    "detect targets": "store_targets.py",
    "classify build": "build_cls_set.py",
    "classify relabel": "relabel_cls.py",
    "classify train": "train_cls.py",
}  # command -> its script in tools/


def wants_help(argv: Sequence[str]) -> bool:
    """Whether a help is asked for."""
    return any(token in ("-h", "--help", "help") for token in argv)


def parse_tokens(argv: Sequence[str], fields: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Command-line tokens -> overrides.

    Accepts `key=value`, `--key value`, `--key=value` and, for booleans, a bare `--key`; `-` and `_` are the same in a
    key, up to a dot. Of a key that is given several times the last value counts; where the key takes a list, all do.
    Text stays as it is written, other values are read as YAML.

    Args:
        argv: the tokens.
        fields: known key -> its type; tells flags from options, and text (`out=0010`) from numbers.
        aliases: other spelling -> key (for example `source` -> `sources`).

    Raises:
        ConfigError: a token that is neither, or an option without its value.
    """
    found: dict[str, list[Any]] = {}
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        dashed = token.startswith("--")
        body = token[2:] if dashed else token
        key, equals, value = body.partition("=")
        section, dot, name = key.partition(".")  # a name of the user's follows: licence.my-photos
        key = section.replace("-", "_") + dot + name
        key = aliases.get(key, key)
        if not equals:
            if not dashed:
                raise ConfigError(
                    f"cannot read `{token}`; expected key=value or --key value{suggest(key, list(fields))}"
                )
            if fields.get(key) in (bool, "bool") and (not tokens or tokens[0].lower() not in ("true", "false")):
                value = "true"
            elif tokens and not tokens[0].startswith("--"):
                value = tokens.pop(0)
            elif key in fields:
                raise ConfigError(f"--{key.replace('_', '-')} needs a value")
            else:
                value = "true"
        found.setdefault(key, []).append(text_or_scalar(value, fields.get(key)))
    several = {key for key, hint in fields.items() if get_origin(hint) is tuple}
    return {
        key: [item for value in values for item in (value if isinstance(value, list) else [value])]
        if key in several and len(values) > 1
        else values[-1]
        for key, values in found.items()
    }


def command_config(
    cls: type[T], shipped: str, argv: Sequence[str], aliases: Mapping[str, str] | None = None, flags: Sequence[str] = ()
) -> tuple[T, dict[str, bool]]:
    """A config dataclass from the shipped YAML, then the file that `config=` names, then the command line.

    Args:
        cls, shipped: as in `load`.
        aliases: as in `parse_tokens`.
        flags: of the command itself, beside `dry_run`.

    Returns:
        The config, and each flag, False where it was not given.

    Raises:
        ConfigError: all unknown keys, wrong types and wrong choices at once.
    """
    own = dict.fromkeys(("dry_run", *flags), bool)
    given = parse_tokens(argv, {**typing.get_type_hints(cls), **own, "config": str}, aliases or {})
    asked = {key: given.pop(key, False) for key in own}
    for key, value in asked.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{key}={value!r}: expected true or false")
    file = given.pop("config", None)
    return load(cls, shipped, given, Path(str(file)) if file else None, "the command"), asked


def read_options(
    command: str,
    argv: Sequence[str],
    hints: Mapping[str, Any],
    needed: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The options of a command that has no YAML, each of the type that its hint says.

    Args:
        command: named in the message.
        hints: option -> its type; `tuple[str, ...]` may be given several times.
        needed: options that must be given.
        aliases: as in `parse_tokens`.

    Raises:
        ConfigError: all unknown, missing and wrong ones at once.
    """
    given = parse_tokens(argv, hints, aliases or {})
    problems = [f"unknown option `{key}`{suggest(key, list(hints))}" for key in given if key not in hints]
    problems += [f"{key}= is missing" for key in needed if given.get(key) in (None, "")]
    found = {}
    for key in given:
        try:
            found[key] = convert(given[key], hints[key]) if key in hints else None
        except (TypeError, ValueError) as error:
            problems.append(f"{key}={shown(given[key])}: {error}")
    if problems:
        raise ConfigError(f"{command}: " + "; ".join(problems) + "; --help shows examples")
    return found


def spelled(command: str, *words: object) -> str:
    """A command to be copied into a shell: quoted where that is needed, and as the script of tools/ if one is running.

    Args:
        command: as in `focusdd detect train`, without the program.
    """
    program = Path(sys.argv[0])
    ours = program.name in SCRIPTS.values()
    first = ["python", str(program.with_name(SCRIPTS[command]))] if ours else ["focusdd", *command.split()]
    return shlex.join([*first, *map(str, words)])
