"""Sets and exports, opened by the programs that they are for. Each test is skipped where its program is not installed:
they are no dependencies of this package (pip install fiftyone supervision datasets ddranking rethinkdc).

FiftyOne keeps what it imports in a database, MongoDB. Its importers are run without one; where one answers
(FIFTYONE_DATABASE_URI=mongodb://..., or the one that FiftyOne brings), whole datasets are opened as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from class_data import write_class_set
from interop_support import det_set, reseal
from test_interop_card import the_card

from focusdd_det.detset import part_path, read_manifest, verify
from focusdd_det.interop.coco import ANNOTATIONS, export_coco
from focusdd_det.interop.finished import open_set
from focusdd_det.interop.layouts import export_ddranking, export_rethinkdc
from focusdd_det.labels import parse_rows

NAMES = ("disc", "square", "bar")


def needs(name: str) -> Any:
    """The module, or a skip that says what was not checked."""
    return pytest.importorskip(name, reason=f"NO {name}: that it opens our sets was not checked")


@pytest.fixture(scope="module")
def detections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = det_set(tmp_path_factory.mktemp("det") / "set")
    (folder / "README.md").write_text(the_card(folder))
    return reseal(folder)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_set(tmp_path_factory.mktemp("cls") / "set")


@pytest.fixture(scope="module", params=["copy", "set"])
def coco(
    request: pytest.FixtureRequest, detections: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The folder that the pictures' names start from, and the JSON."""
    out = tmp_path_factory.mktemp("coco") / "out"
    export_coco(open_set(detections), out, images=request.param)
    return (out / "train" if request.param == "copy" else detections), out / ANNOTATIONS


def truth(folder: Path) -> dict[str, list[tuple[str, tuple[float, ...]]]]:
    """File name -> (class, corners in px) of each label."""
    found = {}
    for item in read_manifest(folder):
        rows = parse_rows(part_path(folder, "labels", item).read_text(), 3)
        boxes = np.concatenate([rows[:, 1:3] - rows[:, 3:] / 2, rows[:, 1:3] + rows[:, 3:] / 2], axis=1) * 96
        found[f"{item.id}.jpg"] = [
            (NAMES[int(row[0])], tuple(box)) for row, box in zip(rows, boxes.tolist(), strict=True)
        ]
    return found


def assert_same(found: dict[str, list[tuple[str, tuple[float, ...]]]], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, boxes in expected.items():
        assert [label for label, _ in found[name]] == [label for label, _ in boxes]
        np.testing.assert_allclose([box for _, box in found[name]], [box for _, box in boxes], atol=0.01)


def test_plain_ultralytics_trains_on_a_classification_set(classes: Path, tmp_path: Path) -> None:
    """In a folder with links to the set and to pictures to validate on, as docs/interop.md says."""
    from ultralytics import YOLO

    val = write_class_set(tmp_path / "val_set")
    before = {path: path.read_bytes() for path in classes.rglob("*") if path.is_file()}
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "train").symlink_to(classes / "train")
    (tmp_path / "both" / "val").symlink_to(val / "train")
    result = YOLO("yolo11n-cls.yaml").train(
        data=str(tmp_path / "both"), epochs=1, imgsz=32, batch=4, workers=0, device="cpu", plots=False,
        project=str(tmp_path / "runs"),
    )  # fmt: skip
    assert 0 <= result.top1 <= 1
    assert {path: path.read_bytes() for path in before} == before
    assert verify(classes) == []


def test_torchvision_opens_a_classification_set(classes: Path) -> None:
    from torchvision.datasets import ImageFolder

    found = ImageFolder(str(classes / "train"))
    assert found.classes == ["n01", "n02", "n03"]
    assert [Path(path).parent.name for path, _ in found.samples] == [found.classes[i] for i in found.targets]
    assert len(found) == 7


