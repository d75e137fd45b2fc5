"""FocusDDTrainer: stock checkpoints, exact resume, replayable pictures, and the refusals."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import NAMES, tiny_yaml, write_set
from safetensors.torch import load_file
from ultralytics.cfg import get_cfg
from ultralytics.utils import DEFAULT_CFG_DICT

from focusdd_det.errors import ConfigError, DataError, WeightsError
from focusdd_det.experiment.child import state_of
from focusdd_det.teacher import Detector
from focusdd_det.trainer import OWN_KEYS, FocusDDTrainer, all_finite
from focusdd_det.training import exact_resume, supervision
from focusdd_det.training.aside import Aside
from focusdd_det.training.command import plan, train_overrides
from focusdd_det.training.replay import EpochSampler, ReplayDataset, replay_loader
from focusdd_det.training.supervision import Options


def options(tmp_path: Path, data: Path, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": str(tiny_yaml(tmp_path)),
        "data": str(data),
        "epochs": 3,
        "imgsz": 64,
        "batch": 4,
        "project": str(tmp_path / "runs"),
        "name": "run",
        "device": "cpu",
        "plots": False,
        "verbose": False,
        "warmup_epochs": 1,
        "close_mosaic": 1,
    }
    return {**base, **more}


class Killed(Exception):
    """Stands for the process dying."""


def kill_in(epoch: int) -> dict[str, list[Any]]:
    def die(trainer: Any) -> None:
        if trainer.epoch == epoch and trainer._batch == 1:
            raise Killed

    return {"on_train_batch_end": [die]}


def weights(file: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(file, weights_only=False)
    return {k: v.clone() for k, v in (checkpoint["ema"] or checkpoint["model"]).state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "results.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "time"} for row in csv.DictReader(file)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_own_keys_are_not_keys_of_ultralytics() -> None:
    assert not set(OWN_KEYS) & (set(DEFAULT_CFG_DICT) | {"augmentations", "save_dir"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, drawn_set: Path, teacher_file: Path, drawn_coco: Path) -> Path:
    """A run of three epochs with a teacher, evaluation data and its annotations."""
    tmp = tmp_path_factory.mktemp("finished")
    before = files_of(drawn_set)
    trainer = FocusDDTrainer(
        overrides=options(tmp, drawn_set, teacher=str(teacher_file), eval_data=str(drawn_coco), multi_scale=0.5)
    )
    trainer.train()
    assert files_of(drawn_set) == before, "the training modified the set"
    assert trainer.args.optimizer == "SGD"
    assert trainer.args.augmentations == []
    assert not any(p.requires_grad for p in trainer.teacher._model.parameters())
    return tmp / "runs" / "run"


def test_run_folder(finished: Path) -> None:
    table = rows(finished)
    assert len(table) == 3
    assert float(table[0]["train/kl_cls_loss"]) > 0
    assert float(table[0]["train/kl_dfl_loss"]) > 0
    assert float(table[0]["val/kl_cls_loss"]) == 0
    assert yaml.safe_load((finished / "focusdd.yaml").read_text())["supervision"] == "both"
    assert not (finished / "weights" / exact_resume.TENSORS).exists(), "a finished run has nothing to resume"
    result = json.loads((finished / "coco_eval.json").read_text())
    assert result["last"]["meaning"] == "headline"
    assert result["best"]["meaning"] == "selected on val"
    assert result["last"]["evaluator"].startswith("pycocotools ")
    assert set(result["last"]["per_class"]) == set(NAMES)


def test_no_anchors_are_made_where_both_have_the_same_bins(
    tmp_path: Path, drawn_set: Path, teacher_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ultralytics' make the host wait for a GPU, after it has begun to wait for the teacher."""
    monkeypatch.setattr(supervision, "make_anchors", lambda *_: pytest.fail("anchors were made"))
    values = {"teacher": str(teacher_file), "supervision": "both", "epochs": 1}
    trainer = FocusDDTrainer(overrides=options(tmp_path, drawn_set, **values))
    trainer.train()
    assert float(rows(tmp_path / "runs" / "run")[0]["train/kl_dfl_loss"]) > 0


