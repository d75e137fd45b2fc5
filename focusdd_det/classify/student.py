"""What `model=` and `weights=` mean: the student, with the weights that it starts from. Nothing is unpickled freely."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.nn.tasks import ClassificationModel, guess_model_task, yaml_model_load
from ultralytics.utils import LOGGER
from ultralytics.utils.checks import check_model_file_from_stem

from focusdd_det.checkpoints import resolve_weights, safe_read, safe_ultralytics
from focusdd_det.classify.nets import (
    Classifier,
    Net,
    arrange_head,
    heads_of,
    load_weights,
    make_net,
    net_of_spec,
    outputs_in,
    read_spec,
)
from focusdd_det.classify.teacher import yolo_names
from focusdd_det.classmap import imagenet_synsets
from focusdd_det.config import cfg_dir
from focusdd_det.errors import ConfigError, WeightsError
from focusdd_det.seeds import seed_of
from focusdd_det.selector import read_state
from focusdd_det.training.replay import seeded

OWN_WEIGHTS = "imagenet"  # weights=imagenet: those that the library publishes


def make_student(
    model: Any,
    names: Sequence[str],
    size: int,
    *,
    weights: str | None = None,
    download: bool = False,
    seed: int = 0,
) -> nn.Module:
    """The student on the CPU, in float32. Its random weights depend on `seed` alone.

    Args:
        model: torchvision or timm name, spec .json (with its weights, if it names any), a classification YAML of
            Ultralytics, or one of its -cls.pt checkpoints (with its weights).
        names: class names in output order.
        size: side of the pictures, px.
        weights: start from these: .safetensors, .pth or spec .json; for a YOLO student a -cls.pt; `imagenet` for those
            that the library publishes (`download`).

    Returns:
        A `Classifier`, or a stock ClassificationModel of Ultralytics.

    Raises:
        ConfigError: `model` names nothing that can be trained.
        WeightsError: an unknown name, or weights that are missing, damaged, unsafe or do not fit.
    """
    if not model:
        raise ConfigError("model= is missing; e.g. model=resnet18, or model=yolo11n-cls.yaml")
    name = str(check_model_file_from_stem(str(model)))
    with seeded(seed_of("student", seed)):
        if Path(name).suffix in (".yaml", ".yml", ".pt"):
            yolo: nn.Module = _yolo(name, names, weights, download)
            return yolo
        return Classifier(_library(name, names, size, weights, download), names)


def _library(name: str, names: Sequence[str], size: int, weights: str | None, download: bool) -> Net:
    classes = len(names)
    known: tuple[str, ...] | None = None  # what the outputs of the weights stand for, where something says so
    if weights == OWN_WEIGHTS and not download:
        raise WeightsError(
            f"weights={OWN_WEIGHTS} are those that the library publishes: add download=True to fetch them"
        )
    start = Path(weights) if weights and weights != OWN_WEIGHTS else None
    if Path(name).suffix == ".json":
        shipped = cfg_dir() / name
        spec = read_spec(shipped if shipped.is_file() and not Path(name).exists() else Path(name))
        if weights == OWN_WEIGHTS:
            raise WeightsError(f"weights={OWN_WEIGHTS} goes with a name as model=, not with {name}")
        net = net_of_spec(spec, classes, size)
        if start is None:
            start, known = spec.weights, spec.classes
    else:
        net = make_net(name, classes, size, download=weights == OWN_WEIGHTS)
    if start is None:
        if weights == OWN_WEIGHTS and classes == len(imagenet_synsets()):  # the library keeps its last layer
            _settle_head(net, imagenet_synsets(), names)
        return net
    if start.suffix == ".json":
        named = read_spec(start)
        if named.weights is None:
            raise WeightsError(f"weights={start} names no weights; expected a spec with a `weights` entry")
        start, known = named.weights, named.classes
    had = outputs_in(net, read_state(start)[0])
    if known is None and set(names) == set(imagenet_synsets()):
        known = imagenet_synsets()
    kept, told = _head(had, known, names)
    load_weights(net, start, head=kept)
    if kept and known is not None:
        for layer in heads_of(net):
            arrange_head(layer, known, names)
    LOGGER.info(f"the student starts from {start}{told}")
    return net


def _settle_head(net: Net, known: Sequence[str], names: Sequence[str]) -> None:
    """The last layer that a library gave with its weights: in the order of `names`, or anew if they are others."""
    kept, told = _head(len(known), known, names)
    for layer in heads_of(net):
        if kept:
            arrange_head(layer, known, names)
        else:
            layer.reset_parameters()  # type: ignore[operator]
    LOGGER.info(f"the student starts from its library's weights{told}")


def _head(had: int | None, known: Sequence[str] | None, names: Sequence[str]) -> tuple[bool, str]:
    """Whether the last layer that comes with weights is used, and what is to be said of that.

    Args:
        had: its outputs.
        known: what they stand for; None: nothing says so.
        names: the classes that are wanted.
    """
    if had != len(names):
        return False, f"; its last layer was for {had} classes, the one for {len(names)} is new"
    if known is None:
        return True, "; nothing says which classes its last layer is for: taken in the order of the data's"
    if set(known) != set(names):
        return False, f"; its last layer was for other classes ({_some(known)}), the one for {_some(names)} is new"
    return True, "" if tuple(known) == tuple(names) else "; its last layer in the order of the data's classes"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _yolo(name: str, names: Sequence[str], weights: str | None, download: bool) -> ClassificationModel:
    start: ClassificationModel | None = None
    cfg: Any = name
    if Path(name).suffix == ".pt":
        start = _checkpoint(name, download)
        cfg = start.yaml
    if weights is not None:
        if Path(weights).suffix != ".pt":
            raise WeightsError(f"weights={weights}: a YOLO student starts from a -cls.pt checkpoint of Ultralytics")
        start = _checkpoint(weights, download)
    try:
        task = "classify" if isinstance(cfg, dict) else guess_model_task(yaml_model_load(cfg))
    except FileNotFoundError as error:
        raise ConfigError(f"model={name}: no such YAML here or in Ultralytics; e.g. yolo11n-cls.yaml") from error
    if task != "classify":
        raise ConfigError(f"model={name} is a model for {task}; expected a classifier such as yolo11n-cls.yaml")
    try:
        with safe_ultralytics():
            model = ClassificationModel(cfg, nc=len(names), ch=3, verbose=False)
    except Exception as error:  # a model's YAML reaches us as whatever the builder trips over
        raise ConfigError(f"model={name}: no model can be built from it ({type(error).__name__}: {error})") from error
    if start is not None:
        layer: Any = model.model[-1].linear
        fresh = {key: value.clone() for key, value in layer.state_dict().items()}
        model.load(start)  # tensors of the same shape; says how many
        known = yolo_names(start)
        kept, told = _head(len(known), known, names)
        if kept:
            arrange_head(layer, known, names)
        else:
            layer.load_state_dict(fresh)
        if told:
            LOGGER.info(told.removeprefix("; "))
    model.names = dict(enumerate(names))
    return model


def _checkpoint(name: str, download: bool) -> ClassificationModel:
    file = resolve_weights(name, download)
    checkpoint = safe_read(file)
    model = checkpoint.get("ema") or checkpoint.get("model")
    if not isinstance(model, ClassificationModel):
        raise WeightsError(
            f"{file} holds {type(model).__name__}, expected a classification model of Ultralytics; a torchvision or "
            "timm student is given by the .json beside its .pt"
        )
    return model.float()
