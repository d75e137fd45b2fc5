"""Ways to choose: FocusDD and the baselines, behind one interface. `method=` names one.

A method is a class with the attributes below, entered into METHODS by `register`; nothing else has to know of it. Yours
can lie in a file of your own: `plugins=my_methods.py method=mine`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np

from focusdd_det.config import SetConfig
from focusdd_det.errors import ConfigError
from focusdd_det.seeds import uniform
from focusdd_det.select import Candidates, Order, background_order, ranked
from focusdd_det.types import Crop, View, round_half_up
from focusdd_det.windows import key_crop, middle_square, window_side


class Method(Protocol):
    """One way to choose sources and crops.

    Attributes:
        needs_selector: whether sources must be looked at by the ViT.
        all_keys: whether every cell is a key patch (no backgrounds).
        looks: crops of a source that the ViT is shown, of which the best counts; 0: the view of the whole source.
    """

    needs_selector: bool
    all_keys: bool
    looks: int

    def adapt(self, config: SetConfig) -> SetConfig:
        """The config as this method takes it: one that knows no grid sets the grid to 1."""

    def look_crops(self, width: int, height: int, sha256: str, config: SetConfig) -> list[Crop]:
        """`looks` squares of a source, by its content alone."""

    def order(self, candidates: Candidates, config: SetConfig, group: str) -> Order:
        """Positions of the candidates, first choice first."""

    def backgrounds(self, candidates: Candidates, config: SetConfig, group: str) -> Order:
        """Positions of the candidates in the order in which they become backgrounds."""

    def crop(self, view: View, corner: tuple[int, int], grid: int, config: SetConfig, sha256: str) -> Crop:
        """The square of a source that is its key patch.

        Args:
            view, corner, grid: the ViT's square in the source, and the best window's top left token in its grid; with
                `looks`, the row of `corner` is the number of the best look.
        """


class _Plain:
    """What most methods have in common."""

    needs_selector = False
    all_keys = True
    looks = 0

    def adapt(self, config: SetConfig) -> SetConfig:
        return config

    def look_crops(self, width: int, height: int, sha256: str, config: SetConfig) -> list[Crop]:
        return []

    def backgrounds(self, candidates: Candidates, config: SetConfig, group: str) -> Order:
        return _shuffled(candidates, config, group)


class FocusDD(_Plain):
    """Best realism score first; the crop is the window with the most attention."""

    needs_selector = True
    all_keys = False

    def order(self, candidates: Candidates, config: SetConfig, group: str) -> Order:
        return ranked(candidates, candidates.score, config.stratify)

    def backgrounds(self, candidates: Candidates, config: SetConfig, group: str) -> Order:
        return background_order(candidates, config.seed, group)

    def crop(self, view: View, corner: tuple[int, int], grid: int, config: SetConfig, sha256: str) -> Crop:
        k = window_side(grid, config.side_ratio)
        return key_crop(view, corner, k, grid, config.crop, config.image_size // config.grid)


class RandomCrops(_Plain):
    """Any source, any place: crops as large as FocusDD's, four to a composite. The baseline of every comparison."""

    def order(self, candidates: Candidates, config: SetConfig, group: str) -> Order:
        return _shuffled(candidates, config, group)

    def crop(self, view: View, corner: tuple[int, int], grid: int, config: SetConfig, sha256: str) -> Crop:
        short = min(view.width, view.height)
        side = max(1, round_half_up(window_side(grid, config.side_ratio) / grid * short))
        x = int(uniform("x", config.seed, sha256) * (view.width - side + 1))
        y = int(uniform("y", config.seed, sha256) * (view.height - side + 1))
        return Crop(x, y, side)


class Realism(_Plain):
    """RDED (Sun et al. 2024): of 5 random crops of a source the one that the classifier is surest of; then the sources
    whose crop it is surest of. A crop is a square of 8 % to 100 % of the middle square's area, as in a random resized
    crop of ratio 1."""

    needs_selector = True
    looks = 5

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


class Whole(_Plain):
    """Random pictures, each the middle square of one source, no grid: what picking photographs by chance gives."""

    all_keys = False

    def adapt(self, config: SetConfig) -> SetConfig:
        return dataclasses.replace(config, grid=1, n_key=0, grids=())

    def order(self, candidates: Candidates, config: SetConfig, group: str) -> Order:
        return _shuffled(candidates, config, group)

    def crop(self, view: View, corner: tuple[int, int], grid: int, config: SetConfig, sha256: str) -> Crop:
        return middle_square(view.width, view.height)


REALISM_LEAST = 0.08  # least area of a crop, as a share of the largest


def _shuffled(candidates: Candidates, config: SetConfig, group: str) -> Order:
    """A random order that depends on the seed and on what the sources hold."""
    draws = [uniform("random", config.seed, group, row.tobytes().hex()) for row in candidates.sha]
    return ranked(candidates, (np.array(draws, np.float64) * 2**53).astype(np.int64), False)


METHODS: dict[str, Method] = {}


def register(name: str, method: Method) -> None:
    """Enter a method under a name; a name that is taken by another class is refused.

    Raises:
        ConfigError: see above.
    """
    if name in METHODS and type(METHODS[name]).__qualname__ != type(method).__qualname__:
        raise ConfigError(f"method `{name}` exists already ({type(METHODS[name]).__name__}); choose another name")
    METHODS[name] = method


register("focusdd", FocusDD())
register("random", RandomCrops())
register("realism", Realism())
register("whole", Whole())
