"""The embedded default: drawn pictures are reproducible and truly annotated, the shipped models know them."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

import focusdd_det.demo
from focusdd_det.checkpoints import safe_read
from focusdd_det.demo.objects import CLASSES, OBJECTS
from focusdd_det.demo.run import DemoFailed, claim, gather, judge, parse
from focusdd_det.demo.scenes import POOR, Picture, plan_many, plan_single, render
from focusdd_det.demo.write import CATEGORY_IDS, write_sources, write_val
from focusdd_det.errors import ConfigError, DataError, DiskError
from focusdd_det.selector import load_selector
from focusdd_det.teacher import load_detector
from focusdd_det.types import Floats

DEMO = Path(focusdd_det.demo.__file__).parent
ROOT = Path(__file__).resolve().parents[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("write", [write_sources, write_val])
def test_a_seed_decides_every_byte(write, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write(tmp_path / name, 2, seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert set(a) == set(c)
    pictures = [name for name in a if name.endswith(".jpg")]
    assert pictures
    assert all(a[name] != c[name] for name in pictures)


def test_a_larger_set_begins_with_the_smaller_one(tmp_path):
    write_sources(tmp_path / "small", 1)
    write_sources(tmp_path / "large", 2)
    large = contents(tmp_path / "large")
    assert all(large[name] == data for name, data in contents(tmp_path / "small").items())


def changed_box(one: Picture, other: Picture) -> Floats:
    """The box of the pixels in which two renderings differ visibly."""
    difference = np.abs(one.image.astype(int) - other.image).max(2) > 12
    y, x = np.nonzero(difference)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], np.float32)


def test_boxes_are_tight_on_what_is_drawn():
    errors = []
    for index in range(12):
        scene = plan_many(f"tight/{index}")
        whole = render(scene)
        drawn = [i for i, item in enumerate(scene.items) if item.kind in OBJECTS]
        if len(drawn) != len(whole.boxes):
            continue  # one is hidden and not annotated
        for box, cls, item in zip(whole.boxes, whole.classes, drawn, strict=True):
            assert CLASSES[cls] == scene.items[item].kind
            without = render(scene, without=item)
            assert len(without.boxes) == len(drawn) - 1
            errors.append(changed_box(whole, without) - box)
    assert len(errors) > 15
    off = np.array(errors) * [-1, -1, 1, 1]  # positive: something of the object lies outside its box
    assert off.max() <= 3, "blur may carry an object two pixels further, not more"
    assert np.abs(np.median(off, axis=0)).max() <= 1
    assert np.abs(off).mean() <= 1.5


@pytest.mark.parametrize("kind", CLASSES)
def test_good_sources_show_one_object_that_is_neither_tiny_nor_all(kind):
    for index in range(3):
        picture = render(plan_single(f"cover/{index}", kind))
        assert picture.classes.tolist() == [CLASSES.index(kind)]
        x1, y1, x2, y2 = picture.boxes[0]
        share = (x2 - x1) * (y2 - y1) / picture.image[..., 0].size
        assert 0.06 < share < 0.75


def test_poor_sources_are_poor():
    good = [render(plan_single(f"p/{i}", "car")) for i in range(6)]
    poor = {name: [render(plan_single(f"p/{i}", "car", name)) for i in range(6)] for name in POOR}

    def visible(pictures: list[Picture]) -> float:
        return float(np.mean([p.areas.sum() / p.image[..., 0].size for p in pictures]))

    for name in ("tiny", "hidden", "cut"):
        assert visible(poor[name]) < 0.8 * visible(good), name
    assert [scene.items[-1].opacity < 0.3 for scene in (plan_single("p/0", "car", "faint"),)] == [True]


def test_coco_annotations_agree_with_the_labels(tmp_path):
    coco = COCO(str(write_val(tmp_path, 6)))
    assert tuple(coco.getCatIds()) == CATEGORY_IDS != tuple(range(1, len(CLASSES) + 1))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert len(coco.imgs) == 6
    total = 0
    for image in coco.imgs.values():
        height, width = cv2.imread(str(tmp_path / "images/val" / image["file_name"])).shape[:2]
        assert (height, width) == (image["height"], image["width"])
        rows = (tmp_path / "labels/val" / image["file_name"]).with_suffix(".txt").read_text().splitlines()
        annotations = coco.imgToAnns[image["id"]]
        assert len(rows) == len(annotations)
        for row, annotation in zip(rows, annotations, strict=True):
            cls, cx, cy, w, h = (float(value) for value in row.split())
            assert CATEGORY_IDS[int(cls)] == annotation["category_id"]
            box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
            np.testing.assert_allclose(box, annotation["bbox"], atol=1e-3)
            assert 0 < annotation["area"] <= annotation["bbox"][2] * annotation["bbox"][3] + 1
            total += 1
    assert total > 6


def test_shipped_models_are_small_and_carry_no_trace_of_a_machine():
    files = [DEMO / "yolo_demo.pt", DEMO / "vit_demo.safetensors"]
    assert all(file.stat().st_size < 2_000_000 for file in files)
    with zipfile.ZipFile(files[0]) as archive:
        pickled = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".pkl"))
    for trace in (b"/home", b"/root", b"/tmp", b"/work", b"/Users", b"/mnt"):
        assert trace not in pickled
    checkpoint = safe_read(files[0])
    assert checkpoint["epoch"] == -1
    assert checkpoint["optimizer"] is None
    assert checkpoint["ema"] is None
    assert {p.dtype for p in checkpoint["model"].parameters()} == {torch.float16}
    assert list(checkpoint["model"].names.values()) == list(CLASSES)


def test_the_teacher_finds_the_objects():
    teacher = load_detector(DEMO / "yolo_demo.pt", names=CLASSES)
    found = total = 0
    for index in range(16):
        picture = render(plan_many(f"unseen/{index}"))
        detections = teacher.detect([picture.image], imgsz=256, batch=1)[0]
        for box, cls in zip(picture.boxes, picture.classes, strict=True):
            total += 1
            same = detections.boxes[detections.classes == cls]
            low, high = np.maximum(same[:, :2], box[:2]), np.minimum(same[:, 2:], box[2:])
            overlap = np.prod(np.maximum(high - low, 0), axis=1)
            union = np.prod(same[:, 2:] - same[:, :2], axis=1) + np.prod(box[2:] - box[:2]) - overlap
            found += bool((overlap / union > 0.5).any())
    assert found / total > 0.75


def test_the_selector_knows_the_classes_and_looks_at_the_object():
    selector = load_selector(str(DEMO / "vit_demo.json"), None)
    assert selector.classes == CLASSES
    pictures = [render(plan_single(f"unseen/{i}", CLASSES[i % len(CLASSES)])) for i in range(96)]
    side = selector.view
    views = [cv2.resize(p.image, (side, side), interpolation=cv2.INTER_AREA) for p in pictures]
    probabilities, attention = selector(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2))
    hits = probabilities.argmax(1).numpy() == np.arange(96) % len(CLASSES)
    assert hits.mean() > 0.85
    centre = (np.arange(selector.grid) + 0.5) / selector.grid
    on_object, chance = [], []
    for picture, one in zip(pictures, attention.numpy(), strict=True):
        height, width = picture.image.shape[:2]
        x1, y1, x2, y2 = picture.boxes[0] / [width, height, width, height]
        inside = ((centre > y1) & (centre < y2))[:, None] & ((centre > x1) & (centre < x2))[None]
        on_object.append(one[inside].sum() / one.sum())
        chance.append(inside.mean())
    assert np.mean(on_object) > 2 * np.mean(chance)


def test_the_selector_file_names_what_the_pipeline_needs():
    spec = json.loads((DEMO / "vit_demo.json").read_text())
    assert set(spec) == {"arch", "kwargs", "classes", "weights", "mean", "std"}
    assert spec["classes"] == list(CLASSES)
    assert (DEMO / spec["weights"]).is_file()


def test_the_demo_writes_into_no_folder_but_its_own(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(DiskError, match="no demo made"):
        claim(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]
    for _ in range(2):  # and takes its own again
        claim(tmp_path / "new")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["--source", "pictures"], ConfigError, "--source and --val go together"),
        (["--val", "instances_val.json"], ConfigError, "--source and --val go together"),
        (["--source", "missing", "--val", "x.json"], DataError, "missing"),
        (["--source", "given", "--val", "x.json"], DataError, "x.json does not exist"),
    ],
)
def test_what_is_missing_is_said_before_any_work(arguments, error, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given" / "ball").mkdir(parents=True)
    with pytest.raises(error, match=says):
        gather(parse([*arguments, "--out", str(tmp_path)]))


def test_a_result_below_what_is_known_fails_and_says_which():
    good = {"teacher": {"mAP50": 0.9}, "focusdd": {"mAP50": 0.2}, "random": {"mAP50": 0.0}}
    judge(good)
    with pytest.raises(DemoFailed, match=r"the FocusDD student reached mAP50 9\.0, expected at least 10"):
        judge({**good, "focusdd": {"mAP50": 0.09}})
    with pytest.raises(DemoFailed, match="the teacher"):
        judge({**good, "teacher": {"mAP50": 0.59}})


@pytest.mark.slow
def test_the_demo_runs_and_prints_both_results(tmp_path):
    command = [sys.executable, "tools/demo.py", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["teacher"]["mAP50"] >= 0.6
    assert results["focusdd"]["mAP50"] >= 0.1
    assert set(results) >= {"teacher", "focusdd", "random", "seconds"}


def test_scenes_have_the_sides_that_are_asked_for() -> None:
    many = [plan_many(f"sides/{i}", (40, 60)) for i in range(20)]
    assert all(40 <= side <= 60 for scene in many for side in (scene.width, scene.height))
    usual = [plan_many(f"sides/{i}") for i in range(20)]
    assert all(192 <= side <= 256 for scene in usual for side in (scene.width, scene.height))
