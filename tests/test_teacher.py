"""The teacher: safe loading of hostile and broken files, and detections that depend on the picture alone."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import NAMES, draw, save_detector

from focusdd_det.checkpoints import resolve_weights, safe_checkpoint, safe_ultralytics
from focusdd_det.errors import ConfigError, WeightsError
from focusdd_det.labels import nms
from focusdd_det.teacher import load_detector


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def pictures(count: int, size: int = 96) -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    return [draw(rng, size)[0] for _ in range(count)]


def equal(a: Any, b: Any) -> bool:
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("boxes", "classes", "conf", "scores"))


# ---- files ----


def test_a_checkpoint_that_carries_code_is_refused_and_does_not_run(tmp_path: Path, teacher_file: Path) -> None:
    canary = tmp_path / "canary"
    checkpoint = torch.load(teacher_file, weights_only=False)
    for place, content in {
        "beside": {**checkpoint, "extra": Bomb(canary)},
        "instead": {"model": Bomb(canary)},
        "bare": Bomb(canary),
    }.items():
        file = tmp_path / f"{place}.pt"
        torch.save(content, file)
        with pytest.raises(WeightsError, match="was refused"):
            load_detector(file)
        assert not canary.exists()


def test_a_model_yaml_inside_a_checkpoint_is_not_evaluated(tmp_path: Path, teacher_file: Path) -> None:
    """Ultralytics rebuilds a student from the YAML in its checkpoint and evaluates its `activation:` line."""
    from ultralytics.nn.tasks import DetectionModel

    canary = tmp_path / "canary"
    recipe = {**safe_checkpoint(teacher_file).yaml, "activation": f"__import__('os').system('touch {canary}')"}
    with safe_ultralytics(), pytest.raises(TypeError, match="blocked"):
        DetectionModel(recipe, verbose=False)
    assert not canary.exists()


def test_broken_files_are_named(tmp_path: Path, teacher_file: Path) -> None:
    whole = teacher_file.read_bytes()
    cases = {
        "empty": (b"", "is empty"),
        "page": (b"<!DOCTYPE html><html>404</html>", "web page"),
        "picture": (b"\xff\xd8\xff\xe0" + bytes(500), "not a PyTorch checkpoint"),
        "half": (whole[: len(whole) // 2], "cut short"),
    }
    for name, (content, message) in cases.items():
        file = tmp_path / f"{name}.pt"
        file.write_bytes(content)
        with pytest.raises(WeightsError, match=message) as caught:
            load_detector(file)
        assert str(file) in str(caught.value)
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsError, match=r"without data\.pkl"):
        load_detector(tmp_path / "zip.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(WeightsError, match="TorchScript"):
        load_detector(tmp_path / "script.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pt")
    with pytest.raises(WeightsError, match="no Ultralytics detection model"):
        load_detector(tmp_path / "state.pt")
    with pytest.raises(WeightsError, match="not found"):
        load_detector(tmp_path / "none.pt")
    with pytest.raises(WeightsError, match="is a folder"):
        load_detector(tmp_path)


def test_damaged_bytes_inside_the_archive(tmp_path: Path, teacher_file: Path) -> None:
    content = bytearray(teacher_file.read_bytes())
    content[200:4000] = bytes(3800)
    file = tmp_path / "damaged.pt"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=str(file)):
        load_detector(file)


def test_weights_that_are_nan(tmp_path: Path, teacher_file: Path) -> None:
    checkpoint = torch.load(teacher_file, weights_only=False)
    next(checkpoint["model"].parameters()).data.fill_(float("nan"))
    torch.save(checkpoint, tmp_path / "nan.pt")
    with pytest.raises(WeightsError, match="not finite"):
        load_detector(tmp_path / "nan.pt")


def test_a_model_for_another_task(tmp_path: Path) -> None:
    from ultralytics.nn.tasks import SegmentationModel

    model = SegmentationModel("yolo11n-seg.yaml", nc=2, verbose=False).half()
    torch.save({"model": model}, tmp_path / "seg.pt")
    with pytest.raises(WeightsError, match="Segment model"):
        load_detector(tmp_path / "seg.pt")


def test_an_official_name_is_never_fetched_without_being_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=r"nothing is downloaded without being asked; add download=True"):
        resolve_weights("yolo11x.pt")
    with pytest.raises(WeightsError, match=r"downloading yolo11x.pt failed|gave no file"):
        resolve_weights("yolo11x.pt", download=True)  # asks Ultralytics' loader, which finds the network closed
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_ultralytics_would_rewrite_is_opened_as_it_is(tmp_path: Path, teacher_file: Path) -> None:
    for name in ("yolov5s.pt", "it's mine.pt"):
        file = tmp_path / name
        file.write_bytes(teacher_file.read_bytes())
        assert load_detector(file).path == file


# ---- names ----


def test_channels_are_gathered_by_name(teacher_file: Path) -> None:
    own, gathered = load_detector(teacher_file), load_detector(teacher_file, names=NAMES)
    assert own.names == ("bar", "other", "disc", "square")
    assert gathered.names == NAMES
    assert gathered.sha256 == own.sha256
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(gathered.heads(x)["scores"], own.heads(x)["scores"][:, [2, 3, 0]])
    image = pictures(1)
    for found, many in zip(gathered.detect(image), own.detect(image), strict=True):
        assert found.scores.shape[1] == 3
        assert many.scores.shape[1] == 4


def test_names_the_teacher_lacks_are_refused_with_both_lists(teacher_file: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        load_detector(teacher_file, names=("disc", "giraffe"))
    message = str(caught.value)
    assert "giraffe" in message
    assert "asked for: disc, giraffe" in message
    assert "it knows: bar, other, disc, square" in message


# ---- heads and detections ----


@pytest.mark.parametrize(("family", "reg_max"), [("yolo11", 16), ("yolo26", 1)])
def test_heads_are_raw_and_carry_no_gradient(tmp_path: Path, family: str, reg_max: int) -> None:
    file = save_detector(tmp_path / "t.pt", family)
    detector = load_detector(file)
    assert detector.reg_max == reg_max
    assert detector.end2end == (family == "yolo26")
    x = torch.rand(2, 3, 64, 96)
    before = x.clone()
    heads = detector.heads(x)
    anchors = (64 // 8) * (96 // 8) + (64 // 16) * (96 // 16) + (64 // 32) * (96 // 32)
    for head in heads.values() if detector.end2end else [heads]:
        assert head["boxes"].shape == (2, 4 * reg_max, anchors)
        assert head["scores"].shape == (2, 3, anchors)
        assert not head["boxes"].requires_grad
        assert not head["scores"].requires_grad
        assert head["scores"].min() < 0, "logits, not probabilities"
    assert torch.equal(x, before)
    assert not detector._model.training
    stock = safe_checkpoint(file)(x)[1]
    pairs = [(heads[k], stock[k]) for k in heads] if detector.end2end else [(heads, stock)]
    for ours, theirs in pairs:
        assert torch.allclose(ours["scores"], theirs["scores"], atol=1e-3)
        assert torch.allclose(ours["boxes"], theirs["boxes"], atol=1e-3)


@pytest.mark.parametrize("family", ["yolo11", "yolo26"])
def test_on_a_cpu_heads_take_a_large_batch_in_parts(tmp_path: Path, family: str) -> None:
    detector = load_detector(save_detector(tmp_path / "t.pt", family))
    assert torch.get_num_threads() == 1
    x = torch.rand(70, 3, 64, 96)  # 640 * 640 px are 66 of them
    seen: list[int] = []
    detector._model.model[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    parts = detector.heads(x)
    assert seen == [66, 4]
    whole, _ = detector._forward(x)
    for ours, all_at_once in [(parts[k], whole[k]) for k in whole] if detector.end2end else [(parts, whole)]:
        assert ours.keys() == all_at_once.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], all_at_once[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["yolo11", "yolo26"])
def test_a_picture_gives_the_same_alone_and_among_others(tmp_path: Path, family: str) -> None:
    detector = load_detector(save_detector(tmp_path / "t.pt", family))
    images = pictures(3)
    together = detector.detect(images, conf=0.1, batch=2)
    assert sum(map(len, together)) > 10
    alone = [detector.detect([image], conf=0.1, batch=2)[0] for image in images]
    assert all(equal(a, b) for a, b in zip(together, alone, strict=True))
    backwards = detector.detect(images[::-1], conf=0.1, batch=2)[::-1]
    assert all(equal(a, b) for a, b in zip(together, backwards, strict=True))


@pytest.mark.parametrize("shape", [(96, 96), (60, 100), (101, 33)])
def test_detections_are_inside_the_picture_rounded_and_best_first(teacher_file: Path, shape: tuple[int, int]) -> None:
    image = cv2.resize(pictures(1)[0], shape[::-1])
    (found,) = load_detector(teacher_file).detect([image], conf=0.1, imgsz=96, max_det=50)
    assert 0 < len(found) <= 50
    assert (found.boxes >= 0).all()
    assert (found.boxes[:, [0, 2]] <= shape[1]).all()
    assert (found.boxes[:, [1, 3]] <= shape[0]).all()
    assert (np.diff(found.conf) <= 0).all()
    assert np.array_equal(found.conf, found.scores.max(1))
    assert np.array_equal(found.classes, found.scores.argmax(1))
    assert np.allclose(found.scores, np.round(found.scores.astype(np.float64), 4), atol=1e-7)
    assert (found.conf > 0.1).all()


def test_detect_refuses_what_it_cannot_do(teacher_file: Path) -> None:
    detector = load_detector(teacher_file)
    assert detector.detect([]) == []
    image = pictures(1)[0]
    for images, more in (
        ([image, image[:64]], {}),
        ([image.astype(np.float32)], {}),
        ([image[..., 0]], {}),
        ([image], {"batch": 0}),
        ([image], {"conf": 2.0}),
        ([image], {"imgsz": 50}),
    ):
        with pytest.raises(ConfigError):
            detector.detect(images, **more)


def test_nms_by_hand() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [1, 0, 11, 10], [20, 0, 30, 10]], np.float64)
    classes = np.array([0, 0, 1, 0])
    assert nms(boxes, classes, 0.7).tolist() == [0, 2, 3]  # IoU 9/11 drops the second; another class stays
    assert nms(boxes, classes, 0.9).tolist() == [0, 1, 2, 3]
    assert nms(boxes[:0], classes[:0], 0.5).tolist() == []


@pytest.mark.assets
@pytest.mark.parametrize("name", ["yolo11n.pt", "yolo26n.pt"])
def test_real_detections_are_those_of_ultralytics(assets: Path, name: str) -> None:
    from ultralytics import YOLO

    file = assets / "weights" / name
    picture = sorted((assets / "data/coco_mini/images/val2017").glob("*.jpg"))[0]
    (found,) = load_detector(file).detect([cv2.imread(str(picture))[..., ::-1].copy()], batch=1)
    (stock,) = YOLO(file).predict(picture, imgsz=640, rect=False, verbose=False)
    assert np.array_equal(found.classes, stock.boxes.cls.int().numpy())
    assert np.allclose(found.boxes, stock.boxes.xyxy.numpy(), atol=0.1)
    assert np.allclose(found.conf, stock.boxes.conf.numpy(), atol=1e-3)


# ---- for a training step ----


def test_fused_and_in_half_precision_it_says_nearly_the_same(tmp_path: Path) -> None:
    for family in ("yolo11", "yolo26"):
        file = save_detector(tmp_path / f"{family}.pt", family)
        x = torch.rand(2, 3, 64, 64)
        full = load_detector(file).heads(x)
        teacher = load_detector(file).to(torch.device("cpu"), torch.bfloat16, channels_last=True)
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in teacher._model.modules())
        with torch.autocast("cpu", torch.bfloat16):
            half = teacher.heads(x)
        pairs = [(half[k], full[k]) for k in half] if teacher.end2end else [(half, full)]
        for ours, theirs in pairs:
            assert ours["scores"].dtype is torch.bfloat16
            assert torch.allclose(ours["scores"].float().sigmoid(), theirs["scores"].sigmoid(), atol=0.05)


def test_a_student_with_one_head_does_not_ask_the_one2one_head(tmp_path: Path) -> None:
    teacher = load_detector(save_detector(tmp_path / "t.pt", "yolo26"))
    x = torch.rand(1, 3, 64, 64)
    before = teacher.heads(x)["one2many"]
    teacher.drop_one2one()
    after = teacher.heads(x)
    assert all(torch.equal(after[key], before[key]) for key in ("boxes", "scores"))