def test_the_teacher_is_asked_aside_before_the_student_and_joined_by_the_loss(
    tmp_path: Path, drawn_set: Path, teacher_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    class Noted(Aside):
        @contextlib.contextmanager
        def running(self) -> Iterator[None]:
            done.append("aside")
            yield
            done.append("back")

        def join(self) -> None:
            done.append("join")

    def noted(name: str, before: Any) -> Any:
        return lambda *args, **more: (done.append(name), before(*args, **more))[1]

    def watch(trainer: Any) -> None:
        trainer.model.model[0].register_forward_pre_hook(lambda *_: done.append("student"))
        trainer.model.model[-1].register_forward_hook(lambda *_: done.append("its heads"))

    monkeypatch.setattr("focusdd_det.trainer.Aside", Noted)
    monkeypatch.setattr("focusdd_det.trainer.all_finite", noted("finite?", all_finite))
    monkeypatch.setattr(Detector, "heads", noted("teacher", Detector.heads))
    monkeypatch.setattr(supervision, "supervision_terms", noted("loss", supervision.supervision_terms))
    values = options(tmp_path, drawn_set, teacher=str(teacher_file), epochs=1)
    FocusDDTrainer(overrides=values, _callbacks={**_callbacks(), "on_train_start": [watch]}).train()
    step = ["aside", "teacher", "finite?", "back", "student", "its heads", "join", "loss"]
    assert done == 3 * step  # ten pictures in batches of four


def test_the_kernel_of_the_optimizer_is_that_of_the_machine() -> None:
    """A run that was begun on a CPU goes on on a GPU, where Ultralytics builds Adam fused."""
    began, goes_on = (torch.nn.Linear(2, 2) for _ in range(2))
    first = torch.optim.AdamW(began.parameters(), lr=0.25, fused=None)
    began(torch.ones(1, 2)).sum().backward()
    first.step()
    counters = {"epoch": 0}
    state = exact_resume.capture(began, began, first, counters)
    second = torch.optim.AdamW(goes_on.parameters(), lr=0.5, fused=True)
    exact_resume.restore(state, goes_on, goes_on, second)
    assert second.param_groups[0]["fused"] is True
    assert second.param_groups[0]["lr"] == 0.25
    assert torch.equal(goes_on.weight, began.weight)


def test_annotations_that_lack_a_class_of_the_set_do_not_end_the_training(
    tmp_path: Path, drawn_set: Path, teacher_file: Path, drawn_coco: Path
) -> None:
    content = json.loads((drawn_coco.parent / "annotations" / "instances_val.json").read_text())
    left_out = content["categories"].pop()
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != left_out["id"]]
    (tmp_path / "fewer.json").write_text(json.dumps(content))
    values = {"teacher": str(teacher_file), "eval_data": str(drawn_coco), "epochs": 1}
    trainer = FocusDDTrainer(
        overrides=options(tmp_path, drawn_set, **values, eval_annotations=str(tmp_path / "fewer.json"))
    )
    trainer.train()
    result = json.loads((Path(trainer.save_dir) / "coco_eval.json").read_text())
    assert left_out["name"] not in result["last"]["covered_classes"]
    assert len(result["last"]["covered_classes"]) == 2


def test_args_yaml_is_stock(finished: Path) -> None:
    args = yaml.safe_load((finished / "args.yaml").read_text())
    assert not set(args) & set(OWN_KEYS)
    assert get_cfg(overrides=args).optimizer == "SGD"


def test_checkpoints_open_in_stock_ultralytics_without_this_package(finished: Path, tmp_path: Path) -> None:
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
    sys.modules.pop("torchvision", None)
