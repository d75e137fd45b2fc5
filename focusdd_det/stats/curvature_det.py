"""The Hessian trace of a detector's training loss on a detection set.

Which anchors stand for which box depends on the weights, by a choice that has no derivative. As in every gradient step
of a training, that choice and the targets that follow from it (and CIoU's weight alpha) are held as they are at these
weights.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from ultralytics.utils import DEFAULT_CFG_DICT, IterableSimpleNamespace

from focusdd_det.checkpoints import safe_checkpoint, safe_read
from focusdd_det.compose import resize
from focusdd_det.detset import Item, part_path, read_data_yaml, read_manifest
from focusdd_det.errors import VerifyError, WeightsError
from focusdd_det.labels import parse_rows
from focusdd_det.progress import progress_bar
from focusdd_det.scoring.decode import BadImage, decode
from focusdd_det.stats.curvature import Sharpness
from focusdd_det.stats.hessian import hessian_trace
from focusdd_det.teacher import STRIDE

LOSS = "detection loss on the set's boxes"
_GAINS = ("box", "cls", "dfl")


def of_detector(weights: Path, folder: Path, probes: int, seed: int, device: str) -> Sharpness:
    """The Hessian trace of a trained detector on a detection set.

    The loss is Ultralytics' sum of the box, class and distribution terms with the run's gains, each picture by itself
    (so no batch size enters), the mean over the whole composites at the run's size, without augmentation; batch
    normalisation with its running statistics; in float32.

    Args:
        weights: last.pt or best.pt of `focusdd detect train` or of plain Ultralytics.
        folder: a detection set whose classes the detector has.
        probes: random vectors; the error falls with their root.

    Raises:
        WeightsError: no such checkpoint, or one of other classes, or with training arguments that are no numbers.
        VerifyError: the set cannot be read.
    """
    model, size = _load(weights)
    names = read_data_yaml(folder)
    items = list(read_manifest(folder))
    own = {str(name): index for index, name in model.names.items()}
    if lacking := [name for name in names if name not in own]:
        raise WeightsError(
            f"{weights} was trained on {len(own)} classes and lacks {len(lacking)} of the {len(names)} of {folder}: "
            f"{', '.join(lacking[:10])}. Give a checkpoint that was trained on this set"
        )
    model.to(device)
    model.model[-1].training = True  # it then gives its raw outputs alone
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".dfl." not in name)  # the numbers of the bins, which no training changes
    criterion = model.init_criterion()

    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        terms, _ = criterion(model(batch["img"]), batch)
        total: Tensor = terms.sum()
        return total

    parameters = [p for p in model.parameters() if p.requires_grad]
    pictures = _pictures(folder, items, [own[name] for name in names], size, device)
    trace = hessian_trace(loss, pictures, parameters, probes, seed)
    return Sharpness(str(weights), LOSS, trace, len(items), size)


def _load(weights: Path) -> tuple[Any, int]:
    """The detector with its run's gains, and the side in px that it was trained at."""
    model: Any = safe_checkpoint(weights)
    if model.model[-1].cv2 is None:
        raise WeightsError(f"{weights} was saved fused, without its one-to-many head; pass the unfused checkpoint")
    given = safe_read(weights).get("train_args")
    args = {**DEFAULT_CFG_DICT, **(given if isinstance(given, dict) else {})}
    wrong = [
        key for key in (*_GAINS, "imgsz") if not isinstance(args[key], numbers.Real) or isinstance(args[key], bool)
    ]
    if wrong:
        raise WeightsError(f"{weights}: its training arguments {', '.join(wrong)} are no numbers; get the file again")
    size = int(args["imgsz"])
    if size < STRIDE or size % STRIDE:
        raise WeightsError(f"{weights} was trained at imgsz={size}; expected a multiple of {STRIDE}")
    model.args = IterableSimpleNamespace(**{key: args[key] for key in (*_GAINS, "epochs")})
    return model, size


def _pictures(
    folder: Path, items: Sequence[Item], classes: Sequence[int], size: int, device: str
) -> Iterator[tuple[dict[str, Tensor], float]]:
    """Each composite as a batch of one, with its share of the mean."""
    with progress_bar(len(items), "Hessian") as bar:
        for item in items:
            image = part_path(folder, "images", item)
            try:
                pixels = decode(image.read_bytes())[0]
                rows = parse_rows(part_path(folder, "labels", item).read_text(encoding="utf-8"), len(classes))
            except (OSError, ValueError, BadImage) as error:
                raise VerifyError(f"{image} or its labels: {error}; run `focusdd verify {folder}`") from error
            index = torch.tensor([classes[int(row[0])] for row in rows], dtype=torch.float32, device=device)
            yield (
                {
                    "img": torch.from_numpy(resize(pixels, size, size)).permute(2, 0, 1)[None].to(device).float() / 255,
                    "batch_idx": torch.zeros(len(rows), device=device),
                    "cls": index[:, None],
                    "bboxes": torch.from_numpy(rows[:, 1:5]).to(device, torch.float32),
                },
                1 / len(items),
            )
            bar.update(1)
