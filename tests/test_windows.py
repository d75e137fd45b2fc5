"""Windows and pixel squares against hand-worked cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from focusdd_det.compose import middle_square
from focusdd_det.types import Crop, View
from focusdd_det.windows import best_windows, key_crop, realism, view_of, window_side


@pytest.mark.parametrize(
    ("grid", "ratio", "side"),
    [(7, 0.8, 5), (14, 0.8, 11), (10, 0.8, 8), (7, 1.0, 7), (5, 0.6, 3), (4, 0.1, 1)],  # 0.6 * 5 is 2.9999... in floats
)
def test_window_side_is_the_floor_of_the_share(grid: int, ratio: float, side: int) -> None:
    assert window_side(grid, ratio) == side


def test_the_window_with_the_most_attention_by_hand() -> None:
    attention = torch.tensor([[[1.0, 0, 0], [0, 3, 2], [0, 1, 1]]])  # sums of 2x2: 4 5 / 4 7, of 8 in all
    share, corner = best_windows(attention, 2)
    assert share.tolist() == [0.875]
    assert corner.tolist() == [[1, 1]]


def test_a_flat_map_gives_the_share_of_its_area_and_the_first_window() -> None:
    share, corner = best_windows(torch.full((1, 7, 7), 0.3), 5)
    assert share.item() == pytest.approx(25 / 49, abs=5e-5)
    assert corner.tolist() == [[0, 0]]


def test_ties_go_to_the_first_in_row_order_whatever_the_scale() -> None:
    one = torch.zeros(7, 7)
    one[1, 5] = one[5, 1] = 1.0
    for scale in (1.0, 1e-3, 7e4):
        _, corner = best_windows((one * scale)[None], 2)
        assert corner.tolist() == [[0, 4]]


def test_windows_agree_with_a_plain_loop() -> None:
    attention = torch.rand(20, 9, 9, generator=torch.Generator().manual_seed(0))
    share, corner = best_windows(attention, 4)
    for b in range(20):
        sums = {(r, c): attention[b, r : r + 4, c : c + 4].double().sum() for r in range(6) for c in range(6)}
        best = max(sums, key=lambda at: float(sums[at]))
        assert tuple(corner[b].tolist()) == best
        assert share[b].item() == pytest.approx(float(sums[best] / attention[b].double().sum()), abs=6e-5)


@pytest.mark.parametrize(("shape", "k"), [((2, 3, 4), 2), ((3, 3), 2), ((1, 3, 3), 4), ((1, 3, 3), 0)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...], k: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        best_windows(torch.ones(shape), k)


def test_realism_is_confidence_plus_weighted_share() -> None:
    p, share = np.array([0.5, 0.2]), np.array([0.6, 0.9])
    assert realism(p, share, 0.0).tolist() == [5000, 2000]  # alpha 0 ranks by confidence alone
    # 0.0865 is 1 - 0.99^9 = 0.0864828; 0.5 + 30 * 0.0864828 * 0.6 = 2.05669
    assert realism(p, share, 30.0).tolist() == [20567, 25350]


@pytest.mark.parametrize(
    ("view", "corner", "k", "grid", "expected"),
    [
        # 700 x 700, cell 100 px: window at row 1, column 2 of 5 tokens: centre (450, 350), side 500, no shift
        (view_of(700, 700, "squash"), (1, 2), 5, 7, Crop(200, 100, 500)),
        # squashed 1400 x 700: centre x = (0 + 2.5)/7 * 1400 = 500, y = 250; side 5/7 * 700 = 500
        (view_of(1400, 700, "squash"), (0, 0), 5, 7, Crop(250, 0, 500)),
        # the same at the right border: centre x = 4.5/7 * 1400 = 900
        (view_of(1400, 700, "squash"), (2, 2), 5, 7, Crop(650, 200, 500)),
        # middle square of 1000 x 700: offset 150, centre x = 2.5/7 * 700 + 150 = 400
        (view_of(1000, 700, "crop"), (0, 0), 5, 7, Crop(150, 0, 500)),
        # odd sizes: 101 x 57, side round(5/7 * 57) = 41; centre (2.5/7 * 101, 4.5/7 * 57) = (36.07, 36.64)
        (view_of(101, 57, "squash"), (2, 0), 5, 7, Crop(16, 16, 41)),
        # a picture of one pixel
        (view_of(1, 1, "squash"), (2, 2), 5, 7, Crop(0, 0, 1)),
        # the whole grid is the short-side square, in the middle
        (view_of(9, 5, "squash"), (0, 0), 7, 7, Crop(2, 0, 5)),
    ],
)
def test_key_patch_in_pixels(view: View, corner: tuple[int, int], k: int, grid: int, expected: Crop) -> None:
    assert key_crop(view, corner, k, grid) == expected


def test_other_crops() -> None:
    view = view_of(1400, 700, "squash")  # the mapped window is 1000 x 500 px
    assert key_crop(view, (0, 0), 5, 7, "cover") == Crop(150, 0, 700)
    assert key_crop(view, (0, 0), 5, 7, "fixed", 320) == Crop(340, 90, 320)
    assert key_crop(view_of(200, 100, "squash"), (0, 0), 5, 7, "fixed", 320).side == 100
    with pytest.raises(ValueError, match="window, cover or fixed"):
        key_crop(view, (0, 0), 5, 7, "square")


def test_a_background_is_the_middle_square() -> None:
    assert middle_square(1001, 700) == Crop(150, 0, 700)
    assert middle_square(3, 8) == Crop(0, 2, 3)
