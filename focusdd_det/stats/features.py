"""Features of pictures by a ViT: what its head would see. Tensors in, arrays out."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from focusdd_det.errors import WeightsError
from focusdd_det.selector import Selector


@torch.inference_mode()
def pooled(vit: Selector, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The pooled features before the head.

    Args:
        vit: as from `load_selector`.
        pixels: [B, view, view, 3] uint8 RGB.

    Returns:
        [B, d] float32.

    Raises:
        WeightsError: values that are not finite.
    """
    features = vit.pooled(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()).numpy()
    if not np.isfinite(features).all():
        raise WeightsError("the features are not finite: the weights are damaged, or do not fit the network")
    return np.asarray(features, np.float32)
