"""How large boxes are, and how much of a composite they cover. Arrays only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

PER_DECADE = 12
# Relative sizes from 1/100 of the side to the whole, in equal steps of the logarithm: 24 bins, 25 edges.
EDGES: Doubles = np.power(10.0, np.linspace(-2, 0, 2 * PER_DECADE + 1))
FILLED = 0.85  # share of a cell's area from which one box fills it
SMALL, MEDIUM = 32.0**2, 96.0**2  # px^2: COCO's borders between small, medium and large


def relative_sizes(rows: Doubles) -> Doubles:
    """sqrt(area) / side of boxes in a square picture, in (0, 1].

    Args:
        rows: [n, 5] class, cx, cy, w, h as shares of the side.
    """
    return np.sqrt(rows[:, 3] * rows[:, 4])


def size_shares(sizes: Doubles) -> Doubles:
    """Share of the boxes in each of the 24 bins of EDGES; smaller ones count to the first, larger ones to the last.

    Returns:
        [24], summing to 1; zeros without boxes.
    """
    counts = np.histogram(np.clip(sizes, EDGES[0], EDGES[-1]), EDGES)[0]
    return np.asarray(counts / max(len(sizes), 1), np.float64)


def overlap(a: Doubles, b: Doubles) -> float:
    """What two distributions over the same bins have in common: the sum of the smaller shares, in [0, 1]."""
    return float(np.minimum(a, b).sum())


def coco_kinds(areas: Doubles) -> tuple[float, float, float]:
    """Shares of small, medium and large boxes by COCO's borders.

    Args:
        areas: [n] px^2, at least one.
    """
    small, below_large = float((areas < SMALL).mean()), float((areas < MEDIUM).mean())
    return small, below_large - small, 1 - below_large


def covered_area(rows: Doubles) -> float:
    """Share of the picture's area that lies under at least one box, in [0, 1]; overlaps count once.

    Exact: the boxes' own edges are the lines of the grid that is painted.

    Args:
        rows: [n, 5] class, cx, cy, w, h as shares of the side.
    """
    if not len(rows):
        return 0.0
    low = np.clip(rows[:, 1:3] - rows[:, 3:] / 2, 0, 1)
    high = np.clip(rows[:, 1:3] + rows[:, 3:] / 2, 0, 1)
    xs, ys = (np.unique(np.concatenate([low[:, axis], high[:, axis]])) for axis in (0, 1))
    painted = np.zeros((len(ys) - 1, len(xs) - 1), np.bool_)
    for (x0, y0), (x1, y1) in zip(low, high, strict=True):
        painted[
            np.searchsorted(ys, y0) : np.searchsorted(ys, y1), np.searchsorted(xs, x0) : np.searchsorted(xs, x1)
        ] = 1
    return float(np.diff(ys) @ painted @ np.diff(xs))


def cells_with_a_box(rows: Doubles, grid: int) -> int:
    """In how many of the grid x grid cells the centre of a box lies."""
    return len({(int(x), int(y)) for x, y in _cells_of(rows, grid)})


def cells_filled(rows: Doubles, grid: int) -> int:
    """How many of the grid x grid cells one box fills: its centre lies there, and it covers FILLED or more of the
    cell's area. It ends where the cell does, and perhaps that is what it teaches."""
    cells = _cells_of(rows, grid)
    low = np.maximum((rows[:, 1:3] - rows[:, 3:] / 2) * grid, cells)
    high = np.minimum((rows[:, 1:3] + rows[:, 3:] / 2) * grid, cells + 1)
    return cells_with_a_box(rows[(high - low).prod(axis=1) >= FILLED], grid)


def _cells_of(rows: Doubles, grid: int) -> NDArray[np.int64]:
    """[n, 2] column and row of the cell in which the centre of each box lies."""
    return np.minimum((rows[:, 1:3] * grid).astype(np.int64), grid - 1)
