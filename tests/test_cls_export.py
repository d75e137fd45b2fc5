"""Data sets without class folders become class folders, picture for picture."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from focusdd_det.classify.export import export, export_command
from focusdd_det.cli import run_main
from focusdd_det.errors import DataError, DiskError


def picture(path: Path, value: int) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((8, 8, 3), value, np.uint8))
    return path.read_bytes()


@pytest.fixture
def food(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """Food-101's tree with two classes and one split."""
    top = tmp_path / "food-101"
    table = {"apple_pie": ["apple_pie/1", "apple_pie/2"], "sushi": ["sushi/9"]}
    files = {
        name: picture(top / "images" / f"{name}.jpg", 10 * i)
        for i, name in enumerate(f for names in table.values() for f in names)
    }
    (top / "meta").mkdir()
    (top / "meta" / "train.json").write_text(json.dumps(table))
    return tmp_path, files


def test_food101_byte_for_byte(food: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    root, files = food
    assert export("food101", root, tmp_path / "out") == 3
    written = {p.parent.name: p.read_bytes() for p in (tmp_path / "out").rglob("*.jpg")}
    assert written["sushi"] == files["sushi/9"]
    assert sorted(p.parent.name for p in (tmp_path / "out").rglob("*.jpg")) == ["apple_pie", "apple_pie", "sushi"]
    with pytest.raises(DiskError, match="exists"):
        export("food101", root, tmp_path / "out")


def test_cifar100_pixel_for_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "cifar-100-python"
    base.mkdir()
    rng = np.random.default_rng(0)
    data = rng.integers(0, 255, (3, 3 * 32 * 32)).astype(np.uint8)
    # What torchvision reads: pickles, which it opens only when their hash is the published one.
    (base / "train").write_bytes(pickle.dumps({"data": data, "fine_labels": [1, 0, 1]}))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "bear"]}))
    with pytest.raises(DataError, match="corrupted"):
        export("cifar100", tmp_path, tmp_path / "out")
    monkeypatch.setattr(datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    assert export("cifar100", tmp_path, tmp_path / "out") == 3
    pixels = np.asarray(Image.open(tmp_path / "out" / "bear" / "000002.png"))
    np.testing.assert_array_equal(pixels, data[2].reshape(3, 32, 32).transpose(1, 2, 0))


def test_tiny_imagenet_s_validation_pictures(tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    data = picture(root / "val" / "images" / "val_0.JPEG", 3)
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01443537\t0\t32\t44\t62\n")
    assert export("tiny_imagenet_val", root, tmp_path / "out") == 1
    assert (tmp_path / "out" / "n01443537" / "000000.JPEG").read_bytes() == data
    (root / "val" / "val_annotations.txt").write_text("../../etc/passwd\tn01443537\n")
    with pytest.raises(DataError, match="file name, tab"):
        export("tiny_imagenet_val", root, tmp_path / "other")
    (root / "val" / "val_annotations.txt").write_text("gone.JPEG\tn01443537\n")
    with pytest.raises(DataError, match=r"gone\.JPEG is missing"):
        export("tiny_imagenet_val", root, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_interrupted_export_is_begun_anew_and_a_stranger_s_folder_is_not(
    food: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    root, _ = food
    work = tmp_path / "out.incomplete"
    work.mkdir()
    (work / "mine.txt").write_text("mine")
    with pytest.raises(DiskError, match="not an export"):
        export("food101", root, tmp_path / "out")
    assert (work / "mine.txt").read_text() == "mine"
    (work / ".export").touch()
    assert export("food101", root, tmp_path / "out") == 3
    assert not work.exists()


@pytest.mark.parametrize(
    ("argv", "code", "told"),
    [
        (["dataset=food11", "root=x", "out=y"], 2, "did you mean food101"),
        (["dataset=food101", "out=y"], 2, "root= is missing"),
        (["dataset=food101", "root=nowhere", "out=y"], 3, "not found"),
        (["datset=food101"], 2, "did you mean dataset"),
        (["dataset=cifar100", "root=nowhere", "out=y", "split=val"], 3, "expected train or test"),
    ],
)
def test_command_refuses(
    argv: list[str],
    code: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(export_command, argv) == code
    assert told in capsys.readouterr().err


def test_command(food: tuple[Path, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(export_command, ["dataset=food101", f"root={food[0]}", f"out={tmp_path / 'out'}"]) == 0
    assert "3 pictures in 2 class folders" in capsys.readouterr().out