def read_supervision(dataset: Any) -> dict[str, list[tuple[str, tuple[float, ...]]]]:
    return {
        Path(path).name: [
            (dataset.classes[int(index)], tuple(box))
            for index, box in zip(found.class_id, found.xyxy.tolist(), strict=True)
        ]
        for path, _, found in dataset
    }


def test_supervision_opens_a_detection_set(detections: Path) -> None:
    sv = needs("supervision")
    dataset = sv.DetectionDataset.from_yolo(
        str(detections / "images/train"), str(detections / "labels/train"), str(detections / "data.yaml")
    )
    assert dataset.classes == list(NAMES)
    assert_same(read_supervision(dataset), truth(detections))


def test_supervision_opens_the_coco_export(detections: Path, coco: tuple[Path, Path]) -> None:
    sv = needs("supervision")
    dataset = sv.DetectionDataset.from_coco(str(coco[0]), str(coco[1]))
    assert_same(read_supervision(dataset), truth(detections))


def test_supervision_opens_a_classification_set(classes: Path) -> None:
    sv = needs("supervision")
    dataset = sv.ClassificationDataset.from_folder_structure(str(classes / "train"))
    assert dataset.classes == ["n01", "n02", "n03"]
    for path, _, found in dataset:
        assert Path(path).parent.name == dataset.classes[int(found.class_id[0])]
    assert len(dataset) == 7


def read_fiftyone(**options: Any) -> tuple[list[Any], Any]:
    """What FiftyOne's own importer of a type yields, and what it says of the whole."""
    data = pytest.importorskip("fiftyone.utils.data")
    importer, _ = data.build_dataset_importer(**options)
    with importer:
        return list(importer), importer.get_dataset_info() if importer.has_dataset_info else None


def corners(detections: Any) -> list[tuple[str, tuple[float, ...]]]:
    found = []
    for one in detections.detections:
        x, y, w, h = (96 * value for value in one.bounding_box)
        found.append((one.label, (x, y, x + w, y + h)))
    return found


def test_fiftyone_s_importer_reads_a_detection_set(detections: Path) -> None:
    types = needs("fiftyone.types")
    samples, info = read_fiftyone(
        dataset_type=types.YOLOv5Dataset, dataset_dir=str(detections), yaml_path="data.yaml", split="train"
    )
    assert_same({Path(path).name: corners(labels) for path, _, labels in samples}, truth(detections))
    assert list(info["classes"]) == list(NAMES)


def test_fiftyone_s_importer_reads_the_coco_export(detections: Path, coco: tuple[Path, Path]) -> None:
    types = needs("fiftyone.types")
    samples, _ = read_fiftyone(
        dataset_type=types.COCODetectionDataset,
        data_path=str(coco[0]),
        labels_path=str(coco[1]),
        label_types=["detections"],
    )
    assert_same({Path(path).name: corners(labels) for path, _, labels in samples}, truth(detections))
    assert all(Path(path).is_file() for path, _, _ in samples)
    assert all(0.25 < one.confidence <= 1 for _, _, labels in samples for one in labels.detections)


def test_fiftyone_s_importer_reads_a_classification_set(classes: Path) -> None:
    types = needs("fiftyone.types")
    samples, _ = read_fiftyone(dataset_type=types.ImageClassificationDirectoryTree, dataset_dir=str(classes / "train"))
    assert len(samples) == 7
    assert all(label.label == Path(path).parent.name for path, _, label in samples)


@pytest.fixture
def database() -> Iterator[Any]:
    """FiftyOne with a database that answers; what the test puts there is deleted."""
    fiftyone = needs("fiftyone")
    try:
        before = set(fiftyone.list_datasets())
    except Exception as error:  # whatever it is, FiftyOne has no database
        pytest.skip(f"NO database for FiftyOne: that Dataset.from_dir opens our sets was not checked ({error})")
    yield fiftyone
    for name in set(fiftyone.list_datasets()) - before:
        fiftyone.delete_dataset(name)


