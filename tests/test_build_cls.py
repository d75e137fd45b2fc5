"""Classification sets: composites in class folders, with the manifest, resume and checks of a detection set."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.datasets import ImageFolder

from focusdd_det import detset, disk
from focusdd_det.build import build, load_class_config
from focusdd_det.cli import build_cls_command, run_main
from focusdd_det.detset import read_manifest, verify
from focusdd_det.errors import ConfigError, DataError, FocusDDError, VerifyError
from focusdd_det.methods import METHODS
from focusdd_det.plan import make_plan
from focusdd_det.scoring.decode import decode

CLASSES = ("n01", "n02", "n03")
HUE = {"n01": (200, 40, 40), "n02": (40, 200, 40), "n03": (40, 40, 200)}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures a class, each class of one colour, and a tiny ViT that knows the classes in another order."""
    top = tmp_path_factory.mktemp("cls")
    rng = np.random.default_rng(0)
    for name, colour in HUE.items():
        (top / "photos" / name).mkdir(parents=True)
        for i in range(12):
            width, height = int(rng.integers(60, 100)), int(rng.integers(60, 100))
            picture = np.clip(np.array(colour) + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)
            cv2.rectangle(picture, (i, i), (i + 20, i + 25), [int(v) for v in rng.integers(0, 255, 3)], -1)
            cv2.imwrite(str(top / "photos" / name / f"{i}.jpg"), picture[..., ::-1])
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **kwargs)
    torch.nn.init.normal_(model.head.weight, std=1.0)
    save_file(model.state_dict(), str(top / "vit.safetensors"))
    spec = {"arch": "vit_tiny_patch16_224", "kwargs": kwargs, "classes": ["n03", "n01", "n02"]}
    (top / "vit.json").write_text(json.dumps(spec | {"weights": "vit.safetensors"}))
    return top


def make(bench: Path, out: Path, **more: Any) -> Path:
    values: dict[str, Any] = {"sources": [str(bench / "photos")], "out": str(out), "ipc": 2, "image_size": 64}
    values |= {"selector": str(bench / "vit.json"), "near_duplicate": 0, "batch": 8, "workers": 2, "device": "cpu"}
    return build(load_class_config(**(values | more))).folder


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "build.log.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def made(bench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(bench, tmp_path_factory.mktemp("made") / "set")


def test_what_overwriting_finds_in_a_set_is_kept(bench: Path, tmp_path: Path) -> None:
    out = make(bench, tmp_path / "set", ipc=1, method="random")
    (out / "runs" / "train").mkdir(parents=True)
    (out / "runs" / "train" / "best.pt").write_text("hours of work")
    (out / "notes.txt").write_text("mine")
    make(bench, out, method="random", overwrite=True)
    assert verify(out) == []
    aside = tmp_path / "set.strays"
    assert (aside / "runs" / "train" / "best.pt").read_text() == "hours of work"
    assert (aside / "notes.txt").read_text() == "mine"