import torch
from ultralytics.nn.tasks import load_checkpoint
for name in ("best", "last"):
    model, checkpoint = load_checkpoint({str(finished / "weights")!r} + f"/{{name}}.pt")
    assert type(model).__name__ == "DetectionModel", type(model)
    assert list(model.names.values()) == {list(NAMES)!r}
    assert model(torch.zeros(1, 3, 64, 64))[0].shape[1] == 7
    assert "focusdd" not in repr(checkpoint["train_args"])
print("opened")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.strip().endswith("opened"), done.stderr


@pytest.mark.parametrize("family", ["yolo11", "yolo26"])
def test_resume_equals_the_unbroken_run(family: str, tmp_path: Path, drawn_set: Path, teacher_file: Path) -> None:
    model = str(tiny_yaml(tmp_path, family))
    # batch 4 of 10 pictures and nbs 16: gradients are still being accumulated when an epoch ends
    common = options(
        tmp_path,
        drawn_set,
        model=model,
        teacher=str(teacher_file),
        epochs=4,
        nbs=16,
        multi_scale=0.5,
        optimizer="AdamW",
    )
    if family == "yolo11":
        common["optimizer"] = "SGD"
    unbroken = FocusDDTrainer(overrides={**common, "name": "unbroken"})
    unbroken.train()
    broken = FocusDDTrainer(overrides={**common, "name": "broken"}, _callbacks={**_callbacks(), **kill_in(2)})
    with pytest.raises(Killed):
        broken.train()
    run = tmp_path / "runs" / "broken"
    assert any(name.startswith("grad.") for name in load_file(run / "weights" / exact_resume.TENSORS))
    resumed = FocusDDTrainer(overrides={"resume": str(run / "weights" / "last.pt")})
    resumed.train()
    assert resumed.start_epoch == 2
    assert same(weights(tmp_path / "runs" / "unbroken" / "weights" / "last.pt"), weights(run / "weights" / "last.pt"))
    assert rows(tmp_path / "runs" / "unbroken") == rows(run)


def _callbacks() -> dict[str, list[Any]]:
    from ultralytics.utils import callbacks

    return callbacks.get_default_callbacks()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path) -> tuple[Path, Path, Path]:
    """A run that died in its second epoch: run folder, its set, its teacher."""
    tmp = tmp_path_factory.mktemp("killed")
    data = write_set(tmp / "set")
    teacher = Path(shutil.copy(teacher_file, tmp / "teacher.pt"))
    trainer = FocusDDTrainer(
        overrides=options(tmp, data, teacher=str(teacher)), _callbacks={**_callbacks(), **kill_in(1)}
    )
    with pytest.raises(Killed):
        trainer.train()
    return tmp / "runs" / "run", data, teacher


