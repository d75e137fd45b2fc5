"""`backbone=`: what of a student comes from the file, what is frozen, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import save_detector, tiny_yaml
from test_trainer import Killed, _callbacks, kill_in, options, rows, same, weights
from ultralytics.nn.tasks import ClassificationModel, DetectionModel

from focusdd_det.disk import file_sha256
from focusdd_det.errors import ConfigError, WeightsError
from focusdd_det.experiment.distill import StockDistillation
from focusdd_det.experiment.settings import check
from focusdd_det.experiment.spec import read_experiment
from focusdd_det.trainer import FocusDDTrainer
from focusdd_det.training.command import plan, train_overrides
from focusdd_det.training.start import start_backbone

BACKBONE = 5  # layers of the tiny detector


def of_layers(state: dict[str, torch.Tensor], layers: range) -> dict[str, torch.Tensor]:
    return {key: value.float() for key, value in state.items() if int(key.split(".")[1]) in layers}


def state_in(file: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(file, weights_only=False)["model"].state_dict()
    return state


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def not_finite(model: torch.nn.Module) -> torch.nn.Module:
    next(model.parameters()).data[0] = torch.nan
    return model


def classifier(path: Path, name: str = "yolo11n-cls.yaml") -> Path:
    torch.save({"model": ClassificationModel(name, verbose=False).half(), "train_args": {}, "epoch": -1}, path)
    return path


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """With statistics as after a training, some near eps."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(1e-4, 2)
    return model.eval()


def outputs(layers: Any, count: int) -> list[torch.Tensor]:
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = []
    with torch.no_grad():
        for layer in layers[:count]:
            x = layer(x)
            found.append(x)
    return found


