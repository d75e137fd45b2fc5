"""An experiment's YAML file -> one validated dataclass.

experiment = read_experiment("methods", values={"assets": "ASSETS"}, small=True)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from focusdd_det.config import BuildConfig, ClassBuildConfig, cfg_dir, read_yaml, suggest
from focusdd_det.errors import ConfigError
from focusdd_det.experiment.grid import ITERATIONS, SECTIONS, Arm, baseline_of, expand, qualified, usual_baseline
from focusdd_det.experiment.statistics import FLOOR

Task = Literal["detect", "classify"]
MERGED = ("needs", *SECTIONS)  # mappings of which a later layer replaces single keys; other keys are replaced whole
KEYS = (
    "base", "title", "about", "task", *MERGED, "iterations", "seeds", "arms", "baseline", "metric", "floor", "x",
    "paper", "small",
)  # fmt: skip
MACHINE = ("device", "workers", "threads", "plots", "verbose", "download")  # where and how fast, not what
METRICS = {"detect": ("covered", "all"), "classify": ("top1", "top5")}
OWNED = {  # keys that the experiment gives itself
    "build": ("out", "seed", "scores", "grow_from", "overwrite"),
    "targets": ("data", "out", "seed", "overwrite", "imgsz"),
    "relabel": ("data", "out", "seed", "overwrite", "size"),
    "train": (
        "data", "seed", "project", "name", "exist_ok", "resume", "save_dir", "targets", "store", "cfg", "mode", "task",
        "distill_model", "eval_annotations", "val",
    ),
    "eval": ("model", "set", "out"),
}  # fmt: skip
TRAIN_FILES = {"detect": "train_det.yaml", "classify": "train_cls.yaml"}
HERE = "here"  # variable that is always there
_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)\}")
_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class PaperNumber:
    """A number that the paper gives. `where`: the arm's name, or the overrides (with sections) that it must have."""

    value: float
    where: str | Mapping[str, Any]

    def fits(self, arm: Arm) -> bool:
        """Whether it belongs beside this arm."""
        if isinstance(self.where, str):
            return arm.name == self.where
        return all(arm.overrides.get(key) == value for key, value in self.where.items())


@dataclass(frozen=True)
class Experiment:
    """What an experiment asks for, after its layers are merged and its variables filled in.

    Attributes:
        name: of the file, with `-small` for the small variant.
        title, about: for people.
        task: what is built and trained.
        build, targets, relabel, train, eval: what every arm has; targets and relabel only where they are used.
        iterations: training steps of every arm; None: `train.epochs`.
        seeds: each decides the build and the training.
        arms: rows of the table.
        baseline: what arms are compared with; see `grid.baseline_of`.
        metric: which of METRICS the comparison goes by.
        floor: percent that both arms of a claim must be above; None: there is none.
        x: the key whose values are the plot's axis; None: the first that is varied over numbers.
        paper: numbers to print beside.
    """

    name: str
    title: str
    about: str
    task: Task
    build: Mapping[str, Any]
    targets: Mapping[str, Any] | None
    relabel: Mapping[str, Any] | None
    train: Mapping[str, Any]
    eval: Mapping[str, Any]
    iterations: int | None
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    baseline: str | Mapping[str, Any] | None
    metric: str
    floor: float | None
    x: str | None
    paper: tuple[PaperNumber, ...]

    def section(self, name: str, arm: Arm) -> dict[str, Any]:
        """What an arm gives a stage: the experiment's own values, then the arm's."""
        common = dict(getattr(self, name) or {})
        own = {k.partition(".")[2]: v for k, v in arm.overrides.items() if k.startswith(f"{name}.")}
        return {**common, **own}

    def iterations_of(self, arm: Arm) -> int | None:
        """Training steps of an arm; None where it trains for `train.epochs`."""
        if "train.epochs" in arm.overrides:
            return None
        found = arm.overrides.get(ITERATIONS, self.iterations)
        return None if found is None else int(found)

    def baseline_of(self, arm: Arm) -> Arm | None:
        """The arm that another is compared with."""
        return baseline_of(arm, self.arms, self.baseline)

    def arm_sha256(self, arm: Arm) -> str:
        """What is asked of an arm, as a hash: a result recorded under another one is not this arm's."""
        asked: dict[str, Any] = {
            name: {key: value for key, value in self.section(name, arm).items() if key not in MACHINE}
            for name in SECTIONS
        }
        asked["task"], asked[ITERATIONS] = self.task, self.iterations_of(arm)
        asked["stores"] = [self.targets is not None, self.relabel is not None]
        return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:16]


