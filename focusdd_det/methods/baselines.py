"""What any choice should stand beside: random crops, random pictures, and RDED's crops."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from focusdd_det.compose import middle_square
from focusdd_det.config import SetConfig
from focusdd_det.methods.base import Base, monotone, shuffled
from focusdd_det.seeds import uniform
from focusdd_det.select import Candidates, Order, ranked
from focusdd_det.types import Crop, View, round_half_up
from focusdd_det.windows import key_crop, window_side

REALISM_LEAST = 0.08  # least area of a crop, as a share of the largest


class RandomCrops(Base):
    """Any source, any place: crops as large as FocusDD's, four to a composite. The baseline of every comparison."""

    @monotone
    def order(self, candidates: Candidates, config: SetConfig, group: str) -> Order:
        return shuffled(candidates, config, group)

    def crop(self, view: View, corner: tuple[int, int], grid: int, config: SetConfig, sha256: str) -> Crop:
        k, cell = window_side(grid, config.side_ratio), config.image_size // config.grid
        side = key_crop(view, (0, 0), k, grid, config.crop, cell).side
        x = int(uniform("x", config.seed, sha256) * (view.width - side + 1))
        y = int(uniform("y", config.seed, sha256) * (view.height - side + 1))
        return Crop(x, y, side)


class Realism(Base):
    """RDED (Sun et al. 2024): of 5 random crops of a source the one that the classifier is surest of; then the sources
    whose crop it is surest of. A crop is a square of 8 % to 100 % of the middle square's area, as in a random resized
    crop of ratio 1."""

    needs_selector = True
    looks = 5

    @monotone
    def order(self, candidates: Candidates, config: SetConfig, group: str) -> Order:
        return ranked(candidates, np.floor(candidates.p * 1e4 + 0.5).astype(np.int64), config.stratify)

    def look_crops(self, width: int, height: int, sha256: str, config: SetConfig) -> list[Crop]:
        crops = []
        for i in range(self.looks):
            share = REALISM_LEAST + (1 - REALISM_LEAST) * uniform("share", config.seed, sha256, i)
            side = max(1, round_half_up(math.sqrt(share) * min(width, height)))
            x = int(uniform("x", config.seed, sha256, i) * (width - side + 1))
            y = int(uniform("y", config.seed, sha256, i) * (height - side + 1))
            crops.append(Crop(x, y, side))
        return crops

    def crop(self, view: View, corner: tuple[int, int], grid: int, config: SetConfig, sha256: str) -> Crop:
        return self.look_crops(view.width, view.height, sha256, config)[corner[0]]


class Whole(Base):
    """Random pictures, each the middle square of one source, no grid: what picking photographs by chance gives."""

    all_keys = False

    def adapt(self, config: SetConfig) -> SetConfig:
        return dataclasses.replace(config, grid=1, n_key=0, grids=())

    @monotone
    def order(self, candidates: Candidates, config: SetConfig, group: str) -> Order:
        return shuffled(candidates, config, group)

    def crop(self, view: View, corner: tuple[int, int], grid: int, config: SetConfig, sha256: str) -> Crop:
        return middle_square(view.width, view.height)
