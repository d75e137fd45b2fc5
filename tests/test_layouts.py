"""Grids of composites."""

from __future__ import annotations

from typing import get_type_hints

import pytest

from focusdd_det.build import load_config
from focusdd_det.commandline import parse_tokens
from focusdd_det.config import BuildConfig
from focusdd_det.layouts import Layout, Layouts, cell_sizes, edges, squares


@pytest.mark.parametrize(("grid", "n_key"), [(1, 1), (2, 3), (3, 7), (4, 12)])  # three quarters, rounded
def test_the_share_of_key_patches_stays(grid: int, n_key: int) -> None:
    assert Layouts(Layout(2, 3), (grid,)).of("dog", 0) == Layout(grid, n_key)


def test_every_composite_draws_a_grid_by_its_number_alone() -> None:
    layouts = Layouts(Layout(2, 3), (2, 3, 3), seed=1)
    drawn = [layouts.of("dog", i).grid for i in range(3000)]
    assert 900 < drawn.count(2) < 1100
    assert drawn.count(3) == 3000 - drawn.count(2)
    assert [layouts.of("cat", i).grid for i in range(50)] != drawn[:50]
    assert [Layouts(Layout(2, 3), (2, 3, 3), seed=2).of("dog", i).grid for i in range(50)] != drawn[:50]


@pytest.mark.parametrize("grids", [(), (1, 2, 3)])
def test_sources_are_counted_composite_by_composite(grids: tuple[int, ...]) -> None:
    layouts = Layouts(Layout(2, 3), grids)
    cells = [layouts.of("dog", i).cells for i in range(20)]
    keys = [layouts.of("dog", i).n_key for i in range(20)]
    for count in range(20):
        assert layouts.sources("dog", count) == sum(cells[:count])
        assert layouts.keys("dog", count) == sum(keys[:count])
        assert layouts.possible("dog", sum(cells[:count]), 20) == count
        assert layouts.possible("dog", sum(cells[: count + 1]) - 1, 20) == count
    assert layouts.possible("dog", 10**6, 20) == 20


def test_cells_fill_the_composite_to_the_pixel() -> None:
    assert edges(640, 3) == [0, 213, 427, 640]
    assert cell_sizes(640, 2) == [(320, 320)] * 4
    assert cell_sizes(10, 3) == [(3, 3), (4, 3), (3, 3), (3, 4), (4, 4), (3, 4), (3, 3), (4, 3), (3, 3)]
    assert squares(640, 2) == [(0, 0, 320), (320, 0, 320), (0, 320, 320), (320, 320, 320)]


def test_a_layout_holds_as_many_key_patches_as_cells_at_most() -> None:
    with pytest.raises(ValueError, match="n_key"):
        Layout(2, 5)


@pytest.mark.parametrize("words", [["--grids", "2,4"], ["grids=[2, 4]"], ["--grids", "2", "--grids", "4"]])
def test_grids_are_given_as_a_list(words: list[str]) -> None:
    assert load_config(**parse_tokens(words, get_type_hints(BuildConfig), {})).grids == (2, 4)
