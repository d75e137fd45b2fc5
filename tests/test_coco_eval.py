"""Official COCO mAP: equal to pycocotools run by hand, matched by names, and never another metric in disguise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import NAMES, save_detector, write_coco
from interop_support import det_set
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from focusdd_det import coco_eval
from focusdd_det.cli import main
from focusdd_det.errors import ConfigError, DataError, WeightsError


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """Folder of a small evaluation set."""
    return write_coco(tmp_path / "coco").parent


def annotations(scene: Path) -> Path:
    return scene / "annotations" / "instances_val.json"


def edit(scene: Path, change: Any) -> Path:
    content = json.loads(annotations(scene).read_text())
    change(content)
    annotations(scene).write_text(json.dumps(content))
    return annotations(scene)


def noisy_detections(truth: COCO) -> list[dict[str, Any]]:
    """The ground truth moved a little, some of it missing, some doubled or of the wrong class."""
    rng = np.random.default_rng(0)
    found = []
    for row in truth.dataset["annotations"]:
        for _ in range(int(rng.integers(0, 3))):
            box = (np.array(row["bbox"]) + rng.normal(0, 3, 4)).round(3).tolist()
            wrong = rng.random() < 0.2
            category = 7 if wrong else row["category_id"]
            found.append(
                {
                    "image_id": row["image_id"],
                    "category_id": category,
                    "bbox": box,
                    "score": round(float(rng.random()), 5),
                }
            )
    return found


def by_hand(file: Path, detections: list[dict[str, Any]], images: list[int], tmp_path: Path) -> COCOeval:
    """pycocotools as its own demo uses it."""
    (tmp_path / "detections.json").write_text(json.dumps(detections))
    truth = COCO(str(file))
    result = COCOeval(truth, truth.loadRes(str(tmp_path / "detections.json")), "bbox")
    result.params.imgIds = images
    result.evaluate()
    result.accumulate()
    result.summarize()
    return result


def test_equals_pycocotools_by_hand_on_the_same_detections(scene: Path, tmp_path: Path) -> None:
    truth = coco_eval.load_annotations(annotations(scene))
    detections = noisy_detections(truth)
    images = sorted(truth.getImgIds())[:5]
    detections = [d for d in detections if d["image_id"] in images]
    expected = by_hand(annotations(scene), detections, images, tmp_path).stats
    result = coco_eval.score(truth, detections, images)
    numbers = coco_eval.twelve(result)
    assert 0.05 < expected[0] < 0.95
    for name, value in zip(coco_eval.NUMBERS, expected, strict=True):
        assert numbers[name] == (None if value == -1 else pytest.approx(value, abs=1e-12)), name


def test_per_class_and_covered_are_the_numbers_of_those_categories(scene: Path, tmp_path: Path) -> None:
    truth = coco_eval.load_annotations(annotations(scene))
    detections = noisy_detections(truth)
    result = coco_eval.score(truth, detections, truth.getImgIds())
    per_class = coco_eval.per_class(result, truth)
    for category, name in zip((7, 17, 27), NAMES, strict=True):
        one = by_hand(annotations(scene), detections, truth.getImgIds(), tmp_path)
        one.params.catIds = [category]
        one.evaluate()
        one.accumulate()
        one.summarize()
        assert per_class[name] == pytest.approx(one.stats[0])
    two = coco_eval.twelve(result, [7, 27])
    assert two["AP"] == pytest.approx((per_class["disc"] + per_class["bar"]) / 2)  # type: ignore[operator]


def test_a_crowd_box_is_neither_missed_nor_wrong(scene: Path) -> None:
    def one_object(content: dict[str, Any]) -> None:
        content["images"] = content["images"][:1]
        single = {"image_id": 1000, "category_id": 7, "area": 400}
        content["annotations"] = [
            {**single, "id": 1, "bbox": [10, 10, 20, 20], "iscrowd": 0},
            {**single, "id": 2, "bbox": [50, 50, 40, 40], "area": 1600, "iscrowd": 1},
        ]

    truth = coco_eval.load_annotations(edit(scene, one_object))
    hit = {"image_id": 1000, "category_id": 7, "bbox": [10, 10, 20, 20], "score": 0.5}
    in_crowd = {"image_id": 1000, "category_id": 7, "bbox": [55, 55, 10, 10], "score": 0.9}
    result = coco_eval.twelve(coco_eval.score(truth, [hit, in_crowd], [1000]))
    assert result["AP"] == pytest.approx(1.0)


def test_no_detections_are_explicit_zeros(scene: Path) -> None:
    truth = coco_eval.load_annotations(annotations(scene))
    numbers = coco_eval.twelve(coco_eval.score(truth, [], truth.getImgIds()))
    assert numbers["AP"] == numbers["AP50"] == numbers["AR_100"] == 0
    assert numbers["AP_large"] is None, "no large object: undefined, not zero"


def test_a_checkpoint_on_its_own_detections(scene: Path, tmp_path: Path, teacher_file: Path) -> None:
    images = scene / "images" / "val"
    result = coco_eval.evaluate(
        teacher_file, annotations(scene), images, imgsz=96, batch=4, conf=0.05, covered=("disc", "bar")
    )
    truth = coco_eval.load_annotations(annotations(scene))
    files = coco_eval.match_images(truth, coco_eval.list_images(images), subset=False)
    names = ["bar", "other", "disc", "square"]
    categories = coco_eval.class_map(names, truth)
    assert categories == {0: 27, 2: 7, 3: 17}
    found = coco_eval.detect(teacher_file, files, categories, imgsz=96, batch=4, conf=0.05)
    assert len(found) == result.detections > 50
    assert all(d["bbox"][0] >= 0 and d["bbox"][0] + d["bbox"][2] <= 96.001 for d in found)
    expected = by_hand(annotations(scene), found, truth.getImgIds(), tmp_path).stats
    assert result.all["AR_100"] == pytest.approx(expected[8])
    assert result.all["AP"] == pytest.approx(expected[0])
    assert result.covered is not None
    assert result.evaluator.startswith("pycocotools 2")
    assert "6 of 6 annotated images" in result.table()
    assert json.loads(json.dumps(result.as_dict()))["per_class"].keys() == set(NAMES)


def test_a_missing_or_wrong_annotations_file(tmp_path: Path, teacher_file: Path, scene: Path) -> None:
    with pytest.raises(DataError, match="annotations not found"):
        coco_eval.evaluate(teacher_file, tmp_path / "none.json", scene / "images/val")
    twice = '[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]'
    for content, message in {
        "not json": "is not a JSON file",
        "[]": "has no images, annotations, categories",
        '{"images": [], "annotations": []}': "has no categories",
        f'{{"images": [], "annotations": [], "categories": {twice}}}': "two categories have the name",
    }.items():
        file = tmp_path / "wrong.json"
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            coco_eval.load_annotations(file)


def test_categories_the_model_lacks_are_refused_with_both_lists(scene: Path, tmp_path: Path) -> None:
    weights = save_detector(tmp_path / "other.pt", names=("disc", "cat"))
    with pytest.raises(DataError) as caught:
        coco_eval.evaluate(weights, annotations(scene), scene / "images/val")
    assert "square, bar" in str(caught.value)
    assert "model: disc, cat" in str(caught.value)
    assert "annotations: disc, square, bar" in str(caught.value)


def test_missing_pictures_are_refused_unless_a_subset_is_asked_for(scene: Path, teacher_file: Path) -> None:
    (scene / "images" / "val" / "scene3.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 6 annotated images have no file, first scene3.jpg[\s\S]*subset=True"):
        coco_eval.evaluate(teacher_file, annotations(scene), scene / "images/val", imgsz=64)
    result = coco_eval.evaluate(teacher_file, annotations(scene), scene / "images/val", imgsz=64, subset=True)
    assert (result.images, result.images_annotated) == (5, 6)
    assert "SUBSET" in result.table()
    with pytest.raises(DataError, match="images not found"):
        coco_eval.evaluate(teacher_file, annotations(scene), scene / "nowhere")


def test_a_label_file_cannot_remove_a_picture_from_the_evaluation(scene: Path, teacher_file: Path) -> None:
    (scene / "labels" / "val" / "scene0.txt").write_text("99 broken\n")
    result = coco_eval.evaluate(teacher_file, annotations(scene), scene / "images/val", imgsz=64)
    assert result.images == 6
    assert not list(scene.rglob("*.cache"))


def test_a_padded_picture_is_whole(scene: Path, teacher_file: Path) -> None:
    """Nothing of Ultralytics' writes over pictures that are only evaluated on."""
    first = coco_eval.evaluate(teacher_file, annotations(scene), scene / "images" / "val", imgsz=96)
    for file in (scene / "images" / "val").glob("*.jpg"):
        file.write_bytes(file.read_bytes() + bytes(100))
    again = coco_eval.evaluate(teacher_file, annotations(scene), scene / "images" / "val", imgsz=96)
    assert (again.images, again.all) == (first.images, first.all)


