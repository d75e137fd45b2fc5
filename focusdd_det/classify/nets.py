"""Classifiers of torchvision and timm by name, with their normalisation inside, and the files that rebuild them.

A classifier is saved as two files: `<name>.safetensors`, the plain state dict of the stock model, and `<name>.json`
beside it, which says how to build that model and which class each output stands for. The selector reads the same JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors.torch import save as save_tensors
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from focusdd_det.config import suggest
from focusdd_det.disk import write_atomic
from focusdd_det.errors import WeightsError
from focusdd_det.selector import read_state, unsafe_kwargs

TORCHVISION = ("resnet18", "resnet50", "resnet101", "mobilenet_v2", "efficientnet_b0")
_TORCHVISION_HEAD = {"resnet": "fc", "mobilenet_v2": "classifier.1", "efficientnet": "classifier.1"}
_IMAGENET_CLASSES = 1000
_SPEC_KEYS = ("arch", "library", "kwargs", "classes", "size", "mean", "std", "weights")

Library = Literal["torchvision", "timm"]


@dataclass(frozen=True)
class Net:
    """A stock classifier and what is needed to use and to rebuild it.

    Attributes:
        module: torchvision's or timm's own module; takes normalised pixels [B, 3, H, W], gives logits [B, classes].
        mean, std: of the pixels in [0, 1], RGB.
        library, arch, kwargs: what builds it again (kwargs without the number of classes).
    """

    module: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    library: Library
    arch: str
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """What a `<name>.json` says.

    Attributes:
        arch, library, kwargs: what builds the stock model (kwargs without the number of classes).
        classes: the class that each output stands for; empty for an architecture that is still to be trained.
        size: side of the pictures it was trained on, px.
        mean, std: of the pixels in [0, 1], RGB; None: the library's own.
        weights: the safetensors file; None if the JSON names none.
    """

    arch: str
    library: Library
    kwargs: dict[str, Any]
    classes: tuple[str, ...]
    size: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    weights: Path | None

    @property
    def name(self) -> str:
        """The name that `make_net` understands."""
        return self.arch if self.library == "torchvision" else f"timm:{self.arch}"


def make_net(
    name: str,
    classes: int,
    size: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    download: bool = False,
) -> Net:
    """A classifier with random weights, or with its library's own.

    Args:
        name: one of TORCHVISION means torchvision's model; any other name is timm's; `timm:resnet18` forces timm's.
        classes: outputs.
        size: side of the pictures, px. Only networks that are built for one size (ViTs) need it.
        kwargs: passed to the library, over what `size` implies.
        download: the library's ImageNet-1K weights (torchvision's first version, which distillation papers use). The
            head is random when `classes` is not what they were trained for.

    Raises:
        WeightsError: an unknown name (near ones are given), options it does not take, a failed download.
    """
    library, arch = _resolve(name)
    if library == "torchvision":
        return _torchvision(arch, classes, dict(kwargs or {}), download)
    return _timm(arch, classes, size, dict(kwargs or {}), download)


class Classifier(nn.Module):
    """A network with its normalisation: pixels in [0, 1] in, logits out. Also what Ultralytics expects of a model.

    Attributes:
        net: the stock module; its state dict is what is saved.
        names, nc, stride, yaml, task, args, transforms: read by Ultralytics.
        criterion: callable (logits, batch) -> (loss, items); set by the trainer.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: Net, names: Sequence[str]) -> None:
        super().__init__()
        self.net = net.module
        self.library, self.arch, self.kwargs = net.library, net.arch, net.kwargs
        self.register_buffer("mean", torch.tensor(net.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(net.std).view(1, 3, 1, 1), persistent=False)
        self.names = dict(enumerate(names))
        self.nc = len(self.names)
        self.stride = torch.tensor([32.0])
        self.yaml: dict[str, Any] = {}
        self.task = "classify"
        self.args: Any = None
        self.transforms: Any = None
        self.criterion: Any = None

    def forward(self, x: Any, augment: bool = False) -> Any:
        """Logits [B, classes] of pixels [B, 3, H, W] in [0, 1]; of a batch (dict), the loss.

        Ultralytics' validator passes `augment`; there is no test-time augmentation here.
        """
        if isinstance(x, dict):
            return self.loss(x)
        return self.net((x - self.mean) / self.std)

    def loss(self, batch: dict[str, Any], preds: Any = None) -> Any:
        """The criterion's value for a batch, which holds the pixels as `img`."""
        return self.criterion(self(batch["img"]) if preds is None else preds, batch)

    def as_net(self) -> Net:
        """The stock module with what rebuilds it."""
        return Net(self.net, _values(self.mean), _values(self.std), self.library, self.arch, self.kwargs)


def save_spec(path: Path, net: Net, classes: Sequence[str], size: int) -> None:
    """Write `<path>.safetensors` and, after it, `<path>.json`; any suffix of `path` is replaced.

    Args:
        net: in float32 or half; the tensors are stored as they are.
        classes: the class that each output stands for.
        size: side of the pictures it was trained on, px.

    Raises:
        DiskError: full disk, no permission.
    """
    weights = path.with_suffix(".safetensors")
    state = {key: value.detach().cpu().contiguous().clone() for key, value in net.module.state_dict().items()}
    write_atomic(weights, save_tensors(state))
    content = {
        "arch": net.arch,
        "library": net.library,
        "kwargs": net.kwargs,
        "classes": list(classes),
        "size": size,
        "mean": list(net.mean),
        "std": list(net.std),
        "weights": weights.name,
    }
    write_atomic(path.with_suffix(".json"), (json.dumps(content, indent=1) + "\n").encode())


def read_spec(path: Path) -> Spec:
    """The content of a `<name>.json`.

    Raises:
        WeightsError: not such a file, unknown or missing keys, classes that are not different names.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not a readable JSON ({error}); expected the .json of a classifier") from error
    if not isinstance(raw, dict) or not {"arch", "classes"} <= set(raw) <= set(_SPEC_KEYS):
        keys = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise WeightsError(f"{path}: expected an object with arch, classes and some of {_SPEC_KEYS}, got {keys}")
    classes, kwargs, weights, size = raw["classes"], raw.get("kwargs") or {}, raw.get("weights"), raw.get("size")
    problems = []
    if not isinstance(raw["arch"], str):
        problems.append(f"arch must be a name, got {raw['arch']!r}")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        problems.append("classes must be a list of names")
    elif not classes and weights is not None:
        problems.append("classes must name what the outputs of its weights stand for")
    elif len(set(classes)) != len(classes):
        problems.append("classes names one twice")
    problems += unsafe_kwargs(kwargs)
    if weights is not None and (not isinstance(weights, str) or Path(weights).name != weights):
        problems.append(f"weights must name a file beside the JSON, got {weights!r}")
    if size is not None and (type(size) is not int or size < 1):
        problems.append(f"size must be a number of px, got {size!r}")
    if raw.get("library", "timm") not in ("torchvision", "timm"):
        problems.append(f"library must be torchvision or timm, got {raw['library']!r}")
    for key in ("mean", "std"):
        value = raw.get(key)
        if value is not None and not (
            isinstance(value, list) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value)
        ):
            problems.append(f"{key} must be three numbers, got {value!r}")
    if problems:
        raise WeightsError(f"{path}: " + "; ".join(problems))
    return Spec(
        arch=raw["arch"],
        library=raw.get("library", "timm"),
        kwargs=kwargs,
        classes=tuple(classes),
        size=size,
        mean=None if raw.get("mean") is None else tuple(map(float, raw["mean"])),
        std=None if raw.get("std") is None else tuple(map(float, raw["std"])),
        weights=None if weights is None else path.parent / weights,
    )


def net_of_spec(spec: Spec, classes: int | None = None, size: int | None = None) -> Net:
    """The network of a spec, with random weights; `classes` and `size` of their own, if given.

    Raises:
        WeightsError: see `make_net`.
    """
    kwargs = dict(spec.kwargs)
    if size is not None and size != spec.size and "img_size" in kwargs:
        kwargs["img_size"] = size
    net = make_net(spec.name, classes or len(spec.classes), size or spec.size, kwargs)
    return Net(net.module, spec.mean or net.mean, spec.std or net.std, net.library, net.arch, net.kwargs)


def load_weights(net: Net, path: Path, head: bool = True) -> None:
    """Put the weights of a file into a network; position embeddings of another picture size are resampled.

    Args:
        path: .safetensors, or .pth read without running code.
        head: False leaves the last layer as it is (another number of classes).

    Raises:
        WeightsError: not such a file, tensors that do not fit, values that are not finite.
    """
    state, _ = read_state(path)
    wrong = [key for key, value in state.items() if not bool(torch.isfinite(value).all())]
    if wrong:
        raise WeightsError(f"{path} holds values that are not finite ({', '.join(wrong[:4])}); the file is damaged")
    kept = {key: value for key, value in state.items() if head or not key.startswith(tuple(head_keys(net)))}
    own = net.module.state_dict()
    resample = getattr(sys.modules[type(net.module).__module__], "checkpoint_filter_fn", None)
    grown = "pos_embed" in kept and "pos_embed" in own and kept["pos_embed"].shape != own["pos_embed"].shape
    try:
        if grown and net.library == "timm" and resample is not None:
            kept = resample(dict(kept), net.module)
        missing, unexpected = net.module.load_state_dict(kept, strict=False)
    except Exception as error:  # whatever torch says of shapes
        raise WeightsError(f"{path} does not fit {net.library}'s {net.arch}: {str(error)[:400]}") from error
    if not head:
        missing = [key for key in missing if not key.startswith(tuple(head_keys(net)))]
    if missing or unexpected:
        raise WeightsError(
            f"{path} does not fit {net.library}'s {net.arch}: missing {missing[:4]}{'...' if len(missing) > 4 else ''},"
            f" unexpected {unexpected[:4]}{'...' if len(unexpected) > 4 else ''}"
        )


def head_keys(net: Net) -> tuple[str, ...]:
    """Prefixes of the last layer's tensors, which depend on the number of classes."""
    if net.library == "torchvision":
        return (next(head for stem, head in _TORCHVISION_HEAD.items() if net.arch.startswith(stem)) + ".",)
    own: Any = getattr(net.module, "pretrained_cfg", None) or getattr(net.module, "default_cfg", {})
    heads = own.get("classifier") or "head"
    return tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))


