"""Class-incremental learning on a distilled set: the classes arrive in steps, and the set is all that is remembered.

After each step a student is trained from scratch on the composites of every class seen so far and measured on exactly
these classes, as in GDumb (Prabhu et al. 2020) and in the continual-learning figures of distillation papers. The
paper's own protocol is not in the text that this was written from: this is the usual one, named as such.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focusdd_det.commandline import wants_help
from focusdd_det.disk import write_atomic
from focusdd_det.errors import ConfigError, DiskError, Interrupted, VerifyError
from focusdd_det.seeds import seed_of

log = logging.getLogger("focusdd")
_OF_THE_MACHINE = ("device", "workers")  # where a step runs, not what it is

USAGE = """Class-incremental learning on a distilled set: train from scratch on the classes seen so far, step by step.

  python tools/continual_cls.py steps=5 model=resnet18 data=datasets/focusdd_cls teacher=resnet18 \\
      teacher_weights=resnet18.pth eval_data=imagenet/val epochs=300 out=runs/continual
  python tools/continual_cls.py steps=5 labels=hard data=datasets/focusdd_cls eval_data=imagenet/val out=runs/continual

  steps       groups, as equal as can be, that the classes are split into (default 5)
  order_seed  decides which classes come when (default 0)
  out         folder of the runs, continual.json and continual.png (default runs/continual)
  and every key of tools/train_cls.py but classes, project, name, resume and store (a store holds the logits of all
  classes: use teacher= or labels=hard). The same command goes on where it was stopped. --dry-run prints the steps.
"""


@dataclass(frozen=True)
class Step:
    """One step: the classes seen so far (indices in the set, rising), and what the student reached on them, percent."""

    classes: tuple[int, ...]
    top1: float
    top5: float


def class_steps(classes: int, steps: int, seed: int) -> list[tuple[int, ...]]:
    """Indices of the classes seen after each step; every step adds as equal a share as can be.

    Raises:
        ConfigError: more steps than classes.
    """
    if not 1 <= steps <= classes:
        raise ConfigError(f"steps={steps}: expected 1 to {classes}, the number of classes")
    order = list(range(classes))
    random.Random(seed_of("continual", seed)).shuffle(order)
    return [tuple(sorted(order[: math.floor(classes * (i + 1) / steps + 0.5)])) for i in range(steps)]


def continual(
    overrides: Mapping[str, Any], out: Path, steps: int = 5, order_seed: int = 0, dry_run: bool = False
) -> list[Step]:
    """Train once a step; runs that are finished are kept, one that was stopped goes on.

    Args:
        overrides: arguments of `FocusDDClassificationTrainer`.
        out: folder for one run a step, continual.json and continual.png.
        dry_run: check everything, say which classes come when, and stop; nothing is written.

    Raises:
        ConfigError: arguments that this decides itself, or `out` belongs to another experiment.
        FocusDDError: as the trainer.
    """
    from focusdd_det.classify.trainer import FocusDDClassificationTrainer, checked

    own = [key for key in ("classes", "project", "name", "resume", "store", "exist_ok") if overrides.get(key)]
    if own:
        raise ConfigError(f"{', '.join(own)}: decided here, step by step; leave out")
    if overrides.get("eval_data") in (None, "", "none"):
        raise ConfigError("eval_data= is missing: the accuracy after each step is the point")
    whole = checked({**overrides, "project": str(out.resolve()), "name": "step", "exist_ok": True})
    names = whole.train_set.names
    seen = class_steps(len(names), steps, order_seed)
    identity = {
        "sha256": {key: whole.origin[key] for key in ("set", "eval", "teacher", "teacher_spec")},
        "steps": [[names[i] for i in classes] for classes in seen],
        "arguments": {key: str(value) for key, value in sorted(overrides.items()) if key not in _OF_THE_MACHINE},
    }
    if dry_run:
        log.info("%s", "\n".join(f"step {i + 1}: {', '.join(classes)}" for i, classes in enumerate(identity["steps"])))
        return []
    _claim(out, identity)
    results: list[Step] = []
    for number, classes in enumerate(seen):
        run = out / f"step{number + 1}"
        if not (run / "accuracy.json").is_file():
            log.info("step %d of %d: %d classes", number + 1, steps, len(classes))
            given = {**overrides, "classes": list(classes), "project": str(out.resolve()), "name": run.name}
            given["exist_ok"] = True
            if (run / "weights" / "resume.safetensors").is_file():
                given = {key: overrides[key] for key in _OF_THE_MACHINE if key in overrides} | {"resume": str(run)}
            trainer = FocusDDClassificationTrainer(overrides=given)
            try:
                trainer.train()
            except KeyboardInterrupt as error:
                raise Interrupted("stopped; finished steps are kept. To go on: the same command") from error
        results.append(_outcome(run / "accuracy.json", classes))
    rows = [{"classes": len(step.classes), "top1": step.top1, "top5": step.top5} for step in results]
    write_atomic(out / "continual.json", (json.dumps({**identity, "results": rows}, indent=1) + "\n").encode())
    _plot(results, out / "continual.png")
    return results


def continual_command(argv: Sequence[str]) -> int:
    """tools/continual_cls.py, `focusdd classify continual`."""
    from focusdd_det.classify.train_cli import checked_overrides

    if wants_help(argv):
        print(USAGE)
        return 0
    extra = {"steps": 5, "order_seed": 0, "out": "runs/continual", "dry_run": False}
    given = checked_overrides(argv, extra)
    options = {key: given.pop(key, value) for key, value in extra.items()}
    for key in ("steps", "order_seed"):
        if type(options[key]) is not int:
            raise ConfigError(f"{key}={options[key]!r}: expected a whole number")
    out, dry_run = Path(str(options["out"])), options["dry_run"] is True
    results = continual(given, out, options["steps"], options["order_seed"], dry_run)
    if dry_run:
        return 0
    print("classes  top-1  top-5")
    for step in results:
        print(f"{len(step.classes):7d} {step.top1:6.2f} {step.top5:6.2f}")
    return 0


def _claim(out: Path, identity: Mapping[str, Any]) -> None:
    """Note in `out` what experiment it belongs to, or refuse it."""
    file = out / "experiment.json"
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is not a folder; give another out=")
    if file.is_file():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            changed = [key for key in identity if before.get(key) != identity[key]]
        except (OSError, ValueError, AttributeError) as error:
            raise VerifyError(f"{file} cannot be read ({error}); move {out} away, or give another out=") from error
        if changed:
            raise ConfigError(f"{out} belongs to another experiment ({', '.join(changed)} differ); give another out=")
        return
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} holds other things; give another out=")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot make {out}: {error.strerror}; give another out=") from error
    write_atomic(file, (json.dumps(identity, indent=1) + "\n").encode())


def _outcome(file: Path, classes: tuple[int, ...]) -> Step:
    try:
        last = json.loads(file.read_text(encoding="utf-8"))["last"]
        return Step(classes, float(last["top1"]), float(last["top5"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VerifyError(
            f"{file} does not say what the step reached ({error}); remove {file.parent} and run the same command again"
        ) from error


def _plot(results: Sequence[Step], path: Path) -> None:
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5))
    axes = figure.subplots()
    axes.plot([len(step.classes) for step in results], [step.top1 for step in results], marker="o")
    axes.set(xlabel="classes seen", ylabel="top-1 on the classes seen, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())
