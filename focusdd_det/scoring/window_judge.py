"""The detection teacher as a judge of windows: whole sources in, the best window of each and its score out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from focusdd_det.config import BuildConfig
from focusdd_det.errors import ConfigError
from focusdd_det.methods import Method
from focusdd_det.types import Detections, Image
from focusdd_det.windows import key_crop, view_of, window_side

if TYPE_CHECKING:
    from focusdd_det.teacher import Detector


@dataclass(frozen=True)
class WindowJudge:
    """A detector that looks at letterboxed sources, at a fixed batch shape, as the labelling does.

    Attributes:
        method: says how good a window is.
        classes: class that composites are made for -> index of its class among the detector's names.
        grid: side of the token grid on which windows are given.
    """

    detector: Detector
    method: Method
    config: BuildConfig
    classes: Mapping[str, int]
    grid: int

    @property
    def side(self) -> int:
        """Side of the letterbox in px: that of the teacher's input when it labels composites."""
        return -(-self.config.image_size // 32) * 32

    def depends_on(self, group: str) -> list[object]:
        """What the score of a source of this class depends on besides the picture."""
        config, detector = self.config, self.detector
        own = detector.names[self.classes[group]]
        cell = config.image_size // config.grid if config.crop == "fixed" else 0
        return [
            "teacher", detector.sha256, list(detector.names), own, self.side, config.conf, config.iou, config.max_det,
            self.grid, config.side_ratio, config.crop, cell, type(self.method).__qualname__,
        ]  # fmt: skip

    def __call__(
        self, looks: Sequence[Image], sizes: Sequence[tuple[int, int]], groups: Sequence[str]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Judge sources.

        Args:
            looks: the whole sources, each in a letterbox [side, side, 3].
            sizes: their width and height in px.
            groups: their classes.

        Returns:
            score [n] in [0, 1], rounded to 1e-4, of each source's best window, and its top left token (row, column)
            [n, 2]. Of equal windows the one nearest to the middle counts, then the first in row order.

        Raises:
            ConfigError: a method of the user's gives something else than a score a window.
        """
        config = self.config
        answers = self.detector.detect(
            list(looks), config.conf, config.iou, config.max_det, config.teacher_batch, self.side
        )
        scores = np.zeros(len(answers), np.float64)
        corners = np.zeros((len(answers), 2), np.int64)
        places = self.grid - window_side(self.grid, config.side_ratio) + 1
        every = np.stack(np.divmod(np.arange(places**2), places), axis=1)
        off_middle = np.square(2 * every - (places - 1)).sum(axis=1)
        for i, (found, (width, height), group) in enumerate(zip(answers, sizes, groups, strict=True)):
            found = on_source(found, width, height, self.side)
            worth = np.asarray(self.method.judge(found, self.classes[group], self._windows(width, height, every)))
            if worth.shape != (len(every),) or not np.isfinite(worth).all():
                raise ConfigError(
                    f"method={config.method}: judge() gave shape {worth.shape}, expected one finite number for each of "
                    f"{len(every)} windows"
                )
            rounded = np.round(np.clip(worth.astype(np.float64), 0, 1), 4)
            best = int(np.lexsort((off_middle, -rounded))[0])
            scores[i], corners[i] = rounded[best], every[best]
        return scores, corners

    def _windows(self, width: int, height: int, corners: NDArray[np.int64]) -> NDArray[np.float64]:
        """[m, 4] the squares that would be cut of a source, in its pixels."""
        config = self.config
        view, k = view_of(width, height, config.geometry), window_side(self.grid, config.side_ratio)
        cell = config.image_size // config.grid
        crops = [key_crop(view, (int(r), int(c)), k, self.grid, config.crop, cell) for r, c in corners]
        return np.array([(c.x, c.y, c.x + c.side, c.y + c.side) for c in crops], np.float64)


def on_source(found: Detections, width: int, height: int, side: int) -> Detections:
    """Boxes in a letterbox [side, side] (compose.letterbox), in pixels of its source of width x height px."""
    scale = side / max(width, height)
    inner = np.array([max(1, round(width * scale)), max(1, round(height * scale))])
    border = (side - inner) // 2
    to_source = np.array([width, height]) / inner
    boxes = (found.boxes.astype(np.float64) - np.tile(border, 2)) * np.tile(to_source, 2)
    boxes = np.clip(boxes, 0, [width, height, width, height])
    return Detections(boxes.astype(np.float32), found.classes, found.conf, found.scores)
