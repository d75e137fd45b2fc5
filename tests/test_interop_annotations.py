"""COCO annotations from YOLO labels: what pycocotools then finds is what the labels say, and official records stay."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from conftest import NAMES, draw, save_detector
from interop_support import tree
from PIL import Image

from focusdd_det import coco_eval
from focusdd_det.cli import main
from focusdd_det.errors import ConfigError, DataError, DiskError
from focusdd_det.interop.annotations import read_truth, write_truth

VAL = "annotations/instances_val.json"


def picture(top: Path, split: str, name: str, labels: str | None, size: tuple[int, int] = (200, 100)) -> Path:
    """A grey picture with its label file; None: without one."""
    for part in ("images", "labels"):
        (top / part / split).mkdir(parents=True, exist_ok=True)
    file = top / "images" / split / name
    cv2.imwrite(str(file), np.full((size[1], size[0], 3), 90, np.uint8))
    if labels is not None:
        (top / "labels" / split / name).with_suffix(".txt").write_text(labels)
    return file


def described(top: Path, names: tuple[str, ...] = NAMES) -> Path:
    content = {"train": "images/train", "val": "images/val", "names": dict(enumerate(names))}
    (top / "data.yaml").write_text(yaml.safe_dump(content))
    return top / "data.yaml"


def official(top: Path, **changes: Any) -> Path:
    """Records of val/1.jpg (one object with an outline, one crowd) and val/2.jpg (no objects)."""
    content: dict[str, Any] = {
        "info": {"year": 2017},
        "licenses": [{"id": 4}],
        "images": [
            {"id": 1, "file_name": "1.jpg", "width": 200, "height": 100, "license": 4},
            {"id": 2, "file_name": "2.jpg", "width": 200, "height": 100},
        ],
        "annotations": [
            {"id": 70, "image_id": 1, "category_id": 27, "bbox": [1.5, 2, 30, 40], "area": 321.25, "iscrowd": 0,
             "segmentation": [[1.5, 2, 31.5, 2, 31.5, 42]]},
            {"id": 9, "image_id": 1, "category_id": 7, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 1,
             "segmentation": {"size": [100, 200], "counts": [5, 9, 19986]}},
        ],
        "categories": [{"id": 27, "name": "bar", "supercategory": "drawn"}, {"id": 7, "name": "disc"},
                       {"id": 17, "name": "square"}],
        **changes,
    }  # fmt: skip
    (top / "base.json").write_text(json.dumps(content))
    return top / "base.json"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """val with two pictures, the second without label file; train with two of 50 x 80 px."""
    top = tmp_path / "small"
    picture(top, "val", "1.jpg", "2 0.5 0.5 0.1 0.1\n")
    picture(top, "val", "2.jpg", None)
    picture(top, "train", "0040.jpg", "1 0.5 0.25 0.2 0.1\n0 0.1 0.9 0.2 0.2\n", (50, 80))
    picture(top, "train", "0050.jpg", "", (50, 80))
    described(top)
    return top


def padded(file: Path) -> None:
    file.write_bytes(file.read_bytes() + bytes(16))


def content_of(out: Path, file: str = VAL) -> dict[str, Any]:
    return dict(json.loads((out / file).read_text()))


# --- what is written


def test_numbers_by_hand(small: Path, tmp_path: Path) -> None:
    count = write_truth(read_truth(small, ["train"]), tmp_path / "out")
    assert count == {"images": 2, "annotations": 2, "official_images": 0, "official_annotations": 0}
    found = content_of(tmp_path / "out", "annotations/instances_train.json")
    assert found["images"] == [
        {"id": 40, "file_name": "0040.jpg", "width": 50, "height": 80},
        {"id": 50, "file_name": "0050.jpg", "width": 50, "height": 80},
    ]
    usual = {"image_id": 40, "iscrowd": 0, "segmentation": []}
    assert found["annotations"] == [
        {"id": 1, "category_id": 2, "bbox": [20.0, 16.0, 10.0, 8.0], "area": 80.0, **usual},
        {"id": 2, "category_id": 1, "bbox": [0.0, 64.0, 10.0, 16.0], "area": 160.0, **usual},
    ]
    assert [(c["id"], c["name"]) for c in found["categories"]] == [(1, "disc"), (2, "square"), (3, "bar")]


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        (("000000000139.jpg", "7.png"), [139, 7]),  # numbers, as COCO has them
        (("a.jpg", "7.jpg"), [2, 1]),
        (("07.jpg", "7.png"), [1, 2]),  # two files of one number
        (("1234567890123.jpg", "7.png"), [1, 2]),  # more digits than an id of COCO has
    ],
)
def test_ids_of_pictures(tmp_path: Path, files: tuple[str, ...], ids: list[int]) -> None:
    for name in files:
        picture(tmp_path, "val", name, "")
    write_truth(read_truth(described(tmp_path), ["val"]), tmp_path / "out")
    assert {i["file_name"]: i["id"] for i in content_of(tmp_path / "out")["images"]} == dict(
        zip(files, ids, strict=True)
    )


def test_classes_of_coco_have_its_ids(tmp_path: Path) -> None:
    picture(tmp_path, "val", "1.jpg", "1 0.5 0.5 0.1 0.1\n")
    write_truth(read_truth(described(tmp_path, ("person", "toothbrush")), ["val"]), tmp_path / "out")
    found = content_of(tmp_path / "out")
    assert [c["id"] for c in found["categories"]] == [1, 90]
    assert found["annotations"][0]["category_id"] == 90


def test_a_row_that_is_repeated_counts_once(small: Path, tmp_path: Path) -> None:
    """As in Ultralytics; and a byte order mark is no part of the first number."""
    row = "2 0.5 0.5 0.1 0.1\n"
    picture(small, "val", "1.jpg", f"\ufeff{row}1 0.2 0.2 0.1 0.1\n{row}")
    picture(small, "val", "2.jpg", row)
    write_truth(read_truth(described(small), ("val",)), tmp_path / "out")
    found = content_of(tmp_path / "out")["annotations"]
    assert [(r["image_id"], r["category_id"]) for r in found] == [(1, 3), (1, 2), (2, 3)]


def test_a_polygon_counts_as_its_box(tmp_path: Path) -> None:
    picture(tmp_path, "val", "1.jpg", "0 0.1 0.2 0.5 0.2 0.3 0.8 0.2 0.4\n")
    write_truth(read_truth(described(tmp_path), ["val"]), tmp_path / "out")
    assert content_of(tmp_path / "out")["annotations"][0]["bbox"] == [20.0, 20.0, 80.0, 60.0]
    assert (tmp_path / "out/labels/val/1.txt").read_text().startswith("0 0.1 0.2 0.5"), "labels stay as they are"


def test_a_turned_picture_has_the_size_that_the_detector_sees(tmp_path: Path) -> None:
    file = picture(tmp_path, "val", "1.jpg", "0 0.5 0.5 0.5 0.5\n")
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(file) as opened:
        opened.copy().save(file, exif=exif)
    assert cv2.imread(str(file)).shape[:2] == (200, 100)
    write_truth(read_truth(described(tmp_path), ["val"]), tmp_path / "out")
    found = content_of(tmp_path / "out")
    assert (found["images"][0]["width"], found["images"][0]["height"]) == (100, 200)
    assert found["annotations"][0]["bbox"] == [25.0, 50.0, 50.0, 100.0]


def test_official_records_are_kept_as_they_are(small: Path, tmp_path: Path) -> None:
    base = official(small)
    before = tree(small)
    count = write_truth(read_truth(small, ["val", "train"], base), tmp_path / "out")
    assert count == {"images": 4, "annotations": 4, "official_images": 2, "official_annotations": 2}
    found, given = content_of(tmp_path / "out"), json.loads(base.read_text())
    assert found["images"][:2] == given["images"]
    assert found["annotations"][:2] == given["annotations"], "not what the label of 1.jpg says"
    assert found["categories"] == given["categories"]
    assert found["licenses"] == given["licenses"]
    assert [image["id"] for image in found["images"][2:]] == [40, 50]
    assert [(a["id"], a["image_id"], a["category_id"]) for a in found["annotations"][2:]] == [(71, 40, 17), (72, 40, 7)]
    assert tree(small) == before
    assert sorted(tree(tmp_path / "out")) == sorted(
        [VAL, "data.yaml", *(f"images/val/{n}.jpg" for n in ("1", "2", "0040", "0050")),
         *(f"labels/val/{n}.txt" for n in ("1", "0040", "0050"))]
    )  # fmt: skip


def test_official_ids_that_names_would_repeat(small: Path, tmp_path: Path) -> None:
    picture(small, "train", "2.png", "")
    picture(small, "val", "2.jpg", None).rename(small / "images/val/two.jpg")
    (small / "images/val/2.jpg").unlink(missing_ok=True)
    base = official(small)
    base.write_text(base.read_text().replace('"2.jpg"', '"val2017/two.jpg"'))
    write_truth(read_truth(small, ["val", "train"], base), tmp_path / "out")
    assert [image["id"] for image in content_of(tmp_path / "out")["images"]] == [1, 2, 3, 4, 5]


def test_records_of_pictures_that_are_not_there(small: Path, tmp_path: Path) -> None:
    base = official(small)
    (small / "images/val/1.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of the 2 images of .*base.json .* first 1.jpg; .*subset=true"):
        read_truth(small, ["val"], base)
    count = write_truth(read_truth(small, ["val"], base, subset=True), tmp_path / "out")
    assert (count["images"], count["annotations"]) == (1, 0)
    assert [image["id"] for image in content_of(tmp_path / "out")["images"]] == [2]


def test_pictures_are_links_and_labels_are_copies(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = read_truth(small, ["train"])
    write_truth(truth, tmp_path / "linked")
    source = small / "images/train/0040.jpg"
    assert source.samefile(tmp_path / "linked/images/train/0040.jpg")
    assert (tmp_path / "linked/labels/train/0040.txt").stat().st_nlink == 1

    def refused(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    write_truth(truth, tmp_path / "copied")
    copy = tmp_path / "copied/images/train/0040.jpg"
    assert copy.read_bytes() == source.read_bytes()
    assert not source.samefile(copy)


# --- what it is for


def test_one_command_evaluates_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a folder that has pictures under the same names, as the data set's own has; and after it was moved."""
    rng = np.random.default_rng(4)
    top = tmp_path / "drawn"
    for split, numbers in (("val", range(3)), ("train", range(3, 5))):
        for number in numbers:
            image, rows = draw(rng, 96)
            text = "".join(f"{c} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for c, x, y, w, h in rows)
            cv2.imwrite(str(picture(top, split, f"{number}.jpg", text)), image)
    described(top)
    monkeypatch.chdir(top)
    assert main(["annotations", "data=data.yaml", "splits=val,train", f"out={tmp_path / 'first'}"]) == 0
    (tmp_path / "first").rename(tmp_path / "moved")
    model = save_detector(tmp_path / "model.pt")
    asked = [f"model={model}", f"data={tmp_path / 'moved'}", "imgsz=64", "device=cpu"]
    assert main(["detect", "val", *asked, f"out={tmp_path / 'eval.json'}"]) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["images"] == 5
    assert "5 of 5 annotated images" in capsys.readouterr().out
    truth = coco_eval.load_annotations(tmp_path / "moved" / VAL)
    rows = [{key: a[key] for key in ("image_id", "category_id", "bbox")} for a in truth.dataset["annotations"]]
    perfect = coco_eval.score(truth, [{**row, "score": 1.0} for row in rows], truth.getImgIds())
    assert coco_eval.twelve(perfect)["AP"] == pytest.approx(1.0)


def test_both_splits_of_real_pictures(assets: Path, tmp_path: Path) -> None:
    mini = assets / "data" / "coco_mini"
    base = mini / "annotations" / "instances_val2017.json"
    count = write_truth(read_truth(mini, ["val", "train"], base), tmp_path / "out")
    assert count == {"images": 305, "annotations": 2208, "official_images": 177, "official_annotations": 1279}
    truth, given = coco_eval.load_annotations(tmp_path / "out" / VAL), json.loads(base.read_text())
    assert len(coco_eval.match_images(truth, coco_eval.list_images(tmp_path / "out/images/val"), subset=False)) == 305
    assert content_of(tmp_path / "out")["annotations"][:1279] == given["annotations"]
    assert {a["category_id"] for a in truth.anns.values()} <= {c["id"] for c in given["categories"]}


# --- what is refused


def _labels(text: str) -> Callable[[Path], object]:
    return lambda top: (top / "labels/train/0040.txt").write_text(text)


@pytest.mark.parametrize(
    ("splits", "spoil", "message"),
    [
        (["val"], None, r"1 of 2 label files .*\n  .*labels/val/2.txt is missing; .* has an empty one"),
        (["train"], _labels("1 0.5 0.5 0.1\n"), r"labels/train/0040.txt: line 1: .* got 4 columns"),
        (["train"], _labels("0 .5 .5 .1 .1\n1 x 0.5 0.1 0.1\n"), r"0040.txt: line 2: .* is not numbers"),
        (["train"], _labels("3 0.5 0.5 0.1 0.1\n"), r"0040.txt: line 1: class 3 is not one of 0..2"),
        (["train"], _labels("0 0.5 1.5 0.1 0.1\n"), r"0040.txt: line 1: expected a box inside the picture"),
        (["train"], _labels("0 0.1 0.2 0.5 0.2 0.3 1.8\n"), r"0040.txt: line 1: .* got 7 columns"),
        (["train"], lambda top: (top / "labels/train/0040.txt").write_bytes(b"\xff\xfe"), "0040.txt: .*decode"),
        (["train", "val"], lambda top: picture(top, "val", "0040.png", ""), "two pictures of one name: .*0040"),
        (["train"], lambda top: (top / "images/train/0040.jpg").write_text("no"), "0040.jpg is not a readable picture"),
        (["train"], lambda top: os.truncate(top / "images/train/0040.jpg", 700), "0040.jpg is cut short"),
        (["train"], lambda top: padded(top / "images/train/0040.jpg"), "0040.jpg has bytes after its JPEG end marker"),
        (["test"], None, "has no `test:`"),
        (["train"], lambda top: (top / "data.yaml").write_text("names: ["), "data.yaml"),
        (["train"], lambda top: described(top, ("disc", "bar", "disc")), "one name to two classes"),
    ],
)
def test_data_that_cannot_be_used(
    small: Path, tmp_path: Path, splits: list[str], spoil: Callable[[Path], object] | None, message: str
) -> None:
    if spoil:
        spoil(small)
    with pytest.raises(DataError, match=message):
        write_truth(read_truth(small, splits), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": [{"id": 7, "name": "disc"}, {"id": 27, "name": "bar"}]}, "no category square"),
        ({"categories": [{"id": i, "name": n} for i, n in ((7, "disc"), (17, "square"), (27, "bar"), (3, "ball"))]},
         "1 categories that data.yaml has not .ball"),
        ({"images": [{"id": 1, "file_name": "1.jpg", "width": 100, "height": 200}]}, "1.jpg is 200 x 100 px"),
        ({"images": [{"id": 1, "file_name": "a/1.jpg"}, {"id": 2, "file_name": "b/1.jpg"}]}, "called 1.jpg"),
        ({"annotations": [{"image_id": 2, "category_id": 7, "bbox": [1, 1, 5, 5]}]}, "labels/val/2.txt is missing"),
        ({"annotations": [{"image_id": 3, "category_id": 7, "bbox": [1, 1, 5, 5]}]}, "belongs to image 3"),
    ],
)  # fmt: skip
def test_official_records_that_do_not_fit(small: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_truth(small, ["val", "train"], official(small, **changes))


def test_more_categories_are_fine_where_no_picture_is_added(small: Path) -> None:
    kinds = [{"id": i, "name": n} for i, n in ((7, "disc"), (17, "square"), (27, "bar"), (3, "ball"))]
    assert read_truth(small, ["val"], official(small, categories=kinds)).count["images"] == 2


def test_out_is_new_and_elsewhere(small: Path, tmp_path: Path) -> None:
    truth = read_truth(small, ["train"])
    with pytest.raises(ConfigError, match="lie in each other"):
        write_truth(truth, small / "images/train/out")
    (tmp_path / "there").mkdir()
    with pytest.raises(DiskError, match="exists"):
        write_truth(truth, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ("out=new", 2, "data= is missing"),
        ("data=small", 2, "out= is missing"),
        ("data=small out=new split=val", 2, "unknown option `split`, did you mean splits"),
        ("data=small out=new splits=train,vall", 2, "`vall`, did you mean val"),
        ("data=small out=new splits=train,train", 2, "each once"),
        ("data=small out=new subset=maybe", 2, "subset='maybe': expected true or false"),
        ("data=small out=new", 3, "labels/val/2.txt is missing"),
        ("data=nowhere.yaml out=new", 3, "data not found"),
        ("data=small out=new base=nowhere.json", 3, "annotations not found"),
        ("data=small out=small", 5, "small exists"),
    ],
)
def test_exit_codes(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str, code: int,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(small.parent)
    assert main(["annotations", *given.split()]) == code
    assert message in capsys.readouterr().err
    assert not Path("new").exists()


def test_a_dry_run_counts_and_writes_nothing(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    official(small)
    monkeypatch.chdir(small.parent)
    asked = ["annotations", "data=small", "splits=val,train", "base=small/base.json", "out=new"]
    assert main([*asked, "--dry-run"]) == 0
    told = f"new/{VAL}: 4 images, 4 annotations, 2 and 2 of them from small/base.json"
    assert capsys.readouterr().out == f"{told}. Nothing was written\n"
    assert not Path("new").exists()
    assert main(asked) == 0
    assert told in capsys.readouterr().out
    assert main(["annotations", "--help"]) == 0
    assert "splits=val,train" in capsys.readouterr().out
