"""Our own choice: windows ranked by what the detection teacher finds in them, not by attention."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from focusdd_det.config import SetConfig
from focusdd_det.methods.base import monotone
from focusdd_det.methods.focus import FocusDD
from focusdd_det.select import Candidates, Order, ranked
from focusdd_det.types import Detections

SMALL = 0.25  # side of a box, as a share of the cell's, below which it is worth less
LARGE = 0.75  # and above which it is
FULL = 0.5  # worth of a box that fills the cell


class TeacherWindows(FocusDD):
    """The detection teacher looks at each whole source; the key window is the one with the best `window_scores`, and
    sources are ranked by theirs. Windows, crops and composites are FocusDD's. Needs no ViT."""

    needs_selector = False
    needs_teacher = True

    def judge(self, found: Detections, own: int, windows: NDArray[np.float64]) -> NDArray[np.float64]:
        return window_scores(found, own, windows)

    @monotone
    def order(self, candidates: Candidates, config: SetConfig, group: str) -> Order:
        return ranked(candidates, np.floor(candidates.p * 1e4 + 0.5).astype(np.int64), config.stratify)


def window_scores(found: Detections, own: int, windows: NDArray[np.float64]) -> NDArray[np.float64]:
    """How good each window is as a training cell for a detector.

    For a box of confidence s, of whose area the share v lies in the window, and whose visible part is as large as a
    square of r window sides:

        score = (1 - product over boxes of the own class of (1 - s * v^2 * size(r))) * (1 - cut / 2)
        size(r) = r / 0.25 below 0.25;  1 up to 0.75;  then down to 0.5 at r = 1
        cut = largest, over boxes of every class, of s * (1 - |2 v - 1|)

    Why: the object of the class must be there with confidence (s) and wholly (v^2: half an object is worth a quarter).
    A sliver of a few pixels teaches little, and one that fills the cell has the seam for its outline and is larger than
    what is looked for (`size`). One good object makes a good cell; more of them help, but ten do not make ten cells
    (one minus the product). An object of any class that the window cuts in half is half a label: what it is becomes
    doubtful and one of its sides is the seam (`cut`, 0 for what is wholly inside or outside).

    Args:
        found: boxes in pixels of the source.
        own: the class of the source, an index as in `found.classes`.
        windows: [m, 4] x1 y1 x2 y2 in pixels of the source.

    Returns:
        [m] float64 in [0, 1].
    """
    boxes = found.boxes.astype(np.float64)
    low = np.maximum(windows[:, None, :2], boxes[None, :, :2])
    high = np.minimum(windows[:, None, 2:], boxes[None, :, 2:])
    inside = np.maximum(high - low, 0).prod(axis=2)  # [m, n] px^2
    area = np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), 1e-9)
    visible = np.minimum(inside / area, 1)
    side = np.sqrt(inside / (windows[:, 2:] - windows[:, :2]).prod(axis=1)[:, None])
    size = np.interp(side, [0, SMALL, LARGE, 1], [0, 1, 1, FULL])
    confidence = found.conf.astype(np.float64)
    worth = np.where(found.classes == own, confidence * visible**2 * size, 0)
    cut = (confidence * (1 - np.abs(2 * visible - 1))).max(axis=1, initial=0)
    return np.asarray((1 - (1 - worth).prod(axis=1)) * (1 - cut / 2), np.float64)
