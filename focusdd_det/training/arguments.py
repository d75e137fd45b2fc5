"""A command line or a recipe of a training -> options: every key of Ultralytics beside ours."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ultralytics.cfg import get_cfg, smart_value
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.torch_utils import select_device

from focusdd_det.config import cfg_dir, read_yaml
from focusdd_det.errors import ConfigError

TRAIN_EXTRA: dict[str, Any] = {"augmentations": [], "save_dir": None}  # taken by Ultralytics, not in its YAML
VERBATIM = (
    "model",
    "data",
    "name",
    "project",
    "teacher",
    "teacher_weights",
    "targets",
    "store",
    "weights",
    "backbone",
    "eval_data",
    "eval_annotations",
    "annotations",
    "images",
    "out",
)
_OPTIMIZERS = {
    name.lower(): name for name in ("Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD", "MuSGD", "auto")
}  # as Ultralytics has them


def train_keys(own: Iterable[str]) -> dict[str, Any]:
    """Every key that a training takes, Ultralytics' with their defaults and `own` ones of ours."""
    return {**DEFAULT_CFG_DICT, **TRAIN_EXTRA, **dict.fromkeys(own)}


def with_recipe(given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """What was given on the command line, over the keys of the YAML file that `cfg=` names, if any: the user's own, or
    one of those that are shipped.

    Raises:
        ConfigError: the file cannot be read, or has unknown keys (with suggestions).
    """
    asked = {key: value for key, value in given.items() if key != "cfg"}
    if not given.get("cfg"):
        return asked
    name = str(given["cfg"])
    shipped = cfg_dir() / name
    recipe = read_yaml(shipped if shipped.is_file() and not Path(name).exists() else Path(name))
    refuse_unknown(recipe, known, f"{name}: ")
    return {**recipe, **asked}


def parse(argv: Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """`key=value`, `--key value`, `--key=value`, `key = value` and bare flags -> keys and Python values.

    Args:
        known: every key with its default; a bare word is a flag where the default is a bool.

    Raises:
        ConfigError: all unknown keys at once with suggestions; a key without a value; an unclosed bracket.
    """
    found: dict[str, Any] = {}
    unknown: list[str] = []
    tokens = _join(argv, known)
    while tokens:
        token = tokens.pop(0)
        key, equals, value = token.lstrip("-").partition("=") if token.startswith("--") else token.partition("=")
        key = key.strip().replace("-", "_")
        if key in ("detect", "classify", "train", "val") and not equals and not token.startswith("--"):
            continue  # `yolo detect train ...` by habit
        if key not in known:
            unknown.append(key)
            if (
                not equals
                and token.startswith("--")
                and tokens
                and not tokens[0].startswith("--")
                and "=" not in tokens[0]
            ):
                tokens.pop(0)
            continue
        if not equals:
            flag = isinstance(known[key], bool)
            following = bool(tokens) and not tokens[0].startswith("--") and "=" not in tokens[0]
            takes = token.startswith("--") and following and (not flag or tokens[0].lower() in ("true", "false"))
            if key == "resume" and token.startswith("--") and following:
                takes = True
            if takes:
                value = tokens.pop(0)
            elif flag:
                value = "True"
            else:
                raise ConfigError(f"{key} needs a value: {key}=... or --{key} ...")
        if not value.strip():
            raise ConfigError(f"{key}= has no value; write {key}=none to unset it")
        found[key] = _value(key, value.strip())
    if unknown:
        raise ConfigError("\n".join(f"unknown option `{key}`{nearest(key, known)}" for key in unknown))
    return found


def _join(argv: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """Undo what a shell splits: `a = b`, `a= b`, and lists with spaces. An option that follows is no value."""
    tokens: list[str] = []
    depth = 0
    glue = False
    for word in argv:
        starts = word == "=" or (word.startswith("=") and bool(tokens))
        option = word.startswith("--") or ("=" in word and word.partition("=")[0].replace("-", "_") in known)
        glue = glue and not option
        if tokens and (depth or glue or starts):
            tokens[-1] += word
        else:
            tokens.append(word)
        depth = tokens[-1].count("[") - tokens[-1].count("]")
        glue = word == "=" or (word.endswith("=") and not word.startswith("--"))
    if depth:
        raise ConfigError(f"`{tokens[-1]}` has an unmatched bracket")
    return tokens


def _value(key: str, text: str) -> Any:
    if key == "eval_annotations" and text.lower() == "none":
        return "none"  # means something: no COCO mAP
    if key in VERBATIM:
        return None if text.lower() in ("none", "null") else text
    if key == "augmentations":
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise ConfigError(f"augmentations={text}: expected a list of Albumentations dicts, or []") from error
    return None if text.lower() == "null" else smart_value(text)


def nearest(key: str, known: Mapping[str, Any]) -> str:
    """`; did you mean a or b?`, over our keys and Ultralytics' alike; empty when nothing is near."""
    near = difflib.get_close_matches(key, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else "; --help lists the options"


def refuse_unknown(values: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """ConfigError with all keys of `values` that are not `known`, each with its suggestion."""
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise ConfigError("\n".join(f"{where}unknown option `{key}`{nearest(key, known)}" for key in unknown))


def check_stock(overrides: Mapping[str, Any], task: str) -> None:
    """Ultralytics' own types and ranges.

    Raises:
        ConfigError: what Ultralytics refuses, or another task or mode.
    """
    stock = {key: value for key, value in overrides.items() if key in DEFAULT_CFG_DICT}
    try:
        get_cfg(overrides=stock)
    except (TypeError, ValueError, SyntaxError) as error:
        raise ConfigError(f"Ultralytics refuses the arguments: {error}") from error
    _check_ranges(stock)
    if stock.get("task", task) != task or stock.get("mode", "train") != "train":
        what = {"detect": "detectors", "classify": "classifiers"}[task]
        raise ConfigError(f"this trains {what}: leave out task= and mode=, or use `yolo` for the other ones")


def device_here(device: Any) -> torch.device:
    """As Ultralytics finds it.

    Raises:
        ConfigError: there is no such device.
    """
    try:
        found: torch.device = select_device("" if device is None else str(device), verbose=False)
    except (ValueError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise ConfigError(f"device={device}: {reason or 'there is none of that name here'}") from error
    return found


def _check_ranges(stock: Mapping[str, Any]) -> None:
    """What Ultralytics finds out late, or trains with all the same.

    Raises:
        ConfigError: all of it at once.
    """
    wrong = []
    batch, imgsz, freeze = stock.get("batch", 16), stock.get("imgsz", 640), stock.get("freeze")
    if isinstance(batch, (int, float)) and not (batch == -1 or 0 < batch < 1 or (batch >= 1 and batch == int(batch))):
        wrong.append(f"batch={batch}: expected a whole number from 1 on, -1, or a share of the GPU's memory below 1")
    if any(isinstance(side, (int, float)) and side < 1 for side in (imgsz if isinstance(imgsz, list) else [imgsz])):
        wrong.append(f"imgsz={imgsz}: expected a number of pixels from 1 on")
    if not isinstance(freeze, (list, tuple, int, type(None))) or isinstance(freeze, bool):
        wrong.append(f"freeze={freeze}: expected the number of layers, or a list of their numbers")
    if stock.get("optimizer") is not None and str(stock["optimizer"]).lower() not in _OPTIMIZERS:
        wrong.append(f"optimizer={stock['optimizer']}: expected one of {', '.join(_OPTIMIZERS.values())}")
    if wrong:
        raise ConfigError("; ".join(wrong))


def listed(values: Mapping[str, Any]) -> str:
    """`key=value key=value`."""
    return " ".join(f"{key}={value}" for key, value in values.items()) or "nothing else"
