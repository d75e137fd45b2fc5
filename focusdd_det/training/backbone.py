"""`backbone=`: a student whose backbone starts from a checkpoint, while its neck and head start from random weights.

The usual start of a detector in the field, from a classifier (yolo11n-cls.pt), and, with `freeze=`, the probe that asks
what a set teaches when the features are given (cfg/experiments/probe.yaml).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn
from ultralytics.nn.tasks import BaseModel, DetectionModel
from ultralytics.utils import LOGGER

from focusdd_det.errors import ConfigError, WeightsError
from focusdd_det.teacher import resolve_weights, safe_read


def backbone_argument(name: str, model: object, pretrained: object, download: bool) -> str:
    """The file that `backbone=` means.

    Raises:
        ConfigError: `model=` or `pretrained=` give the student weights already.
        WeightsError: as `resolve_weights` and `read_backbone`.
    """
    others = {"model": model if Path(str(model)).suffix == ".pt" else None, "pretrained": pretrained}
    for key, value in others.items():
        if value is not None and not isinstance(value, bool):
            raise ConfigError(
                f"{key}={value} and backbone={name}: the student would start from two files; with backbone= give "
                "model=<a .yaml> and no pretrained="
            )
    file = resolve_weights(name, download)
    read_backbone(file)
    return str(file)


def read_backbone(file: Path) -> nn.Sequential:
    """The layers, in their order, of a model of Ultralytics; no code from the file runs.

    Raises:
        WeightsError: as `safe_read`; or the file holds no such model.
    """
    checkpoint = safe_read(file)
    model = checkpoint.get("ema") or checkpoint.get("model")
    if not isinstance(model, BaseModel) or not isinstance(getattr(model, "model", None), nn.Sequential):
        raise WeightsError(
            f"{file} holds no model of Ultralytics ({type(model).__name__}); backbone= takes a detector or a "
            "classifier of the student's family and scale, e.g. backbone=yolo11n-cls.pt"
        )
    layers: nn.Sequential = model.model
    return layers.float()


def start_backbone(student: DetectionModel, file: Path, freeze: int | Sequence[int] | None = None) -> int:
    """Give a student's backbone the weights of the layers in the file, from the input to the first that does not fit.

    A classifier of YOLO11 has no SPPF, so of the eleven layers of a detector's backbone its first nine fit.

    Args:
        student: with random weights; changed in place.
        freeze: Ultralytics' argument: so many first layers, or their numbers, will not be trained.

    Returns:
        How many layers were taken.

    Raises:
        WeightsError: as `read_backbone`; or not even the first layer fits.
        ConfigError: a layer of the backbone that starts from random weights would be frozen.
    """
    source = read_backbone(file)
    count = len(student.yaml["backbone"])
    taken = 0
    for own, given in zip(student.model[:count], source, strict=False):
        if type(own) is not type(given) or _shapes(own) != _shapes(given):
            break
        own.load_state_dict(given.state_dict())
        taken += 1
    if not taken:
        raise WeightsError(
            f"backbone={file}: its first layer {tuple(_shapes(source[0]).values())[:1]} is not that of the student "
            f"{tuple(_shapes(student.model[0]).values())[:1]}; expected a model of the same family and scale, e.g. "
            "yolo11n-cls.pt or yolo11n.pt for yolo11n.yaml"
        )
    frozen = range(freeze) if isinstance(freeze, int) else freeze or ()
    if at_random := [layer for layer in frozen if taken <= layer < count]:
        raise ConfigError(
            f"freeze={freeze} would keep layer {at_random[0]} as it starts, from random weights: of the backbone's "
            f"{count} layers the first {taken} are in {file}; give freeze={taken}, or less"
        )
    LOGGER.info(f"backbone: {taken} of {count} layers from {file}; the rest of the student starts from random weights")
    return taken


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in layer.state_dict().items()}
