"""The loop that one would write first: one process, Pillow decodes every pixel, timm's own forward on whole batches."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from focusdd_det.bench.definition import Seen, best_window, confidence
from focusdd_det.config import SetConfig
from focusdd_det.scoring.glance import difference_hash, view_pixels
from focusdd_det.selector import Selector
from focusdd_det.sources import Located
from focusdd_det.types import Image
from focusdd_det.windows import window_side


class Batch(NamedTuple):
    """n sources: their views [view, view, 3] uint8, probabilities [n, classes] and attention [n, g, g]."""

    sources: list[Located]
    views: list[Image]
    probabilities: Tensor
    attention: Tensor


def plain(selector: Selector, batch: int) -> Selector:
    """The same ViT through timm's own forward, `batch` pictures at once."""
    backbone = copy.copy(selector.backbone)
    backbone.whole = True  # type: ignore[attr-defined]
    return replace(selector, backbone=backbone, at_a_time=batch)


def loop(sources: Sequence[Located], selector: Selector, config: SetConfig) -> Iterator[Batch]:
    """All sources that Pillow can read, in order, in batches of `config.batch`, the last one as it comes."""
    batch: list[Located] = []
    views: list[Image] = []
    for located in sources:
        picture = _pillow(located)
        if picture is not None:
            batch.append(located)
            views.append(view_pixels(picture, selector.view, config.geometry))
        if len(batch) == config.batch:
            yield Batch(batch, views, *_look(selector, views))
            batch, views = [], []
    if batch:
        yield Batch(batch, views, *_look(selector, views))


def _look(selector: Selector, views: Sequence[Image]) -> tuple[Tensor, Tensor]:
    return selector(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous())


def _pillow(located: Located) -> Image | None:
    try:
        with PILImage.open(io.BytesIO(located.read())) as picture:
            return np.asarray(picture.convert("RGB"), np.uint8)
    except (OSError, SyntaxError, ValueError):
        return None


def seen_by_class(
    sources: Sequence[Located], selector: Selector, columns: Mapping[str, Sequence[int]], config: SetConfig
) -> dict[str, list[Seen]]:
    """What the loop says of each source, class by class.

    Args:
        columns: class -> outputs of the ViT that stand for it.
    """
    found: dict[str, list[Seen]] = {name: [] for name in columns}
    k = window_side(selector.grid, config.side_ratio)
    for batch in loop(sources, selector, config):
        for located, view, row, attention in zip(*batch, strict=True):
            s = located.source
            share, corner = best_window(attention.double().numpy(), k)
            p = confidence(row.tolist(), columns[s.group])
            sha = hashlib.sha256(located.read()).digest()
            name = f"{s.root}\x1f{s.path}"
            found[s.group].append(Seen(sha, name, s.folder, p, share, corner, difference_hash(view)))
    return found
