"""Grids that bring box sizes near to a reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from focusdd_det.cli import main
from focusdd_det.detset import read_manifest
from focusdd_det.errors import ConfigError
from focusdd_det.stats.reference import measure, read_boxes
from focusdd_det.stats.size_match import quantiles, sizes_in_cells, suggestions


def test_quantiles_weigh_boxes() -> None:
    sizes = np.array([0.5, 0.25])
    assert np.unique(quantiles(sizes, np.ones(2)), return_counts=True)[1].tolist() == [100, 100]
    assert (quantiles(sizes, np.array([3.0, 1.0])) == -1).mean() == 0.75


@pytest.mark.parametrize("grids", [(1,), (2,), (3,), (2, 4), (1, 3, 3)])
def test_the_mixture_that_made_the_reference_is_found(grids: tuple[int, ...]) -> None:
    in_cell = np.random.default_rng(0).uniform(0.3, 1.0, 500)
    reference = np.concatenate([np.repeat(in_cell / n, n * n) for n in grids])
    best = suggestions(in_cell, reference)[0]
    assert best.grids == grids
    assert best.distance == pytest.approx(0, abs=0.01)
    assert best.sources == pytest.approx(np.mean([n * n for n in grids]))


def test_boxes_of_half_the_size_are_one_octave_away() -> None:
    in_cell = np.full(10, 0.5)
    by_grids = {s.grids: s.distance for s in suggestions(in_cell, np.full(7, 0.5), (1, 2))}
    assert by_grids[(1,)] == pytest.approx(0)
    assert by_grids[(2,)] == pytest.approx(1)


def test_sizes_of_a_set_and_of_a_reference(drawn_set: Path, tmp_path: Path) -> None:
    whole, cell = sizes_in_cells(drawn_set)
    assert len(whole) == sum(i.boxes for i in read_manifest(drawn_set))
    np.testing.assert_allclose(cell, whole)  # pictures of one cell
    pictures = [{"id": 1, "width": 100, "height": 50, "file_name": "a.jpg"}]
    boxes = [{"id": i, "image_id": 1, "category_id": 1, "bbox": [0, 0, w, h], "area": w * h, "iscrowd": crowd}
             for i, (w, h, crowd) in enumerate([(10, 10, 0), (40, 10, 0), (50, 50, 1)], 1)]  # fmt: skip
    content = {"images": pictures, "annotations": boxes, "categories": [{"id": 1, "name": "disc"}]}
    (tmp_path / "r.json").write_text(json.dumps(content))
    np.testing.assert_allclose(read_boxes(tmp_path / "r.json").sizes, [0.1, 0.2])
    assert measure(tmp_path / "r.json").boxes == 2


def test_the_command_names_the_nearest_first(
    drawn_set: Path, drawn_coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = next(drawn_coco.parent.rglob("*.json"))
    assert main(["grids", str(drawn_set), f"reference={reference}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "grids=" in line]
    distances = [float(line.split(" octaves")[0].split()[-1]) for line in lines]
    assert len(lines) == 5
    assert distances == sorted(distances)


@pytest.mark.parametrize("words", [[], ["set"], ["reference=a.json"], ["set", "refrence=a.json"]])
def test_wrong_words_are_a_usage_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grids", *words]) == ConfigError.exit_code
    assert "grids: " in capsys.readouterr().err
