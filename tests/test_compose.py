"""Cells and composites."""

from __future__ import annotations

import numpy as np
import pytest

from focusdd_det.compose import assemble, cell_order, cut, encode_jpeg, letterbox, resize
from focusdd_det.types import Crop


def flat(colour: int, side: int = 4) -> np.ndarray:
    return np.full((side, side, 3), colour, np.uint8)


def test_cells_lie_in_row_order() -> None:
    whole = assemble([flat(10), flat(20), flat(30), flat(40)], 2)
    assert whole.shape == (8, 8, 3)
    assert [whole[y, x, 0] for y, x in ((0, 0), (0, 7), (7, 0), (7, 7))] == [10, 20, 30, 40]
    with pytest.raises(ValueError, match="expected 4 cells"):
        assemble([flat(1)] * 3, 2)
    with pytest.raises(ValueError, match="make a square"):
        assemble([flat(1)] * 3 + [flat(1, 5)], 2)


def test_the_order_of_cells_is_a_permutation_that_depends_on_the_seed() -> None:
    orders = {tuple(cell_order(seed, 4)) for seed in range(200)}
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(orders) == 24


def test_a_cell_shows_its_crop_and_nothing_else() -> None:
    picture = np.zeros((10, 20, 3), np.uint8)
    picture[2:8, 5:11] = 200
    assert (cut(picture, Crop(5, 2, 6), 12, 12) == 200).all()
    assert (cut(picture, Crop(5, 2, 6), 3, 4) == 200).all()
    with pytest.raises(ValueError, match="outside"):
        cut(picture, Crop(15, 2, 6), 12, 12)


def test_shrinking_averages() -> None:
    board = np.indices((8, 8)).sum(0) % 2 * 255
    picture = np.repeat(board[:, :, None], 3, 2).astype(np.uint8)
    assert set(np.unique(resize(picture, 4, 4))) <= {127, 128}


def test_letterbox_keeps_the_shape() -> None:
    cell, scale, left, top = letterbox(np.full((50, 100, 3), 255, np.uint8), 40)
    assert (scale, left, top) == (0.4, 0, 10)
    assert (cell[10:30] == 255).all()
    assert (cell[:10] == 114).all()
    assert (cell[30:] == 114).all()


def test_encoding_is_repeatable() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert encode_jpeg(picture, 95) == encode_jpeg(picture.copy(), 95)
