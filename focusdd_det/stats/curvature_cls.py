"""The Hessian trace of a classifier's training loss on a classification set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from focusdd_det.classify.classset import ClassSet, read_class_set
from focusdd_det.classify.nets import Classifier, load_weights, net_of_spec, read_spec
from focusdd_det.classify.views import Pictures
from focusdd_det.compose import resize
from focusdd_det.errors import WeightsError
from focusdd_det.progress import progress_bar
from focusdd_det.stats.curvature import Sharpness
from focusdd_det.stats.hessian import hessian_trace

Batch = tuple[Tensor, Tensor]  # pixels [B, 3, S, S] in [0, 1], classes [B]
LOSS = "mean cross-entropy"
_SIZE = 224  # px, for a checkpoint that does not say


def of_classifier(weights: Path, folder: Path, probes: int, seed: int, batch: int, device: str) -> Sharpness:
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
    return Sharpness(str(weights), LOSS, trace, len(data), size, accuracy=right / len(data))


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
    with progress_bar(len(data), "Hessian") as bar:
        for start in range(0, len(data), batch):
            indices = range(start, min(start + batch, len(data)))
            pixels = torch.stack([torch.from_numpy(resize(pictures[i], size, size)).permute(2, 0, 1) for i in indices])
            classes = torch.from_numpy(data.classes[start : start + batch])
            yield (pixels.to(device).float() / 255, classes.to(device)), len(indices) / len(data)
            bar.update(len(indices))
