"""Options of the classification trainer: defaults, refusals, and the recipe that is shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ultralytics.utils import DEFAULT_CFG_DICT

from focusdd_det.classify.options import Options
from focusdd_det.config import cfg_dir, read_yaml
from focusdd_det.errors import ConfigError

GIVEN: dict[str, Any] = {"eval_data": "val", "labels": "hard"}


def test_own_keys_are_not_keys_of_ultralytics() -> None:
    assert not set(Options.keys()) & (set(DEFAULT_CFG_DICT) | {"augmentations", "save_dir"})


def test_the_shipped_recipe_is_the_one_for_imagenet() -> None:
    recipe = read_yaml(cfg_dir() / "train_cls.yaml")
    assert set(recipe) <= set(DEFAULT_CFG_DICT) | set(Options.keys())
    assert set(Options.keys()) <= set(recipe)
    expected = {
        "optimizer": "AdamW",
        "lr0": 1e-3,
        "lrf": 0,
        "weight_decay": 0.01,
        "momentum": 0.9,
        "batch": 128,
        "epochs": 300,
        "imgsz": 224,
        "cos_lr": True,
        "warmup_epochs": 0,
        "scale": 0.92,
        "fliplr": 0.5,
        "cutmix": 1.0,
        "temperature": 20,
        "ema": False,
    }
    assert {key: recipe[key] for key in expected} == expected
    shipped = {key: recipe[key] for key in set(Options.keys()) - {"eval_data", "labels"}}
    assert Options.of({**GIVEN, **shipped}) == Options.of(GIVEN), "cfg/train_cls.yaml and Options state other defaults"


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ({"store": "s"}, "store"),
        ({"teacher": "resnet18"}, "live"),
        ({"labels": "hard"}, "hard"),
        ({"labels": "live", "teacher": "resnet18"}, "live"),
    ],
)
def test_labels_follow_from_what_is_given(values: dict[str, Any], labels: str) -> None:
    assert Options.of({"eval_data": "val", **values}).labels == labels


def test_measuring_nothing_has_to_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="eval_data=none"):
        Options.of({"labels": "hard"})
    assert Options.of({"labels": "hard", "eval_data": "none"}).eval_data is None
    assert Options.of({"labels": "hard", "eval_data": None}).eval_data is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labels": "hrad"}, "expected store, live, hard, did you mean hard"),
        ({"labels": None}, "nothing to learn from"),
        ({"labels": "store"}, "needs store="),
        ({"labels": "live"}, "needs teacher="),
        ({"labels": "hard", "teacher": "resnet18"}, "leave it out"),
        ({"labels": "hard", "store": "s"}, "contradict"),
        ({"teacher_weights": "a.pth"}, "name of its architecture"),
        ({"temperature": 0}, "temperature=0: expected a number > 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"every": -1}, "every=-1"),
        ({"every": 1.5}, "every=1.5"),
        ({"pool": True}, "pool=True"),
        ({"ema": 1}, "ema=1: expected True or False"),
        ({"precision": "fp61"}, "expected auto, fp32, bf16"),
        ({"labels": None, "store": "s", "subset_ipc": 3}, "no store has labels for"),
        ({"eval_data": 3}, "eval_data=3"),
    ],
)
def test_wrong_options(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options.of({**GIVEN, **values})


def test_all_wrong_options_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Options.of({"temperature": -1, "ema": "yes", "labels": "live"})
    assert all(word in str(caught.value) for word in ("temperature", "ema", "teacher=", "eval_data"))


@pytest.mark.parametrize(("every", "epochs", "expected"), [(0, 300, 6), (0, 10, 1), (7, 300, 7), (0, 600, 12)])
def test_interval(every: int, epochs: int, expected: int) -> None:
    assert Options.of({**GIVEN, "every": every}).interval(epochs) == expected


def test_paths_become_text() -> None:
    assert Options.of({"store": Path("s"), "eval_data": Path("v")}).store == "s"
