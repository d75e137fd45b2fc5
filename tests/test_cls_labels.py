"""What a classifier learns from: the classes, a live teacher, or stored logits of the same views."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cls_support import CLASSES, SIZE, Killed, losses, make_pictures, make_teacher, options, same, train
from safetensors.torch import load_file
from torch.nn import functional as F

from focusdd_det.classify.relabel import load_config, relabel
from focusdd_det.classify.teacher import load_classifier
from focusdd_det.classify.trainer import FocusDDClassificationTrainer
from focusdd_det.errors import ConfigError, VerifyError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, pictures: Path, teacher: Path) -> Path:
    """Two epochs of views with the teacher's logits."""
    return make_store(tmp_path_factory.mktemp("store") / "labels", pictures, teacher)


def make_store(out: Path, pictures: Path, teacher: Path, **more: Any) -> Path:
    values = {"epochs": 2, "size": SIZE, "batch": 8, "device": "cpu", "temperature": 4.0, **more}
    config = load_config(data=str(pictures), out=str(out), teacher=str(teacher), eval_data="none", **values)
    return relabel(config).folder


def first_batch(trainer: FocusDDClassificationTrainer) -> tuple[torch.Tensor, dict[str, Any]]:
    """Loss of the untrained student on the first batch, as the loop computes it, and the batch."""
    seen: dict[str, Any] = {}
    step = trainer.preprocess_batch

    def keep(batch: dict[str, Any]) -> dict[str, Any]:
        done = step(batch)
        if not seen:
            seen.update(done)
            seen["state"] = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        return done

    def stop(told: Any) -> None:
        seen["loss"] = told.loss.detach()
        raise Killed

    trainer.preprocess_batch = keep  # type: ignore[method-assign]
    trainer.add_callback("on_train_batch_end", stop)
    with pytest.raises(Killed):
        trainer.train()
    trainer.model.load_state_dict(seen.pop("state"))
    return seen["loss"], seen


def test_the_soft_loss_is_the_formula(tmp_path: Path, pictures: Path, teacher: Path) -> None:
    trainer = FocusDDClassificationTrainer(
        overrides=options(tmp_path, pictures, teacher=str(teacher), temperature=3.0, batch=6)
    )
    loss, batch = first_batch(trainer)
    assert batch["img"].min() >= 0 and 0.5 < batch["img"].max() <= 1
    taught = load_classifier(str(teacher), None, CLASSES, SIZE)(batch["img"])
    student = trainer.model.train()(batch["img"])
    p = torch.softmax(taught.double() / 3, 1)
    expected = -(p * torch.log_softmax(student.double() / 3, 1)).sum(1).mean()
    assert torch.allclose(loss.double(), expected, atol=1e-6)
    assert not any("teacher" in name for name in trainer.model.state_dict())


def test_the_hard_loss_is_cross_entropy_by_shares(tmp_path: Path, pictures: Path) -> None:
    trainer = FocusDDClassificationTrainer(overrides=options(tmp_path, pictures, batch=6))
    loss, batch = first_batch(trainer)
    student = trainer.model.train()(batch["img"]).double()
    own = F.cross_entropy(student, batch["cls"], reduction="none")
    partner = F.cross_entropy(student, batch["partner_cls"], reduction="none")
    assert (batch["share"] < 1).any()
    expected = (batch["share"] * own + (1 - batch["share"]) * partner).mean()
    assert torch.allclose(loss.double(), expected, atol=1e-6)


@pytest.mark.parametrize("labels", ["hard", "live", "store"])
def test_training_lowers_the_loss(labels: str, tmp_path: Path, pictures: Path, teacher: Path, store: Path) -> None:
    values: dict[str, Any] = {"labels": labels, "temperature": 2}
    values |= {"hard": {}, "live": {"teacher": str(teacher)}, "store": {"store": str(store)}}[labels]
    trainer = train(
        tmp_path,
        pictures,
        **values,
        epochs=40,
        every=40,
        pool=1,
        cutmix=0.0,
        scale=0.2,
        lr0=0.01,
        batch=13,
        eval_data=None,
    )
    course = losses(Path(trainer.save_dir), "train/ce" if labels == "hard" else "train/soft_ce")
    floor = 0.0
    if labels != "hard":  # the teacher's own entropy
        batch = next(iter(trainer.train_loader))
        logits = trainer.teacher(batch["img"].float() / 255) if trainer.teacher else batch["soft"]["logits"].float()
        p = (logits / 2).softmax(1)
        floor = float(-(p * p.log()).sum(1).mean())
    assert course[-1] - floor < 0.5 * (course[0] - floor), (course, floor)


def test_bf16_on_a_cpu_trains_with_a_loss_in_float32(tmp_path: Path, pictures: Path) -> None:
    dtypes = []
    trainer = FocusDDClassificationTrainer(overrides=options(tmp_path, pictures, precision="bf16", epochs=1))
    forward = trainer._student.net.forward
    trainer._student.net.forward = lambda x: (y := forward(x), dtypes.append((y.dtype, trainer.model.training)))[0]
    trainer.add_callback("on_train_batch_end", lambda t: dtypes.append((t.loss.dtype, "loss")))
    trainer._write_weights = lambda name: None  # type: ignore[method-assign]  (a lambda cannot be saved)
    trainer.train()
    assert (torch.bfloat16, True) in dtypes
    assert (torch.float32, "loss") in dtypes
    assert (torch.float32, False) in dtypes, "measured in float32"
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_a_moving_average_is_kept_on_request_only(tmp_path: Path, pictures: Path) -> None:
    plain = train(tmp_path, pictures, name="plain", epochs=2)
    assert plain.ema.ema is plain.model
    average = train(tmp_path, pictures, name="average", epochs=2, ema=True)
    assert same(dict(plain.model.state_dict()), dict(average.model.state_dict()))
    saved = load_file(Path(average.wdir) / "last.safetensors")
    assert same(saved, dict(average.ema.ema.net.state_dict()))
    assert not same(saved, load_file(Path(plain.wdir) / "last.safetensors"))