def test_resume_without_our_files_says_that_it_is_not_exact(
    killed: tuple[Path, Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(killed[0], tmp_path / "run"))
    exact_resume.remove(run / "weights")
    trainer = FocusDDTrainer(overrides={"resume": str(run / "weights" / "last.pt"), "save_dir": str(run)})
    trainer.train()
    assert trainer.epoch == 2
    assert "will not be exactly" in caplog.text


def test_a_run_that_was_moved_goes_on_where_it_is(killed: tuple[Path, Path, Path], tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in killed[0].rglob("*")}
    run = Path(shutil.copytree(killed[0], tmp_path / "moved"))
    trainer = FocusDDTrainer(overrides={"resume": str(run / "weights" / "last.pt")})
    trainer.train()
    assert Path(trainer.save_dir) == run
    assert len(rows(run)) > len(rows(killed[0]))
    assert state_of(run, "detect") == "finished"
    assert {path: path.stat().st_mtime_ns for path in killed[0].rglob("*")} == before


def test_a_finished_run_is_not_resumed(finished: Path) -> None:
    with pytest.raises(WeightsError, match="finished run"):
        FocusDDTrainer(overrides={"resume": str(finished / "weights" / "last.pt")})


def test_without_eval_data_nothing_is_quoted(
    tmp_path: Path, drawn_set: Path, teacher_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = FocusDDTrainer(
        overrides=options(tmp_path, drawn_set, teacher=str(teacher_file), supervision="kl", epochs=1, plots=True)
    )
    trainer.train()
    assert "on training composites" in caplog.text
    assert "mAP50" not in caplog.text
    (row,) = rows(tmp_path / "runs" / "run")
    assert not [name for name in row if name.startswith(("metrics/", "val/"))]
    assert float(row["train/box_loss"]) == float(row["train/cls_loss"]) == 0  # supervision=kl drops the boxes
    assert float(row["train/kl_cls_loss"]) > 0


def test_ddp_worker_rebuilds_the_trainer_from_its_state(tmp_path: Path, drawn_set: Path, teacher_file: Path) -> None:
    from ultralytics.utils.dist import generate_ddp_file

    trainer = FocusDDTrainer(overrides=options(tmp_path, drawn_set, teacher=str(teacher_file), epochs=1))
    script = Path(generate_ddp_file(trainer))
    try:
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, check=False)
    finally:
        script.unlink()
        script.with_suffix(".pt").unlink()
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = rows(tmp_path / "runs" / "run")
    assert float(row["train/kl_cls_loss"]) > 0
    assert not set(yaml.safe_load((tmp_path / "runs" / "run" / "args.yaml").read_text())) & set(OWN_KEYS)


# ---- pictures ----


def dataset(folder: Path, augmentations: list[Any] | None = None, **hyp: Any) -> ReplayDataset:
    cfg = get_cfg(overrides={"imgsz": 64, "mosaic": 1.0, "mixup": 0.3, "scale": 0.0, "translate": 0.0, **hyp})
    cfg.augmentations = augmentations or []
    return ReplayDataset(
        img_path=str(folder / "images" / "train"),
        imgsz=64,
        batch_size=2,
        augment=True,
        hyp=cfg,
        data={"names": dict(enumerate(NAMES)), "channels": 3},
        task="detect",
        seed=3,
    )


def pixels(folder: Path, workers: int, **hyp: Any) -> list[torch.Tensor]:
    import albumentations as A

    data = dataset(folder, [A.RandomBrightnessContrast(p=0.5)], **hyp)
    loader = replay_loader(data, 2, workers, seed=3)
    batches = [batch["img"] for _ in range(2) for batch in loader]
    loader.close()
    return batches


@pytest.mark.parametrize("mosaic", [1.0, 0.0])
def test_pixels_do_not_depend_on_the_workers(drawn_set: Path, mosaic: float) -> None:
    alone = pixels(drawn_set, 0, mosaic=mosaic)
    assert not torch.equal(alone[0], alone[5]), "two epochs must differ"
    for workers in (1, 2):
        others = pixels(drawn_set, workers, mosaic=mosaic)
        assert all(torch.equal(a, b) for a, b in zip(alone, others, strict=True))


def test_a_sample_does_not_depend_on_what_came_before_or_disturb_what_comes_after(drawn_set: Path) -> None:
    import random

    first = dataset(drawn_set)
    for i in range(5):
        first[(0, i)]
    random.seed(1)
    expected = random.random()
    random.seed(1)
    late = first[(2, 7)]["img"]
    assert random.random() == expected
    assert torch.equal(late, dataset(drawn_set)[(2, 7)]["img"])
    assert not torch.equal(late, first[(3, 7)]["img"])


def test_every_rank_sees_its_share_once() -> None:
    shares = [list(EpochSampler(7, 0, rank=rank, world=2)) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == 4
    assert {i for share in shares for _, i in share} == set(range(7))
    sampler = EpochSampler(7, 0)
    assert [next(iter(sampler))[0] for _ in range(3)] == [0, 1, 2]


# ---- refusals ----


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"supervision": "klx", "teacher": "t.pt"}, "expected labels, kl or both, did you mean kl"),
        ({"supervision": "both"}, "needs teacher="),
        ({"teacher": "t.pt", "kl_temperature": 0}, "kl_temperature=0: expected a number > 0"),
        ({"teacher": "t.pt", "kl_cls": -1}, "kl_cls=-1"),
        ({"teacher": "t.pt", "kl_beta": float("nan")}, "kl_beta=nan"),
    ],
)
def test_wrong_options(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options.of(values)


def test_refusals_leave_no_run_folder(tmp_path: Path, drawn_set: Path, teacher_file: Path) -> None:
    def refused(error: type[Exception], match: str, **more: Any) -> None:
        base = {**options(tmp_path, drawn_set), "teacher": str(teacher_file)}
        with pytest.raises(error, match=match):
            FocusDDTrainer(overrides={**base, **more})
        assert not (tmp_path / "runs").exists()

    refused(ConfigError, "cache=disk writes beside the pictures", cache="disk")
    refused(ConfigError, "split=test", split="test")
    refused(ConfigError, "another method", distill_model="yolo11s.pt")
    refused(WeightsError, "download=True", teacher="yolo11x.pt")
    refused(WeightsError, "download=True", model="yolo11n.pt")
    refused(ConfigError, "no such YAML", model="yolo11nn.yaml")
    refused(ConfigError, "expected a .yaml", model="yolo11n.onnx")
    refused(DataError, "data not found", data="nowhere")
    refused(DataError, "images not found", data="coco8.yaml")  # known to Ultralytics, which would download it
    refused(DataError, "images not found", eval_data="coco8.yaml")
    refused(ConfigError, "a model for segment", model="yolo11n-seg.yaml")


# ---- speed on a CPU ----


def first_step(tmp_path: Path, data: Path, teacher: Path, name: str, **more: Any) -> tuple[Any, dict[str, float]]:
    """A trainer after its first step, and the terms of that step's loss."""
    seen: dict[str, float] = {}

    def stop(trainer: Any) -> None:
        seen.update({key: float(value) for key, value in trainer.loss_items.items()})
        raise Killed

    values = options(tmp_path, data, name=name, teacher=str(teacher), batch=10, **more)
    trainer = FocusDDTrainer(overrides=values, _callbacks={**_callbacks(), "on_train_batch_end": [stop]})
    with pytest.raises(Killed):
        trainer.train()
    return trainer, seen


@pytest.mark.parametrize("family", ["yolo11", "yolo26"])
def test_bf16_trains_near_fp32(family: str, tmp_path: Path, drawn_set: Path, teacher_file: Path) -> None:
    model = str(tiny_yaml(tmp_path, family))
    _, full = first_step(tmp_path, drawn_set, teacher_file, "full", model=model)
    trainer, half = first_step(tmp_path, drawn_set, teacher_file, "half", model=model, precision="bf16")
    assert half == pytest.approx(full, rel=0.03, abs=1e-3)
    assert half != full, "nothing ran in bfloat16"
    assert trainer.teacher.heads(torch.zeros(1, 3, 64, 64))["scores"].dtype is torch.bfloat16
    kinds = {p.dtype for p in trainer.model.parameters()} | {
        p.grad.dtype for p in trainer.model.parameters() if p.grad is not None
    }
    assert kinds == {torch.float32}


def test_channels_last_is_only_a_layout(
    tmp_path: Path, drawn_set: Path, teacher_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, usual = first_step(tmp_path, drawn_set, teacher_file, "usual")
    trainer, other = first_step(tmp_path, drawn_set, teacher_file, "other", channels_last=True)
    assert other == pytest.approx(usual, rel=1e-4)
    weight = trainer.model.model[1].conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert trainer.args.channels_last is True, "a resumed run has the same layout"
    assert "ignoring" not in caplog.text


def test_resume_in_bf16_and_channels_last_equals_the_unbroken_run(
    tmp_path: Path, drawn_set: Path, teacher_file: Path
) -> None:
    common = options(
        tmp_path, drawn_set, teacher=str(teacher_file), nbs=16, precision="bf16", channels_last=True, epochs=3
    )
    unbroken = FocusDDTrainer(overrides={**common, "name": "unbroken"})
    unbroken.train()
    broken = FocusDDTrainer(overrides={**common, "name": "broken"}, _callbacks={**_callbacks(), **kill_in(2)})
    with pytest.raises(Killed):
        broken.train()
    run = tmp_path / "runs" / "broken"
    resumed = FocusDDTrainer(overrides={"resume": str(run / "weights" / "last.pt")})
    resumed.train()
    assert (resumed.start_epoch, resumed.options.precision) == (2, "bf16")
    assert same(weights(tmp_path / "runs" / "unbroken" / "weights" / "last.pt"), weights(run / "weights" / "last.pt"))
    assert rows(tmp_path / "runs" / "unbroken") == rows(run)
    assert "precision" not in yaml.safe_load((run / "args.yaml").read_text())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "bf16", "device": "0"}, "give amp=bf16"),
        ({"amp": "bf16", "device": "cpu"}, "give precision=bf16"),
        ({"precision": "fp16"}, "expected fp32 or bf16, did you mean"),
    ],
)
def test_a_precision_that_the_device_has_another_key_for(
    values: dict[str, Any], message: str, tmp_path: Path, drawn_set: Path
) -> None:
    for given in (train_overrides({**options(tmp_path, drawn_set, supervision="labels"), **values}),):
        with pytest.raises(ConfigError, match=message):
            plan(given)
        with pytest.raises(ConfigError, match=message):
            FocusDDTrainer(overrides=given)
    assert not (tmp_path / "runs").exists()


