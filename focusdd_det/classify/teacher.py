"""The teacher of a classifier: frozen, safely loaded, its outputs in the order of the set's class names."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import ultralytics
from torch import Tensor, nn
from ultralytics.nn.tasks import ClassificationModel

from focusdd_det.checkpoints import resolve_weights, safe_read, safe_ultralytics
from focusdd_det.classify.nets import (
    Classifier,
    Net,
    load_weights,
    make_net,
    net_of_spec,
    outputs_in,
    read_spec,
)
from focusdd_det.classmap import imagenet_synsets
from focusdd_det.config import read_yaml
from focusdd_det.devices import in_parts
from focusdd_det.disk import file_sha256
from focusdd_det.errors import FocusDDError, WeightsError
from focusdd_det.selector import read_state, state_digest

log = logging.getLogger("focusdd")
_A_THREAD = 2 * 224**2  # pixels of a part of a batch: ResNets like fewer, docs/performance.md
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ClassTeacher:
    """A frozen classifier whose outputs are the caller's classes, in the caller's order.

    Attributes:
        module: pixels [B, 3, S, S] float in [0, 1] -> logits [B, classes] float32, on its device; eval, no gradient.
        name: what it was asked for by.
        sha256: of its weights: the file, or the tensors where a library fetched them.
        spec: hash of everything else that decides what it says: architecture, its classes, size, mean, std, and the
            precision that it was loaded with.
        classes: what each column stands for.
    """

    module: _Frozen
    name: str
    sha256: str
    spec: str
    classes: tuple[str, ...]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits [B, classes] float32 of pixels [B, 3, S, S] in [0, 1]."""
        logits: Tensor = self.module(pixels)
        return logits

    def run_in(self, dtype: torch.dtype | None) -> None:
        """From now on in autocast of this precision; None: in float32."""
        self.module.dtype = dtype
        if dtype is not None:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class _Frozen(nn.Module):
    """A classifier in one precision, with its columns gathered."""

    columns: Tensor | None

    def __init__(self, model: nn.Module, columns: Sequence[int] | None) -> None:
        super().__init__()
        self.model = model
        self.dtype: torch.dtype | None = None
        self.register_buffer("columns", None if columns is None else torch.tensor(columns), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._look(some) for some in in_parts(x, _A_THREAD)])

    def _look(self, x: Tensor) -> Tensor:
        if self.dtype is not None:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            out = self.model(x)
        logits: Tensor = out[1] if isinstance(out, tuple) else out  # Ultralytics: (probabilities, logits)
        logits = logits.float()
        return logits if self.columns is None else logits[:, self.columns]


def load_classifier(
    name: str,
    weights: str | None,
    wanted: Sequence[str],
    size: int,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    download: bool = False,
) -> ClassTeacher:
    """A frozen classifier for the classes `wanted`, in their order.

    Args:
        name: a torchvision or timm name (with `weights`, or `download`), whose 1,000 outputs are ImageNet-1K's; the
            `.json` of a trained classifier; or a checkpoint of an Ultralytics classifier (`*.pt`).
        weights: .safetensors or .pth, read without running code; with a `.json` instead of the file that it names.
        wanted: class names; outputs are gathered by name.
        size: side of the pictures that it will see, px.
        precision: fp32, bf16 or fp16 (autocast).
        download: let torchvision, timm or Ultralytics fetch their own weights.

    Raises:
        WeightsError: no such model, no, damaged, unsafe or other weights, values that are not finite, an order of
            outputs that nothing states, or classes that it does not know (both lists are printed).
    """
    if precision not in _DTYPES:
        raise WeightsError(f"precision={precision}: expected one of {', '.join(_DTYPES)}")
    if name.endswith(".pt"):
        model, own, digest, described = _ultralytics(name, weights, download)
    elif name.endswith(".json"):
        model, own, digest, described = _from_spec(Path(name), weights, size)
    else:
        model, own, digest, described = _by_name(name, weights, size, download)
    missing = [wish for wish in wanted if wish not in set(own)]
    if missing or not wanted:
        raise WeightsError(
            f"the teacher {name} does not know {len(missing)} of the {len(wanted)} classes: {_shown(missing)}.\n"
            f"  asked for: {_shown(wanted)}\n  it knows: {_shown(own)}\nUse a teacher that was trained on these "
            "classes, or rename the folders to its names"
        )
    position = {known: i for i, known in enumerate(own)}
    order = [position[wish] for wish in wanted]
    gathered = None if order == list(range(len(own))) else order
    module = _Frozen(model, gathered).eval().requires_grad_(False).to(device)
    spec = hashlib.sha256(json.dumps([described, own, size, precision], sort_keys=True).encode()).hexdigest()
    teacher = ClassTeacher(module, name, digest, spec, tuple(wanted))
    teacher.run_in(_DTYPES[precision])
    _probe(teacher, size, device)
    return teacher


