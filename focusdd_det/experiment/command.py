"""`focusdd experiment`: command line -> a run, a plan, or a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from focusdd_det.commandline import parse_tokens
from focusdd_det.config import BuildConfig, ClassBuildConfig, read_yaml, suggest
from focusdd_det.disk import write_atomic
from focusdd_det.errors import ConfigError, DataError, FocusDDError
from focusdd_det.experiment.spec import Experiment, read_experiment, shipped, variables

USAGE = """A grid of builds, trainings and evaluations, ending in one table with mean, spread and seeds, and a plot.

  focusdd experiment methods imagenet=/data/imagenet/train coco=/data/coco.yaml teacher=yolo11x.pt \\
      selector=deit_small.safetensors                                                   a shipped experiment
  focusdd experiment mine.yaml out=runs/mine parallel=2                                 one of your own
  focusdd experiment methods --small assets=ASSETS                                      its small variant
  focusdd experiment methods --small assets=ASSETS --dry-run                            what would run, and its disk
  focusdd experiment methods --small assets=ASSETS --table                              the table of what is there
  focusdd experiment methods ... seeds=0,1,2,3,4 iterations=5000 train.batch=32 build.device=cuda:1

NAME=VALUE      data that the file needs (--help of a file lists it: focusdd experiment methods --help)
out             work folder (default: runs/experiments/<name>); the same command goes on there, and what is finished
                is not run again
parallel        stages at a time (default 1)
seeds, iterations, metric, floor, x, build.KEY, targets.KEY, relabel.KEY, train.KEY, eval.KEY
                in place of the file's
--small --dry-run --table --help

A failed stage is recorded with the end of its log; the other arms go on, and the exit code is 1.
docs/experiments.md has the file format. Shipped:
"""
OPTIONS: dict[str, Any] = {"out": str, "parallel": int, "small": bool, "dry_run": bool, "table": bool}
BUILDS = (BuildConfig, ClassBuildConfig)
DEFAULT_OUT = Path("runs") / "experiments"


def experiment_command(argv: Sequence[str]) -> int:
    """`focusdd experiment`.

    Raises:
        ConfigError, DataError, DiskError: see errors.py for the exit codes.
    """
    words = [word for word in argv if word not in ("-h", "--help", "help")]
    helped = len(words) < len(argv)
    files = [word for word in words[:1] if not word.startswith("-") and "=" not in word]
    if not files:
        print(USAGE + _listed())
        if not helped:
            raise ConfigError("focusdd experiment: expected an experiment's file or name")
        return 0
    if helped:
        print(_about(files[0]))
        return 0
    needs = {**variables(files[0]), **variables(files[0], small=True)}
    texts = {f"build.{key}": hint for kind in BUILDS for key, hint in get_type_hints(kind).items()}
    texts |= {key.replace("_", "-"): hint for key, hint in texts.items()}
    found = parse_tokens(words[1:], {**texts, **dict.fromkeys(needs, str), **OPTIONS}, {})
    given = {key.replace("-", "_"): value for key, value in found.items()}  # train.close-mosaic
    flags = {key: _flag(given, key) for key in ("small", "dry_run", "table")}
    parallel = given.pop("parallel", 1)
    if type(parallel) is not int or parallel < 1:
        raise ConfigError(f"parallel={parallel!r}: expected a whole number from 1 on")
    out = given.pop("out", None)
    declared = variables(files[0], flags["small"])
    values = {key: given.pop(key) for key in list(given) if key in declared}
    for key in given:
        near = suggest(key, list(declared))
        if near and "." not in key and key not in ("seeds", "iterations", "metric", "floor", "x"):
            raise ConfigError(f"unknown option `{key}`{near}")
    experiment = read_experiment(files[0], values, flags["small"], given)
    place = Path(str(out)) if out is not None else DEFAULT_OUT / experiment.name
    if flags["table"]:
        return _finish(experiment, place)
    from focusdd_det.experiment.settings import check

    check(experiment)
    if flags["dry_run"]:
        from focusdd_det.experiment.preview import preview

        print(preview(experiment, place))
        return 0
    from focusdd_det.experiment.runner import run

    failed = run(experiment, place, parallel)
    _finish(experiment, place)
    if failed:
        raise FocusDDError(
            f"{failed} of {len(experiment.arms) * len(experiment.seeds)} arms and seeds failed; {place / 'results.md'} "
            f"has the ends of their logs, {place / 'stages'} the whole. The same command tries them again"
        )
    return 0


def _finish(experiment: Experiment, out: Path) -> int:
    """Write and print the table."""
    from focusdd_det.experiment import results
    from focusdd_det.experiment.plot import plot
    from focusdd_det.experiment.table import as_json, make_table, markdown

    if not out.is_dir():
        raise DataError(f"there is no {out}; run the experiment first, or give its out=")
    found, failures = results.read(out, experiment)
    table = make_table(experiment, found, failures)
    text = markdown(table)
    write_atomic(out / "results.md", text.encode())
    write_atomic(out / "results.json", (json.dumps(as_json(table), indent=1) + "\n").encode())
    write_atomic(out / "plot.png", plot(experiment, table))
    print(text)
    print(f"written: {out / 'results.md'}, results.json, plot.png")
    return 0


def _listed() -> str:
    lines = []
    for name, file in shipped().items():
        lines.append(f"  {name:18}{read_yaml(file).get('title', '')}")
    return "\n".join(lines)


def _about(name: str) -> str:
    from focusdd_det.experiment.spec import find_experiment

    path = find_experiment(name)
    content = read_yaml(path)
    lines = [f"{path}", f"{content.get('title', '')}", "", str(content.get("about") or "").strip(), ""]
    for small in (False, True) if content.get("small") else (False,):
        needs = variables(name, small, only_used=True)
        lines.append("needs, small variant:" if small else "needs:")
        lines += [f"  {key}=...  {told}" for key, told in needs.items()]
    return "\n".join(lines)


def _flag(given: dict[str, Any], key: str) -> bool:
    value = given.pop(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value!r}: expected true or false")
    return value