def test_fiftyone_opens_a_detection_set(database: Any, detections: Path) -> None:
    dataset = database.Dataset.from_dir(
        dataset_dir=str(detections), dataset_type=database.types.YOLOv5Dataset, yaml_path="data.yaml", split="train"
    )
    assert_same({Path(one.filepath).name: corners(one.ground_truth) for one in dataset}, truth(detections))


def test_fiftyone_opens_the_coco_export(database: Any, detections: Path, coco: tuple[Path, Path]) -> None:
    dataset = database.Dataset.from_dir(
        dataset_type=database.types.COCODetectionDataset,
        data_path=str(coco[0]),
        labels_path=str(coco[1]),
        label_types=["detections"],
    )
    assert_same({Path(one.filepath).name: corners(one.ground_truth) for one in dataset}, truth(detections))


def test_fiftyone_opens_a_classification_set(database: Any, classes: Path) -> None:
    dataset = database.Dataset.from_dir(
        dataset_dir=str(classes / "train"), dataset_type=database.types.ImageClassificationDirectoryTree
    )
    assert dataset.count_values("ground_truth.label") == {
        folder.name: len(list(folder.iterdir())) for folder in (classes / "train").iterdir()
    }


def test_load_dataset_finds_the_pictures(detections: Path, classes: Path, tmp_path: Path) -> None:
    """By the `configs` of the card: the composites, and not the contact sheet."""
    datasets = needs("datasets.load")  # not `datasets`: this repository has a folder of that name
    (detections / "contact_sheet.jpg").write_bytes(next((detections / "images/train").iterdir()).read_bytes())
    found = datasets.load_dataset(str(detections), split="train", cache_dir=str(tmp_path / "cache"))
    (detections / "contact_sheet.jpg").unlink()
    assert len(found) == 5
    assert found[0]["image"].size == (96, 96)
    assert found.column_names == ["image"]
    text = (detections / "README.md").read_text()
    text = text.replace("images/train/*.jpg", "train/*/*.jpg").replace("drop_labels: true", "drop_labels: false")
    (classes / "README.md").write_text(text)
    reseal(classes)
    found = datasets.load_dataset(str(classes), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(found) == 7
    assert found.features["label"].names == ["n01", "n02", "n03"]


def test_rethinkdc_s_own_reader(classes: Path, tmp_path: Path) -> None:
    """Its list of pictures; its ImageFolderIPC around that does not start with the torchvision of today."""
    reader = needs("rethinkdc.imagenet_ipc")
    export_rethinkdc(open_set(classes), tmp_path / "out")
    samples = reader.make_dataset(str(tmp_path / "out" / "train"), extensions=(".jpg",), image_number=2)
    assert len(samples) == 6  # of seven: the first two of each class
    for path, label in samples:
        assert Path(path).parent.name == ("n01", "n02", "n03")[label]


def test_ddranking_s_own_form(classes: Path, tmp_path: Path) -> None:
    """Its own writer of random pictures, on our pictures, gives the folders that the export gives."""
    data = needs("ddranking.utils.data")
    export_ddranking(open_set(classes), tmp_path / "out")
    by_class: dict[str, list[str]] = {}
    for item in read_manifest(classes):
        by_class.setdefault(item.class_name, []).append(str(part_path(classes, "images", item)))
    samples = [by_class[name] for name in sorted(by_class)]
    there = Path(data.get_random_data_path("any", samples, 2, 0, str(tmp_path / "theirs")))
    assert sorted(p.name for p in there.iterdir()) == sorted(p.name for p in (tmp_path / "out/train").iterdir())
    ours = {p.name for p in (tmp_path / "out/train/00000").iterdir()}
    assert {p.name for p in (there / "00000").iterdir()} <= ours
    for folder in there.iterdir():
        own = {p.read_bytes() for p in (tmp_path / "out/train" / folder.name).iterdir()}
        assert {p.read_bytes() for p in folder.iterdir()} <= own
