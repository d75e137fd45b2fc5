"""`backbone=`: a student whose backbone starts from a checkpoint, while its neck and head start from random weights.

The usual start of a detector in the field, from a classifier (yolo11n-cls.pt), and, with `freeze=`, the probe that asks
what a set teaches when the features are given (cfg/experiments/probe.yaml).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.nn.tasks import BaseModel, DetectionModel
from ultralytics.utils import LOGGER

from focusdd_det.checkpoints import resolve_weights, safe_read, safe_ultralytics
from focusdd_det.errors import ConfigError, WeightsError
from focusdd_det.training.run_files import model_argument

LEAST = 2 / 3  # of a backbone's layers that have to fit; a classifier of YOLO11 has 9 of 11, of YOLOv8 at least 7 of 10
_ACTS = ("add", "n", "stride", "padding", "dilation", "groups", "kernel_size")  # what a layer does beside its weights


def start_argument(given: Mapping[str, Any], download: bool) -> str:
    """The file that `backbone=` means, after every check that needs no training.

    Args:
        given: arguments of a training; `backbone` and Ultralytics' `model`, `pretrained` and `freeze` are looked at.

    Raises:
        ConfigError: `model=` or `pretrained=` give the student weights already; `freeze=` as `start_backbone`.
        WeightsError: as `resolve_weights`, `read_layers` and `start_backbone`.
    """
    name, recipe = str(given["backbone"]), model_argument(given.get("model"), download)
    others = {"model": recipe if Path(recipe).suffix == ".pt" else None, "pretrained": given.get("pretrained")}
    for key, value in others.items():
        if value is not None and not isinstance(value, bool):
            raise ConfigError(
                f"{key}={value} and backbone={name}: the student would start from two files; with backbone= give "
                "model=<a .yaml> and no pretrained="
            )
    file = resolve_weights(name, download)
    with safe_ultralytics():
        student = DetectionModel(recipe, verbose=False)
    _fitting(student, read_layers(file), file, given.get("freeze"))
    return str(file)


def read_layers(file: Path) -> nn.Sequential:
    """The layers, in their order, of a model of Ultralytics, float32; no code from the file runs.

    Raises:
        WeightsError: as `safe_read`; or the file holds no such model, a fused one, or weights that are not finite.
    """
    checkpoint = safe_read(file)
    model = checkpoint.get("model") if checkpoint.get("ema") is None else checkpoint["ema"]
    layers = getattr(model, "model", None)
    if not isinstance(model, BaseModel) or not isinstance(layers, nn.Sequential) or not len(layers):
        raise WeightsError(
            f"{file} holds no finished model of Ultralytics ({type(model).__name__}); backbone= takes a detector or a "
            "classifier of the student's family and scale, e.g. backbone=yolo11n-cls.pt"
        )
    if not any(isinstance(module, nn.BatchNorm2d) for module in layers.modules()):
        raise WeightsError(f"{file} was saved fused, without its BatchNorm; backbone= takes a model as it was trained")
    if not all(bool(torch.isfinite(value).all()) for value in layers.state_dict().values()):
        raise WeightsError(f"{file} holds weights that are not finite (NaN or infinity); get the file again")
    return layers.float()


def start_backbone(student: DetectionModel, file: Path, freeze: Any = None) -> int:
    """Give a student's backbone the layers in the file, from the input to the first that does not fit.

    A classifier of YOLO11 has no SPPF, so of the eleven layers of a detector's backbone its first nine fit.

    Args:
        student: with random weights; changed in place.
        freeze: Ultralytics' argument: so many first layers, or a list of their numbers or names, will not be trained.

    Returns:
        How many layers were taken.

    Raises:
        WeightsError: as `read_layers`; or less than two thirds of the backbone's layers fit.
        ConfigError: a layer of the backbone that starts from random weights would be frozen.
    """
    source = read_layers(file)
    taken = _fitting(student, source, file, freeze)
    for own, given in zip(student.model[:taken], source, strict=False):
        _take(own, given)
    count = len(student.yaml["backbone"])
    LOGGER.info(f"backbone: {taken} of {count} layers from {file}; the rest of the student starts from random weights")
    return taken


def _fitting(student: DetectionModel, source: nn.Sequential, file: Path, freeze: Any) -> int:
    """How many layers will be taken, or the error that says why none can be."""
    count = len(student.yaml["backbone"])
    taken = 0
    for own, given in zip(student.model[:count], source, strict=False):
        if not _fits(own, given):
            break
        taken += 1
    if taken < LEAST * count:
        here, there = (_said(layers[taken]) if taken < len(layers) else "none" for layers in (student.model, source))
        raise WeightsError(
            f"backbone={file}: {taken} of the backbone's {count} layers fit the student; its layer {taken} is {there}, "
            f"here {here}. Expected a model of the same family, scale and number of channels, e.g. yolo11n-cls.pt or "
            "yolo11n.pt for yolo11n.yaml"
        )
    if at_random := [layer for layer in _frozen(freeze) if taken <= layer < count]:
        raise ConfigError(
            f"freeze={freeze} would keep layer {at_random[0]} as it starts, from random weights: of the backbone's "
            f"{count} layers the first {taken} are in {file}; give freeze={taken}, or less"
        )
    return taken


def _fits(own: nn.Module, given: nn.Module) -> bool:
    """Whether two layers compute the same from the same weights: YOLO26's SPPF has the shapes of YOLO11's, but not its
    activation and shortcut."""
    if {key: value.shape for key, value in own.state_dict().items()} != {
        key: value.shape for key, value in given.state_dict().items()
    }:
        return False
    ours, theirs = dict(own.named_modules()), dict(given.named_modules())
    if ours.keys() != theirs.keys():
        return False
    for name, module in ours.items():
        other = theirs[name]
        if type(module) is not type(other):
            return False
        both = [act for act in _ACTS if hasattr(module, act) and hasattr(other, act)]
        if any(getattr(module, act) != getattr(other, act) for act in both):
            return False
    return True


def _take(own: nn.Module, given: nn.Module) -> None:
    """Weights and statistics. A classifier's BatchNorm has another eps, which a student that is built anew from its
    YAML cannot keep: the factor goes into gamma."""
    own.load_state_dict(given.state_dict())
    theirs = dict(given.named_modules())
    for name, module in own.named_modules():
        if isinstance(module, nn.BatchNorm2d) and module.eps != theirs[name].eps:
            assert module.running_var is not None
            factor = (module.running_var + module.eps) / (module.running_var + theirs[name].eps)
            module.weight.data.mul_(factor.sqrt())


def _frozen(freeze: Any) -> Iterator[int]:
    """Numbers of the layers, as Ultralytics understands its argument."""
    if isinstance(freeze, int):
        yield from range(freeze)
    elif isinstance(freeze, list):
        numbers = (str(item).split(".")[0] for item in freeze)
        yield from (int(number) for number in numbers if number.isdigit())


def _said(layer: nn.Module) -> str:
    return f"{type(layer).__name__} {[tuple(value.shape) for value in layer.parameters()][:1]}"
