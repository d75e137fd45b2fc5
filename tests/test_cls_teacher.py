"""The classification teacher: safe loading, columns by class name; and accuracy."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from class_data import CLASSES, tiny_net, write_class_folders, write_shuffled_teacher, write_teacher
from safetensors.torch import load_file, save_file

from focusdd_det.classify.accuracy import accuracy
from focusdd_det.classify.classset import read_class_set
from focusdd_det.classify.nets import Classifier
from focusdd_det.classify.teacher import in_precision, load_classifier
from focusdd_det.classify.views import EvalDataset
from focusdd_det.classmap import imagenet_synsets
from focusdd_det.devices import in_parts
from focusdd_det.errors import WeightsError

X = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_columns_follow_the_names_that_are_wanted(tmp_path: Path) -> None:
    names = ("a", *CLASSES, "b")
    plain = load_classifier(str(write_teacher(tmp_path / "plain", names)), None, CLASSES, 32)
    shuffled = write_shuffled_teacher(tmp_path / "shuffled", tiny_net(5), names, [3, 0, 4, 2, 1])
    other = load_classifier(str(shuffled), None, CLASSES, 32)
    direct = Classifier(tiny_net(5), names).eval()(X)[:, 1:4].detach()
    assert direct.std() > 0.1
    torch.testing.assert_close(plain(X), direct, rtol=0, atol=0)
    torch.testing.assert_close(other(X), direct, rtol=1e-5, atol=1e-6)
    assert plain.classes == other.classes == CLASSES and plain.spec != other.spec
    turned = load_classifier(str(shuffled), None, CLASSES[::-1], 32)
    torch.testing.assert_close(turned(X), direct.flip(1), rtol=1e-5, atol=1e-6)


def test_it_is_frozen(tmp_path: Path) -> None:
    teacher = load_classifier(str(write_teacher(tmp_path / "t")), None, CLASSES, 32)
    assert not teacher.module.training and not any(p.requires_grad for p in teacher.module.parameters())
    assert not teacher(X).requires_grad and teacher(X).dtype == torch.float32


def test_a_cpu_takes_a_batch_in_parts(tmp_path: Path) -> None:
    teacher = load_classifier(str(write_teacher(tmp_path / "t")), None, CLASSES, 32)
    x = torch.rand(130, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    sizes: list[int] = []
    teacher.module.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    logits = teacher(x)
    assert torch.get_num_threads() == 1
    assert sizes == [98, 32]  # 2 * 224^2 pixels a thread
    for i in (0, 97, 98, 129):
        torch.testing.assert_close(logits[i : i + 1], teacher(x[i : i + 1]), rtol=1e-4, atol=1e-6)
    assert [len(part) for part in in_parts(torch.zeros(3, 3, 640, 640), 100)] == [1, 1, 1]
    assert [len(part) for part in in_parts(torch.zeros(3, 3, 64, 64, device="meta"), 100)] == [3]


def test_half_precision_is_near(tmp_path: Path) -> None:
    path = str(write_teacher(tmp_path / "t"))
    full, half = (load_classifier(path, None, CLASSES, 32, precision=p) for p in ("fp32", "bf16"))
    assert half(X).dtype == torch.float32 and not torch.equal(half(X), full(X))
    torch.testing.assert_close(half(X), full(X), rtol=0.1, atol=0.1 * full(X).abs().max().item())
    assert full.sha256 == half.sha256 and full.spec != half.spec
    before = full(X)
    full.run_in(torch.bfloat16)
    assert torch.equal(full(X), half(X))
    full.run_in(None)
    torch.testing.assert_close(full(X), before)


def test_a_precision_in_which_it_overflows_is_not_taken(tmp_path: Path) -> None:
    path = write_teacher(tmp_path / "t")
    teacher = load_classifier(str(path), None, CLASSES, 32)
    in_precision(teacher, torch.float16, 32, "cpu")
    assert teacher.module.dtype == torch.float16
    first = next(m for m in teacher.module.modules() if isinstance(m, torch.nn.Conv2d))
    with torch.no_grad():
        first.weight.mul_(1e6)
    assert not torch.isfinite(teacher(X)).all()
    in_precision(teacher, torch.float16, 32, "cpu")
    assert teacher.module.dtype is None and torch.isfinite(teacher(X)).all()


def test_classes_that_it_lacks_name_both_lists(tmp_path: Path) -> None:
    path = write_teacher(tmp_path / "t", ("n03", "n02"))
    with pytest.raises(
        WeightsError, match=r"does not know 1 of the 3 classes: n01(.|\n)*asked for(.|\n)*it knows: n03, n02"
    ):
        load_classifier(str(path), None, CLASSES, 32)


def test_plain_weights_with_1000_outputs_are_imagenets(tmp_path: Path) -> None:
    net = tiny_net(1000)
    save_file({k: v.clone() for k, v in net.module.state_dict().items()}, tmp_path / "w.safetensors")
    torch.save({"state_dict": net.module.state_dict()}, tmp_path / "w.pth")
    wanted = ("n03888257", "n01440764")
    expected = Classifier(net, imagenet_synsets()).eval()(X)[:, [imagenet_synsets().index(n) for n in wanted]].detach()
    for name in ("w.safetensors", "w.pth"):
        found = load_classifier("test_efficientnet", str(tmp_path / name), wanted, 32)
        torch.testing.assert_close(found(X), expected, rtol=0, atol=0)


def test_plain_weights_with_other_outputs_need_their_names(tmp_path: Path) -> None:
    save_file({k: v.clone() for k, v in tiny_net(3).module.state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"3 outputs.*nothing says which class.*\.json"):
        load_classifier("test_efficientnet", str(tmp_path / "w.safetensors"), CLASSES, 32)


def test_nothing_is_fetched_without_being_asked() -> None:
    with pytest.raises(WeightsError, match=r"teacher_weights=PATH.*download=true"):
        load_classifier("resnet18", None, CLASSES, 32)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    path = write_teacher(tmp_path / "t")
    state = load_file(tmp_path / "t.safetensors")
    state["classifier.weight"][0, 0] = float("inf")
    save_file(state, tmp_path / "t.safetensors")
    with pytest.raises(WeightsError, match=r"not finite \(classifier\.weight\)"):
        load_classifier(str(path), None, CLASSES, 32)
    (tmp_path / "t.safetensors").write_bytes(b"half a file")
    with pytest.raises(WeightsError, match=r"t\.safetensors is not a checkpoint"):
        load_classifier(str(path), None, CLASSES, 32)


class Evil:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("evil-ran",)


@pytest.mark.parametrize("name", ["evil.pth", "evil-cls.pt"])
def test_a_file_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, tmp_path / name)
    with pytest.raises(WeightsError):
        if name.endswith(".pt"):
            load_classifier(str(tmp_path / name), None, CLASSES, 32)
        else:
            load_classifier("test_resnet", str(tmp_path / name), CLASSES, 32)
    assert not (tmp_path / "evil-ran").exists()


def write_ultralytics(path: Path, names: tuple[str, ...]) -> Any:
    from ultralytics.nn.tasks import ClassificationModel

    torch.manual_seed(0)
    cfg = {"nc": len(names), "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": [[-1, 1, "Classify", ["nc"]]]}
    (path.parent / "tiny-cls.yaml").write_text(json.dumps(cfg))
    model = ClassificationModel(str(path.parent / "tiny-cls.yaml"), nc=len(names), verbose=False)
    model.names = dict(enumerate(names))
    model.model[-1].linear.weight.data.mul_(20)
    torch.save({"model": model, "train_args": {}, "epoch": -1}, path)
    return model.eval()


def test_an_ultralytics_classifier_gives_logits_by_name(tmp_path: Path) -> None:
    model = write_ultralytics(tmp_path / "t-cls.pt", ("n02", "n01", "x", "n03"))
    found = load_classifier(str(tmp_path / "t-cls.pt"), None, CLASSES, 32)
    with torch.no_grad():
        probabilities, logits = model(X)
    torch.testing.assert_close(found(X), logits[:, [3, 1, 0]])
    assert not torch.allclose(found(X), probabilities[:, [3, 1, 0]], atol=0.05)  # no softmax


def test_a_detector_is_no_classifier(teacher_file: Path) -> None:
    with pytest.raises(WeightsError, match="DetectionModel, expected an Ultralytics classifier"):
        load_classifier(str(teacher_file), None, CLASSES, 32)


def test_accuracy_by_hand(tmp_path: Path) -> None:
    # six classes of two pictures; the logits put class (red of the middle pixel) % 6 first and then count upwards
    names = tuple("abcdef")
    found = read_class_set(write_class_folders(tmp_path / "val", names), "val")
    middle = [int(EvalDataset(found, 16)[i]["img"][0, 8, 8]) % 6 for i in range(12)]

    def module(x: torch.Tensor) -> torch.Tensor:
        first = (x[:, 0, 8, 8] * 255).round().long() % 6
        order = (torch.arange(6)[None] - first[:, None]) % 6  # 0 for the first, 5 for the last
        return -order.float()

    right = np.array([m == c for m, c in zip(middle, found.classes, strict=True)])
    five = np.array([(c - m) % 6 != 5 for m, c in zip(middle, found.classes, strict=True)])
    for batch, workers in ((5, 1), (12, 3)):
        result = accuracy(module, found, 16, batch=batch, workers=workers)
        assert result.n == 12
        assert result.top1 == pytest.approx(100 * right.mean()) and result.top5 == pytest.approx(100 * five.mean())
        assert result.per_class == {n: 100 * right[2 * i : 2 * i + 2].mean() for i, n in enumerate(names)}
    few = found.only(["a", "b", "c"])
    assert accuracy(lambda x: module(x)[:, :3], few, 16).top5 == 100
    with pytest.raises(WeightsError, match=r"\[3\b|finite"):
        accuracy(lambda x: module(x) * float("nan"), found, 16)
    with pytest.raises(WeightsError, match=r"expected finite logits \[6, 3\]"):
        accuracy(module, few, 16)


@pytest.mark.assets
def test_a_real_teacher_knows_real_pictures(assets: Path) -> None:
    found = read_class_set(assets / "data" / "imagenette_mini", "val")
    kept = np.arange(0, len(found), 25)
    few = replace(
        found, paths=[found.paths[i] for i in kept], keys=[found.keys[i] for i in kept], classes=found.classes[kept]
    )
    weights = assets / "weights" / "tf_efficientnet_lite0.in1k.safetensors"
    teacher = load_classifier("tf_efficientnet_lite0.in1k", str(weights), found.names, 224)
    assert accuracy(teacher, few, 224, batch=10).top1 >= 80  # chance is 10
