"""FocusDDClassificationTrainer: what it learns from, what it leaves behind, and the refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from class_data import write_class_set
from cls_support import (
    CLASSES,
    NET,
    SIZE,
    make_pictures,
    make_teacher,
    options,
    rows,
    same,
    train,
    write_folders,
)
from safetensors.torch import load_file
from ultralytics.cfg import get_cfg
from ultralytics.utils import DEFAULT_CFG_DICT

from focusdd_det.classify.accuracy import accuracy
from focusdd_det.classify.classset import read_class_set
from focusdd_det.classify.nets import head_keys, heads_of, make_net
from focusdd_det.classify.student import make_student
from focusdd_det.classify.teacher import load_classifier
from focusdd_det.classify.trainer import OWN_KEYS, FocusDDClassificationTrainer
from focusdd_det.classmap import imagenet_synsets
from focusdd_det.errors import ConfigError, DataError, FocusDDError, WeightsError
from focusdd_det.training import exact_resume


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


# ---- a run and what it leaves ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pictures: Path, teacher: Path) -> Path:
    """A run of five epochs with a live teacher, measured in epochs 2, 4 and 5."""
    tmp = tmp_path_factory.mktemp("finished")
    values = {"teacher": str(teacher), "epochs": 5, "every": 2, "plots": True, "temperature": 4, "lr0": 0.02}
    trainer = FocusDDClassificationTrainer(overrides=options(tmp, pictures, **values))
    trainer.train()
    assert trainer.args.optimizer == "AdamW"
    assert trainer.args.nbs == trainer.args.batch == 4
    assert trainer.optimizer.param_groups[1]["weight_decay"] in (0.0, 0.01)
    assert {g["param_group"]: g["weight_decay"] for g in trainer.optimizer.param_groups}["weight"] == 0.01
    return tmp / "runs" / "run"


def test_run_folder(finished: Path) -> None:
    table = rows(finished)
    assert [row["epoch"] for row in table] == ["1", "2", "3", "4", "5"]
    measured = [row["metrics/accuracy_top1"] != "nan" for row in table]
    assert measured == [False, True, False, True, True]
    assert all(float(row["train/soft_ce"]) > 0 for row in table)
    assert float(table[1]["val/ce"]) > 0
    for name in ("args.yaml", "focusdd.yaml", "accuracy.json", "results.png"):
        assert (finished / name).is_file(), name
    assert not (finished / "weights" / exact_resume.TENSORS).exists(), "a finished run has nothing to resume"
    own = yaml.safe_load((finished / "focusdd.yaml").read_text())
    assert own["labels"] == "live"
    assert own["views"]["scale"] == [0.08, 1.0]
    args = yaml.safe_load((finished / "args.yaml").read_text())
    assert not set(args) & set(OWN_KEYS)
    assert get_cfg(overrides=args).optimizer == "AdamW"


def test_the_headline_is_the_last_epochs_accuracy(finished: Path, pictures: Path) -> None:
    result = json.loads((finished / "accuracy.json").read_text())
    last, best = result["last"], result["best"]
    assert (last["epoch"], last["meaning"], last["n"]) == (5, "headline", 12)
    assert best["meaning"] == "selected on val"
    evaluation = read_class_set(pictures, "val", CLASSES)
    again = load_classifier(str(finished / "weights" / "last.json"), None, CLASSES, SIZE)
    assert dataclasses.asdict(accuracy(again.module, evaluation, SIZE)) == {
        key: last[key] for key in ("top1", "top5", "n", "per_class")
    }
    logged = [float(row["metrics/accuracy_top1"]) for row in rows(finished)]
    assert round(last["top1"] / 100, 4) == round(logged[-1], 4), "the validator and the headline look at the same views"
    assert best["top1"] == pytest.approx(100 * max(x for x in logged if x == x), abs=1e-2)
    assert set(result["sha256"]) == {"set", "teacher", "teacher_spec", "store", "eval"}


def test_the_best_epoch_is_kept_beside_the_last(tmp_path: Path, pictures: Path, monkeypatch: Any) -> None:
    trainer = FocusDDClassificationTrainer(overrides=options(tmp_path, pictures, epochs=4, every=1))
    planned = iter([0.25, 0.75, 0.75, 0.5])

    class Fake:
        def __init__(self, real: Any) -> None:
            self.real, self.metrics = real, real.metrics

        def __call__(self, told: Any) -> Any:
            result = self.real(told)
            self.metrics = type("", (), {"top1": next(planned), "top5": 1.0})
            return result

    trainer.add_callback("on_train_start", lambda t: setattr(t, "validator", Fake(t.validator)))
    trainer.train()
    result = json.loads((Path(trainer.save_dir) / "accuracy.json").read_text())
    assert result["best"] == {"epoch": 2, "top1": 75.0, "top5": 100.0, "meaning": "selected on val"}
    best, last = (load_file(Path(trainer.wdir) / f"{name}.safetensors") for name in ("best", "last"))
    assert not same(best, last)
    assert result["last"]["epoch"] == 4


def test_stock_timm_and_stock_torchvision_load_the_weights(finished: Path, tmp_path: Path, pictures: Path) -> None:
    import timm
    from torchvision.models import resnet18

    stock: Any = timm.create_model(NET, num_classes=3)
    stock.load_state_dict(load_file(finished / "weights" / "last.safetensors"))
    trainer = train(tmp_path, pictures, model="resnet18", epochs=1, batch=12)
    plain = resnet18(num_classes=3)
    plain.load_state_dict(load_file(Path(trainer.wdir) / "last.safetensors"))
    x = torch.rand(2, 3, SIZE, SIZE)
    model: Any = trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(plain.eval()((x - model.mean) / model.std), model(x))


def test_a_trained_student_teaches_and_starts_others(finished: Path, tmp_path: Path, pictures: Path) -> None:
    spec = finished / "weights" / "last.json"
    trainer = FocusDDClassificationTrainer(
        overrides=options(tmp_path, pictures, teacher=str(spec), weights=str(spec), epochs=1)
    )
    assert same(dict(trainer._student.net.state_dict()), load_file(spec.with_suffix(".safetensors")))
    trainer.train()
    assert trainer.tloss["soft_ce"] > 0


def test_a_start_from_weights_for_other_classes_has_a_new_head(
    tmp_path: Path, pictures: Path, teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = FocusDDClassificationTrainer(overrides=options(tmp_path, pictures, weights=str(teacher)))
    assert "was for 4 classes, the one for 3 is new" in caplog.text
    state, start = trainer._student.net.state_dict(), load_file(teacher.with_suffix(".safetensors"))
    assert sum(not torch.equal(state[key], start[key]) for key in state) == 2, "weight and bias of the head"


def test_the_last_layer_follows_the_names_of_the_classes(finished: Path, tmp_path: Path) -> None:
    """Not their places: a set in another order, or other classes of the same number."""
    spec = finished / "weights" / "last.json"
    known = json.loads(spec.read_text())["classes"]
    turned = [known[i] for i in (2, 0, 1)]
    start = load_file(spec.with_suffix(".safetensors"))
    layers = head_keys(make_net(NET, 3, SIZE))
    for names, kept in ((known, True), (turned, True), (["x", "y", "z"], False)):
        for model, weights in ((str(spec), None), (NET, str(spec))):
            student: Any = make_student(model, names, SIZE, weights=weights)
            state = student.net.state_dict()
            for key, value in start.items():
                if not key.startswith(layers):
                    assert torch.equal(state[key], value)
                elif kept:
                    assert all(torch.equal(state[key][i], value[known.index(n)]) for i, n in enumerate(names))
                else:
                    assert not torch.equal(state[key], value)


@pytest.mark.parametrize("turned", [True, False])
def test_the_library_s_own_last_layer_follows_the_names_too(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    synsets = imagenet_synsets()
    names = synsets[::-1] if turned else tuple(f"own {i}" for i in range(1000))
    made: list[Any] = []

    def fetched(name: str, classes: int, size: int, download: bool = False) -> Any:
        net = make_net(name, classes, size)
        made.append((net, heads_of(net)[0].weight.detach().clone()))
        return net

    monkeypatch.setattr("focusdd_det.classify.student.make_net", fetched)
    student: Any = make_student(NET, names, SIZE, weights="imagenet", download=True)
    (net, before), (layer,) = made[0], heads_of(made[0][0])
    assert student.net is net.module
    assert torch.equal(layer.weight, before.flip(0)) == turned
    assert not torch.equal(layer.weight, before)


def test_the_last_layer_of_a_yolo_follows_the_names_too(tmp_path: Path) -> None:
    first: Any = make_student("yolo11n-cls.yaml", ("a", "b", "c"), 32)
    torch.save({"model": first.half(), "train_args": {}}, tmp_path / "first.pt")
    layer = first.float().model[-1].linear
    turned: Any = make_student(str(tmp_path / "first.pt"), ("c", "a", "b"), 32, seed=1)
    assert torch.equal(turned.model[-1].linear.weight, layer.weight[[2, 0, 1]])
    assert torch.equal(turned.model[-1].linear.bias, layer.bias[[2, 0, 1]])
    other: Any = make_student(str(tmp_path / "first.pt"), ("c", "a", "d"), 32, seed=1)
    fresh: Any = make_student("yolo11n-cls.yaml", ("c", "a", "d"), 32, seed=1)
    assert torch.equal(other.model[-1].linear.weight, fresh.model[-1].linear.weight)
    assert torch.equal(other.model[0].conv.weight, first.model[0].conv.weight)


def test_without_eval_data_nothing_is_measured(tmp_path: Path, pictures: Path, caplog: Any) -> None:
    trainer = train(tmp_path, pictures, eval_data=None, epochs=2)
    assert "nothing is measured" in caplog.text
    result = json.loads((Path(trainer.save_dir) / "accuracy.json").read_text())
    assert result["last"] is None
    assert result["best"] is None
    assert not [name for name in rows(Path(trainer.save_dir))[0] if name.startswith(("metrics/", "val/"))]
    assert Path(trainer.last).is_file()
    assert not Path(trainer.best).exists()


# ---- what ends a run, and the refusals ----


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, pictures: Path) -> None:
    trainer = FocusDDClassificationTrainer(overrides=options(tmp_path, pictures, every=1))

    def spoil(told: Any) -> None:
        if told.epoch == 1:
            next(told.model.parameters()).data.fill_(float("nan"))

    trainer.add_callback("on_train_batch_start", spoil)
    with pytest.raises(FocusDDError, match="not a finite number in epoch 2; the state after epoch 1 is kept"):
        trainer.train()
    assert all(torch.isfinite(v).all() for v in load_file(Path(trainer.wdir) / "last.safetensors").values())


def test_a_set_of_ours_is_not_written_to(tmp_path: Path) -> None:
    folder = write_class_set(tmp_path / "set", count=5)
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    train(tmp_path, folder, eval_data=None, epochs=1)
    with pytest.raises(ConfigError, match="would lie inside"):
        FocusDDClassificationTrainer(overrides=options(folder, folder, eval_data=None))
    with pytest.raises(DataError, match="has no val pictures"):
        FocusDDClassificationTrainer(overrides=options(tmp_path, folder))
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_disappears_is_named(workers: int, tmp_path: Path) -> None:
    data = make_pictures(tmp_path / "pictures")
    trainer = FocusDDClassificationTrainer(overrides=options(tmp_path, data, eval_data=None))
    trainer.args.workers = workers
    (data / "train" / "bar" / "2.png").unlink()
    with pytest.raises(DataError) as caught:
        trainer.train()
    assert str(caught.value).startswith(f"cannot read {data / 'train' / 'bar' / '2.png'}")
    assert "Traceback" not in str(caught.value)


def test_refusals_leave_no_run_folder(tmp_path: Path, pictures: Path, teacher: Path) -> None:
    def refused(error: type[Exception], match: str, **more: Any) -> None:
        with pytest.raises(error, match=match):
            FocusDDClassificationTrainer(overrides=options(tmp_path, pictures, **more))
        assert not (tmp_path / "runs").exists()

    refused(ConfigError, "multiple of 32", imgsz=100)
    refused(ConfigError, "multiple of 32[^$]*scale=1", imgsz=100, scale=1)
    refused(ConfigError, "whole number", batch=-1)
    refused(ConfigError, "weights=<file>", pretrained="a.pt")
    refused(ConfigError, "fraction, mixup, hsv_h: without effect here", fraction=0.1, mixup=1.0, hsv_h=0.5, flipud=0.0)
    refused(ConfigError, "freeze=10: counts the layers of YOLO models", freeze=10)
    refused(ConfigError, "expected indices from 0 to 2", classes=[5])
    refused(ConfigError, "no such YAML", model="yolo11nn-cls.yaml")
    refused(ConfigError, "a model for detect", model="yolo11n.yaml")
    refused(WeightsError, "did you mean resnet18", model="resnet_18")
    refused(WeightsError, "download=True", model="yolo11n-cls.pt")
    refused(WeightsError, "add download=True", weights="imagenet")
    refused(WeightsError, "no checkpoint at", weights="nowhere.safetensors")
    refused(WeightsError, "teacher_weights=PATH", teacher="resnet18")
    refused(DataError, "is not a folder", eval_data="nowhere")
    with pytest.raises(DataError, match="is not a folder"):
        FocusDDClassificationTrainer(overrides=options(tmp_path, tmp_path / "nowhere"))
    assert not (tmp_path / "runs").exists()


def test_evaluation_data_without_a_class_is_refused_by_name(tmp_path: Path, pictures: Path) -> None:
    lacking = write_folders(tmp_path / "lacking", "val", 1, 3)
    (lacking / "val" / "disc").rename(lacking / "val" / "plate")
    with pytest.raises(DataError, match=r"1 of the 3 classes: disc"):
        FocusDDClassificationTrainer(overrides=options(tmp_path, pictures, eval_data=str(lacking)))


def test_ddp_worker_rebuilds_the_trainer_from_its_state(tmp_path: Path, pictures: Path, teacher: Path) -> None:
    first = FocusDDClassificationTrainer(overrides=options(tmp_path, pictures, teacher=str(teacher), temperature=5.0))
    state = dict(vars(first.args))
    worker = FocusDDClassificationTrainer(
        {**DEFAULT_CFG_DICT, "save_dir": str(first.save_dir)}, overrides={**state, "exist_ok": True}
    )
    assert worker.options == first.options
    assert worker.save_dir == first.save_dir
    assert {k: v for k, v in vars(worker.args).items() if k != "exist_ok"} == {
        k: v for k, v in vars(first.args).items() if k != "exist_ok"
    }