def test_classes_of_a_set_that_the_annotations_lack_are_left_out(
    scene: Path, tmp_path: Path, teacher_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = det_set(tmp_path / "set", names=("disc", "other", "bar"))
    words = [f"model={teacher_file}", f"annotations={annotations(scene)}", f"images={scene / 'images' / 'val'}"]
    out = tmp_path / "eval.json"
    assert main(["detect", "val", *words, f"set={folder}", "imgsz=96", f"out={out}"]) == 0
    assert json.loads(out.read_text())["covered_classes"] == ["disc", "bar"]
    assert main(["detect", "val", *words, "covered=disc,other", "imgsz=96", f"out={out}"]) == 2


def test_an_unreadable_picture(scene: Path, teacher_file: Path) -> None:
    (scene / "images" / "val" / "scene2.jpg").write_bytes(b"a picture? no")
    with pytest.raises(DataError, match=r"scene2.jpg is not a readable picture"):
        coco_eval.evaluate(teacher_file, annotations(scene), scene / "images/val", imgsz=64)


def test_file_names_with_folders_choose_among_equal_names(tmp_path: Path) -> None:
    files = []
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "1.jpg").touch()
        files.append(tmp_path / part / "1.jpg")
    truth = COCO()
    truth.dataset = {"images": [{"id": 5, "file_name": "b/1.jpg"}]}
    assert coco_eval.match_images(truth, files, subset=False) == {files[1]: 5}
    truth.dataset = {"images": [{"id": 5, "file_name": "1.jpg"}]}
    with pytest.raises(DataError, match="ambiguous"):
        coco_eval.match_images(truth, files, subset=False)


def test_options_out_of_range_and_wrong_weights(scene: Path, teacher_file: Path, tmp_path: Path) -> None:
    images = scene / "images/val"
    with pytest.raises(ConfigError, match="need batch >= 1"):
        coco_eval.evaluate(teacher_file, annotations(scene), images, batch=0)
    with pytest.raises(ConfigError, match="no category named giraffe"):
        coco_eval.evaluate(teacher_file, annotations(scene), images, covered=["giraffe"])
    with pytest.raises(WeightsError):
        coco_eval.evaluate(tmp_path / "none.pt", annotations(scene), images)


@pytest.mark.assets
def test_real_detector_on_real_pictures(assets: Path) -> None:
    """Twelve pictures of COCO: yolo11n finds what it should."""
    folder = assets / "data" / "coco_mini"
    files = coco_eval.list_images(folder / "images" / "val2017")[:12]
    result = coco_eval.evaluate(
        assets / "weights" / "yolo11n.pt",
        folder / "annotations" / "instances_val2017.json",
        files,
        imgsz=320,
        batch=6,
        subset=True,
    )
    assert result.images == 12
    assert 0.25 < (result.all["AP"] or 0) < 0.7
