"""Pictures by class: by name, never by position."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
from class_data import CLASSES, write_class_folders, write_class_set

from focusdd_det.classify.classset import read_class_set
from focusdd_det.errors import DataError, VerifyError


def test_a_set_of_ours_keeps_its_order(tmp_path: Path) -> None:
    folder = write_class_set(tmp_path / "set", count=5)
    found = read_class_set(folder, "train")
    assert found.names == CLASSES and found.is_ours and len(found) == 5
    assert found.classes.tolist() == [0, 1, 2, 0, 1]
    for path, index, key in zip(found.paths, found.classes, found.keys, strict=True):
        assert path.startswith(f"train/{CLASSES[index]}/")
        assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == key
    assert found.sha256 == hashlib.sha256((folder / "manifest.jsonl").read_bytes()).hexdigest()
    assert read_class_set(folder / "data.yaml", "train").paths == found.paths


def test_a_damaged_set_is_refused(tmp_path: Path) -> None:
    folder = write_class_set(tmp_path / "set")
    victim = next((folder / "train").rglob("*.jpg"))
    victim.write_bytes(victim.read_bytes() + b"x")
    with pytest.raises(VerifyError, match=r"not intact(.|\n)*" + victim.name):
        read_class_set(folder, "train")


def test_a_detection_set_is_refused_with_the_command_that_builds_the_right_one(drawn_set: Path) -> None:
    with pytest.raises(DataError, match=r"detection set.*build_cls_set\.py"):
        read_class_set(drawn_set, "train")


def test_a_distilled_set_is_no_evaluation_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no val pictures"):
        read_class_set(write_class_set(tmp_path / "set"), "val")


@pytest.mark.parametrize("inner", ["", "val"])
def test_class_folders_are_sorted(tmp_path: Path, inner: str) -> None:
    write_class_folders(tmp_path / "data" / inner)
    found = read_class_set(tmp_path / "data", "val")
    prefix = f"{inner}/" if inner else ""
    assert found.names == ("n01", "n02", "n03") and not found.is_ours
    assert found.paths == [f"{prefix}{n}/p{i}.jpg" for n in found.names for i in range(2)]
    assert found.classes.tolist() == [0, 0, 1, 1, 2, 2] and found.classes.dtype == np.int64


def test_the_place_of_the_folder_changes_no_key(tmp_path: Path) -> None:
    flat = read_class_set(write_class_folders(tmp_path / "a"), "train")
    write_class_folders(tmp_path / "b" / "train")
    split = read_class_set(tmp_path / "b", "train")
    assert flat.keys == split.keys and flat.sha256 == split.sha256 and len(set(flat.keys)) == len(flat)


def test_a_file_of_another_size_changes_the_hash(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "a")
    before = read_class_set(folder, "train").sha256
    with (folder / "n01" / "p0.jpg").open("ab") as file:
        file.write(b"0")
    assert read_class_set(folder, "train").sha256 != before


def test_evaluation_classes_are_matched_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_class_folders(tmp_path / "val", (*CLASSES, "n00"))
    with caplog.at_level(logging.INFO, logger="focusdd"):
        found = read_class_set(folder, "val", CLASSES)
    assert found.names == CLASSES
    assert [CLASSES[c] for c in found.classes] == [path.split("/")[0] for path in found.paths]
    assert [r.getMessage() for r in caplog.records] == [f"{folder}: 3 of its 4 class folders are used"]


def test_a_class_without_a_folder_names_both_lists(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "val", ("n01", "n02"))
    with pytest.raises(DataError, match=r"n03(.|\n)*asked for: n03, n01, n02(.|\n)*it has: n01, n02"):
        read_class_set(folder, "val", CLASSES)


def test_an_empty_class_folder_is_refused(tmp_path: Path) -> None:
    (write_class_folders(tmp_path / "val") / "n09").mkdir()
    with pytest.raises(DataError, match="n09 holds no picture"):
        read_class_set(tmp_path / "val", "val")


def test_a_missing_split_is_not_taken_for_classes(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "data" / "train")
    with pytest.raises(DataError, match="has train but no val"):
        read_class_set(tmp_path / "data", "val")


def test_only_some_classes(tmp_path: Path) -> None:
    whole = read_class_set(write_class_set(tmp_path / "set"), "train")
    part = whole.only(["n02", "n03"])
    assert part.names == ("n02", "n03") and part.sha256 != whole.sha256
    assert [part.names[c] for c in part.classes] == [path.split("/")[1] for path in part.paths]
    assert part.keys == [k for k, p in zip(whole.keys, whole.paths, strict=True) if "/n01/" not in p]
    with pytest.raises(DataError, match="n07"):
        whole.only(["n07"])
