"""What each stage of one arm and one seed is given: plain keys and values, as its command takes them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focusdd_det.classify.options import leaves_one_over, not_for_classifiers
from focusdd_det.config import BuildConfig, ClassBuildConfig, SetConfig, cfg_dir, load, read_yaml
from focusdd_det.errors import ConfigError, DataError
from focusdd_det.experiment.grid import Arm
from focusdd_det.experiment.spec import TRAIN_FILES, Experiment

DISTILL = "distill_model"  # value of `supervision` that means Ultralytics' own feature distillation
SHARES = ("warmup_epochs", "close_mosaic", "every")  # of the training; `10%` of a run's epochs
_SHARE = re.compile(r"(\d+(?:\.\d+)?)%")


@dataclass(frozen=True)
class Steps:
    """How long a training is.

    Attributes:
        composites: pictures of its set; batch: of a step; epochs: passes over the set; each: steps of an epoch.
    """

    composites: int
    batch: int
    epochs: int
    each: int

    @property
    def iterations(self) -> int:
        """Steps of the run."""
        return self.each * self.epochs


def steps_for(iterations: int, composites: int, batch: int, each: int | None = None) -> Steps:
    """The whole number of epochs whose steps come nearest to `iterations`, at least one; half an epoch counts up.

    Args:
        each: steps of an epoch, where its last batch is not simply what is left.
    """
    each = each or math.ceil(composites / batch)
    return Steps(composites, batch, max(1, math.floor(iterations / each + 0.5)), each)


def build_settings(experiment: Experiment, arm: Arm, seed: int) -> dict[str, Any]:
    """Keys of the build, without its place."""
    return {**experiment.section("build", arm), "seed": seed}


def build_config(experiment: Experiment, arm: Arm, seed: int) -> SetConfig:
    """The same with every default, validated.

    Raises:
        ConfigError: unknown keys, wrong values.
    """
    values = {**build_settings(experiment, arm, seed), "out": "set"}
    if experiment.task == "detect":
        return load(BuildConfig, "build_det.yaml", values, section=f"arm `{arm.name}`: build")
    return load(ClassBuildConfig, "build_cls.yaml", values, section=f"arm `{arm.name}`: build")


def train_settings(experiment: Experiment, arm: Arm, seed: int, steps: Steps | None = None) -> dict[str, Any]:
    """Keys of the training with every default, without its data and place. Shares of the epochs are filled in.

    Args:
        steps: how long it is; None while its set is not built: then `epochs` and shares of it are those of 100.
    """
    own = experiment.section("train", arm)
    values = {**read_yaml(cfg_dir() / TRAIN_FILES[experiment.task]), **own, "seed": seed}
    if experiment.task == "detect":
        values["eval_data"] = None  # the evaluation is a stage of its own
        values["val"] = False
        if values.get("supervision") == "labels":
            values["teacher"] = None
        elif "teacher" not in own and experiment.targets is None:
            values["teacher"] = build_config(experiment, arm, seed).teacher  # type: ignore[attr-defined]
        elif "teacher" not in own:
            distill = values.get("supervision") == DISTILL  # which has no use for what is stored
            values["teacher"] = experiment.section("targets", arm).get("teacher") if distill else None
    elif "data" in experiment.section("eval", arm):
        values["eval_data"] = experiment.section("eval", arm)["data"]
    epochs = steps.epochs if steps else 100 if experiment.iterations_of(arm) else int(values["epochs"])
    values["epochs"] = epochs
    for key in SHARES:
        share = _SHARE.fullmatch(str(values.get(key, "")))
        if share:
            part = float(share.group(1)) / 100 * epochs
            values[key] = round(part, 3) if key == "warmup_epochs" else math.floor(part + 0.5)
    return values


def steps_of(experiment: Experiment, arm: Arm, composites: int) -> Steps:
    """How long an arm's training is on a set of so many composites.

    Raises:
        ConfigError: a batch that is no positive whole number.
    """
    values = {**read_yaml(cfg_dir() / TRAIN_FILES[experiment.task]), **experiment.section("train", arm)}
    batch, iterations = values["batch"], experiment.iterations_of(arm)
    if type(batch) is not int or batch < 1:
        raise ConfigError(f"arm `{arm.name}`: train.batch={batch!r}: expected a whole number, for equal iterations")
    each = math.ceil(composites / batch)
    if experiment.task == "classify" and leaves_one_over(composites, batch):
        each -= 1
    if iterations is None:
        return Steps(composites, batch, int(values["epochs"]), each)
    return steps_for(iterations, composites, batch, each)


def uses_targets(experiment: Experiment, train: Mapping[str, Any]) -> bool:
    """Whether a training reads stored soft targets of a detector: one with a teacher of its own asks that."""
    return experiment.targets is not None and train.get("supervision") in ("kl", "both") and not train.get("teacher")


def uses_store(experiment: Experiment, train: Mapping[str, Any]) -> bool:
    """Whether a training reads stored logits of a classifier."""
    return experiment.relabel is not None and train.get("labels") in (None, "store") and not train.get("teacher")


def targets_settings(experiment: Experiment, arm: Arm, seed: int, train: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the storing of soft targets: the training's own views."""
    from focusdd_det.training.targets import VIEWS

    shipped = read_yaml(cfg_dir() / "store_targets.yaml")
    views = {key: train[key] for key in (*VIEWS, "close_mosaic") if key in train}
    own = experiment.section("targets", arm)
    if "teacher" not in own:
        own["teacher"] = build_config(experiment, arm, seed).teacher  # type: ignore[attr-defined]
    return {**shipped, **views, **own, "seed": seed}


