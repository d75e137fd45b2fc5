"""Attention map -> region score and window -> square of the original picture. Pure arithmetic, no models, no files."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from focusdd_det.types import Crop, View, round_half_up

GCA_MASS = 1.0 - 0.99**9  # 0.0865: the sum of LF-ViT's unnormalised attention over its 9 blocks


def window_side(grid: int, side_ratio: float) -> int:
    """Side k of the key window in token columns: floor(side_ratio * g), at least 1. 5 at g = 7, 11 at g = 14."""
    return max(1, math.floor(side_ratio * grid + 1e-9))


def best_windows(attention: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k x k window with the most attention, and its share of all attention (region score, DESIGN section 3).

    Args:
        attention: [B, g, g] float, at least 0 everywhere.
        k: side of the window, 1 to g.

    Returns:
        share [B] float32 in [0, 1], rounded to 1e-4; and corner [B, 2] int64, (row, column) of the window's top left
        token. Ties, to 1e-6 of the whole, go to the first in row order.
    """
    if attention.ndim != 3 or attention.shape[1] != attention.shape[2]:
        raise ValueError(f"expected attention [B, g, g], got {tuple(attention.shape)}")
    grid = attention.shape[1]
    if not 1 <= k <= grid:
        raise ValueError(f"expected a window side of 1 to {grid}, got {k}")
    attention = attention.double()
    total = attention.sum(dim=(1, 2)).clamp_min(1e-12)
    integral = torch.nn.functional.pad(attention, (1, 0, 1, 0)).cumsum(1).cumsum(2)
    sums = integral[:, k:, k:] - integral[:, :-k, k:] - integral[:, k:, :-k] + integral[:, :-k, :-k]
    shares = (sums / total[:, None, None]).flatten(1)
    # Summation order leaves equal windows a few 1e-17 apart; a tie must not depend on it.
    shares = torch.round(shares * 1e6) / 1e6
    best = shares.max(dim=1).values
    first = (shares == best[:, None]).int().argmax(dim=1)
    columns = grid - k + 1
    corner = torch.stack([first // columns, first % columns], dim=1)
    return (torch.round(best * 1e4) / 1e4).float().clamp(0, 1), corner


def least_windows(attention: Tensor, k: int) -> Tensor:
    """The k x k window with the least attention: corner [B, 2] int64, ties as in `best_windows`."""
    most = attention.flatten(1).amax(dim=1)[:, None, None]
    return best_windows(most - attention, k)[1]


def realism(p: np.ndarray, share: np.ndarray, alpha: float) -> np.ndarray:
    """S = p + alpha * 0.0865 * share (Eq. 5), as whole multiples of 1e-4 (int64), so that ties are ties everywhere."""
    return np.floor((p.astype(np.float64) + alpha * GCA_MASS * share.astype(np.float64)) * 1e4 + 0.5).astype(np.int64)


def view_of(width: int, height: int, geometry: str) -> View:
    """Where the ViT's square lies in a picture: all of it (squash) or its middle short-side square (crop)."""
    if geometry == "squash":
        return View(width, height, 0.0, 0.0, float(width), float(height))
    if geometry == "crop":
        side = float(min(width, height))
        return View(width, height, (width - side) / 2, (height - side) / 2, side, side)
    raise ValueError(f"geometry: expected squash or crop, got {geometry}")


def key_crop(view: View, corner: tuple[int, int], k: int, grid: int, mode: str = "window", fixed: int = 0) -> Crop:
    """The square of the original that a key window stands for (Eq. 6, 7).

    Centre: x = (column + k/2) / g * extent_x + offset_x, and y alike. Side: `window` round(k/g * min(W, H)); `cover`
    the smallest square that holds the mapped window, at most min(W, H); `fixed` min(fixed, W, H). Shifted inside at a
    border.

    Args:
        view: the ViT's square in the original.
        corner: (row, column) of the window's top left token.
        k: side of the window in tokens.
        grid: side of the token grid, g.
        mode: window, cover or fixed.
        fixed: side in px for `fixed`: the cell's side.
    """
    short = min(view.width, view.height)
    if mode == "window":
        side = round_half_up(k / grid * short)
    elif mode == "cover":
        side = min(math.ceil(k / grid * max(view.extent_x, view.extent_y) - 1e-9), short)
    elif mode == "fixed":
        side = min(fixed, short)
    else:
        raise ValueError(f"crop: expected window, cover or fixed, got {mode}")
    side = max(1, min(side, short))
    row, column = corner
    x = (column + k / 2) / grid * view.extent_x + view.offset_x
    y = (row + k / 2) / grid * view.extent_y + view.offset_y
    return square_at(x, y, side, view.width, view.height)


def square_at(x: float, y: float, side: int, width: int, height: int) -> Crop:
    """A square of `side` px around (x, y), shifted to lie inside a picture of width x height."""
    left = min(max(round_half_up(x - side / 2), 0), width - side)
    top = min(max(round_half_up(y - side / 2), 0), height - side)
    return Crop(left, top, side)