def test_a_classifier_gives_its_first_nine_layers(tmp_path: Path) -> None:
    """With what they compute: its BatchNorm has another eps, which is no weight."""
    given = stirred(ClassificationModel("yolo11n-cls.yaml", verbose=False))
    torch.save({"model": given, "train_args": {}, "epoch": -1}, tmp_path / "yolo11n-cls.pt")
    student = DetectionModel("yolo11n.yaml", verbose=False).eval()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    assert start_backbone(student, tmp_path / "yolo11n-cls.pt", 9) == 9
    assert given.model[0].bn.eps != student.model[0].bn.eps == 1e-3
    for mine, theirs in zip(outputs(student.model, 9), outputs(given.model, 9), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert equal(of_layers(student.state_dict(), range(9, 24)), of_layers(before, range(9, 24)))


@pytest.mark.parametrize(("freeze", "layer"), [(11, 9), ([0, 9], 9), (["0.conv", "10.cv1"], 10)])
def test_what_starts_at_random_is_not_frozen(freeze: Any, layer: int, tmp_path: Path) -> None:
    file = classifier(tmp_path / "n.pt")
    with pytest.raises(ConfigError, match=rf"layer {layer} .* give freeze=9"):
        start_backbone(DetectionModel("yolo11n.yaml", verbose=False), file, freeze)
    for right in (9, [0, "8.cv1", "23.cv2", 23], None):
        start_backbone(DetectionModel("yolo11n.yaml", verbose=False), file, right)


def test_the_average_is_what_is_taken(tmp_path: Path) -> None:
    models = [ClassificationModel("yolo11n-cls.yaml", verbose=False) for _ in range(2)]
    torch.save({"model": models[0], "ema": models[1], "train_args": {}, "epoch": 3}, tmp_path / "last.pt")
    student = DetectionModel("yolo11n.yaml", verbose=False)
    start_backbone(student, tmp_path / "last.pt")
    assert torch.equal(student.model[0].conv.weight, models[1].model[0].conv.weight)


MISFITS: dict[str, tuple[str, Callable[[], torch.nn.Module], str]] = {
    "scale": (
        "yolo11s.yaml",
        lambda: ClassificationModel("yolo11n-cls.yaml", verbose=False),
        r"0 of .*\(16, 3, 3, 3\).*\(32, 3, 3, 3\)",
    ),
    "family": (
        "yolo11n.yaml",
        lambda: DetectionModel("yolov8n.yaml", verbose=False),
        r"2 of .* layer 2 is C2f .*, here C3k2",
    ),
    "channels": (
        "yolo11n.yaml",
        lambda: DetectionModel("yolo11n.yaml", ch=1, verbose=False),
        r"0 of .* number of channels",
    ),
    "fused": (
        "yolo11n.yaml",
        lambda: DetectionModel("yolo11n.yaml", verbose=False).fuse(verbose=False),
        "saved fused",
    ),
    "no model": ("yolo11n.yaml", lambda: torch.nn.Linear(1, 1), r"no finished model of Ultralytics \(Linear\)"),
    "NaN": ("yolo11n.yaml", lambda: not_finite(DetectionModel("yolo11n.yaml", verbose=False)), "not finite"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_models_that_do_not_fit(name: str, tmp_path: Path) -> None:
    student, model, told = MISFITS[name]
    torch.save({"model": model(), "train_args": {}, "epoch": -1}, tmp_path / "start.pt")
    with pytest.raises(WeightsError, match=told):
        start_backbone(DetectionModel(student, verbose=False), tmp_path / "start.pt")


def test_equal_shapes_of_another_family_are_not_taken(tmp_path: Path) -> None:
    """YOLO26's SPPF has no activation, and a shortcut."""
    torch.save({"model": DetectionModel("yolo26n.yaml", verbose=False), "epoch": -1}, tmp_path / "yolo26n.pt")
    assert start_backbone(DetectionModel("yolo11n.yaml", verbose=False), tmp_path / "yolo26n.pt") == 9


def test_a_misfit_costs_no_run_folder(tmp_path: Path, drawn_set: Path) -> None:
    values = options(tmp_path, drawn_set, supervision="labels", backbone=str(classifier(tmp_path / "n.pt")))
    for begin in (lambda: FocusDDTrainer(overrides=values), lambda: plan(values)):
        with pytest.raises(WeightsError, match="0 of the backbone's 5 layers fit"):
            begin()
    assert not (tmp_path / "runs").exists()


def test_a_frozen_backbone_stays_and_the_rest_learns(tmp_path: Path, drawn_set: Path, teacher_file: Path) -> None:
    start = save_detector(tmp_path / "start.pt", seed=7)
    values = options(tmp_path, drawn_set, teacher=str(teacher_file), backbone=str(start), freeze=BACKBONE)
    trainer = FocusDDTrainer(overrides=values)
    trainer.train()
    run = tmp_path / "runs" / "run"
    given, last = state_in(start), weights(run / "weights" / "last.pt")
    assert equal(of_layers(last, range(BACKBONE)), of_layers(given, range(BACKBONE)))
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
    digest = file_sha256(start)
    start.unlink()
    last = tmp_path / "runs" / "run" / "weights" / "last.pt"
    with pytest.raises(ConfigError, match="keeps backbone as it began"):
        FocusDDTrainer(overrides={"resume": str(last), "backbone": "other.pt"})
    FocusDDTrainer(overrides={"resume": str(last)}).train()
    assert yaml.safe_load((tmp_path / "runs" / "run" / "focusdd.yaml").read_text())["backbone_sha256"] == digest
    assert len(rows(tmp_path / "runs" / "run")) == 3
    assert same(weights(last), weights(tmp_path / "runs" / "whole" / "weights" / "last.pt"))


def test_stock_distillation_starts_from_it_too(tmp_path: Path, drawn_set: Path, teacher_file: Path) -> None:
    start = save_detector(tmp_path / "start.pt", seed=7)
    stock = options(tmp_path, drawn_set, epochs=1, distill_model=str(teacher_file), freeze=BACKBONE, val=False)
    with pytest.raises(ConfigError, match="on one device alone"):
        StockDistillation(overrides={**stock, "device": "0,1"}, backbone=str(start))
    assert not (tmp_path / "runs").exists()
    StockDistillation(overrides=stock, backbone=str(start)).train()
    last = weights(tmp_path / "runs" / "run" / "weights" / "last.pt")
    assert equal(of_layers(last, range(BACKBONE)), of_layers(state_in(start), range(BACKBONE)))


def test_an_experiment_looks_before_it_builds(tmp_path: Path) -> None:
    for backbone, freeze in (
        (classifier(tmp_path / "s.pt", "yolo11s-cls.yaml"), 9),
        (classifier(tmp_path / "n.pt"), 11),
    ):
        content = {
            "title": "start",
            "task": "detect",
            "build": {"sources": [str(tmp_path)], "ipc": 1, "teacher": "yolo11x.pt"},
            "train": {"supervision": "labels", "backbone": str(backbone), "freeze": freeze},
            "eval": {"data": "coco.yaml"},
            "iterations": 2,
            "seeds": [0],
            "arms": {"focusdd": {"build.method": "focusdd"}},
        }
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(WeightsError if freeze == 9 else ConfigError, match="backbone"):
            check(read_experiment(tmp_path / "mine.yaml", {}))
    content["train"] = {"supervision": "labels", "backbone": str(tmp_path / "n.pt"), "freeze": 9}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    check(read_experiment(tmp_path / "mine.yaml", {}))


def test_a_model_that_has_weights_is_refused(tmp_path: Path, drawn_set: Path, teacher_file: Path) -> None:
    """`YOLO("a.yaml").load("b.pt")`: the neck and head would not start at random, as is said."""
    values = options(tmp_path, drawn_set, supervision="labels", backbone=str(teacher_file))
    trainer = FocusDDTrainer(overrides=values)
    with pytest.raises(ConfigError, match="has weights already"):
        trainer.get_model(values["model"], torch.load(teacher_file, weights_only=False)["model"], verbose=False)


def test_a_run_from_before_the_option_does_not_take_it(tmp_path: Path, drawn_set: Path, teacher_file: Path) -> None:
    with pytest.raises(Killed):
        values = options(tmp_path, drawn_set, supervision="labels")
        FocusDDTrainer(overrides=values, _callbacks={**_callbacks(), **kill_in(1)}).train()
    last = tmp_path / "runs" / "run" / "weights" / "last.pt"
    checkpoint = torch.load(last, weights_only=False)
    del checkpoint["train_args"]["backbone"]
    torch.save(checkpoint, last)
    with pytest.raises(ConfigError, match="keeps backbone as it began"):
        FocusDDTrainer(overrides={"resume": str(last), "backbone": str(teacher_file)})


@pytest.mark.parametrize("key", ["model", "pretrained"])
def test_two_starts_are_refused(key: str, tmp_path: Path, drawn_set: Path, teacher_file: Path) -> None:
    values: dict[str, Any] = options(tmp_path, drawn_set, supervision="labels", backbone=str(teacher_file))
    with pytest.raises(ConfigError, match=f"{key}=.* the student would start from two files"):
        FocusDDTrainer(overrides={**values, key: str(teacher_file)})
    assert not (tmp_path / "runs").exists()


def test_a_file_that_holds_no_model_is_refused(tmp_path: Path, drawn_set: Path) -> None:
    torch.save({"model": {"model.0.conv.weight": torch.zeros(1)}}, tmp_path / "state.pt")
    values = options(tmp_path, drawn_set, supervision="labels")
    for file, told in (("state.pt", "holds no finished model of Ultralytics"), ("missing.pt", "missing.pt")):
        with pytest.raises(WeightsError, match=told):
            FocusDDTrainer(overrides={**values, "backbone": str(tmp_path / file)})
    assert not (tmp_path / "runs").exists()


def test_the_plan_names_it(tmp_path: Path, drawn_set: Path) -> None:
    start = save_detector(tmp_path / "start.pt")
    given = {"model": str(tiny_yaml(tmp_path)), "data": str(drawn_set), "supervision": "labels", "backbone": str(start)}
    assert f"backbone      {start} (sha256 " in plan(train_overrides(given))
