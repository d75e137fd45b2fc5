"""Top-1 and top-5 of a classifier over the middle views of a set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from focusdd_det.ahead import ahead
from focusdd_det.classify.classset import ClassSet
from focusdd_det.classify.views import EvalDataset
from focusdd_det.errors import WeightsError


@dataclass(frozen=True)
class Accuracy:
    """Percent of pictures whose class is the best, or among the best five, of the logits.

    Attributes:
        top1, top5: percent; with fewer than five classes top5 is 100.
        n: pictures.
        per_class: top-1 percent by class name; classes without pictures are left out.
    """

    top1: float
    top5: float
    n: int
    per_class: dict[str, float]


@torch.no_grad()
def accuracy(
    module: Callable[[Tensor], Tensor],
    class_set: ClassSet,
    size: int,
    batch: int = 64,
    device: str | torch.device = "cpu",
    workers: int = 1,
    progress: Callable[[int], object] | None = None,
) -> Accuracy:
    """Measure a classifier.

    Args:
        module: in eval mode; pixels [B, 3, size, size] float in [0, 1] on `device` -> logits [B, classes], columns in
            the order of the set's names.
        workers: decoding threads.
        progress: called with the number of pictures that were done.

    Raises:
        DataError: a picture that cannot be read.
        WeightsError: logits of another number of classes, or not finite.
    """
    data = EvalDataset(class_set, size)
    hits1 = np.zeros(len(class_set), bool)
    hits5 = np.zeros(len(class_set), bool)
    kept: list[Tensor] = []
    start = 0
    for view in ahead(range(len(data)), lambda index: data[index]["img"], workers, batch + 4 * workers):
        kept.append(view)
        stop = start + len(kept)
        if len(kept) < batch and stop < len(data):
            continue
        logits = module(torch.stack(kept).to(device).float().div_(255)).float().cpu()
        if logits.shape != (len(kept), len(class_set.names)) or not bool(torch.isfinite(logits).all()):
            raise WeightsError(
                f"the classifier gives outputs of shape {list(logits.shape)}, or some that are not finite; expected "
                f"finite logits [{len(kept)}, {len(class_set.names)}]"
            )
        best = logits.topk(min(5, logits.shape[1])).indices
        right = best == torch.from_numpy(class_set.classes[start:stop])[:, None]
        hits1[start:stop] = right[:, 0].numpy()
        hits5[start:stop] = right.any(dim=1).numpy()
        if progress is not None:
            progress(len(kept))
        kept, start = [], stop
    per_class = {
        name: 100.0 * float(hits1[class_set.classes == i].mean())
        for i, name in enumerate(class_set.names)
        if bool((class_set.classes == i).any())
    }
    return Accuracy(100.0 * float(hits1.mean()), 100.0 * float(hits5.mean()), len(class_set), per_class)