def shipped() -> dict[str, Path]:
    """Name -> file of the experiments that come with this package; bases (`base_*`, `small_*`) are left out."""
    files = sorted((cfg_dir() / "experiments").glob("*.yaml"))
    return {file.stem: file for file in files if not file.stem.startswith(("base_", "small_"))}


def find_experiment(name: str) -> Path:
    """An experiment's file by path, or by the name of a shipped one.

    Raises:
        ConfigError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = shipped()
    stem = path.name.removesuffix(".yaml")
    if path.parent == Path() and stem in known:
        return known[stem]
    raise ConfigError(
        f"no experiment {name}{suggest(stem, list(known))}; expected a YAML file, or one of {', '.join(known)}"
    )


def read_experiment(
    file: str | Path,
    values: Mapping[str, Any] | None = None,
    small: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Experiment:
    """Read, merge (base, file, small, overrides) and validate an experiment.

    Args:
        file: a path, or the name of a shipped one.
        values: variable -> value, for `${variable}`.
        small: take the file's small variant.
        overrides: `section.key` or a key of the file -> value, as from the command line.

    Raises:
        ConfigError: all problems that were found, in one message.
    """
    path = find_experiment(str(file))
    content = _layers(path)
    if small:
        extra = content.get("small")
        if not isinstance(extra, Mapping):
            raise ConfigError(f"{path} has no `small:` variant; leave --small out")
        content = _merge({**content, "paper": []}, _based(dict(extra), path))
    content.pop("small", None)
    content = _with_overrides(content, overrides or {})
    content = _filled(path, content, dict(values or {}))
    name = path.stem + ("-small" if small else "")
    experiment = _validated(path, name, content)
    _refuse_lost(experiment, overrides or {})
    return experiment


def variables(file: str | Path, small: bool = False, only_used: bool = False) -> dict[str, str]:
    """Variable -> what it must be, of those that an experiment's file declares (or that its arms really use)."""
    path = find_experiment(str(file))
    content = _layers(path)
    if small and isinstance(content.get("small"), Mapping):
        content = _merge(content, _based(dict(content["small"]), path))
    content.pop("small", None)
    needs = content.pop("needs", None) or {}
    used = _used(content)
    if not isinstance(needs, Mapping):
        return {}
    return {str(k): str(v) for k, v in needs.items() if not only_used or k in used}


def _used(content: Mapping[str, Any]) -> list[str]:
    rest = {key: value for key, value in content.items() if key not in ("needs", "about", "title")}
    return sorted(set(_VARIABLE.findall(json.dumps(rest, default=str))))


# ---- layers ----


