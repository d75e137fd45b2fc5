"""How many cells a composite has and where they lie. Pure arithmetic.

With `grids=` a composite draws its grid from a list, so that objects come in several sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from focusdd_det.seeds import uniform
from focusdd_det.types import round_half_up


@dataclass(frozen=True)
class Layout:
    """`grid` x `grid` cells, of which `n_key` are key patches and the others backgrounds (N_k + N_l = n^2)."""

    grid: int
    n_key: int

    def __post_init__(self) -> None:
        if not self.grid >= 1 or not 0 <= self.n_key <= self.grid**2:
            raise ValueError(f"expected 0 <= n_key <= grid^2, got {self}")

    @property
    def cells(self) -> int:
        """Cells, and sources that a composite takes."""
        return self.grid**2

    @property
    def n_background(self) -> int:
        """Cells that show a source whole."""
        return self.cells - self.n_key


@dataclass(frozen=True)
class Layouts:
    """The layout of every composite of a build.

    Attributes:
        usual: of every composite, unless `grids` is given.
        grids: grids of which each composite draws one, all equally often; name one twice for twice as many. The share
            of key patches stays that of `usual`: 3 of 4 become 1 of 1, 7 of 9 and 12 of 16.
        seed: the run's seed.
    """

    usual: Layout
    grids: tuple[int, ...] = ()
    seed: int = 0

    def of(self, group: str, number: int) -> Layout:
        """Layout of the proposal `number` of a class: it depends on nothing else, so that a set can be grown."""
        if not self.grids:
            return self.usual
        grid = self.grids[int(uniform("grid", self.seed, group, number) * len(self.grids))]
        return Layout(grid, round_half_up(self.usual.n_key / self.usual.cells * grid**2))

    def sources(self, group: str, composites: int) -> int:
        """Sources that the first so many composites of a class take."""
        if not self.grids:
            return composites * self.usual.cells
        return sum(self.of(group, i).cells for i in range(composites))

    def keys(self, group: str, composites: int) -> int:
        """Key patches among them."""
        return sum(self.of(group, i).n_key for i in range(composites))

    def possible(self, group: str, sources: int, wanted: int) -> int:
        """How many of the `wanted` composites so many sources can fill."""
        if not self.grids:
            return min(wanted, sources // self.usual.cells)
        made = 0
        while made < wanted and sources >= (cells := self.of(group, made).cells):
            sources -= cells
            made += 1
        return made


def edges(size: int, grid: int) -> list[int]:
    """Borders of the cells along a side of `size` px, in whole px: grid + 1 values from 0 to size."""
    return [round_half_up(i * size / grid) for i in range(grid + 1)]


def cell_sizes(size: int, grid: int) -> list[tuple[int, int]]:
    """(width, height) of each cell in row order, px; they differ by at most 1 px where the grid does not divide."""
    sides = [high - low for low, high in zip(edges(size, grid), edges(size, grid)[1:], strict=False)]
    return [(width, height) for height in sides for width in sides]


def squares(size: int, grid: int) -> Sequence[tuple[float, float, float]]:
    """(left, top, side) of each cell in row order, exact, in px."""
    side = size / grid
    return [((i % grid) * side, (i // grid) * side, side) for i in range(grid**2)]
