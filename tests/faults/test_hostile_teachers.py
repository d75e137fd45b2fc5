"""Teachers that answer strangely: real checkpoints whose last layer makes them do it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.support import NAMES, Workshop, tree, write_teacher
from focusdd_det.detset import part_path, read_manifest, read_soft, verify
from focusdd_det.errors import DataError, WeightsError
from focusdd_det.labels import parse_rows


def classes(value: float) -> Callable[[Any], None]:
    """Every anchor gives every class the same score."""

    def change(head: Any) -> None:
        for layers in head.cv3:
            layers[-1].weight.data.zero_()
            layers[-1].bias.data.fill_(value)

    return change


def sides(index: int) -> Callable[[Any], None]:
    """Every box side is `index` strides away from its anchor."""

    def change(head: Any) -> None:
        classes(1.0)(head)
        for layers in head.cv2:
            layers[-1].weight.data.zero_()
            bias = torch.zeros(4, 16)
            bias[:, index] = 60
            layers[-1].bias.data.copy_(bias.flatten())

    return change


def labels(folder: Path) -> list[Any]:
    return [parse_rows(part_path(folder, "labels", i).read_text(), len(NAMES)) for i in read_manifest(folder)]


def test_a_teacher_that_finds_nothing(workshop: Workshop, tmp_path: Path) -> None:
    teacher = str(write_teacher(tmp_path / "nothing.pt", head=classes(-30.0)))
    with pytest.raises(DataError, match="found nothing in any"):
        workshop.build(tmp_path / "set", teacher=teacher)
    kept = workshop.build(tmp_path / "kept", teacher=teacher, empty="keep")
    assert [len(rows) for rows in labels(kept)] == [0] * 9
    assert verify(kept) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_teacher_that_returns_nan(workshop: Workshop, tmp_path: Path, value: float) -> None:
    def poison(model: Any) -> None:
        model.model[0].conv.weight.data[0, 0, 0, 0] = value

    teacher = write_teacher(tmp_path / "nan.pt", model=poison)
    with pytest.raises(WeightsError, match="not finite"):
        workshop.build(tmp_path / "set", teacher=str(teacher))
    assert not (tmp_path / "set.incomplete").exists()


def test_a_teacher_whose_boxes_reach_outside(workshop: Workshop, tmp_path: Path) -> None:
    """Sides of up to 480 px around anchors in a picture of 64 px."""
    teacher = write_teacher(tmp_path / "outside.pt", head=sides(15))
    folder = workshop.build(tmp_path / "set", teacher=str(teacher))
    assert verify(folder) == []
    for rows in labels(folder):
        assert len(rows)
        low, high = rows[:, 1:3] - rows[:, 3:] / 2, rows[:, 1:3] + rows[:, 3:] / 2
        assert low.min() >= -1e-9
        assert high.max() <= 1 + 1e-9


def test_a_teacher_whose_boxes_have_no_area(workshop: Workshop, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "zero.pt", head=sides(0))
    with pytest.raises(DataError, match="found nothing in any"):
        workshop.build(tmp_path / "set", teacher=str(teacher), min_side=0.0)


@pytest.mark.parametrize(("limit", "side"), [(300, 192), pytest.param(20_000, 736, marks=pytest.mark.slow)])
def test_a_teacher_with_ten_thousand_boxes(workshop: Workshop, tmp_path: Path, limit: int, side: int) -> None:
    """736 px are 11,109 anchors, all of which fire and none of which is suppressed."""
    teacher = write_teacher(tmp_path / "many.pt", head=sides(1))
    options = {"ipc": 1, "image_size": side, "classes": ["ball"], "iou": 1.0, "max_det": limit, "teacher_batch": 1}
    folder = workshop.build(tmp_path / "set", teacher=str(teacher), **options)
    (rows,) = labels(folder)
    assert len(rows) == 300 if limit == 300 else len(rows) > 10_000
    (item,) = read_manifest(folder)
    assert len(read_soft(part_path(folder, "soft", item))["scores"]) == len(rows) == item.boxes
    assert verify(folder) == []


def test_a_teacher_with_its_classes_in_another_order(workshop: Workshop, tmp_path: Path) -> None:
    """The same network with its channels permuted gives the same labels and soft targets."""
    order = [2, 0, 1]

    def permute(head: Any) -> None:
        for layers in head.cv3:
            layers[-1].weight.data = layers[-1].weight.data[order]
            layers[-1].bias.data = layers[-1].bias.data[order]

    names = [NAMES[i] for i in order]
    plain = workshop.build(tmp_path / "plain", teacher=str(write_teacher(tmp_path / "a.pt")))
    other = workshop.build(tmp_path / "other", teacher=str(write_teacher(tmp_path / "b.pt", names, head=permute)))
    parts = [{k: v for k, v in tree(f).items() if k.startswith(("labels/", "soft/"))} for f in (plain, other)]
    assert parts[0] == parts[1]
    assert len(parts[0]) == 2 * 9 + 2


def test_a_teacher_with_79_names(workshop: Workshop, tmp_path: Path) -> None:
    """Of the 80 classes of COCO one is missing: refused with both lists; and one name too few for its channels."""
    from focusdd_det.classmap import find_map, read_class_map
    from focusdd_det.teacher import load_detector

    coco = read_class_map(find_map("coco_imagenet.yaml"), ("exact",)).names
    teacher = write_teacher(tmp_path / "few.pt", coco[:79])
    with pytest.raises(WeightsError, match=r"does not know 1 of the 80 classes: toothbrush") as caught:
        load_detector(str(teacher), names=coco)
    assert "it knows: person, bicycle" in str(caught.value)

    def forget(model: Any) -> None:
        model.names = dict(enumerate(coco[:79]))

    with pytest.raises(WeightsError, match="80 class channels but 79 class names"):
        load_detector(str(write_teacher(tmp_path / "lost.pt", coco, model=forget)), names=coco)
