"""FocusDD's own choice, and what it is with other windows."""

from __future__ import annotations

from typing import Literal

from focusdd_det.config import SetConfig
from focusdd_det.methods.base import Base, monotone
from focusdd_det.seeds import uniform
from focusdd_det.select import Candidates, Order, background_order, ranked
from focusdd_det.types import Crop, View
from focusdd_det.windows import key_crop, window_side


class FocusDD(Base):
    """Best realism score first; the crop is the window with the most attention."""

    needs_selector = True
    all_keys = False

    @monotone
    def order(self, candidates: Candidates, config: SetConfig, group: str) -> Order:
        return ranked(candidates, candidates.score, config.stratify)

    @monotone
    def backgrounds(self, candidates: Candidates, config: SetConfig, group: str) -> Order:
        return background_order(candidates, config.seed, group)

    def crop(self, view: View, corner: tuple[int, int], grid: int, config: SetConfig, sha256: str) -> Crop:
        k = window_side(grid, config.side_ratio)
        return key_crop(view, corner, k, grid, config.crop, config.image_size // config.grid)


class LeastAttention(FocusDD):
    """FocusDD's sources in FocusDD's order, but the crop is the window with the least attention (Table 11, min AS, as
    we read it). The score is still that of the window with the most."""

    window: Literal["most", "least"] = "least"


class RandomAttention(FocusDD):
    """FocusDD's sources in FocusDD's order, but the crop is any window of the same grid, by seed and content (Table 11,
    random AS, as we read it)."""

    def crop(self, view: View, corner: tuple[int, int], grid: int, config: SetConfig, sha256: str) -> Crop:
        places = grid - window_side(grid, config.side_ratio) + 1
        row, column = (int(uniform(axis, config.seed, sha256) * places) for axis in ("row", "column"))
        return super().crop(view, (row, column), grid, config, sha256)


class RankedCrops(RandomAttention):
    """FocusDD's sources in FocusDD's order, any window of each, no backgrounds: its choice of pictures without its
    choice of windows, the same composites as `random_as` with n_key = grid^2. Ours."""

    all_keys = True