def in_precision(teacher: ClassTeacher, dtype: torch.dtype | None, size: int, device: str | torch.device) -> None:
    """From now on in this precision, where its outputs are finite in it; else in float32, which is said."""
    teacher.run_in(dtype)
    if dtype is None:
        return
    try:
        _probe(teacher, size, device)
    except WeightsError:
        teacher.run_in(None)
        log.warning("the teacher %s does not run in %s, so it runs in float32", teacher.name, dtype)


def _probe(teacher: ClassTeacher, size: int, device: str | torch.device) -> None:
    """What does not fit is found here, not in the middle of a run."""
    try:
        noise = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        logits = teacher(noise.to(device))
    except FocusDDError:
        raise
    except Exception as error:
        raise WeightsError(f"the teacher {teacher.name} does not run at {size} px: {str(error)[:300]}") from error
    if logits.shape != (2, len(teacher.classes)) or not bool(torch.isfinite(logits).all()):
        raise WeightsError(
            f"the teacher {teacher.name} gives {list(logits.shape)} outputs, or some that are not finite; expected "
            f"{len(teacher.classes)} finite logits: its weights are damaged"
        )


_Loaded = tuple[nn.Module, tuple[str, ...], str, Any]  # module, its classes, digest of the weights, what built it


def _by_name(name: str, weights: str | None, size: int, download: bool) -> _Loaded:
    classes = imagenet_synsets()
    if weights is None and not download:
        make_net(name, 2, size)  # a misspelt name is the better message
        raise WeightsError(
            f"teacher={name} has no weights here: give teacher_weights=PATH (.safetensors or .pth), or download=true "
            "to let its library fetch them"
        )
    net = make_net(name, len(classes), size, download=weights is None)
    if weights is not None:
        found = outputs_in(net, read_state(Path(weights))[0])
        if found is not None and found != len(classes):
            raise WeightsError(
                f"{weights} has {found} outputs, and nothing says which class each stands for (ImageNet-1K's 1000 are "
                f"known); give the .json that was saved beside the weights, or write one: "
                '{"arch": ..., "library": ..., "kwargs": {}, "classes": [names in order], "weights": ...}'
            )
        load_weights(net, Path(weights))
    digest = file_sha256(weights) if weights is not None else state_digest(net.module)
    return Classifier(net, classes), classes, digest, _described(net)


def _from_spec(path: Path, weights: str | None, size: int) -> _Loaded:
    spec = read_spec(path)
    file = Path(weights) if weights is not None else spec.weights
    if file is None:
        raise WeightsError(f"{path} names no weights; give teacher_weights=PATH, or write `weights` into it")
    if not spec.classes:
        raise WeightsError(f"{path} names no classes, so it is not known what the outputs stand for; write `classes`")
    net = net_of_spec(spec, size=size)
    load_weights(net, file)
    return Classifier(net, spec.classes), spec.classes, file_sha256(file), _described(net)


def _described(net: Net) -> list[Any]:
    return [net.library, net.arch, sorted(net.kwargs.items()), list(net.mean), list(net.std)]


def _ultralytics(name: str, weights: str | None, download: bool) -> _Loaded:
    if weights is not None:
        raise WeightsError(f"teacher={name} is a checkpoint that holds its weights; leave teacher_weights out")
    file = resolve_weights(name, download)
    with safe_ultralytics():
        checkpoint = safe_read(file)
    model = checkpoint.get("ema") or checkpoint.get("model")
    if not isinstance(model, ClassificationModel):
        raise WeightsError(
            f"{file} holds a {type(model).__name__}, expected an Ultralytics classifier such as yolo11n-cls.pt (a "
            "student of this package is given by its .json)"
        )
    model = model.float()
    state = model.state_dict()
    if not all(bool(torch.isfinite(value).all()) for value in state.values()):
        raise WeightsError(f"{file} holds values that are not finite; the file is damaged")
    own = yolo_names(model)
    outputs = int(model.model[-1].linear.out_features)
    if len(own) != outputs:
        raise WeightsError(f"{file} has {outputs} outputs but {len(own)} class names; it cannot be trusted")
    if len(set(own)) != len(own):
        raise WeightsError(f"{file} names a class twice; its outputs cannot be told apart by name")
    model.model[-1].export = False  # gives the logits beside the probabilities
    return model, own, file_sha256(file), ["ultralytics", ultralytics.__version__]


def yolo_names(model: nn.Module) -> tuple[str, ...]:
    """What the outputs of an Ultralytics classifier stand for; ImageNet-1K's by their synsets."""
    names: Any = model.names
    own = tuple(str(names[i]) for i in range(len(names)))
    return imagenet_synsets() if own == _ultralytics_imagenet() else own


@lru_cache(maxsize=1)
def _ultralytics_imagenet() -> tuple[str, ...]:
    """The English names, two of them twice, that the 1,000 synsets have in Ultralytics' own checkpoints."""
    names = read_yaml(Path(ultralytics.__file__).parent / "cfg" / "datasets" / "ImageNet.yaml")["names"]
    return tuple(str(names[i]) for i in range(len(names)))


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:40]) + (f", ... ({len(names)})" if len(names) > 40 else "")