def relabel_settings(experiment: Experiment, arm: Arm, seed: int, train: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the relabelling: the training's own size, crops, flips and CutMix."""
    shipped = read_yaml(cfg_dir() / "relabel_cls.yaml")
    views = {
        "size": train["imgsz"],
        "scale": [round(1 - float(train["scale"]), 6), 1.0],
        "flip": train["fliplr"],
        "cutmix": train["cutmix"],
        "temperature": train["temperature"],
        "eval_data": train["eval_data"],
    }
    return {**shipped, **views, **experiment.section("relabel", arm), "seed": seed}


def eval_settings(experiment: Experiment, arm: Arm, train: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the COCO evaluation: at the training's size and device unless told otherwise."""
    device = {} if train.get("device") is None else {"device": train["device"]}
    return {"imgsz": train["imgsz"], **device, **experiment.section("eval", arm)}


def check(experiment: Experiment) -> None:
    """Every stage of every arm, before anything is run.

    Raises:
        ConfigError: all problems, each with its arm.
    """
    problems: list[str] = []
    for arm in experiment.arms:
        try:
            _check_arm(experiment, arm, experiment.seeds[0])
        except (ConfigError, DataError) as error:
            told = str(error)
            problems.append(told if told.startswith("arm `") else f"arm `{arm.name}`: {told}")
    if problems:
        listed = "\n  ".join(dict.fromkeys(problems))
        raise ConfigError(f"{experiment.name} cannot be run:\n  {listed}")
    trainings = [train_settings(experiment, arm, experiment.seeds[0]) for arm in experiment.arms]
    if experiment.targets is not None and not any(uses_targets(experiment, train) for train in trainings):
        raise ConfigError(
            f"{experiment.name} stores `targets` that no arm reads: every arm names a train.teacher, which is asked in "
            "the training, or learns from the boxes alone; leave one of the two out"
        )
    if any(train.get("precision") == "bf16" and train.get("device") == "cpu" for train in trainings):
        from focusdd_det.training.precision import warn_if_slow

        warn_if_slow()


def _check_arm(experiment: Experiment, arm: Arm, seed: int) -> None:
    from focusdd_det.plan import method_of

    method_of(build_config(experiment, arm, seed))
    steps_of(experiment, arm, 100)
    train = train_settings(experiment, arm, seed)
    if experiment.task == "detect":
        _check_detect(experiment, arm, seed, train)
    else:
        _check_classify(experiment, arm, seed, train)


def _check_detect(experiment: Experiment, arm: Arm, seed: int, train: dict[str, Any]) -> None:

    from focusdd_det.training.arguments import check_stock, refuse_unknown, train_keys
    from focusdd_det.training.command import VAL_DEFAULTS
    from focusdd_det.training.precision import check_precision
    from focusdd_det.training.store_targets import load_config
    from focusdd_det.training.supervision import Options

    refuse_unknown(train, train_keys(Options.keys()), "train: ")
    eval_keys = {key: None for key in VAL_DEFAULTS if key not in ("model", "set", "out")}
    refuse_unknown(experiment.section("eval", arm), eval_keys, "eval: ")
    if train["supervision"] == DISTILL:
        from focusdd_det.experiment.distill import check_distill

        check_distill(train)
        _check_start(train)
        return
    if uses_targets(experiment, train):
        train = {**train, "targets": "store"}
        load_config(**{**targets_settings(experiment, arm, seed, train), "data": "set", "out": "store"})
    options = Options.of(train)
    check_stock(train, "detect")
    check_precision(options.precision, train.get("device"), train.get("amp", True))
    _check_start(train)


def _check_start(train: Mapping[str, Any]) -> None:
    """Where a training names the file of its start and that is here, whether it can start from it."""
    from focusdd_det.training.start import start_argument

    if train.get("backbone") and Path(str(train["backbone"])).is_file():
        start_argument(train, bool(train.get("download")))


def _check_classify(experiment: Experiment, arm: Arm, seed: int, train: dict[str, Any]) -> None:
    from ultralytics.utils import DEFAULT_CFG_DICT

    from focusdd_det.classify.options import Options
    from focusdd_det.classify.relabel import load_config
    from focusdd_det.training.arguments import check_stock, refuse_unknown, train_keys

    refuse_unknown(train, train_keys(Options.keys()), "train: ")
    refuse_unknown(experiment.section("eval", arm), {"data": None}, "eval: ")
    if uses_store(experiment, train):
        load_config(**{**relabel_settings(experiment, arm, seed, train), "data": "set", "out": "store"})
        train = {**train, "store": "store"}
    options = Options.of(train)
    if options.eval_data is None:
        raise ConfigError("eval: data: none: an experiment needs something to measure on")
    check_stock(train, "classify")
    if problems := not_for_classifiers(train, DEFAULT_CFG_DICT):
        raise ConfigError("train: " + "; ".join(problems))


def existing(value: Any) -> Path | None:
    """The file or folder that a value names, if it is there."""
    if not isinstance(value, (str, Path)) or not str(value):
        return None
    path = Path(value).expanduser()
    try:
        return path if path.exists() else None
    except OSError:
        return None
