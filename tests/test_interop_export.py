"""COCO JSON and the folders of other benchmarks: what their readers find is what the set says."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from class_data import write_class_folders, write_class_set
from interop_support import det_set, reseal, tree
from pycocotools.coco import COCO
from torchvision.datasets import ImageFolder
from ultralytics.data.converter import coco80_to_coco91_class

from focusdd_det import coco_eval
from focusdd_det.classmap import find_map, imagenet_synsets, read_class_map
from focusdd_det.cli import main
from focusdd_det.detset import part_path, read_manifest, read_soft
from focusdd_det.errors import ConfigError, DataError, DiskError, VerifyError
from focusdd_det.interop.coco import ANNOTATIONS, COCO_IDS, boxes_of, categories, export_coco
from focusdd_det.interop.finished import open_set
from focusdd_det.interop.layouts import SUBSETS, class_order, export_ddranking, export_rethinkdc
from focusdd_det.labels import parse_rows

COCO_NAMES = ("person", "dog", "toothbrush")


def opened(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


@pytest.fixture(scope="module")
def detections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return det_set(tmp_path_factory.mktemp("det") / "set")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_set(tmp_path_factory.mktemp("cls") / "set")


# --- COCO


def test_the_official_ids_are_ultralytics_own() -> None:
    names = read_class_map(find_map("coco_imagenet.yaml"), ["exact"]).names
    assert [COCO_IDS[name][0] for name in names] == coco80_to_coco91_class()


@pytest.mark.parametrize(
    ("names", "numbering", "ids"),
    [
        (COCO_NAMES, "auto", [1, 18, 90]),
        (COCO_NAMES, "contiguous", [1, 2, 3]),
        (("toothbrush", "person"), "coco", [90, 1]),  # by name, whatever the set's order
        (("person", "wombat"), "auto", [1, 2]),
    ],
)
def test_category_ids(names: tuple[str, ...], numbering: Any, ids: list[int]) -> None:
    assert [kind["id"] for kind in categories(names, numbering)] == ids
    assert [kind["name"] for kind in categories(names, numbering)] == list(names)


def test_official_ids_need_official_names() -> None:
    with pytest.raises(ConfigError, match="no class wombat"):
        categories(("person", "wombat"), "coco")


def test_boxes_by_hand() -> None:
    rows = np.array([[2, 0.5, 0.25, 0.2, 0.1]])
    np.testing.assert_allclose(boxes_of(rows, 200, 100), [[80, 20, 40, 10]])


def test_the_json_says_what_the_labels_say(detections: Path, tmp_path: Path) -> None:
    count = export_coco(open_set(detections), tmp_path / "coco")
    truth = opened(tmp_path / "coco" / ANNOTATIONS)
    items = list(read_manifest(detections))
    assert count == {"images": 5, "annotations": sum(i.boxes for i in items), "categories": 3}
    assert len(truth.anns) == count["annotations"]
    for image, item in zip(truth.loadImgs(truth.getImgIds()), items, strict=True):
        assert (image["width"], image["height"]) == (96, 96)
        copy = tmp_path / "coco" / "train" / image["file_name"]
        assert copy.read_bytes() == part_path(detections, "images", item).read_bytes()
        assert copy.stat().st_nlink == 1
        rows = parse_rows(part_path(detections, "labels", item).read_text(), 3)
        found = truth.loadAnns(truth.getAnnIds(imgIds=image["id"]))
        assert [truth.cats[a["category_id"]]["name"] for a in found] == [
            ("disc", "square", "bar")[int(r[0])] for r in rows
        ]
        np.testing.assert_allclose([a["bbox"] for a in found], boxes_of(rows, 96, 96), atol=1e-4)
        soft = read_soft(part_path(detections, "soft", item))["conf"]
        np.testing.assert_allclose([a["score"] for a in found], soft, atol=1e-3)


@pytest.mark.parametrize("numbering", ["coco", "contiguous"])
def test_the_labels_measured_against_themselves_are_perfect(tmp_path: Path, numbering: Any) -> None:
    folder = det_set(tmp_path / "set", COCO_NAMES, count=8)
    export_coco(open_set(folder), tmp_path / "coco", numbering)
    truth = coco_eval.load_annotations(tmp_path / "coco" / ANNOTATIONS)
    keys = ("image_id", "category_id", "bbox", "score")
    rows = [{key: a[key] for key in keys} for a in truth.dataset["annotations"]]
    assert coco_eval.twelve(coco_eval.score(truth, rows, truth.getImgIds()))["AP"] == pytest.approx(1.0)


def test_pictures_that_stay_in_the_set(detections: Path, tmp_path: Path) -> None:
    export_coco(open_set(detections), tmp_path / "coco", images="set")
    assert sorted(tree(tmp_path / "coco")) == [ANNOTATIONS, "export.json"]
    truth = opened(tmp_path / "coco" / ANNOTATIONS)
    assert all((detections / image["file_name"]).is_file() for image in truth.imgs.values())


def test_a_composite_without_boxes_is_an_image_without_annotations(tmp_path: Path) -> None:
    folder = det_set(tmp_path / "set", count=1)
    from dataclasses import replace

    from focusdd_det.detset import soft_bytes
    from focusdd_det.disk import sha256
    from focusdd_det.types import Detections

    item = next(read_manifest(folder))
    soft = soft_bytes(Detections.none(3))
    part_path(folder, "labels", item).write_bytes(b"")
    part_path(folder, "soft", item).write_bytes(soft)
    item = replace(item, boxes=0, sha256={**item.sha256, "labels": sha256(b""), "soft": sha256(soft)})
    (folder / "manifest.jsonl").write_text(item.line())
    count = export_coco(open_set(reseal(folder)), tmp_path / "coco")
    assert count["images"] == 1
    assert json.loads((tmp_path / "coco" / ANNOTATIONS).read_text())["annotations"] == []


def test_the_export_of_a_set_is_the_same_bytes(detections: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_coco(open_set(detections), tmp_path / name)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_damaged_file_stops_the_export_and_leaves_nothing(tmp_path: Path) -> None:
    for part in ("images", "labels", "soft"):
        folder = det_set(tmp_path / part / "set")
        item = list(read_manifest(folder))[-1]
        path = part_path(folder, part, item)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        with pytest.raises(VerifyError, match="not the bytes that the manifest names"):
            export_coco(open_set(folder), tmp_path / part / "coco")
        assert [p.name for p in (tmp_path / part).iterdir()] == ["set"]


# --- benchmarks' folders


def test_ddranking_numbers_are_the_folder_names(classes: Path, tmp_path: Path) -> None:
    made = export_ddranking(open_set(classes), tmp_path / "out")
    # the set's own order is n03, n01, n02; the real data's folders are sorted
    assert made["classes"] == {"00000": "n01", "00001": "n02", "00002": "n03"}
    seen = ImageFolder(str(tmp_path / "out" / "train"))
    assert seen.classes == ["00000", "00001", "00002"]
    assert [p.name for p in (tmp_path / "out" / "train").iterdir() if not p.is_dir()] == []
    by_class: dict[str, list[bytes]] = {}
    for item in read_manifest(classes):
        by_class.setdefault(item.class_name, []).append(part_path(classes, "images", item).read_bytes())
    found: dict[str, list[bytes]] = {}
    for path, label in seen.samples:
        found.setdefault(made["classes"][f"{label:05d}"], []).append(Path(path).read_bytes())
    assert found == by_class


def test_the_order_of_the_set_is_kept_when_asked_for(classes: Path, tmp_path: Path) -> None:
    assert export_ddranking(open_set(classes), tmp_path / "out", "set")["classes"]["00000"] == "n03"


@pytest.mark.parametrize("subset", SUBSETS)
def test_subsets_of_imagenet_have_an_order_of_their_own(subset: str) -> None:
    own = tuple(imagenet_synsets()[number] for number in SUBSETS[subset])
    assert len(set(own)) == 10
    assert class_order(sorted(own), subset, imagenet_synsets) == own
    assert class_order(sorted(own), "auto", imagenet_synsets) == own
    assert class_order(sorted(own), "sorted", imagenet_synsets) == tuple(sorted(own))
    with pytest.raises(DataError, match="does not have just the classes"):
        class_order(own[:9], subset, imagenet_synsets)


def test_rethinkdc_has_the_folders_of_its_validation_data(classes: Path, tmp_path: Path) -> None:
    val = write_class_folders(tmp_path / "val")
    export_rethinkdc(open_set(classes), tmp_path / "out", val)
    train, real = ImageFolder(str(tmp_path / "out" / "train")), ImageFolder(str(val))
    assert train.class_to_idx == real.class_to_idx
    assert len(train) == 7
    write_class_folders(val, names=("n04",))
    with pytest.raises(DataError, match="differ in n04"):
        export_rethinkdc(open_set(classes), tmp_path / "out2", val)


def test_a_path_that_rethinkdc_takes_for_a_hub(classes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="he-y"):
        export_rethinkdc(open_set(classes), tmp_path / "the-yard")


def test_a_class_without_pictures_would_shift_the_others(tmp_path: Path) -> None:
    folder = write_class_set(tmp_path / "set", count=2)
    for export in (export_ddranking, export_rethinkdc):
        with pytest.raises(DataError, match="no picture of n02"):
            export(open_set(folder), tmp_path / "out")


# --- the command


def test_the_command(detections: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["export", str(detections), "format=coco", f"out={out}", "--dry-run"]) == 0
    assert "5 composites" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert main(["export", str(detections), "--format", "coco", "--out", out]) == 0
    assert "5 images" in capsys.readouterr().out
    assert main(["export", str(detections), "format=coco", f"out={out}"]) == 5
    assert main(["export", str(classes), "format=ddranking", f"out={tmp_path / 'ddr'}"]) == 0
    assert "2 to 3 pictures" in capsys.readouterr().out
    assert main(["export", str(classes), "format=rethinkdc", f"out={tmp_path / 'rdc'}"]) == 0
    assert "--ipc 3" in capsys.readouterr().out
    assert main(["export", "--help"]) == 0


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["SET", "format=coko", "out=OUT"], 2, "did you mean coco"),
        (["SET", "format=coco", "out=OUT", "catgories=coco"], 2, "did you mean categories"),
        (["SET", "format=coco", "out=OUT", "categories=contigous"], 2, "did you mean contiguous"),
        (["SET", "format=coco", "out=OUT", "order=sorted"], 2, "order is no option of format=coco"),
        (["SET", "format=coco"], 2, "out= is missing"),
        ([], 2, "expected a path first"),
        (["SET", "format=coco", "out=SET/inside"], 2, "lie in each other"),
        (["SET", "format=ddranking", "out=OUT"], 3, "format=coco takes this one"),
        (["CLS", "format=coco", "out=OUT"], 3, "format=ddranking"),
        (["CLS", "format=ddranking", "out=OUT", "order=imagenete"], 2, "did you mean imagenette"),
        (["OUT", "format=coco", "out=OUT"], 3, "not a distilled set"),
    ],
)
def test_refusals(
    detections: Path, classes: Path, tmp_path: Path, words: list[str], code: int, told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"SET": str(detections), "CLS": str(classes), "OUT": str(tmp_path / "out")}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    assert main(["export", *words]) == code
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_only_what_this_command_began_is_removed(detections: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.incomplete"
    work.mkdir()
    (work / "mine.txt").write_text("keep me")
    with pytest.raises(DiskError, match="was not begun by this command"):
        export_coco(open_set(detections), tmp_path / "out")
    assert (work / "mine.txt").read_text() == "keep me"
    shutil.rmtree(work)
    (work / "new" / "train").mkdir(parents=True)  # as a killed run leaves it
    (work / ".focusdd").touch()
    (work / "new" / "train" / "half.jpg").write_bytes(b"half")
    export_coco(open_set(detections), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not (tmp_path / "out" / "train" / "half.jpg").exists()


def test_an_unfinished_or_damaged_set_is_refused(tmp_path: Path) -> None:
    folder = det_set(tmp_path / "set")
    (folder / "README.md").write_text("other")
    with pytest.raises(VerifyError, match=r"README\.md: not the bytes that COMPLETE names"):
        open_set(folder)
    (folder / "COMPLETE").unlink()
    with pytest.raises(VerifyError, match="not finished"):
        open_set(folder)