def test_classes_restrict_the_set_and_the_evaluation_by_name(tmp_path: Path, pictures: Path) -> None:
    trainer = train(tmp_path, pictures, classes=[2, 0], epochs=1)
    result = json.loads((Path(trainer.save_dir) / "accuracy.json").read_text())
    assert list(result["last"]["per_class"]) == ["square", "bar"]
    assert result["last"]["n"] == 8
    assert json.loads((Path(trainer.wdir) / "last.json").read_text())["classes"] == ["square", "bar"]


def test_the_student_depends_on_the_seed_alone(tmp_path: Path, pictures: Path, teacher: Path) -> None:
    def student(**more: Any) -> dict[str, torch.Tensor]:
        torch.rand(3)
        made = FocusDDClassificationTrainer(overrides=options(tmp_path, pictures, **more))
        return dict(made._student.state_dict())

    assert same(student(), student(teacher=str(teacher)))
    assert not same(student(), student(seed=1))


# ---- stored logits ----


def views_and_losses(tmp_path: Path, pictures: Path, **more: Any) -> tuple[list[torch.Tensor], list[float]]:
    seen: list[torch.Tensor] = []
    trainer = FocusDDClassificationTrainer(overrides=options(tmp_path, pictures, temperature=4.0, **more))
    step = trainer.preprocess_batch

    def keep(batch: dict[str, Any]) -> dict[str, Any]:
        seen.append(batch["img"].clone())
        return step(batch)

    trainer.preprocess_batch = keep  # type: ignore[method-assign]
    trainer.train()
    return seen, losses(Path(trainer.save_dir), "train/soft_ce")


def test_live_and_stored_labels_are_the_same_training(
    tmp_path: Path, pictures: Path, teacher: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common: dict[str, Any] = {"epochs": 3, "pool": 2, "batch": 7, "lr0": 1e-3}
    live = views_and_losses(tmp_path, pictures, teacher=str(teacher), name="live", **common)
    stored = views_and_losses(tmp_path, pictures, store=str(store), name="stored", scale=0.5, **common)
    assert len(live[0]) == len(stored[0]) == 6
    assert all(torch.equal(a, b) for a, b in zip(live[0], stored[0], strict=True))
    assert live[1] == pytest.approx(stored[1], abs=2e-3)
    assert "views (scale, fliplr, cutmix, seed) are those of" in caplog.text
    result = json.loads((tmp_path / "runs" / "stored" / "accuracy.json").read_text())
    assert result["sha256"]["teacher"] == load_classifier(str(teacher), None, CLASSES, SIZE).sha256


def test_the_top_k_of_a_store_is_learnt_from(tmp_path: Path, pictures: Path, teacher: Path) -> None:
    store = make_store(tmp_path / "top", pictures, teacher, topk=2, temperature=0.5)
    values = {"store": str(store), "temperature": 0.5, "epochs": 8, "every": 8, "lr0": 0.01, "batch": 13}
    trainer = train(tmp_path, pictures, **values, eval_data=None)
    course = losses(Path(trainer.save_dir), "train/soft_ce")
    assert min(course[-2:]) < course[0]
    with pytest.raises(ConfigError, match=r"temperature=3: the store keeps the top 2"):
        train(tmp_path, pictures, **{**values, "temperature": 3})


def test_a_store_of_something_else_is_refused(tmp_path: Path, pictures: Path, store: Path) -> None:
    def refused(error: type[Exception], match: str, data: Path = pictures, **more: Any) -> None:
        with pytest.raises(error, match=match):
            FocusDDClassificationTrainer(overrides=options(tmp_path, data, store=str(store), **more))
        assert not (tmp_path / "runs").exists()

    refused(ConfigError, "views of 32 px, but 64 px", imgsz=64)
    refused(ConfigError, "2 epochs of views, but pool=3", pool=3)
    refused(VerifyError, "classes in another order", classes=[1, 0, 2])
    refused(VerifyError, "another set", make_pictures_with_one_more(tmp_path / "more"))


def make_pictures_with_one_more(folder: Path) -> Path:
    make_pictures(folder)
    (folder / "train" / "bar" / "z.png").write_bytes((folder / "train" / "bar" / "0.png").read_bytes())
    return folder


def test_a_store_that_is_damaged_during_the_training_ends_it(tmp_path: Path, pictures: Path, teacher: Path) -> None:
    store = make_store(tmp_path / "labels", pictures, teacher)
    trainer = FocusDDClassificationTrainer(overrides=options(tmp_path, pictures, store=str(store), every=1))
    file = store / "epoch_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(VerifyError, match="epoch_00001"):
        trainer.train()
    assert Path(trainer.last).is_file(), "the epoch before is kept"
