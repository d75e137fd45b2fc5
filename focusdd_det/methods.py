"""Ways to choose: FocusDD and the baselines, behind one interface. `method=` names one.

A method is a class with the attributes below, entered into METHODS; nothing else has to know of it.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from focusdd_det.config import BuildConfig
from focusdd_det.seeds import uniform
from focusdd_det.select import Candidates, Order, background_order, ranked
from focusdd_det.types import Crop, View, round_half_up
from focusdd_det.windows import key_crop, window_side


class Method(Protocol):
    """One way to choose sources and crops.

    Attributes:
        needs_selector: whether sources must be looked at by the ViT.
        all_keys: whether every cell is a key patch (no backgrounds).
    """

    needs_selector: bool
    all_keys: bool

    def order(self, candidates: Candidates, config: BuildConfig, group: str) -> Order:
        """Positions of the candidates, first choice first."""

    def backgrounds(self, candidates: Candidates, config: BuildConfig, group: str) -> Order:
        """Positions of the candidates in the order in which they become backgrounds."""

    def crop(self, view: View, corner: tuple[int, int], grid: int, config: BuildConfig, sha256: str) -> Crop:
        """The square of a source that is its key patch."""


class FocusDD:
    """Best realism score first; the crop is the window with the most attention."""

    needs_selector = True
    all_keys = False

    def order(self, candidates: Candidates, config: BuildConfig, group: str) -> Order:
        return ranked(candidates, candidates.score, config.stratify)

    def backgrounds(self, candidates: Candidates, config: BuildConfig, group: str) -> Order:
        return background_order(candidates, config.seed, group)

    def crop(self, view: View, corner: tuple[int, int], grid: int, config: BuildConfig, sha256: str) -> Crop:
        k = window_side(grid, config.side_ratio)
        return key_crop(view, corner, k, grid, config.crop, config.image_size // config.grid)


class RandomCrops:
    """Any source, any place: crops as large as FocusDD's, four to a composite. The baseline of every comparison."""

    needs_selector = False
    all_keys = True

    def order(self, candidates: Candidates, config: BuildConfig, group: str) -> Order:
        draws = [uniform("random", config.seed, group, row.tobytes().hex()) for row in candidates.sha]
        return ranked(candidates, (np.array(draws, np.float64) * 2**53).astype(np.int64), False)

    def backgrounds(self, candidates: Candidates, config: BuildConfig, group: str) -> Order:
        return self.order(candidates, config, group)

    def crop(self, view: View, corner: tuple[int, int], grid: int, config: BuildConfig, sha256: str) -> Crop:
        short = min(view.width, view.height)
        side = max(1, round_half_up(window_side(grid, config.side_ratio) / grid * short))
        x = int(uniform("x", config.seed, sha256) * (view.width - side + 1))
        y = int(uniform("y", config.seed, sha256) * (view.height - side + 1))
        return Crop(x, y, side)


METHODS: dict[str, Method] = {"focusdd": FocusDD(), "random": RandomCrops()}
