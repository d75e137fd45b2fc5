"""How sharp the minimum is that a classifier reached on a set: the Hessian trace of its training loss (Fig. 8)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from focusdd_det.classify.classset import ClassSet, read_class_set
from focusdd_det.classify.nets import Classifier, load_weights, net_of_spec, read_spec
from focusdd_det.classify.views import Pictures
from focusdd_det.compose import resize
from focusdd_det.detset import task_of
from focusdd_det.errors import ConfigError, WeightsError
from focusdd_det.progress import progress_bar
from focusdd_det.stats.hessian import Trace, hessian_trace

Batch = tuple[Tensor, Tensor]  # pixels [B, 3, S, S] in [0, 1], classes [B]
_SIZE = 224  # px, for a checkpoint that does not say


@dataclass(frozen=True)
class Sharpness:
    """What was measured of one checkpoint.

    Attributes:
        weights: the checkpoint.
        trace: of the Hessian of the mean cross-entropy over the set's pictures.
        accuracy: share of the set's own pictures that it gets right: training accuracy, no test.
        pictures: of the set; size: px they were shown at.
    """

    weights: str
    trace: Trace
    accuracy: float
    pictures: int
    size: int

    def plain(self) -> dict[str, object]:
        """As it stands in stats.json."""
        return {
            "weights": self.weights,
            "hessian_trace": self.trace.mean,
            "standard_error": self.trace.standard_error,
            "probes": list(self.trace.probes),
            "parameters": self.trace.parameters,
            "loss": self.trace.loss,
            "accuracy_on_the_set": self.accuracy,
            "pictures": self.pictures,
            "size": self.size,
        }

    def line(self) -> str:
        """In words."""
        t = self.trace
        error = "one probe: no error" if t.standard_error is None else f"± {t.standard_error:.4g}"
        return (
            f"{self.weights}: Hessian trace {t.mean:.4g} {error} ({len(t.probes)} probes, {t.parameters} weights), "
            f"loss {t.loss:.4g}, accuracy {100 * self.accuracy:.1f} %, on {self.pictures} pictures of {self.size} px"
        )


def require_classification(sets: Sequence[Path]) -> None:
    """Refuses detection sets, before anything is read.

    Raises:
        ConfigError: naming the set.
    """
    for folder in sets:
        if task_of(folder) == "detect":
            raise ConfigError(
                f"{folder} is a detection set; the Hessian trace is offered for classifiers on classification sets. "
                "The loss of a detector depends on how boxes are matched to anchors, so it has no second derivative "
                "where the matching changes"
            )


def sharpness(weights: Path, folder: Path, probes: int, seed: int, batch: int, device: str) -> Sharpness:
    """The Hessian trace of a trained classifier on a classification set.

    The loss is the mean cross-entropy with the set's classes, over the whole pictures without augmentation, batch
    normalisation with its running statistics, in float32.

    Args:
        weights: last.json of a run of `focusdd classify train`, or the .safetensors beside it.
        folder: a classification set.
        probes: random vectors; the error falls with their root.
        batch: pictures at a time; of no consequence for the result but rounding.

    Raises:
        WeightsError: no such checkpoint, or one of other classes.
        DataError, VerifyError: the set cannot be read.
    """
    data = read_class_set(folder, "train")
    model, size = _load(weights, data.names, device)
    parameters = [p.requires_grad_(True) for p in model.parameters()]
    right = 0

    def loss(batch_: Batch) -> Tensor:
        nonlocal right
        pixels, classes = batch_
        logits = model(pixels)
        right += int((logits.detach().argmax(1) == classes).sum())
        return F.cross_entropy(logits, classes)

    trace = hessian_trace(loss, _batches(data, size, batch, device), parameters, probes, seed)
    return Sharpness(str(weights), trace, right / len(data), len(data), size)


def _load(weights: Path, names: Sequence[str], device: str) -> tuple[_Ordered, int]:
    if weights.suffix == ".safetensors":
        weights = weights.with_suffix(".json")
    if weights.suffix != ".json":
        raise WeightsError(
            f"weights={weights}: expected the last.json that `focusdd classify train` writes beside last.safetensors"
        )
    spec = read_spec(weights)
    if spec.weights is None:
        raise WeightsError(f"{weights} names no weights; expected the spec of a trained classifier")
    if set(spec.classes) != set(names):
        known = set(spec.classes)
        lacking = [name for name in names if name not in known]
        raise WeightsError(
            f"{weights} was trained on {len(spec.classes)} classes and the set has {len(names)}; lacking: "
            f"{', '.join(lacking[:10]) or 'none'}. Give a checkpoint that was trained on this set"
        )
    net = net_of_spec(spec)
    load_weights(net, spec.weights)
    model = _Ordered(Classifier(net, spec.classes), [spec.classes.index(name) for name in names])
    return model.float().eval().to(device), spec.size or _SIZE


class _Ordered(torch.nn.Module):
    """A classifier whose outputs stand in the order of the set's classes."""

    def __init__(self, model: Classifier, order: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.order = list(order)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits[:, self.order]


def _batches(data: ClassSet, size: int, batch: int, device: str) -> Iterator[tuple[Batch, float]]:
    pictures = Pictures(data, budget=0)
    bar = progress_bar(len(data), "Hessian")
    try:
        for start in range(0, len(data), batch):
            indices = range(start, min(start + batch, len(data)))
            pixels = torch.stack([torch.from_numpy(resize(pictures[i], size, size)).permute(2, 0, 1) for i in indices])
            classes = torch.from_numpy(data.classes[start : start + batch])
            yield (pixels.to(device).float() / 255, classes.to(device)), len(indices) / len(data)
            bar.update(len(indices))
    finally:
        bar.close()
