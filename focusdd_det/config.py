"""Config: one commented YAML a tool, overridden by `key=value`, into a frozen dataclass.

The shipped YAML holds every default; its comments are the help text. Unknown keys, wrong types and wrong choices are
collected and reported together, each with the nearest name that exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from focusdd_det.errors import ConfigError

T = TypeVar("T")
K = TypeVar("K", bound="KeyedOptions")


def cfg_dir() -> Path:
    """The folder of the shipped YAML files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "cfg", package.parent / "cfg"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"the configs are missing: neither {package / 'cfg'} nor {package.parent / 'cfg'}; reinstall")


@dataclass(frozen=True)
class SetConfig:
    """What the build of any distilled set is asked for: which pictures, how composed. The shipped YAML says what each
    key means."""

    sources: tuple[Any, ...]
    out: str
    ipc: int
    classes: tuple[str, ...]
    short_class: Literal["error", "reduce", "reuse", "skip"]
    seed: int
    method: str
    plugins: tuple[str, ...]
    selector: str
    selector_weights: str | None
    view: int | Literal["auto"]
    geometry: Literal["squash", "crop"]
    attention: Literal["gca", "last", "mean"]
    side_ratio: float
    alpha: float
    confidence: Literal["true", "max"]
    selection: Literal["grow", "paper"]
    stratify: bool
    near_duplicate: int
    least_entropy: float
    grid: int
    n_key: int
    grids: tuple[int, ...]
    image_size: int
    crop: Literal["window", "cover", "fixed"]
    background: Literal["crop", "letterbox"]
    jpeg_quality: int
    max_bad: float
    max_pixels: int
    decode: Literal["reduced", "full"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    screen: Literal["auto", "off", "bf16", "fp16"]
    batch: int
    device: str
    workers: int
    loader: Literal["auto", "threads", "processes"]
    threads: int
    scores: str | None
    grow_from: str | None
    overwrite: bool
    download: bool

    def __post_init__(self) -> None:
        problems = [f"{key}={getattr(self, key)!r}: expected {text}" for ok, key, text in self.conditions() if not ok]
        if problems:
            raise ConfigError("the configuration is not valid:\n  " + "\n  ".join(problems))

    def conditions(self) -> list[tuple[bool, str, str]]:
        """What must hold: whether it does, the key, and what was expected."""
        return [
            (self.ipc >= 1, "ipc", "at least 1 composite per class"),
            (1 <= self.grid <= 4, "grid", "1 to 4 cells a side"),
            (self.n_key >= 0, "n_key", "0 to grid^2 key patches"),
            (all(1 <= n <= 4 for n in self.grids), "grids", "grids of 1 to 4 cells a side, such as 2,3,3"),
            (self.image_size >= 32, "image_size", "at least 32 px"),
            (0 < self.side_ratio <= 1, "side_ratio", "in (0, 1]"),
            (self.alpha >= 0, "alpha", "at least 0 (0 ranks by confidence alone)"),
            (isinstance(self.view, str) or self.view >= 16, "view", "auto or at least 16 px"),
            (1 <= self.jpeg_quality <= 100, "jpeg_quality", "1 to 100"),
            (0 <= self.near_duplicate <= 64, "near_duplicate", "0 (off) to 64 bits"),
            (0 <= self.least_entropy <= 8, "least_entropy", "0 (off) to 8 bits"),
            (0 <= self.max_bad <= 1, "max_bad", "a share in [0, 1]"),
            (self.batch >= 1, "batch", "at least 1"),
            (self.workers >= 0, "workers", "at least 0 (0 chooses)"),
            (self.threads >= 0, "threads", "at least 0 (0 leaves torch's own)"),
        ]


@dataclass(frozen=True)
class BuildConfig(SetConfig):
    """A detection set: composites that a teacher puts boxes on; cfg/build_det.yaml."""

    ipc_unit: Literal["coco", "imagenet"]
    class_map: str
    levels: tuple[str, ...]
    teacher: str
    label_on: Literal["composite", "source"]
    conf: float
    own_conf: float | None
    contradiction: Literal["keep", "drop", "correct"]
    iou: float
    max_det: int
    min_side: float
    min_visible: float
    empty: Literal["replace", "keep"]
    teacher_batch: int

    def conditions(self) -> list[tuple[bool, str, str]]:
        """Those of any set, and the teacher's."""
        known = {"exact", "strong", "near"}
        return [
            *super().conditions(),
            (0 < self.conf < 1, "conf", "in (0, 1)"),
            (self.own_conf is None or 0 < self.own_conf < 1, "own_conf", "in (0, 1), or null for conf"),
            (0 < self.iou <= 1, "iou", "in (0, 1]"),
            (self.max_det >= 1, "max_det", "at least 1"),
            (0 <= self.min_visible <= 1, "min_visible", "in [0, 1]"),
            (self.min_side >= 0, "min_side", "at least 0 px"),
            (self.teacher_batch >= 1, "teacher_batch", "at least 1"),
            (set(self.levels) <= known and bool(self.levels), "levels", "some of exact, strong, near"),
        ]


@dataclass(frozen=True)
class ClassBuildConfig(SetConfig):
    """A classification set: every class folder is a class, and a composite's label is its class; cfg/build_cls.yaml."""


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases: a page of nested ones stands for more values than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read here", mark)
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text that may come from anybody.

    Raises:
        ValueError: anything that is not plain, valid YAML.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    # A value that contradicts its tag (`!!int x`, `!!timestamp x`) reaches us as whatever PyYAML trips over.
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"not valid YAML ({type(error).__name__}: {str(error)[:200]})") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file: plain values only, a file from outside never gets to run code.

    Raises:
        ConfigError: the file is missing, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}; expected a YAML file there") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file ({error.reason}); expected YAML in UTF-8") from error
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}; expected `key: value` lines")
    return value


