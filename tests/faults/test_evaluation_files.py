"""Annotations, pictures, checkpoints and detections that are not what they should be: a number, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_detector, write_coco

from focusdd_det import coco_eval
from focusdd_det.cli import run_main
from focusdd_det.errors import DataError, WeightsError
from focusdd_det.training.command import val_coco


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "coco").parent


def annotations(scene: Path) -> Path:
    return scene / "annotations" / "instances_val.json"


def evaluate(scene: Path, weights: Path, **more: Any) -> coco_eval.CocoResult:
    return coco_eval.evaluate(weights, annotations(scene), scene / "images" / "val", imgsz=64, **more)


# ---- annotations ----

FILES: dict[str, Callable[[bytes], bytes]] = {
    "missing": lambda whole: b"",
    "empty": lambda whole: b"",
    "cut short": lambda whole: whole[:-40],
    "a web page": lambda whole: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "not text": lambda whole: b"\xff\xfe" + bytes(200),
    "brackets without end": lambda whole: b"[" * 200_000,
    "a list": lambda whole: b"[]",
    "other keys": lambda whole: b'{"info": {}}',
}


@pytest.mark.parametrize("name", FILES)
def test_an_annotations_file_that_is_none(
    name: str, scene: Path, teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3, the file is named, and no number is printed or written in its place."""
    file = annotations(scene)
    file.write_bytes(FILES[name](file.read_bytes()))
    if name == "missing":
        file.unlink()
    out = tmp_path / "result.json"
    given = [f"model={teacher_file}", f"annotations={file}", f"images={scene / 'images' / 'val'}", f"out={out}"]
    assert run_main(val_coco, given) == 3
    said = capsys.readouterr()
    assert str(file) in said.err
    assert "AP" not in said.out
    assert not out.exists()


Content = dict[str, Any]


def change(part: str, **values: Any) -> Callable[[Content], None]:
    return lambda content: content[part][0].update(values)


def without(part: str, key: str) -> Callable[[Content], None]:
    return lambda content: content[part][0].pop(key)


def again(part: str, **values: Any) -> Callable[[Content], None]:
    return lambda content: content[part].append({**content[part][0], **values})