def copy_of(data: Path, place: Path) -> Path:
    """Of a YOLO data set, with a data.yaml that leads to it."""
    shutil.copytree(data.parent, place)
    content = yaml.safe_load(data.read_text())
    (place / "data.yaml").write_text(yaml.safe_dump({**content, "path": str(place)}))
    return place


def test_arrays_beside_pictures_are_the_user_s(tmp_path: Path, drawn_set: Path, drawn_coco: Path) -> None:
    """Ultralytics would take scene0.npy for a cache of scene0.jpg: read it, write over it or delete it."""
    coco = copy_of(drawn_coco, tmp_path / "coco")
    np.save(coco / "images" / "val" / "scene0.npy", np.arange(512, dtype=np.float32))
    np.save(coco / "images" / "val" / "scene1.npy", np.zeros((96, 96, 3), np.uint8))
    (coco / "images" / "val" / "scene2.npy").write_bytes(b"not an array")
    before = files_of(coco)
    results = []
    for name, data in (("with", coco / "data.yaml"), ("without", drawn_coco)):
        values = options(tmp_path, drawn_set, supervision="labels", eval_data=str(data), epochs=1, name=name)
        FocusDDTrainer(overrides=values).train()
        results.append(json.loads((tmp_path / "runs" / name / "coco_eval.json").read_text())["last"]["detections"])
    assert files_of(coco) == before
    assert results[0] == results[1]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_classes_are_those_of_the_training_in_the_evaluation_too(
    order: tuple[int, ...], tmp_path: Path, drawn_set: Path, drawn_coco: Path
) -> None:
    coco = copy_of(drawn_coco, tmp_path / "coco")
    content = yaml.safe_load((coco / "data.yaml").read_text())
    names = {new: content["names"][old] for old, new in enumerate(order)}
    (coco / "data.yaml").write_text(yaml.safe_dump({**content, "names": names}))
    for file in (coco / "labels" / "val").glob("*.txt"):
        lines = [line.split(" ", 1) for line in file.read_text().splitlines()]
        file.write_text("".join(f"{order[int(c)]} {rest}\n" for c, rest in lines))
    trainer = FocusDDTrainer(
        overrides=options(tmp_path, drawn_set, supervision="labels", eval_data=str(coco / "data.yaml"), classes=[0])
    )
    trainer._setup_train()
    found = [label["cls"].flatten().tolist() for label in trainer.test_loader.dataset.labels]
    assert {c for row in found for c in row} == {0.0}
    trainer.train_loader.close()


