"""results.jsonl: a line per arm and seed that is finished and per stage that failed; only ever appended to."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from focusdd_det.disk import append_lines
from focusdd_det.errors import DiskError, VerifyError
from focusdd_det.experiment.grid import Arm
from focusdd_det.experiment.spec import Experiment

FILE = "results.jsonl"


@dataclass(frozen=True)
class Result:
    """What was measured of one arm with one seed.

    Attributes:
        values: metric -> percent; detection: `all`, `covered` (over the classes of its own set), `all50`, `covered50`.
        per_class: class -> AP or accuracy in percent; classes without ground truth are left out.
        covered: classes of the arm's own set (detection).
        composites, epochs, iterations: of its training.
        stages: kind -> key.
        versions: of the packages that made it; `code`: hashes of the code that made its stages.
        inputs: path -> hash of what stood there, of the sources, teachers and evaluation data; empty in older files.
    """

    arm: str
    arm_sha256: str
    seed: int
    values: dict[str, float]
    per_class: dict[str, float]
    covered: tuple[str, ...]
    composites: int
    epochs: int
    iterations: int
    stages: dict[str, str]
    versions: dict[str, str]
    inputs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A stage that failed, and the end of its log."""

    arm: str
    arm_sha256: str
    seed: int
    stage: str
    exit_code: int
    tail: str


def measured(task: str, content: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float], tuple[str, ...]]:
    """What an evaluation's JSON says, in percent: values, per class, covered classes.

    Raises:
        VerifyError: nothing was measured, or it is no such file.
    """
    try:
        if task == "classify":
            last = content["last"]
            if last is None or last["meaning"] != "headline":
                raise VerifyError("accuracy.json: nothing was measured on pictures other than the training's")
            return {"top1": float(last["top1"]), "top5": float(last["top5"])}, dict(last["per_class"]), ()
        percent = {k: 100 * float(v) for k, v in content["per_class"].items() if v is not None}
        values = {}
        for name in ("all", "covered"):
            for metric, key in (("AP", name), ("AP50", f"{name}50")):
                value = (content[name] or {}).get(metric)
                if value is not None:
                    values[key] = 100 * float(value)
        return values, percent, tuple(content["covered_classes"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VerifyError(f"the evaluation's JSON is not one of ours ({error!r}); remove it and run again") from error


def append(out: Path, record: Mapping[str, Any]) -> None:
    """One line more, on the disk before it returns.

    Raises:
        DiskError: full disk, no permission.
    """
    append_lines(out / FILE, (json.dumps(record, ensure_ascii=True, sort_keys=True) + "\n").encode())


def result_record(result: Result) -> dict[str, Any]:
    """A result as a line."""
    return {"kind": "result", "time": _now(), **result.__dict__}


def failure_record(failure: Failure) -> dict[str, Any]:
    """A failure as a line."""
    return {"kind": "failure", "time": _now(), **failure.__dict__}


def read(out: Path, experiment: Experiment) -> tuple[list[Result], list[Failure]]:
    """The results of an experiment's arms and seeds and the failures, in its order; of each the latest line counts."""
    results: dict[tuple[str, int], Result] = {}
    failures: dict[tuple[str, int], Failure] = {}
    for line in _lines(out / FILE):
        try:
            record = json.loads(line)
            kind, _ = record.pop("kind"), record.pop("time")
            key = (str(record["arm_sha256"]), int(record["seed"]))
            if kind == "result":
                record["covered"] = tuple(record["covered"])
                results[key] = Result(**record)
                failures.pop(key, None)
            elif kind == "failure":
                failures[key] = Failure(**record)
                results.pop(key, None)  # of what was there before: it may be of other data
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # a line that was cut short
    wanted = [(arm, (experiment.arm_sha256(arm), seed)) for arm in experiment.arms for seed in experiment.seeds]
    return (
        [_named(results[key], arm) for arm, key in wanted if key in results],
        [_named(failures[key], arm) for arm, key in wanted if key in failures],
    )


def _named(found: Any, arm: Arm) -> Any:
    """An arm may have been given another name since."""
    return type(found)(**{**found.__dict__, "arm": arm.name})


def _lines(path: Path) -> Sequence[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DiskError(f"cannot read {path}: {error.strerror}") from error


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
