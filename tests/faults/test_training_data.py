"""Data that is not what it should be: a training refuses it before it makes a folder, and leaves it as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from conftest import NAMES, write_coco, write_set

from faults.support import flip
from faults.training import files_of, options, rows
from focusdd_det import detset, disk
from focusdd_det.cli import run_main
from focusdd_det.errors import ConfigError, DataError, VerifyError
from focusdd_det.trainer import FocusDDTrainer
from focusdd_det.training import traindata
from focusdd_det.training.command import train

Damage = Callable[[Path], Path]
IMAGE, LABEL, SOFT = "images/train/disc-0000.jpg", "labels/train/disc-0000.txt", "soft/train/disc-0000.safetensors"


def reseal(folder: Path) -> None:
    """What somebody who means harm does after a change."""
    (folder / "COMPLETE").write_bytes(detset.seal(folder))


def flipped(name: str) -> Damage:
    def damage(folder: Path) -> Path:
        flip(folder / name)
        return folder / name

    return damage


def gone(name: str) -> Damage:
    def damage(folder: Path) -> Path:
        (folder / name).unlink()
        return folder / name

    return damage


def added(name: str) -> Damage:
    def damage(folder: Path) -> Path:
        (folder / name).write_bytes(b"stray")
        return folder / name

    return damage


def cut(name: str, size: int) -> Damage:
    def damage(folder: Path) -> Path:
        (folder / name).write_bytes((folder / name).read_bytes()[:-size])
        return folder / name

    return damage


def data_yaml(**change: str) -> Damage:
    def damage(folder: Path) -> Path:
        file = folder / "data.yaml"
        file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **change}))
        reseal(folder)
        return file

    return damage


def manifest(**change: Any) -> Damage:
    def damage(folder: Path) -> Path:
        file = folder / "manifest.jsonl"
        first, *rest = file.read_text().splitlines(keepends=True)
        file.write_text(json.dumps({**json.loads(first), **change}) + "\n" + "".join(rest))
        reseal(folder)
        return file

    return damage


DAMAGES: dict[str, Damage] = {
    "a flipped byte in an image": flipped(IMAGE),
    "a flipped byte in a label": flipped(LABEL),
    "a flipped byte in a soft target": flipped(SOFT),
    "a flipped byte in the manifest": flipped("manifest.jsonl"),
    "a flipped byte in data.yaml": flipped("data.yaml"),
    "a flipped byte in build.yaml": flipped("build.yaml"),
    "a flipped byte in COMPLETE": flipped("COMPLETE"),
    "an image cut short": cut(IMAGE, 50),
    "the last manifest line cut short": cut("manifest.jsonl", 40),
    "a deleted image": gone(IMAGE),
    "a deleted label": gone(LABEL),
    "a deleted manifest": gone("manifest.jsonl"),
    "a deleted COMPLETE": gone("COMPLETE"),
    "a stray image": added("images/train/mine.jpg"),
    "a stray label": added("labels/train/mine.txt"),
    "data.yaml with download:": data_yaml(download="import os"),
    "data.yaml with path:": data_yaml(path="/"),
    "data.yaml with ../": data_yaml(train="../elsewhere"),
    "data.yaml with an absolute val": data_yaml(val="/etc"),
    "a manifest id with ../": manifest(id="../../mine"),
    "a manifest id with a slash at its start": manifest(id="/etc/passwd"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_set(damage: Damage, tmp_path: Path, teacher_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_set(tmp_path / "set", count=4)
    named = damage(data)
    before = files_of(data)
    given = options(tmp_path, data=data, teacher=teacher_file)
    assert run_main(train, [f"{key}={value}" for key, value in given.items()]) == 6
    said = capsys.readouterr().err
    assert str(named) in said or (named.name == "COMPLETE" and "has no COMPLETE" in said)
    assert files_of(data) == before
    assert not (tmp_path / "runs").exists()


def test_an_image_that_ultralytics_would_drop_stops_the_training(tmp_path: Path, teacher_file: Path) -> None:
    """Its hash is right, so the set is what its manifest says; but a training would run on less than that."""
    data = write_set(tmp_path / "set", count=4)
    tiny = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    (data / IMAGE).write_bytes(tiny)
    item = next(detset.read_manifest(data))
    manifest(sha256={**item.sha256, "images": disk.sha256(tiny)})(data)
    assert detset.verify(data) == []
    before = files_of(data)
    with pytest.raises(VerifyError, match="lists 4 composites, but Ultralytics keeps 3"):
        FocusDDTrainer(overrides=options(tmp_path, data=data, teacher=str(teacher_file))).train()
    assert files_of(data) == before


def test_a_planted_label_cache_is_never_opened(tmp_path: Path, drawn_coco: Path, teacher_file: Path) -> None:
    """Neither in the set nor beside the pictures of the evaluation; it is left where it is."""
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (canary,)

    data = write_set(tmp_path / "set", count=4)
    evaluation = Path(shutil.copytree(drawn_coco.parent, tmp_path / "coco"))
    for file in (data / "labels" / "train.cache", evaluation / "labels" / "val.cache"):
        with file.open("wb") as stream:
            np.save(stream, np.array(Bomb(), dtype=object), allow_pickle=True)
    np.load(data / "labels" / "train.cache", allow_pickle=True)
    assert canary.exists(), "the bomb works"
    canary.unlink()
    before = files_of(data), files_of(evaluation)
    given = options(tmp_path, data=data, eval_data=str(evaluation / "data.yaml"), teacher=str(teacher_file), epochs=1)
    FocusDDTrainer(overrides=given).train()
    assert not canary.exists()
    assert (files_of(data), files_of(evaluation)) == before


def test_a_large_set_is_checked_in_seconds_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_set(tmp_path / "set", count=12)
    monkeypatch.setattr(traindata, "MANY", 12)
    monkeypatch.setattr(traindata.LOGGER, "propagate", True)
    assert traindata.resolve_data(data).count == 12
    assert "checking 12 composites against the manifest" in caplog.text


def test_another_run_folder_than_one_inside_the_set(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", count=3)
    given = options(tmp_path, data=data, supervision="labels", project=str(data / "runs"))
    with pytest.raises(ConfigError, match="inside the set"):
        FocusDDTrainer(overrides=given)
    assert detset.verify(data) == []


# ---- YOLO data sets that are not ours ----


def yolo(top: Path, **change: Any) -> Path:
    """A YOLO data set in `top/coco`; returns its data.yaml."""
    file = write_coco(top / "coco", count=4)
    content = {**yaml.safe_load(file.read_text()), **change}
    file.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return file


@pytest.mark.parametrize("path", [".", None, "../coco", "coco"])
def test_a_relative_path_is_found_from_the_folder_of_data_yaml(
    path: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = yolo(tmp_path, path=path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path if path == "coco" else tmp_path / "elsewhere")
    before = files_of(file.parent)
    data = traindata.load_yolo_data(file, "train")
    assert Path(data["train"]).resolve() == (tmp_path / "coco" / "images" / "val").resolve()
    assert data["nc"] == 3
    if path == ".":  # the whole training, in which Ultralytics reads the file once more
        given = options(tmp_path, data=str(file), eval_data=str(file), supervision="labels", epochs=1)
        FocusDDTrainer(overrides=given).train()
        assert (tmp_path / "runs" / "run" / "coco_eval.json").is_file()
    assert files_of(file.parent) == before
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_pictures_that_are_in_neither_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = yolo(tmp_path, path="nowhere")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="images not found") as caught:
        traindata.load_yolo_data(file, "train")
    assert str(tmp_path / "elsewhere" / "nowhere") in str(caught.value)
    assert str(tmp_path / "coco" / "nowhere") in str(caught.value)


def test_a_download_key_is_never_followed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = f"import pathlib; pathlib.Path({str(canary)!r}).touch()"
    file = yolo(tmp_path, download=code)
    assert traindata.load_yolo_data(file, "val")["nc"] == 3
    shutil.rmtree(tmp_path / "coco" / "images")
    with pytest.raises(DataError, match="nothing is downloaded"):
        traindata.load_yolo_data(file, "val")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "key missing|not found"),
        (b"PK\x03\x04" + bytes(100), "expected a YOLO data.yaml|cannot be used"),
        (b"<!DOCTYPE html><html></html>", "expected a YOLO data.yaml"),
        (b"!!python/object/apply:os.system [touch canary]", "expected a YOLO data.yaml"),
        (b"train: [1, 2\n", "expected a YOLO data.yaml"),
        (b"train: images/val\nval: images/val\nnames: [a, b]\nnc: 3\n", "must match"),
        (b"train: images/val\nval: images/val\n", "'names' or 'nc'"),
        (b"train: images/val\nval: images/val\nnames: {0: a, 7: b}\n", "cannot be used"),
        (b'train: "a\\0b"\nval: images/val\nnames: [a]\n', "images not found"),
    ],
)
def test_a_data_yaml_that_is_none(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = yolo(tmp_path)
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        traindata.load_yolo_data(file, "train")
    assert str(file) in str(caught.value)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("damage", ["cut short", "no bytes"])
def test_pictures_of_other_data_are_not_rewritten(tmp_path: Path, damage: str) -> None:
    """Ultralytics replaces a JPEG that is cut short by one of its own making; here it is named and left alone."""
    file = yolo(tmp_path)
    picture = tmp_path / "coco" / "images" / "val" / "scene2.jpg"
    picture.write_bytes(picture.read_bytes()[:-30] if damage == "cut short" else b"")
    before = files_of(tmp_path / "coco")
    with pytest.raises(DataError, match=r"scene2\.jpg is cut short"):
        FocusDDTrainer(overrides=options(tmp_path, data=str(file), supervision="labels")).train()
    assert files_of(tmp_path / "coco") == before


def test_a_picture_that_disappears_during_the_training(tmp_path: Path) -> None:
    file = yolo(tmp_path)
    trainer = FocusDDTrainer(overrides=options(tmp_path, data=str(file), supervision="labels"))
    picture = tmp_path / "coco" / "images" / "val" / "scene1.jpg"
    trainer.add_callback("on_train_epoch_end", lambda _: picture.unlink(missing_ok=True))
    with pytest.raises(DataError, match=r"scene1\.jpg: a picture was taken away[\s\S]*resume=.*last\.pt"):
        trainer.train()
    assert len(rows(tmp_path / "runs" / "run")) == 1


def test_classes_of_the_evaluation_that_the_training_has_not(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", count=3)
    file = yolo(tmp_path, names=["cat", "dog", "cow"])
    with pytest.raises(DataError, match="shares no class name") as caught:
        FocusDDTrainer(overrides=options(tmp_path, data=data, supervision="labels", eval_data=str(file)))
    assert all(name in str(caught.value) for name in (*NAMES, "cat"))
    assert not (tmp_path / "runs").exists()