def test_a_begun_set_that_is_overwritten_keeps_what_is_not_its_own(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("focusdd_det.build._finish", stop)
        make(bench, tmp_path / "set", ipc=1, method="random")
    (tmp_path / "set.incomplete" / "notes.txt").write_text("mine")
    make(bench, tmp_path / "set", method="random", overwrite=True)
    assert [p.name for p in (tmp_path / "set.strays").iterdir()] == ["notes.txt"]


def test_a_class_that_comes_out_smaller_is_told_of(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("focusdd"), "propagate", True)
    photos = shutil.copytree(bench / "photos", tmp_path / "photos")
    for i in range(1, 9):  # another file, the same picture
        shutil.copy(photos / "n02" / "0.jpg", photos / "n02" / f"{i}.jpg")
        with (photos / "n02" / f"{i}.jpg").open("ab") as file:
            file.write(bytes(i))
    make(bench, tmp_path / "set", sources=[str(photos)], method="random", near_duplicate=4)
    assert "1 classes have fewer composites than planned" in caplog.text and "n02 1 of 2" in caplog.text


def test_a_set_in_a_folder_that_a_link_of_the_sources_leads_to_is_refused(bench: Path, tmp_path: Path) -> None:
    real = shutil.copytree(bench / "photos", tmp_path / "real")
    (tmp_path / "photos").mkdir()
    for name in CLASSES:
        (tmp_path / "photos" / name).symlink_to(real / name)
    with pytest.raises(ConfigError, match="lie in each other"):
        make(bench, real / "n01" / "set", sources=[str(tmp_path / "photos")], method="random")
    assert verify(make(bench, tmp_path / "set", sources=[str(tmp_path / "photos")], method="random")) == []


def test_composites_lie_in_class_folders_that_stock_loaders_read(made: Path) -> None:
    assert verify(made) == []
    assert detset.task_of(made) == "classify"
    stock = ImageFolder(str(made / "train"))
    assert stock.classes == list(CLASSES) == detset.read_data_yaml(made)
    assert len(stock) == 6
    assert all(picture.size == (64, 64) for picture, _ in stock)
    for item in read_manifest(made):
        assert [cell.kind for cell in item.cells].count("background") == 1
        assert len(item.cells) == 4
        assert {cell.folder for cell in item.cells} == {item.class_name}
        pixels = cv2.imread(str(detset.part_path(made, "images", item)))[..., ::-1].reshape(-1, 3).mean(axis=0)
        assert int(pixels.argmax()) == CLASSES.index(item.class_name)  # the pictures of the class, and of no other


def test_p_is_that_of_the_source_s_class_whatever_the_selector_s_order(bench: Path, made: Path) -> None:
    from focusdd_det.scoring.glance import view_pixels
    from focusdd_det.selector import load_selector

    vit = load_selector(str(bench / "vit.json"), None)
    for item in list(read_manifest(made))[::2]:
        cell = item.cells[0]
        picture = decode((bench / "photos" / cell.path).read_bytes(), 32)[0]
        view = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
        view[0] = torch.from_numpy(view_pixels(picture, 32, "crop")).permute(2, 0, 1)
        p = vit(view)[0][0, vit.classes.index(item.class_name)]
        assert cell.p == pytest.approx(float(p), abs=2e-4)


def test_same_bytes_for_any_number_of_workers_and_after_an_interruption(
    bench: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert content(make(bench, tmp_path / "one", workers=1)) == content(made)
    written = detset.append

    def stop(folder: Path, item: detset.Item) -> None:
        if item.class_name == "n02":
            raise KeyboardInterrupt
        written(folder, item)

    monkeypatch.setattr(detset, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        make(bench, tmp_path / "two")
    monkeypatch.undo()
    assert not (tmp_path / "two").exists()
    assert content(make(bench, tmp_path / "two")) == content(made)


def test_a_larger_set_begins_with_the_smaller_one(bench: Path, made: Path, tmp_path: Path) -> None:
    grown = make(bench, tmp_path / "grown", ipc=3, grow_from=str(made))
    assert verify(grown) == []
    small = {item.line() for item in read_manifest(made)}
    lines = [item.line() for item in read_manifest(grown)]
    assert len(lines) == 9
    assert small < set(lines)
    for name, data in content(made).items():
        if name.startswith("train/"):
            assert (grown / name).read_bytes() == data


def test_what_is_damaged_missing_or_stray_is_found_and_repaired(bench: Path, tmp_path: Path) -> None:
    folder = make(bench, tmp_path / "set")
    before = content(folder)
    items = list(read_manifest(folder))
    detset.part_path(folder, "images", items[0]).write_bytes(b"other")
    detset.part_path(folder, "images", items[3]).unlink()
    (folder / "train" / "n01" / "note.txt").write_text("mine")
    (folder / "train" / "n09").mkdir()
    (folder / "train" / "n09" / "picture.jpg").write_bytes(b"mine")
    problems = "\n".join(verify(folder))
    for name in (items[0].id, items[3].id, "note.txt", "n09"):
        assert name in problems
    with pytest.raises(VerifyError, match="--resume"):
        make(bench, folder)
    values = {"sources": [str(bench / "photos")], "out": str(folder), "ipc": 2, "image_size": 64, "batch": 8}
    values |= {"selector": str(bench / "vit.json"), "near_duplicate": 0, "workers": 2, "device": "cpu"}
    build(load_class_config(**values), resume=True)
    assert verify(folder) == []
    assert content(folder) == before
    aside = tmp_path / "set.strays" / "train"
    assert (aside / "n01" / "note.txt").read_text() == "mine"
    assert (aside / "n09" / "picture.jpg").read_bytes() == b"mine"


def test_stock_ultralytics_may_leave_its_cache(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "set")
    (folder / "train.cache").write_bytes(b"never opened")
    assert verify(folder) == []


def test_random_pictures_are_whole_and_one_to_a_composite(bench: Path, tmp_path: Path) -> None:
    folder = make(bench, tmp_path / "whole", method="whole", ipc=5)
    items = list(read_manifest(folder))
    assert len(items) == 15
    for item in items:
        (cell,) = item.cells
        assert cell.crop == ((cell.width - cell.crop[2]) // 2, (cell.height - cell.crop[2]) // 2, cell.crop[2])
        assert cell.crop[2] == min(cell.width, cell.height)
    other = make(bench, tmp_path / "other", method="whole", ipc=5, seed=1)
    assert {c.path for i in read_manifest(other) for c in i.cells} != {c.path for i in items for c in i.cells}
    assert make_plan(load_class_config(sources=[str(bench / "photos")], method="whole", ipc=12)).composites == 36


def test_realism_takes_the_crop_that_the_classifier_is_surest_of(bench: Path, tmp_path: Path) -> None:
    from focusdd_det.scoring.glance import view_pixels
    from focusdd_det.selector import load_selector

    config = load_class_config(sources=["x"], seed=0)
    folder = make(bench, tmp_path / "realism", method="realism", ipc=2)
    vit = load_selector(str(bench / "vit.json"), None)
    sure: dict[str, list[float]] = {}
    for name in CLASSES:
        for path in sorted((bench / "photos" / name).iterdir()):
            picture = cv2.imread(str(path))[..., ::-1].copy()
            height, width = picture.shape[:2]
            crops = METHODS["realism"].look_crops(width, height, disk.sha256(path.read_bytes()), config)
            assert len(crops) == 5
            views = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
            for i, c in enumerate(crops):
                assert 0.28 * min(width, height) - 1 <= c.side <= min(width, height)
                square = picture[c.y : c.y + c.side, c.x : c.x + c.side]
                views[i] = torch.from_numpy(view_pixels(square, 32, "squash")).permute(2, 0, 1)
            p = vit(views)[0][:5, vit.classes.index(name)]
            best = int(p.argmax())
            sure[f"{name}/{path.name}"] = [float(p[best]), crops[best].x, crops[best].y, crops[best].side]
    for name in CLASSES:
        cells = [c for i in read_manifest(folder) if i.class_name == name for c in i.cells]
        ranked = sorted((v[0] for k, v in sure.items() if k.startswith(name)), reverse=True)
        assert sorted((c.p for c in cells), reverse=True) == pytest.approx(ranked[:8], abs=2e-4)
        for c in cells:
            assert c.kind == "key"
            assert list(c.crop or ()) == sure[c.path][1:]


def test_classes_by_map_and_by_name(bench: Path, tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text("n01: warm\nn03: cold\n")
    source = f"{bench / 'photos'}::{tmp_path / 'map.yaml'}"
    folder = make(bench, tmp_path / "mapped", sources=[source], ipc=1)
    assert detset.read_data_yaml(folder) == ["cold", "warm"]
    assert {i.class_name: i.cells[0].folder for i in read_manifest(folder)} == {"cold": "n03", "warm": "n01"}
    some = make(bench, tmp_path / "some", classes=["n02"], ipc=1)
    assert detset.read_data_yaml(some) == ["n02"]
    assert verify(some) == []


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"classes": ["n2"]}, ConfigError, "did you mean n02"),
        ({"method": "realizm"}, ConfigError, "did you mean realism"),
        ({"sources": ["PHOTOS/.."]}, DataError, "PHOTOS"),
        ({"sources": ["nowhere"]}, DataError, "no source folder nowhere"),
        ({"n_key": 5}, ConfigError, "n_key=5"),
        ({"ipc": 5, "short_class": "error"}, DataError, "too few sources"),
    ],
)
def test_refusals(bench: Path, tmp_path: Path, change: dict[str, Any], error: type[FocusDDError], told: str) -> None:
    change = {
        key: [v.replace("PHOTOS", str(bench / "photos")) for v in value] if key == "sources" else value
        for key, value in change.items()
    }
    if change.get("sources", [""])[0].endswith(".."):
        (tmp_path / "imagenet" / "train").mkdir(parents=True)
        (tmp_path / "imagenet" / "val").mkdir()
        change, told = {"sources": [str(tmp_path / "imagenet")]}, "holds train, val: give the folder"
    with pytest.raises(error, match=told):
        make(bench, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_a_manifest_cannot_lead_a_class_outside(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "set")
    text = (folder / "manifest.jsonl").read_text()
    for name in ("../../n01", "..", ".hidden", "a/b"):
        (folder / "manifest.jsonl").write_text(text.replace('"class_name":"n01"', f'"class_name":"{name}"'))
        with pytest.raises(VerifyError, match="folder"):
            list(read_manifest(folder))


def test_a_detection_manifest_in_a_classification_set_is_found(made: Path, drawn_set: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "set")
    shutil.copy(drawn_set / "manifest.jsonl", folder / "manifest.jsonl")
    assert any("has other parts than images" in problem for problem in verify(folder))


def test_command(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--source", str(bench / "photos"), "--ipc", "1", "--selector", str(bench / "vit.json"), "batch=8"]
    assert run_main(build_cls_command, [*words, "--out", str(tmp_path / "a"), "--dry-run"]) == 0
    assert "3 composites planned" in capsys.readouterr().out
    assert not (tmp_path / "a").exists()
    assert run_main(build_cls_command, [*words, "--out", str(tmp_path / "a")]) == 0
    assert "focusdd classify relabel data=" in capsys.readouterr().out
    card = (tmp_path / "a" / "README.md").read_text()
    assert "image-classification" in card
    assert "| n02 | 1 |" in card
    assert run_main(build_cls_command, [*words, "teacher=x.pt"]) == 2
    assert "unknown key `teacher`" in capsys.readouterr().err
    assert run_main(build_cls_command, ["--help"]) == 0
    assert "build_cls_set.py --source" in capsys.readouterr().out