def _layers(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    unknown = [str(key) for key in content if key not in KEYS]
    if unknown:
        told = "\n  ".join(f"unknown key `{key}`{suggest(key, KEYS)}" for key in unknown)
        raise ConfigError(f"{path} is not valid:\n  {told}\n  (keys: {', '.join(KEYS)})")
    return _based(content, path)


def _based(content: dict[str, Any], path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A layer on top of the file that its `base:` names, from the same folder or the shipped ones; that may have a base
    too, but none of those `above` it."""
    base = content.pop("base", None)
    if base is None:
        return content
    places = [path.parent / str(base), cfg_dir() / "experiments" / str(base)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ConfigError(f"{path}: base: {base}: there is no {' nor '.join(map(str, places))}")
    if found.resolve() in above:
        raise ConfigError(f"{path}: base: {base}: that file stands on this one already")
    under = read_yaml(found)
    unknown = [str(key) for key in under if key not in KEYS or key == "small"]
    if unknown:
        raise ConfigError(f"{found}: {', '.join(unknown)}: not a key that a base may have")
    return _merge(_based(under, found, (*above, found.resolve())), content)


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        if key in MERGED and isinstance(merged.get(key), Mapping) and isinstance(value, Mapping):
            merged[key] = {**merged[key], **value}
        else:
            merged[key] = value
    return merged


def _with_overrides(content: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    if "train.epochs" in overrides:
        content = {key: value for key, value in content.items() if key != ITERATIONS}  # the one or the other
    for key, value in overrides.items():
        section, dot, rest = key.partition(".")
        if dot and section in SECTIONS and rest:
            content = {**content, section: {**(content.get(section) or {}), rest: value}}
        elif key in ("iterations", "seeds", "metric", "floor", "x"):
            content = {**content, key: value}
        else:
            raise ConfigError(
                f"unknown option `{key}`{suggest(key, ('iterations', 'seeds', 'metric', 'parallel', 'out'))}; the key "
                "of a stage is given with its section, such as train.batch=8 or build.device=cuda:0"
            )
    return content


def _refuse_lost(experiment: Experiment, overrides: Mapping[str, Any]) -> None:
    """Of the command line what an arm has a value of its own for would be lost."""
    same = {ITERATIONS: "train.epochs", "train.epochs": ITERATIONS}  # how long: the one or the other
    problems = []
    for key, value in overrides.items():
        asked = {key, same.get(key, key)}
        arms = [arm.name for arm in experiment.arms if asked & set(arm.overrides)]
        if arms:
            problems.append(f"{key}={value}: the arms {', '.join(arms)} give this themselves; change it in the file")
    if problems:
        raise ConfigError(f"{experiment.name} cannot be run so:\n  " + "\n  ".join(problems))


def _filled(path: Path, content: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`${name}` in every text replaced by its value."""
    needs = content.get("needs") or {}
    if not isinstance(needs, Mapping) or not all(_NAME.fullmatch(str(key)) for key in needs):
        raise ConfigError(f"{path}: needs: expected `name: what it is`, the names of letters, digits and _")
    rest = {key: value for key, value in content.items() if key not in ("needs", "about", "title")}
    values[HERE] = path.resolve().parent
    needs = {**needs, HERE: "the folder of the experiment's file"}
    used = _used(content)
    undeclared = [name for name in used if name not in needs]
    if undeclared:
        raise ConfigError(f"{path}: ${{{undeclared[0]}}} is not declared under needs: (declared: {', '.join(needs)})")
    missing = [name for name in used if values.get(name) in (None, "")]
    if missing:
        listed = "\n  ".join(f"{name}=...   {needs[name]}" for name in missing)
        raise ConfigError(f"{path} needs data that was not given:\n  {listed}")
    nowhere = [
        f"{name}={values[name]}: no such file or folder; expected {needs[name]}"
        for name in used
        if not Path(str(values[name])).expanduser().exists()
    ]
    if nowhere:
        raise ConfigError("\n".join(nowhere))
    known = {name: str(Path(str(values[name])).expanduser().resolve()) for name in used}

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return _VARIABLE.sub(lambda match: known[match.group(1)], value)
        if isinstance(value, list):
            return [fill(item) for item in value]
        if isinstance(value, Mapping):
            return {key: fill(item) for key, item in value.items()}
        return value

    return {**content, **{key: fill(value) for key, value in rest.items()}}


# ---- validation ----


def sections_of(task: Task) -> dict[str, list[str]]:
    """Section -> keys that an arm may give without naming the section."""
    kind = BuildConfig if task == "detect" else ClassBuildConfig
    return {"build": list(get_type_hints(kind)), "train": list(read_yaml(cfg_dir() / TRAIN_FILES[task]))}


def _validated(path: Path, name: str, content: Mapping[str, Any]) -> Experiment:
    problems: list[str] = []
    task = content.get("task")
    if task not in METRICS:
        raise ConfigError(f"{path}: task: expected detect or classify, got {task!r}")
    for section in SECTIONS:
        if content.get(section) is not None and not isinstance(content[section], Mapping):
            problems.append(f"{section}: expected `key: value` lines, got {content[section]!r}")
    wrong_store = "relabel" if task == "detect" else "targets"
    if content.get(wrong_store) is not None:
        problems.append(f"{wrong_store}: not for task {task}")
    if "arms" not in content:
        problems.append("arms: missing; expected `name: {build.key: value}` or `vary: {key: [values]}`")
    if problems:
        raise ConfigError(f"{path} is not valid:\n  " + "\n  ".join(problems))
    sections = sections_of(task)
    try:
        arms = expand(content["arms"], sections)
        baseline = _baseline(content.get("baseline"), arms, sections)
        paper = tuple(_paper(entry, sections) for entry in content.get("paper") or ())
        x = None if content.get("x") is None else qualified(str(content["x"]), sections)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    problems += _owned(content, arms)
    iterations, seeds = content.get("iterations"), content.get("seeds", [0, 1, 2])
    steps = [arm.overrides[ITERATIONS] for arm in arms if ITERATIONS in arm.overrides]
    for value in [iterations, *steps]:
        if value is not None and (type(value) is not int or value < 1):
            problems.append(f"iterations: expected a whole number from 1 on, got {value!r}")
    if iterations is not None and "epochs" in (content.get("train") or {}):
        problems.append("iterations and train.epochs are both given; leave one out")
    seeds = [int(v) for v in seeds.split(",")] if isinstance(seeds, str) and _digits(seeds) else seeds
    seeds = [seeds] if type(seeds) is int else seeds
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and s >= 0 for s in seeds):
        problems.append(f"seeds: expected a list of whole numbers from 0 on, got {seeds!r}")
    elif len(set(seeds)) < len(seeds):
        problems.append(f"seeds: {seeds}: each seed once")
    metric = content.get("metric", METRICS[task][0])
    if metric not in METRICS[task]:
        problems.append(f"metric: expected {' or '.join(METRICS[task])}, got {metric!r}")
    floor = content.get("floor", FLOOR if task == "detect" else None)
    if floor is not None and (isinstance(floor, bool) or not isinstance(floor, (int, float))):
        problems.append(f"floor: expected a number in percent, or null, got {floor!r}")
    if problems:
        raise ConfigError(f"{path} is not valid:\n  " + "\n  ".join(problems))
    return Experiment(
        name=name,
        title=str(content.get("title") or name),
        about=str(content.get("about") or "").strip(),
        task=task,
        build=dict(content.get("build") or {}),
        targets=None if content.get("targets") is None else dict(content["targets"]),
        relabel=None if content.get("relabel") is None else dict(content["relabel"]),
        train=dict(content.get("train") or {}),
        eval=dict(content.get("eval") or {}),
        iterations=iterations,
        seeds=tuple(seeds),
        arms=arms,
        baseline=baseline,
        metric=str(metric),
        floor=None if floor is None else float(floor),
        x=x,
        paper=paper,
    )


def _digits(text: str) -> bool:
    return bool(text) and all(part.strip().isdecimal() for part in text.split(","))


def _baseline(given: Any, arms: Sequence[Arm], sections: Mapping[str, Sequence[str]]) -> str | Mapping[str, Any] | None:
    if given is None:
        return usual_baseline(arms)
    if isinstance(given, Mapping):
        baseline = {qualified(str(key), sections): value for key, value in given.items()}
        if not any(baseline_of(arm, arms, baseline) for arm in arms):
            raise ConfigError(f"baseline: {dict(given)}: no arm differs from another in just that")
        return baseline
    if str(given) == "none":
        return None
    names = [arm.name for arm in arms]
    if str(given) not in names:
        raise ConfigError(f"baseline: no arm `{given}`{suggest(str(given), names)}; there are {', '.join(names)}")
    return str(given)


def _paper(entry: Any, sections: Mapping[str, Sequence[str]]) -> PaperNumber:
    if not isinstance(entry, Mapping) or type(entry.get("value")) not in (int, float) or len(entry) < 2:
        raise ConfigError(
            f"paper: {entry!r}: expected `{{value: number, arm: name}}` or `{{value: number, key: value}}`"
        )
    rest = {str(key): value for key, value in entry.items() if key != "value"}
    if set(rest) == {"arm"}:
        return PaperNumber(float(entry["value"]), str(rest["arm"]))
    return PaperNumber(float(entry["value"]), {qualified(key, sections): value for key, value in rest.items()})


def _owned(content: Mapping[str, Any], arms: Sequence[Arm]) -> list[str]:
    """Keys that are the experiment's own business."""
    given = {f"{section}.{key}" for section in SECTIONS for key in content.get(section) or ()}
    given |= {key for arm in arms for key in arm.overrides}
    taken = {f"{section}.{key}" for section, keys in OWNED.items() for key in keys}
    return [f"{key}: the experiment sets this itself; leave it out" for key in sorted(given & taken)]
