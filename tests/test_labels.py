"""Label rows and the rules by which boxes are dropped."""

from __future__ import annotations

import numpy as np
import pytest

from focusdd_det.labels import (
    carry,
    confirms,
    drop_repeats,
    drop_slivers,
    join,
    own_class_first,
    parse_rows,
    rows,
    settle_contradictions,
)
from focusdd_det.types import Crop, Detections


def found(*boxes: tuple[float, float, float, float], classes: list[int] | None = None) -> Detections:
    n = len(boxes)
    index = np.array(classes or [0] * n, np.int64)
    scores = np.full((n, 3), 0.1, np.float32)
    scores[np.arange(n), index] = 0.9
    return Detections(np.array(boxes, np.float32).reshape(n, 4), index, np.full(n, 0.9, np.float32), scores)


def test_rows_are_centre_and_size_relative_to_the_picture() -> None:
    text = rows(found((0, 0, 320, 640), (160, 160, 480, 320), classes=[2, 0]), 640)
    assert text == "2 0.250000 0.500000 0.500000 1.000000\n0 0.500000 0.375000 0.500000 0.250000\n"


def test_rows_never_reach_outside_and_come_back_as_they_were() -> None:
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 640, (200, 2, 2)), axis=1)
    boxes = [(float(c[0, 0]), float(c[0, 1]), float(c[1, 0]), float(c[1, 1])) for c in corners]
    table = parse_rows(rows(found(*boxes), 640), 3)
    low, high = table[:, 1:3] - table[:, 3:] / 2, table[:, 1:3] + table[:, 3:] / 2
    assert low.min() >= -1e-9
    assert high.max() <= 1 + 1e-9
    np.testing.assert_allclose(np.concatenate([low, high], 1) * 640, np.array(boxes), atol=1e-3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.1", "4 columns"),
        ("0 0.5 0.5 0.1 0.1 0.9", "6 columns"),  # a confidence: Ultralytics would drop the whole image
        ("3 0.5 0.5 0.1 0.1", "not one of 0..2"),
        ("-1 0.5 0.5 0.1 0.1", "not one of 0..2"),
        ("0.5 0.5 0.5 0.1 0.1", "not one of 0..2"),
        ("0 nan 0.5 0.1 0.1", "expected class"),
        ("0 1.5 0.5 0.1 0.1", "inside"),
        ("0 0.5 0.5 0 0.1", "larger than 0"),
        ("cat 0.5 0.5 0.1 0.1", "not numbers"),
    ],
)
def test_wrong_rows_are_named(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_rows("0 0.5 0.5 0.1 0.1\n" + line + "\n", 3)
    assert "line 2" in str(caught.value)


def test_slivers_are_dropped() -> None:
    kept = drop_slivers(found((0, 0, 3.9, 100), (0, 0, 4, 100), (5, 5, 5, 5)), 4.0)
    assert kept.boxes.tolist() == [[0, 0, 4, 100]]
    assert len(drop_slivers(found((5, 5, 5, 9)), 0.0)) == 0


def test_boxes_of_a_source_move_into_its_cell() -> None:
    # The crop shows x 100..300, y 50..250 in the right upper cell (320..640, 0..320): scale 1.6.
    moved = carry(found((150, 100, 200, 150), (50, 50, 150, 100)), Crop(100, 50, 200), (320, 0, 320), 0.5)
    np.testing.assert_allclose(moved.boxes, [[400, 80, 480, 160], [320, 0, 400, 80]], atol=1e-4)


def test_boxes_that_hardly_show_are_dropped() -> None:
    crop = Crop(100, 0, 100)
    assert len(carry(found((0, 0, 120, 50)), crop, (0, 0, 100), 0.25)) == 0  # 20 of 120 px
    assert len(carry(found((0, 0, 140, 50)), crop, (0, 0, 100), 0.25)) == 1
    assert len(carry(found((0, 0, 90, 50)), crop, (0, 0, 100), 0.0)) == 0  # outside


def test_a_cell_is_confirmed_by_a_box_of_its_class_centred_in_it() -> None:
    boxes = found((0, 0, 100, 100), (330, 10, 400, 100), classes=[1, 2])
    assert confirms(boxes, 1, (0, 0, 320))
    assert not confirms(boxes, 2, (0, 0, 320))
    assert confirms(boxes, 2, (320, 0, 320))
    assert not confirms(Detections.none(3), 0, (0, 0, 320))


def test_joining_nothing_gives_nothing() -> None:
    assert len(join([Detections.none(3), Detections.none(3)], 3)) == 0
    assert len(join([found((0, 0, 1, 1)), Detections.none(3), found((1, 1, 2, 2))], 3)) == 2


def test_boxes_that_became_equal_are_written_once() -> None:
    kept = drop_repeats(
        found((0, 0, 10, 10), (0, 0, 10.00001, 10), (0, 0, 10, 10), (0, 0, 10, 11), classes=[0, 0, 1, 0]), 64
    )
    assert kept.classes.tolist() == [0, 1, 0]
    assert len(set(rows(kept, 64).splitlines())) == 3


def test_the_own_class_may_have_a_lower_threshold() -> None:
    boxes = found((0, 0, 9, 9), (9, 9, 20, 20), (0, 9, 9, 20), classes=[1, 0, 1])
    boxes = Detections(boxes.boxes, boxes.classes, np.array([0.15, 0.15, 0.05], np.float32), boxes.scores)
    assert own_class_first(boxes, 1, 0.25, 0.1).boxes.tolist() == [[0, 0, 9, 9]]
    assert len(own_class_first(boxes, 1, 0.25, 0.25)) == 0


LEFT, RIGHT = (0.0, 0.0, 100.0), (100.0, 0.0, 100.0)


def contradicting(box: tuple[float, float, float, float], conf: float, own: float) -> Detections:
    """A box of class 2 with this confidence; class 1, that of the sources, has the score `own` there."""
    scores = np.array([[0.0, own, conf]], np.float32)
    return Detections(np.array([box], np.float32), np.array([2]), np.array([conf], np.float32), scores)


@pytest.mark.parametrize(
    ("box", "conf", "own", "dropped", "corrected"),
    [
        ((5, 5, 95, 95), 0.5, 0.1, [], [1]),  # doubtful, and the known class is plausible there
        ((5, 5, 95, 95), 0.5, 0.04, [], []),  # doubtful, and it is not: nothing to learn
        ((5, 5, 95, 95), 0.8, 0.5, [2], [2]),  # a sure box of another class: a person with a ball
        ((5, 5, 60, 60), 0.5, 0.1, [2], [2]),  # does not fill the cell
        ((5, 5, 295, 95), 0.5, 0.1, [2], [2]),  # centred elsewhere
    ],
)
def test_boxes_that_contradict_the_known_class(
    box: tuple[float, float, float, float], conf: float, own: float, dropped: list[int], corrected: list[int]
) -> None:
    boxes = contradicting(box, conf, own)
    cells = [LEFT]
    assert settle_contradictions(boxes, 1, cells, correct=False).classes.tolist() == dropped
    settled = settle_contradictions(boxes, 1, cells, correct=True)
    assert settled.classes.tolist() == corrected
    if corrected == [1]:
        assert settled.conf.tolist() == pytest.approx([own])
        assert settled.boxes.tolist() == boxes.boxes.tolist()


def test_nothing_contradicts_where_the_known_class_is_found() -> None:
    both = join([contradicting((105, 5, 195, 95), 0.5, 0.1), found((110, 10, 120, 20), classes=[1])], 3)
    assert settle_contradictions(both, 1, [LEFT, RIGHT], correct=False).classes.tolist() == [2, 1]
    alone = join([contradicting((105, 5, 195, 95), 0.5, 0.1), found((10, 10, 20, 20), classes=[1])], 3)
    assert settle_contradictions(alone, 1, [LEFT, RIGHT], correct=False).classes.tolist() == [1]
    assert len(settle_contradictions(Detections.none(3), 1, [LEFT], correct=True)) == 0