def suggest(name: str, known: Sequence[str]) -> str:
    """`, did you mean a, b?` for a name that is not among `known`; empty when nothing is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6) if len(name) < 60 else []
    return f", did you mean {' or '.join(near)}?" if near else ""


def load(cls: type[T], shipped: str, overrides: Mapping[str, Any], file: Path | None = None, section: str = "") -> T:
    """A config dataclass from the shipped YAML, then `file`, then `overrides`; the later one wins.

    Args:
        cls: a frozen dataclass without defaults; its annotations give types and choices.
        shipped: name of a file in cfg/ that holds every key of `cls`.
        overrides: key -> value, as from `parse_tokens` or from Python.
        file: a user's own YAML with some of the keys.
        section: named in messages.

    Raises:
        ConfigError: all unknown keys, wrong types and wrong choices at once.
    """
    values = read_yaml(cfg_dir() / shipped)
    hints = typing.get_type_hints(cls)
    problems = []
    layers = [(str(file), read_yaml(file))] if file else []
    for where, layer in [*layers, ("", dict(overrides))]:
        for key, value in layer.items():
            if key not in hints:
                problems.append(f"{where + ': ' if where else ''}unknown key `{key}`{suggest(str(key), list(hints))}")
            else:
                values[key] = value
    for key in hints:
        if key not in values:
            problems.append(f"missing key `{key}`")
            continue
        try:
            values[key] = convert(values[key], hints[key])
        except (TypeError, ValueError) as error:
            problems.append(f"{key}={shown(values[key])}: {error}")
    if problems:
        raise ConfigError(f"{section or shipped} is not valid:\n  " + "\n  ".join(problems))
    return cls(**{key: values[key] for key in hints})


def describe(shipped: str) -> str:
    """The keys of a shipped YAML with their comments: the option list of --help."""
    return (cfg_dir() / shipped).read_text(encoding="utf-8")


def as_plain(config: Any) -> dict[str, Any]:
    """A config dataclass as plain YAML values (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        return value

    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


@dataclass(frozen=True)
class KeyedOptions:
    """What a training adds to Ultralytics' own keys: the fields of a subclass."""

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """Names of the options, in order."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def of(cls: type[K], values: Mapping[str, Any]) -> K:
        """From keys and values; paths may be Path objects, a missing key takes its default."""
        known = cls.keys()
        return cls(**{k: str(v) if isinstance(v, Path) else v for k, v in values.items() if k in known})


def without_keys(cfg: Any, keys: Collection[str]) -> Any:
    """The `cfg` that Ultralytics gives a trainer, less keys that are not its own.

    Args:
        cfg: a mapping or a namespace, which comes back as a dict; anything else (the name of a file) as it is.
    """
    values = cfg if isinstance(cfg, Mapping) else getattr(cfg, "__dict__", None)
    return cfg if values is None else {key: value for key, value in values.items() if key not in keys}


def text_or_scalar(text: str, hint: Any) -> Any:
    """A value of the command line. Where the key takes text it is that text: the folder 0010, not 8.

    A list of texts may be YAML (`[a, b]`), or mappings where the key takes those too.
    """
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    listed = get_origin(hint) is tuple and get_args(hint)[0] in (str, Any)
    if not listed and not (str in options and set(options) <= {str, type(None)}):
        return _scalar(text)
    if listed and text.startswith(("[", "{")):
        return _scalar(text)
    unset = not text or (text.lower() == "null" and (listed or type(None) in options))  # `none` may mean something
    return None if unset else text


def _scalar(text: str) -> Any:
    if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text):
        return float(text)  # YAML 1.1 reads 1e-3 as a string
    try:
        return parse_yaml(text) if text else None
    except ValueError:
        return text


def shown(value: Any) -> str:
    """A value in a message."""
    try:
        return repr(value)[:200]
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a very long number"


def convert(value: Any, hint: Any) -> Any:
    """`value` as the annotated type, or TypeError / ValueError with what was expected."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if value is None:
            if type(None) in options:
                return None
            raise TypeError("expected a value")
        for option in options:
            if option is type(None):
                continue
            try:
                return convert(value, option)
            except (TypeError, ValueError) as error:
                failure = error
        raise failure
    if origin is Literal:
        choices = get_args(hint)
        if isinstance(value, bool):
            value = str(value).lower()
        if value not in choices:
            raise ValueError(
                f"expected one of {', '.join(map(str, choices))}{suggest(str(value), [str(c) for c in choices])}"
            )
        return value
    if origin is tuple:
        if isinstance(value, str):
            parts = [part.strip() for part in value.split(",") if part.strip()]
            kind = get_args(hint)[0]
            plain = kind is str or get_origin(kind) is Literal
            items = parts if plain else [_scalar(part) for part in parts] if kind is int else [value]
        else:
            items = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
        return tuple(convert(item, get_args(hint)[0]) for item in items)
    if hint is Any:
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise TypeError("expected true or false")
        return value
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 != 0:  # nan and inf too
            raise TypeError("expected a whole number")
        if abs(value) >= 1 << 63:
            raise ValueError("expected a whole number below 2^63")
        return int(value)
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError("expected a number")
        if value != value or abs(value) > 1e300:
            raise ValueError("expected a finite number")
        return float(value)
    if hint is str:
        if isinstance(value, (Mapping, list, tuple, bool)) or value is None:
            raise TypeError("expected text")
        return str(value)
    raise TypeError(f"unsupported annotation {hint}")