CONTRADICTIONS: dict[str, tuple[Callable[[Content], None], str]] = {
    "one image id twice": (again("images", file_name="other.jpg"), "two images have the id 1000"),
    "one picture twice": (again("images", id=5), "two images have the file_name 'scene0.jpg'"),
    "one category id twice": (again("categories", name="other"), "two categories have the id 7"),
    "one category name twice": (again("categories", id=5), "two categories have the name 'disc'"),
    "one annotation id twice": (again("annotations"), "two annotations have the id 1"),
    "an object of no listed image": (change("annotations", image_id=77), "image 77, which is not listed"),
    "an image id as text": (change("annotations", image_id="1000"), "image '1000', which is not listed"),
    "image ids all text": (change("images", id="1000"), "whole numbers"),
    "an object of no listed category": (change("annotations", category_id=1), "category 1, which is not listed"),
    "a box of NaN": (change("annotations", bbox=[0, 0, float("nan"), 5]), "has the box"),
    "a box of three numbers": (change("annotations", bbox=[0, 0, 5]), "has the box"),
    "a box of text": (change("annotations", bbox=["a", 0, 5, 5]), "COCO's format"),
    "a negative box": (change("annotations", bbox=[0, 0, -5, 5]), "has the box"),
    "no box": (without("annotations", "bbox"), "COCO's format"),
    "no file name": (without("images", "file_name"), "COCO's format"),
    "no images": (lambda content: content["images"].clear(), "which is not listed"),
    "rows that are no rows": (lambda content: content["annotations"].append(3), "COCO's format"),
    "a part that is no list": (lambda content: content.update(images=5), "COCO's format"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_annotations_that_contradict_themselves(name: str, scene: Path) -> None:
    """pycocotools scores most of these without a word."""
    make, message = CONTRADICTIONS[name]
    content = json.loads(annotations(scene).read_text())
    make(content)
    annotations(scene).write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        coco_eval.load_annotations(annotations(scene))
    assert str(annotations(scene)) in str(caught.value)


def test_annotations_numbered_from_zero_without_area_and_iscrowd(scene: Path) -> None:
    """pycocotools takes an object with the id 0 for one that was never found, and fails without the other two."""
    content = json.loads(annotations(scene).read_text())
    for row in content["annotations"]:
        row["iscrowd"] = 0
    annotations(scene).write_text(json.dumps(content))
    whole = coco_eval.load_annotations(annotations(scene))
    perfect = [
        {**{k: row[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9} for row in whole.anns.values()
    ]
    for number, row in enumerate(content["annotations"]):
        row["id"] = number
        del row["area"], row["iscrowd"]
    annotations(scene).write_text(json.dumps(content))
    bare = coco_eval.load_annotations(annotations(scene))
    numbers = [coco_eval.twelve(coco_eval.score(t, perfect, t.getImgIds())) for t in (whole, bare)]
    assert numbers[0] == numbers[1]
    assert numbers[1]["AP"] == pytest.approx(1.0)


def test_categories_of_other_names(scene: Path, teacher_file: Path) -> None:
    content = json.loads(annotations(scene).read_text())
    content["categories"][1]["name"] = "Square"
    annotations(scene).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"no class for 1 of the 3 categories: Square\.[\s\S]*model: bar, other"):
        evaluate(scene, teacher_file)


# ---- pictures ----


def test_pictures_cut_short_empty_and_of_text(scene: Path, teacher_file: Path) -> None:
    picture = scene / "images" / "val" / "scene2.jpg"
    whole = picture.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"<!DOCTYPE html>"):
        picture.write_bytes(data)
        with pytest.raises(DataError, match=r"scene2\.jpg is"):
            evaluate(scene, teacher_file)
        assert picture.read_bytes() == data


def test_a_subset_says_that_it_is_one(scene: Path, teacher_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("scene1.jpg", "scene4.jpg"):
        (scene / "images" / "val" / name).unlink()
    with pytest.raises(DataError, match="2 of 6 annotated images have no file"):
        evaluate(scene, teacher_file)
    result = evaluate(scene, teacher_file, subset=True)
    assert (result.images, result.images_annotated) == (4, 6)
    assert "4 of 6 annotated images (a SUBSET)" in result.table()


# ---- checkpoints and detections ----


def test_a_model_that_finds_nothing_scores_explicit_zeros(scene: Path, tmp_path: Path) -> None:
    file = save_detector(tmp_path / "silent.pt")
    checkpoint = torch.load(file, weights_only=False)
    for layers in checkpoint["model"].model[-1].cv3:
        layers[-1].weight.data.zero_()
        layers[-1].bias.data.fill_(-60)
    torch.save(checkpoint, file)
    result = evaluate(scene, file)
    assert result.detections == 0
    assert result.all["AP"] == result.all["AR_100"] == 0.0
    assert all(value == 0.0 for value in result.per_class.values())
    assert "0.00" in result.table()


def test_a_model_of_nan_is_refused_not_scored_zero(scene: Path, tmp_path: Path) -> None:
    file = save_detector(tmp_path / "nan.pt")
    checkpoint = torch.load(file, weights_only=False)
    next(checkpoint["model"].parameters()).data.fill_(float("nan"))
    torch.save(checkpoint, file)
    with pytest.raises(WeightsError, match=r"nan\.pt gives values that are not finite"):
        evaluate(scene, file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_detections_that_are_not_finite(scene: Path, value: float) -> None:
    truth = coco_eval.load_annotations(annotations(scene))
    for row in (
        {"image_id": 1000, "category_id": 7, "bbox": [0, 0, value, 5], "score": 0.5},
        {"image_id": 1000, "category_id": 7, "bbox": [0, 0, 5, 5], "score": value},
    ):
        with pytest.raises(DataError, match="not finite"):
            coco_eval.score(truth, [row], truth.getImgIds())


def test_detections_on_wrong_image_ids(scene: Path) -> None:
    truth = coco_eval.load_annotations(annotations(scene))
    row = {"image_id": 1, "category_id": 7, "bbox": [0, 0, 5, 5], "score": 0.5}
    with pytest.raises(DataError, match=r"not annotated: \[1\]"):
        coco_eval.score(truth, [row], truth.getImgIds())


def test_detections_outside_the_picture_and_of_other_categories_are_false_alarms(scene: Path) -> None:
    truth = coco_eval.load_annotations(annotations(scene))
    good = [
        {**{k: row[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.5}
        for row in truth.anns.values()
        if not row["iscrowd"]
    ]
    outside = [{**row, "bbox": [500.0, 500.0, 5.0, 5.0], "score": 0.9} for row in good]
    other = [{**row, "category_id": 99, "score": 0.9} for row in good]
    numbers = [
        coco_eval.twelve(coco_eval.score(truth, rows, truth.getImgIds()))
        for rows in (good, good + outside, good + other)
    ]
    assert numbers[0]["AP"] == pytest.approx(1.0)
    assert numbers[1]["AP"] < 0.7  # type: ignore[operator]
    assert numbers[2] == numbers[0]


def test_the_result_cannot_be_written(scene: Path, teacher_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    given = [f"model={teacher_file}", f"annotations={annotations(scene)}", f"images={scene / 'images' / 'val'}"]
    assert run_main(val_coco, [*given, "imgsz=64", "device=cpu", f"out={tmp_path / 'file' / 'result.json'}"]) == 5