def test_square_pictures_are_shuffled_whatever_rect_says(tmp_path: Path, drawn_set: Path) -> None:
    trainer = FocusDDTrainer(overrides=options(tmp_path, drawn_set, supervision="labels", rect=True, mosaic=0.0))
    trainer._setup_train()
    assert trainer.train_loader.sampler.shuffle
    assert trainer.train_loader.sampler.order(0) != sorted(trainer.train_loader.sampler.order(0))
    trainer.train_loader.close()


@pytest.mark.parametrize("more", [{"eval_annotations": "none"}, {"single_cls": True}])
def test_an_evaluation_without_coco_map(
    more: dict[str, Any], tmp_path: Path, drawn_set: Path, drawn_coco: Path
) -> None:
    """Asked for, or where the annotations' classes are not told apart."""
    values = options(tmp_path, drawn_set, supervision="labels", eval_data=str(drawn_coco), epochs=1, **more)
    FocusDDTrainer(overrides=values).train()
    assert not (tmp_path / "runs" / "run" / "coco_eval.json").exists()
    assert "metrics/mAP50-95(B)" in rows(tmp_path / "runs" / "run")[0]


def test_ultralytics_own_coco_evaluation_does_not_run(tmp_path: Path, drawn_set: Path, drawn_coco: Path) -> None:
    """It starts by itself where val is COCO's val2017.txt, and takes the first class of any set for COCO's person."""
    coco = copy_of(drawn_coco, tmp_path / "coco")
    content = yaml.safe_load((coco / "data.yaml").read_text())
    (coco / "data.yaml").write_text(yaml.safe_dump({**content, "val": "val2017.txt"}))
    (coco / "val2017.txt").write_text("".join(f"./images/val/{p.name}\n" for p in (coco / "images/val").iterdir()))
    (coco / "annotations/instances_val.json").rename(coco / "annotations/instances_val2017.json")
    values = options(tmp_path, drawn_set, supervision="labels", eval_data=str(coco / "data.yaml"), epochs=1)
    FocusDDTrainer(overrides=values).train()
    run = tmp_path / "runs" / "run"
    assert not (run / "predictions.json").exists()
    assert "metrics/mAP50-95(B)" in rows(run)[0]
    assert json.loads((run / "coco_eval.json").read_text())


def test_a_resumed_run_keeps_our_options_and_needs_no_start(
    tmp_path: Path, drawn_set: Path, teacher_file: Path, drawn_coco: Path
) -> None:
    start = tmp_path / "start.pt"
    shutil.copy(teacher_file, start)
    values = options(tmp_path, drawn_set, teacher=str(teacher_file), pretrained=str(start))
    with pytest.raises(Killed):
        FocusDDTrainer(overrides=values, _callbacks={**_callbacks(), **kill_in(1)}).train()
    start.unlink()
    last = tmp_path / "runs" / "run" / "weights" / "last.pt"
    for changed in ({"kl_beta": 0.0}, {"eval_data": str(drawn_coco)}):
        with pytest.raises(ConfigError, match=f"a resumed run keeps {next(iter(changed))} as it began"):
            FocusDDTrainer(overrides={"resume": str(last), **changed})
    FocusDDTrainer(overrides={"resume": str(last), "kl_beta": 1.0}).train()
    assert len(rows(tmp_path / "runs" / "run")) == 3
