"""Signal to noise of a picture, with the 3 x 3 Laplacian that the paper's Appendix D names. Arrays only.

The appendix's formula is not in the text that this was written from. Our reading: the noise is Immerkaer's estimate
("Fast Noise Variance Estimation", CVIU 1996), the signal the mean brightness, their ratio in decibels.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

LAPLACIAN = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)  # the difference of two Laplacians


def noise_sigma(grey: NDArray[np.uint8]) -> float:
    """Standard deviation of the noise: sqrt(pi/2) / (6 (W-2)(H-2)) * sum |I * N|, in grey levels.

    N answers neither to flat areas and slopes nor to straight edges along the axes, so the seams of a composite hardly
    count; fine texture does count as noise.

    Args:
        grey: [H, W] uint8, at least 3 x 3.

    Raises:
        ValueError: a smaller picture.
    """
    height, width = grey.shape
    if min(height, width) < 3:
        raise ValueError(f"the noise of a picture is estimated on 3 x 3 px, got {width} x {height}")
    inner = cv2.filter2D(grey, cv2.CV_32F, LAPLACIAN)[1:-1, 1:-1]
    total = float(np.abs(inner).sum(dtype=np.float64))
    return float(math.sqrt(math.pi / 2) / (6 * (width - 2) * (height - 2)) * total)


def snr_db(grey: NDArray[np.uint8]) -> float | None:
    """20 log10(mean / sigma) in dB; None for a picture without any noise, or a black one, which have no ratio.

    Args:
        grey: [H, W] uint8, at least 3 x 3.
    """
    sigma, mean = noise_sigma(grey), float(grey.mean())
    return 20 * math.log10(mean / sigma) if sigma > 0 and mean > 0 else None
