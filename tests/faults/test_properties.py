"""Properties of the arithmetic and of the formats, on inputs that nobody would write down."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focusdd_det.build import load_config
from focusdd_det.commandline import parse_tokens
from focusdd_det.compose import middle_square
from focusdd_det.config import BuildConfig, as_plain, parse_yaml
from focusdd_det.detset import PARTS, Cell, Item
from focusdd_det.errors import ConfigError, FocusDDError
from focusdd_det.labels import carry, drop_repeats, drop_slivers, join, parse_rows, rows
from focusdd_det.types import Crop, Detections
from focusdd_det.windows import best_windows, key_crop, square_at, view_of, window_side

several = settings(max_examples=60, deadline=None, derandomize=True)
SIZE = 640


@st.composite
def detections(draw: st.DrawFn, size: float = SIZE, classes: int = 5) -> Detections:
    n = draw(st.integers(0, 6))
    number = st.floats(0, size, width=32, allow_nan=False)
    corners = [sorted((draw(number), draw(number))) + sorted((draw(number), draw(number))) for _ in range(n)]
    boxes = np.array([[x1, y1, x2, y2] for x1, x2, y1, y2 in corners], np.float32).reshape(n, 4)
    index = np.array([draw(st.integers(0, classes - 1)) for _ in range(n)], np.int64)
    conf = np.full(n, 0.5, np.float32)
    return Detections(boxes, index, conf, np.full((n, classes), 0.5, np.float32))


@several
@given(detections(), st.integers(32, 2000))
def test_label_rows_come_back_as_the_boxes_they_were(found: Detections, size: int) -> None:
    found = replace(found, boxes=found.boxes * np.float32(size / SIZE))
    kept = drop_repeats(drop_slivers(found, 0.0), size)
    table = parse_rows(rows(kept, size), 5)
    assert len(table) == len(kept)
    np.testing.assert_array_equal(table[:, 0], kept.classes)
    low, high = table[:, 1:3] - table[:, 3:] / 2, table[:, 1:3] + table[:, 3:] / 2
    np.testing.assert_allclose(np.concatenate([low, high], axis=1) * size, kept.boxes, atol=size * 1.01e-6 + 1e-3)
    assert (low >= -1e-12).all()
    assert (high <= 1 + 1e-12).all()


@several
@given(detections(), st.floats(0, 50, width=32))
def test_no_sliver_is_left(found: Detections, least: float) -> None:
    kept = drop_slivers(found, least)
    wide_enough = [min(box[2] - box[0], box[3] - box[1]) >= np.float32(max(least, 0.01)) for box in found.boxes]
    np.testing.assert_array_equal(kept.boxes, found.boxes[np.array(wide_enough, bool)])


@several
@given(detections(), st.integers(0, 500), st.integers(0, 500), st.integers(1, 600), st.integers(0, 3), st.floats(0, 1))
def test_carried_boxes_stay_in_their_cell_and_map_back(
    found: Detections, x: int, y: int, side: int, position: int, visible: float
) -> None:
    crop, cell = Crop(x, y, side), (position % 2 * 320.0, position // 2 * 320.0, 320.0)
    moved = carry(found, crop, cell, visible)
    left, top, cell_side = cell
    assert (moved.boxes[:, [0, 2]] >= left - 1e-3).all()
    assert (moved.boxes[:, [1, 3]] >= top - 1e-3).all()
    assert (moved.boxes[:, [0, 2]] <= left + cell_side + 1e-3).all()
    assert (moved.boxes[:, [1, 3]] <= top + cell_side + 1e-3).all()
    assert len(join([moved, Detections.none(5)], 5)) == len(moved) <= len(found)
    back = (moved.boxes - np.array([left, top, left, top])) * (side / cell_side) + np.array([x, y, x, y])
    for box in back:
        distance = np.abs(np.clip(found.boxes, [x, y, x, y], [x + side, y + side] * 2) - box).max(axis=1)
        assert distance.min() < 1e-2


@several
@given(
    st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 24), st.data(),
    st.sampled_from(["window", "cover", "fixed"]), st.sampled_from(["squash", "crop"]), st.integers(1, 900),
)  # fmt: skip
def test_a_key_crop_lies_in_its_picture(
    width: int, height: int, grid: int, data: st.DataObject, mode: str, geometry: str, fixed: int
) -> None:
    k = data.draw(st.integers(1, grid))
    corner = (data.draw(st.integers(0, grid - k)), data.draw(st.integers(0, grid - k)))
    crop = key_crop(view_of(width, height, geometry), corner, k, grid, mode, fixed)
    assert 1 <= crop.side <= min(width, height)
    assert 0 <= crop.x <= width - crop.side
    assert 0 <= crop.y <= height - crop.side
    middle = middle_square(width, height)
    assert middle.side == min(width, height)
    assert square_at(width / 2, height / 2, middle.side, width, height).side == middle.side


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.data())
def test_best_windows_are_those_of_brute_force(grid: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, grid))
    flat = data.draw(st.lists(st.integers(0, 20), min_size=grid * grid, max_size=grid * grid))
    table = np.array(flat, np.float64).reshape(grid, grid)
    share, corner = best_windows(torch.from_numpy(table)[None].float(), k)
    places = [(r, c) for r in range(grid - k + 1) for c in range(grid - k + 1)]
    sums = [table[r : r + k, c : c + k].sum() for r, c in places]
    assert tuple(corner[0].tolist()) == places[int(np.argmax(sums))]
    assert share[0] == pytest.approx(max(sums) / max(table.sum(), 1e-12), abs=1e-4)


@given(st.integers(1, 64), st.floats(0.001, 1))
def test_a_window_is_no_larger_than_its_grid(grid: int, ratio: float) -> None:
    assert 1 <= window_side(grid, ratio) <= grid


text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
digest = st.text("0123456789abcdef", min_size=64, max_size=64)
share = st.floats(0, 1)
whole = st.integers(0, 1 << 40)
crops = st.none() | st.tuples(whole, whole, st.integers(1, 9999))
paths = text.filter(lambda p: not p.startswith("/") and ".." not in p.split("/"))
cells = st.builds(
    Cell, st.sampled_from(["key", "background"]), text, paths, text, digest, st.integers(1, 9999), st.integers(1, 9999),
    crops, share, share, st.booleans(),
)  # fmt: skip
grids = st.sampled_from([0, 1, 4, 9]).flatmap(lambda n: st.lists(cells, min_size=n, max_size=n)).map(tuple)
items = st.builds(
    Item, st.from_regex(r"[a-z0-9_]{1,40}", fullmatch=True), text, whole, text, whole, whole,
    st.integers(0, (1 << 64) - 1), grids, whole,
    st.fixed_dictionaries(dict.fromkeys(PARTS, digest)),
)  # fmt: skip


@several
@given(items)
def test_manifest_lines_come_back(item: Item) -> None:
    line = item.line()
    assert line.isascii()
    assert line.count("\n") == 1
    assert Item.parse(line) == item
    assert Item.parse(line).line() == line


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = list(as_plain(load_config(out="x")))


@several
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=12), plain, max_size=6))
def test_any_configuration_is_taken_or_refused_with_our_error(overrides: dict[str, object]) -> None:
    try:
        config = load_config(**overrides)  # type: ignore[arg-type]
    except TypeError:
        assert "file" in overrides  # an argument of load_config itself
        return
    except ConfigError:
        return
    assert load_config(**as_plain(config)) == config
    assert isinstance(config, BuildConfig)


@several
@given(st.lists(st.text(max_size=15) | st.sampled_from(KEYS).map("--{}".format), max_size=6))
def test_any_command_line_is_read_or_refused_with_our_error(argv: list[str]) -> None:
    try:
        parse_tokens(argv, BuildConfig.__annotations__, {})
    except FocusDDError as error:
        assert str(error)


@several
@given(plain)
def test_yaml_reads_json_as_json(value: object) -> None:
    written = json.dumps(value)
    try:
        read = parse_yaml(written)
    except ValueError:
        assert "\\u" in written or "\\b" in written or "\\f" in written  # surrogates, which YAML has not
        return
    assert json.dumps(read, default=str)
    if isinstance(value, (bool, int)) or value is None:
        assert read == value or math.isnan(float(value or 0))