def arrange_head(layer: nn.Module, known: Sequence[str], wanted: Sequence[str]) -> None:
    """The rows of a last layer whose outputs are `known`, in the order of `wanted`: the same classes."""
    rows = torch.tensor([list(known).index(name) for name in wanted])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter[rows].clone())


def heads_of(net: Net) -> list[nn.Module]:
    """The last layers, one or two."""
    return [net.module.get_submodule(key.removesuffix(".")) for key in head_keys(net)]


def outputs_in(net: Net, state: Mapping[str, Tensor]) -> int | None:
    """How many classes a state dict of this architecture was made for; None if it has no head."""
    for prefix in head_keys(net):
        for key in (f"{prefix}weight", f"{prefix}bias"):
            if key in state:
                return int(state[key].shape[0])
    return None


def _resolve(name: str) -> tuple[Library, str]:
    if name in TORCHVISION:
        return "torchvision", name
    arch = name.removeprefix("timm:")
    if not timm.is_model(arch.split(".")[0]):
        near = suggest(arch.split(".")[0], sorted({*TORCHVISION, *timm.list_models()}))
        raise WeightsError(
            f"no classifier is called {name}{near or '; timm.list_models() lists the names'}; expected one of "
            f"{', '.join(TORCHVISION)}, any name of timm's, or the .json of a trained classifier"
        )
    return "timm", arch


