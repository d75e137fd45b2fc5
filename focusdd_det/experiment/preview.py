"""What an experiment would do (`--dry-run`): arms, stages that are there, what would run, how much disk it takes."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from focusdd_det.config import SetConfig
from focusdd_det.errors import FocusDDError
from focusdd_det.experiment.settings import build_config, steps_of, train_settings
from focusdd_det.experiment.spec import Experiment
from focusdd_det.experiment.stages import Finished, Work, key_of
from focusdd_det.plan import make_plan

BYTES_PER_PIXEL = 0.6  # of a composite, generously
BYTES_BESIDE = 16_000  # labels, soft scores and a manifest line of a composite
BYTES_PER_SOURCE = 400  # in the file of scores
BYTES_PER_WEIGHT = 4  # last and best in half precision
BYTES_PER_WEIGHT_RUNNING = 20  # while it trains: weights, average and optimizer in single precision
PLOTS = 5_000_000  # of a run folder


def preview(experiment: Experiment, out: Path) -> str:
    """The plan as text. Writes nothing.

    Raises:
        FocusDDError: the sources of a build cannot be used.
    """
    work = Work(experiment, out)
    counts = _Composites()
    lines = [f"{experiment.title} ({experiment.name}): {len(experiment.arms)} arms x {len(experiment.seeds)} seeds"]
    lines += [f"in {out}", ""]
    width = max(len(arm.name) for arm in experiment.arms)
    lines.append(f"{'arm':{width}}  seed  composites  epochs  iterations  state")
    sets: dict[str, int] = {}
    scores: dict[str, int] = {}
    trainings: set[str] = set()
    states: Counter[str] = Counter()
    for seed in experiment.seeds:
        for arm in experiment.arms:
            config = build_config(experiment, arm, seed)
            stage = work.build(arm, seed)
            composites, sources = counts.of(config)
            if work.done(stage):
                composites = work.manifest(stage.output)[1]
            else:
                sets[stage.key] = int(composites * (config.image_size**2 * BYTES_PER_PIXEL + BYTES_BESIDE))
                if not Path(stage.alone).is_file():
                    scores[stage.alone] = sources * BYTES_PER_SOURCE
            steps = steps_of(experiment, arm, composites)
            state = _state(work, arm, seed)
            states[state.split()[0]] += 1
            if not state.startswith(("there", "eval")):
                train = train_settings(experiment, arm, seed, steps)
                trainings.add(key_of([stage.key, {k: v for k, v in train.items() if k not in ("device", "workers")}]))
            lines.append(
                f"{arm.name:{width}}  {seed:4d}  {composites:10d}  {steps.epochs:6d}  {steps.iterations:10d}  {state}"
            )
    weights = _weights(str(train_settings(experiment, experiment.arms[0], 0).get("model")), experiment.task)
    one = weights * BYTES_PER_WEIGHT + PLOTS
    need = sum(sets.values()) + sum(scores.values()) + one * len(trainings)
    total, there = sum(states.values()), states["there"]
    lines += [
        "",
        f"there: {there} of {total} results; to do: {len(sets)} builds, {len(trainings)} trainings",
        f"disk: sets {_size(sum(sets.values()))}, scores {_size(sum(scores.values()))}, "
        f"runs {_size(one * len(trainings))} (each {_size(weights * BYTES_PER_WEIGHT_RUNNING)} more while it trains); "
        f"free: {_size(_free(out))}",
    ]
    if experiment.targets is not None or experiment.relabel is not None:
        lines.append(
            "      and the stores of soft labels, whose size each store's own --dry-run says once its set is built"
        )
    if need > _free(out):
        lines.append("      THAT IS MORE THAN IS FREE")
    return "\n".join(lines)


def _state(work: Work, arm: Any, seed: int) -> str:
    try:
        found = work.next(arm, seed)
    except FocusDDError as error:
        return f"cannot be used: {error}"
    if isinstance(found, Finished):
        return "there"
    return f"{found.kind} {'goes on' if work.begun(found) else 'is next'} ({found.key})"


class _Composites:
    """Composites and sources of builds; builds that have the same number of them for sure are planned once."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}

    def of(self, config: SetConfig) -> tuple[int, int]:
        keys = (
            "sources",
            "classes",
            "ipc",
            "short_class",
            "ipc_unit",
            "class_map",
            "levels",
            "method",
            "grid",
            "grids",
        )
        drawn = config.seed if config.grids else None  # which grid each composite gets
        key = key_of([drawn, *(getattr(config, name, None) for name in keys)])
        if key not in self._known:
            plan = make_plan(config)
            self._known[key] = plan.composites, plan.sources
        return self._known[key]


def _weights(model: str, task: str) -> int:
    """Parameters of a student; a guess of 25 million where it cannot be built."""
    try:
        if task == "detect":
            from ultralytics.nn.tasks import DetectionModel

            from focusdd_det.checkpoints import safe_checkpoint, safe_ultralytics
            from focusdd_det.training.run_files import model_argument

            name = model_argument(model, False)
            with safe_ultralytics():
                net = safe_checkpoint(name) if name.endswith(".pt") else DetectionModel(name, verbose=False)
            return sum(p.numel() for p in net.parameters())
        from focusdd_det.classify.nets import make_net

        return sum(p.numel() for p in make_net(model, 1000).module.parameters())
    except Exception:  # only an estimate depends on it
        return 25_000_000


def _free(out: Path) -> int:
    place = out.resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
