"""The command line of training classifiers: every key of Ultralytics beside ours, typos, plans, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cls_support import CLASSES, SIZE, make_pictures, make_teacher, options, train
from conftest import REPOSITORY

from focusdd_det.classify.relabel import load_config, relabel
from focusdd_det.classify.teacher import load_classifier
from focusdd_det.classify.train_cli import train as command
from focusdd_det.classify.train_cli import train_overrides
from focusdd_det.cli import run_main


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def words(tmp_path: Path, data: Path, **more: Any) -> list[str]:
    return [f"{key}={value}" for key, value in options(tmp_path, data, **more).items() if value is not None]


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(command, ["--help"]) == 0
    out = capsys.readouterr().out
    assert "tools/train_cls.py model=resnet18" in out
    for key in ("labels:", "store:", "subset_ipc:", "weight_decay:"):
        assert key in out


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["techer=resnet18"], 2, "did you mean teacher"),
        (["epoch=3"], 2, "did you mean epochs"),
        (["temperature=-1"], 2, "temperature=-1"),
        (["lr0=fast"], 2, "Ultralytics refuses"),
        (["task=detect"], 2, "this trains classifiers"),
        (["imgsz=100"], 2, "multiple of 32"),
        (["model=resnet_18"], 4, "did you mean resnet18"),
        (["eval_data=nowhere"], 3, "is not a folder"),
        (["labels=live"], 2, "needs teacher="),
        (["resume=nowhere"], 4, "nothing to resume"),
    ],
)
def test_mistakes_end_with_a_message_and_a_code(
    extra: list[str], code: int, message: str, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(command, [*words(tmp_path, pictures), *extra]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_missing_eval_data_is_told(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [word for word in words(tmp_path, pictures) if not word.startswith("eval_data")]
    assert run_main(command, given) == 2
    assert "eval_data=none" in capsys.readouterr().err


def test_a_store_that_does_not_fit_ends_with_its_code(
    tmp_path: Path, pictures: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"epochs": 1, "size": SIZE, "batch": 8, "device": "cpu"}
    out = str(tmp_path / "labels")
    relabel(load_config(data=str(pictures), out=out, teacher=str(teacher), eval_data="none", **values))
    given = words(tmp_path, pictures, store=out)
    assert run_main(command, [*given, "imgsz=64"]) == 2
    assert "train at imgsz=32" in capsys.readouterr().err
    assert run_main(command, [*given, "classes=[0,1]"]) == 6
    assert "other classes" in capsys.readouterr().err
    assert run_main(command, [*given, f"store={tmp_path / 'none'}"]) == 6
    assert "no COMPLETE" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(command, [*words(tmp_path, pictures), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "13 pictures of 3 classes" in out
    assert "the class folders" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("extra", "code", "told"),
    [
        (["store=nowhere", "labels=store"], 6, "nowhere"),
        (["imgsz=33"], 2, "multiple of 32"),
        (["model=resnet17"], 4, "resnet17"),
        (["batch=0"], 2, "batch=0"),
        (["resume=nowhere"], 4, "nowhere"),
    ],
)
def test_a_dry_run_makes_every_check(
    extra: list[str], code: int, told: str, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word for word in words(tmp_path, pictures) if not (word.startswith("labels") and len(extra) == 2)]
    assert run_main(command, [*given, *extra, "--dry-run"]) == code
    assert told in capsys.readouterr().err


def test_accuracy_on_the_training_pictures_is_not_called_a_headline(tmp_path: Path, pictures: Path) -> None:
    given = [*words(tmp_path, pictures), f"data={pictures / 'train'}", f"eval_data={pictures / 'train'}"]
    assert run_main(command, [*given, "name=same"]) == 0
    last = json.loads(next(tmp_path.rglob("same/accuracy.json")).read_text())["last"]
    assert last["meaning"] == "on the pictures it was trained on: not a measure of quality"


def test_a_file_of_options_and_the_shipped_recipes(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("epochs: 7\nsubset_ipc: 3\n")
    asked = train_overrides({"cfg": str(mine), "epochs": 9})
    assert (asked["epochs"], asked["subset_ipc"], asked["lr0"]) == (9, 3, 0.001)
    for shipped in ("train_cls.yaml", "finetune_cls.yaml"):
        if (REPOSITORY / "cfg" / shipped).is_file():
            assert train_overrides({"cfg": shipped})["optimizer"] == "AdamW"
    assert train_overrides({"resume": "runs/x"}) == {"resume": "runs/x"}


def test_the_tool_trains(tmp_path: Path, pictures: Path) -> None:
    tool = [sys.executable, str(REPOSITORY / "tools" / "train_cls.py")]
    given = words(tmp_path, pictures, epochs=1)
    done = subprocess.run([*tool, *given], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "(headline)" in done.stdout + done.stderr
    assert (tmp_path / "runs" / "run" / "weights" / "last.safetensors").is_file()


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultralytics.utils.callbacks.base import default_callbacks

    def stop(trainer: Any) -> None:
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setitem(default_callbacks, "on_train_batch_end", [stop])
    assert run_main(command, words(tmp_path, pictures, every=1)) == 130
    last = tmp_path / "runs" / "run" / "weights" / "last.pt"
    assert f"focusdd classify train resume={last}" in capsys.readouterr().err
    monkeypatch.setitem(default_callbacks, "on_train_batch_end", [])
    assert run_main(command, [f"resume={last}"]) == 0


def test_yolo_students_stay_stock(tmp_path: Path, pictures: Path) -> None:
    trainer = train(tmp_path, pictures, model="yolo11n-cls.yaml", epochs=1, batch=12)
    assert not (Path(trainer.wdir) / "last.safetensors").exists()
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "focusdd_det":
            raise ImportError("this process has no focusdd_det")
sys.meta_path.insert(0, Refuse())
try:
    import torchvision
except RuntimeError:  # a CUDA build on a CPU torch, which is not what is tested
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        sys.modules.pop(name)
    import torch
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
import torch
from ultralytics import YOLO
model = YOLO({str(Path(trainer.last))!r})
assert model.task == "classify", model.task
assert list(model.names.values()) == {list(CLASSES)!r}, model.names
assert "focusdd" not in repr(model.ckpt["train_args"])
print("opened", model.model(torch.zeros(1, 3, {SIZE}, {SIZE}))[0].shape[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.strip().endswith("opened 3"), done.stderr[-2000:]
    assert load_classifier(str(trainer.last), None, CLASSES[::-1], SIZE).classes == CLASSES[::-1]