def _torchvision(arch: str, classes: int, kwargs: dict[str, Any], download: bool) -> Net:
    from torchvision import models

    try:
        pretrained = download and classes == _IMAGENET_CLASSES
        first: Any = models.get_model(
            arch,
            weights="IMAGENET1K_V1" if download else None,
            num_classes=_IMAGENET_CLASSES if download else classes,
            **kwargs,
        )
    except Exception as error:
        what = "its weights cannot be fetched" if download else "torchvision cannot build it"
        raise WeightsError(f"{arch}: {what} ({error})") from error
    net = Net(first, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "torchvision", arch, kwargs)
    if download and not pretrained:
        prefix = head_keys(net)[0].removesuffix(".")
        parent, _, last = prefix.rpartition(".")
        old: Any = first.get_submodule(prefix)
        setattr(first.get_submodule(parent), last, nn.Linear(old.in_features, classes))
    return net


def _timm(arch: str, classes: int, size: int | None, kwargs: dict[str, Any], download: bool) -> Net:
    own = timm.get_pretrained_cfg(arch, allow_unregistered=True)
    if size is not None and own is not None and own.fixed_input_size:
        kwargs.setdefault("img_size", size)
    try:
        module: Any = timm.create_model(arch, pretrained=download, num_classes=classes, **kwargs)
    except Exception as error:
        what = "its weights cannot be fetched" if download else f"timm cannot build it with {kwargs}"
        raise WeightsError(f"{arch}: {what} ({str(error)[:300]})") from error
    config = timm.data.resolve_model_data_config(module)
    return Net(module, tuple(config["mean"]), tuple(config["std"]), "timm", arch.split(".")[0], kwargs)


def _values(buffer: Tensor) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in buffer.flatten())  # the decimals before float32
