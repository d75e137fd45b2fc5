"""`backbone=`: what of a student comes from the file, what is frozen, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import save_detector, tiny_yaml
from test_trainer import Killed, _callbacks, kill_in, options, rows, same, weights
from ultralytics.nn.tasks import ClassificationModel, DetectionModel

from focusdd_det.errors import ConfigError, WeightsError
from focusdd_det.experiment.distill import StockDistillation
from focusdd_det.trainer import FocusDDTrainer
from focusdd_det.training.backbone import start_backbone
from focusdd_det.training.command import plan, train_overrides

BACKBONE = 5  # layers of the tiny detector


def of_layers(state: dict[str, torch.Tensor], layers: range) -> dict[str, torch.Tensor]:
    return {key: value.float() for key, value in state.items() if int(key.split(".")[1]) in layers}


def state_in(file: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(file, weights_only=False)["model"].state_dict()
    return state


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a if not key.endswith(but or ("-",)))


def classifier(path: Path, name: str = "yolo11n-cls.yaml") -> Path:
    torch.save({"model": ClassificationModel(name, verbose=False).half(), "train_args": {}, "epoch": -1}, path)
    return path


def test_a_classifier_gives_its_first_nine_layers(tmp_path: Path) -> None:
    file = classifier(tmp_path / "yolo11n-cls.pt")
    student = DetectionModel("yolo11n.yaml", verbose=False)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    assert start_backbone(student, file, 9) == 9
    given = state_in(file)
    after = student.state_dict()
    assert equal(of_layers(after, range(9)), of_layers(given, range(9)))
    assert equal(of_layers(after, range(9, 24)), of_layers(before, range(9, 24)))
    for freeze in (11, [0, 9]):
        with pytest.raises(ConfigError, match=r"layer 9 .* give freeze=9"):
            start_backbone(student, file, freeze)


def test_another_scale_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"first layer .*\(16, 3, 3, 3\).* not that of the student .*\(32, 3, 3, 3\)"
    ):
        start_backbone(DetectionModel("yolo11s.yaml", verbose=False), classifier(tmp_path / "n.pt"))


def test_a_frozen_backbone_stays_and_the_rest_learns(tmp_path: Path, drawn_set: Path, teacher_file: Path) -> None:
    start = save_detector(tmp_path / "start.pt", seed=7)
    values = options(tmp_path, drawn_set, teacher=str(teacher_file), backbone=str(start), freeze=BACKBONE)
    trainer = FocusDDTrainer(overrides=values)
    trainer.train()
    run = tmp_path / "runs" / "run"
    given, last = state_in(start), weights(run / "weights" / "last.pt")
    assert equal(of_layers(last, range(BACKBONE)), of_layers(given, range(BACKBONE)), ("num_batches_tracked",))
    head = range(BACKBONE, BACKBONE + 1)
    moved = [key for key, value in of_layers(last, head).items() if not torch.equal(value, of_layers(given, head)[key])]
    assert any(key.endswith("conv.weight") for key in moved)
    assert yaml.safe_load((run / "focusdd.yaml").read_text())["backbone"] == str(start)
    assert "backbone" not in yaml.safe_load((run / "args.yaml").read_text())


def test_a_resumed_run_goes_on_from_what_it_learned(tmp_path: Path, drawn_set: Path) -> None:
    """Not from the file, which may be gone; to the weights of a run that was never stopped."""
    start = save_detector(tmp_path / "start.pt", seed=7)
    values = options(tmp_path, drawn_set, supervision="labels", backbone=str(start))
    FocusDDTrainer(overrides={**values, "name": "whole"}).train()
    with pytest.raises(Killed):
        FocusDDTrainer(overrides=values, _callbacks={**_callbacks(), **kill_in(1)}).train()
    start.unlink()
    last = tmp_path / "runs" / "run" / "weights" / "last.pt"
    FocusDDTrainer(overrides={"resume": str(last)}).train()
    assert len(rows(tmp_path / "runs" / "run")) == 3
    assert same(weights(last), weights(tmp_path / "runs" / "whole" / "weights" / "last.pt"))


def test_stock_distillation_starts_from_it_too(tmp_path: Path, drawn_set: Path, teacher_file: Path) -> None:
    start = save_detector(tmp_path / "start.pt", seed=7)
    stock = options(tmp_path, drawn_set, epochs=1)
    trainer = StockDistillation(
        overrides={**stock, "distill_model": str(teacher_file), "freeze": BACKBONE, "val": False}, backbone=str(start)
    )
    trainer.train()
    last = weights(tmp_path / "runs" / "run" / "weights" / "last.pt")
    assert equal(
        of_layers(last, range(BACKBONE)), of_layers(state_in(start), range(BACKBONE)), ("num_batches_tracked",)
    )


@pytest.mark.parametrize("key", ["model", "pretrained"])
def test_two_starts_are_refused(key: str, tmp_path: Path, drawn_set: Path, teacher_file: Path) -> None:
    values: dict[str, Any] = options(tmp_path, drawn_set, supervision="labels", backbone=str(teacher_file))
    with pytest.raises(ConfigError, match=f"{key}=.* the student would start from two files"):
        FocusDDTrainer(overrides={**values, key: str(teacher_file)})
    assert not (tmp_path / "runs").exists()


def test_a_file_that_holds_no_model_is_refused(tmp_path: Path, drawn_set: Path) -> None:
    torch.save({"model": {"model.0.conv.weight": torch.zeros(1)}}, tmp_path / "state.pt")
    values = options(tmp_path, drawn_set, supervision="labels")
    for file, told in (("state.pt", "holds no model of Ultralytics"), ("missing.pt", "missing.pt")):
        with pytest.raises(WeightsError, match=told):
            FocusDDTrainer(overrides={**values, "backbone": str(tmp_path / file)})
    assert not (tmp_path / "runs").exists()


def test_the_plan_names_it(tmp_path: Path, drawn_set: Path) -> None:
    start = save_detector(tmp_path / "start.pt")
    given = {"model": str(tiny_yaml(tmp_path)), "data": str(drawn_set), "supervision": "labels", "backbone": str(start)}
    assert f"backbone      {start} (sha256 " in plan(train_overrides(given))
