"""Teachers, students and checkpoints that are hostile, damaged, changed or gone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import save_detector, tiny_yaml, write_set

from faults.support import flip
from faults.training import equal_runs, options, rows, weights, words
from focusdd_det.cli import run_main
from focusdd_det.errors import FocusDDError, VerifyError, WeightsError
from focusdd_det.trainer import FocusDDTrainer
from focusdd_det.training import exact_resume
from focusdd_det.training.command import train
from focusdd_det.training.run_files import cut_results


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def code_beside(file: Path, good: Path, canary: Path) -> None:
    torch.save({**torch.load(good, weights_only=False), "extra": Bomb(canary)}, file)


def code_in_its_yaml(file: Path, good: Path, canary: Path) -> None:
    """Ultralytics evaluates the `activation:` line of a checkpoint's model YAML when it builds a student from it."""
    checkpoint = torch.load(good, weights_only=False)
    checkpoint["model"].yaml["activation"] = f"__import__('os').system('touch {canary}')"
    torch.save(checkpoint, file)


def torchscript(file: Path, good: Path, canary: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(file))


def content(data: bytes) -> Callable[[Path, Path, Path], None]:
    return lambda file, good, canary: file.write_bytes(data) and None


HOSTILE: dict[str, Callable[[Path, Path, Path], None]] = {
    "code beside the model": code_beside,
    "TorchScript": torchscript,
    "empty": content(b""),
    "a web page": content(b"<!DOCTYPE html><html>404</html>"),
    "cut short": lambda file, good, canary: file.write_bytes(good.read_bytes()[:9000]) and None,
}


CASES = [("teacher", name) for name in HOSTILE] + [
    (arg, "code beside the model") for arg in ("model", "pretrained", "backbone")
]


@pytest.mark.parametrize(("argument", "name"), CASES)
def test_a_checkpoint_that_is_none(
    argument: str,
    name: str,
    tmp_path: Path,
    drawn_set: Path,
    teacher_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, canary = tmp_path / "strange.pt", tmp_path / "canary"
    HOSTILE[name](file, teacher_file, canary)
    given = {**options(tmp_path, data=drawn_set, teacher=teacher_file), argument: file}
    assert run_main(train, words(given)) == 4
    assert str(file) in capsys.readouterr().err
    assert not canary.exists()
    assert not (tmp_path / "runs").exists()


def test_code_in_the_yaml_of_a_student(tmp_path: Path, drawn_set: Path, teacher_file: Path) -> None:
    """As a .yaml it is refused; inside a .pt it is never evaluated."""
    canary = tmp_path / "canary"
    recipe = yaml.safe_load(tiny_yaml(tmp_path).read_text())
    recipe["activation"] = f"__import__('os').system('touch {canary}')"
    (tmp_path / "yolo11n-evil.yaml").write_text(yaml.safe_dump(recipe))
    given = options(tmp_path, data=drawn_set, supervision="labels", epochs=1)
    assert run_main(train, words({**given, "model": tmp_path / "yolo11n-evil.yaml"})) == 2
    assert not canary.exists()
    assert not (tmp_path / "runs").exists()
    code_in_its_yaml(tmp_path / "evil.pt", teacher_file, canary)
    assert run_main(train, words({**given, "model": tmp_path / "evil.pt"})) != 0
    assert not canary.exists()


# ---- teachers that load, but do not teach ----


def teacher(path: Path, good: Path, change: Callable[[Any], None]) -> Path:
    checkpoint = torch.load(good, weights_only=False)
    change(checkpoint["model"].model)
    torch.save(checkpoint, path)
    return path


def refused(tmp_path: Path, data: Path, file: Path, match: str) -> None:
    with pytest.raises(WeightsError, match=match):
        FocusDDTrainer(overrides=options(tmp_path, data=str(data), teacher=str(file)))
    assert not (tmp_path / "runs").exists()


def test_a_teacher_of_nan(tmp_path: Path, drawn_set: Path, teacher_file: Path) -> None:
    file = teacher(tmp_path / "t.pt", teacher_file, lambda m: next(m.parameters()).data.fill_(float("nan")))
    refused(tmp_path, drawn_set, file, "not finite")


def test_a_teacher_that_overflows_on_real_pictures_only(tmp_path: Path, drawn_set: Path, teacher_file: Path) -> None:
    """Grey gives zeros in every layer, so that the look at it before the training finds nothing."""

    def overflow(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.zero_()
                module.bias.data.zero_()
                module.weight.data.fill_(6e4)
        for layer in model[1:5]:
            layer.conv.weight.data.mul_(1000)
        first = model[0].conv.weight.data
        first.zero_()
        first[:, 0, 1, 1], first[:, 1, 1, 1] = 1, -1

    file = teacher(tmp_path / "t.pt", teacher_file, overflow)
    trainer = FocusDDTrainer(overrides=options(tmp_path, data=str(drawn_set), teacher=str(file)))
    with pytest.raises(WeightsError, match=r"the teacher .*t\.pt gave values that are not finite .* of epoch 1"):
        trainer.train()
    assert not (tmp_path / "runs" / "run" / "weights" / "last.pt").exists()


def test_a_teacher_that_finds_nothing(tmp_path: Path, drawn_set: Path, teacher_file: Path) -> None:
    """Nothing to imitate but silence: the terms are finite, and the boxes of the set still teach."""

    def silence(model: Any) -> None:
        for layers in model[-1].cv3:
            layers[-1].bias.data.fill_(-60)
            layers[-1].weight.data.zero_()

    file = teacher(tmp_path / "t.pt", teacher_file, silence)
    FocusDDTrainer(overrides=options(tmp_path, data=str(drawn_set), teacher=str(file), epochs=1)).train()
    (row,) = rows(tmp_path / "runs" / "run")
    assert 0 <= float(row["train/kl_cls_loss"]) < 100
    assert float(row["train/kl_dfl_loss"]) == pytest.approx(0, abs=1e-6)
    assert float(row["train/box_loss"]) > 0
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "runs" / "run" / "weights" / "last.pt").values())


def test_a_teacher_with_one_name_missing(tmp_path: Path, drawn_set: Path) -> None:
    file = save_detector(tmp_path / "t.pt", names=("disc", "square", "Bar"))
    refused(tmp_path, drawn_set, file, r"1 of the 3 classes: bar\.[\s\S]*it knows: disc, square, Bar")


def test_a_teacher_with_its_classes_in_another_order(tmp_path: Path, drawn_set: Path, teacher_file: Path) -> None:
    """Its channels are gathered by name: the student learns the same."""
    order = [2, 0, 3, 1]

    def permute(model: Any) -> None:
        for layers in model[-1].cv3:
            last = layers[-1]
            last.weight.data, last.bias.data = last.weight.data[order], last.bias.data[order]

    file = teacher(tmp_path / "t.pt", teacher_file, permute)
    checkpoint = torch.load(file, weights_only=False)
    names = checkpoint["model"].names
    checkpoint["model"].names = {new: names[old] for new, old in enumerate(order)}
    torch.save(checkpoint, file)
    for name, path in (("one", teacher_file), ("other", file)):
        given = options(tmp_path, data=str(drawn_set), teacher=str(path), epochs=1, name=name)
        FocusDDTrainer(overrides=given).train()
    (one,), (other,) = rows(tmp_path / "runs" / "one"), rows(tmp_path / "runs" / "other")
    assert {k: float(v) for k, v in one.items()} == pytest.approx({k: float(v) for k, v in other.items()}, rel=1e-3)


# ---- what a resumed run finds ----


class Stop(Exception):
    """Ends a training where a kill would."""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path) -> Path:
    """Folder with set/, teacher.pt and runs/run, a run that ended in its second epoch. Copied, never changed."""
    top = tmp_path_factory.mktemp("stopped")
    write_set(top / "set")
    shutil.copy(teacher_file, top / "teacher.pt")
    trainer = FocusDDTrainer(overrides=options(top, data=str(top / "set"), teacher=str(top / "teacher.pt")))

    def stop(trainer: Any) -> None:
        if trainer.epoch == 1:
            raise Stop

    trainer.add_callback("on_train_batch_end", stop)
    with pytest.raises(Stop):
        trainer.train()
    return top


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of its run folder."""
    return Path(shutil.copytree(stopped / "runs" / "run", tmp_path / "run"))


def resume(run: Path, **more: Any) -> FocusDDTrainer:
    given = {"resume": str(run / "weights" / "last.pt"), "save_dir": str(run), **more}
    return FocusDDTrainer(overrides=given)


@pytest.mark.parametrize("keep", [0, 5000, -1])
def test_last_pt_cut_short_says_so_and_the_way_on_works(stopped: Path, run: Path, tmp_path: Path, keep: int) -> None:
    last = run / "weights" / "last.pt"
    last.write_bytes(last.read_bytes()[:keep])
    with pytest.raises(WeightsError) as caught:
        resume(run)
    said = str(caught.value)
    assert str(last) in said
    way_on = said.split("Start a new run from ")[1].split(",")[0]
    assert way_on == f"model={run / 'weights' / 'best.pt'}"
    if keep == 5000:
        given = options(tmp_path, data=str(stopped / "set"), supervision="labels", epochs=1)
        FocusDDTrainer(overrides={**given, "model": way_on.removeprefix("model=")}).train()


@pytest.mark.parametrize("damage", ["cut short", "a header that lies", "flipped metadata"])
def test_resume_safetensors_is_damaged(run: Path, damage: str) -> None:
    file = run / "weights" / exact_resume.TENSORS
    data = bytearray(file.read_bytes())
    if damage == "cut short":
        del data[1000:]
    elif damage == "a header that lies":
        data[:8] = (1 << 40).to_bytes(8, "little")
    else:
        data[data.index(b"epoch")] ^= 0x80
    file.write_bytes(data)
    with pytest.raises(WeightsError, match=r"resume\.safetensors is damaged[\s\S]*delete it to resume from last\.pt"):
        resume(run).train()
    if damage == "cut short":
        file.unlink()
        resume(run).train()  # the way on
        assert len(rows(run)) == 3


def test_the_teacher_is_missing_on_resume(stopped: Path, run: Path, tmp_path: Path) -> None:
    file = stopped / "teacher.pt"
    moved = file.rename(tmp_path / "moved.pt")
    try:
        with pytest.raises(WeightsError, match=r"was taught by .*teacher\.pt[\s\S]*teacher=<path>"):
            resume(run)
        resume(run, teacher=str(moved)).train()  # the way on
        unmoved = Path(shutil.copytree(stopped / "runs" / "run", tmp_path / "again"))
        moved.rename(file)
        resume(unmoved).train()
        assert equal_runs(run, unmoved)
    finally:
        if moved.exists():
            moved.rename(file)


def test_the_teacher_has_changed_on_resume(stopped: Path, run: Path, tmp_path: Path) -> None:
    other = save_detector(tmp_path / "other.pt", names=("bar", "other", "disc", "square"), seed=1)
    with pytest.raises(WeightsError, match="another file than the teacher"):
        resume(run, teacher=str(other))


@pytest.mark.parametrize("change", ["another set", "a damaged set", "no set"])
def test_another_set_at_the_same_path_on_resume(stopped: Path, run: Path, tmp_path: Path, change: str) -> None:
    data = stopped / "set"
    moved = data.rename(tmp_path / "moved")
    try:
        if change == "another set":
            write_set(data, seed=5)
        elif change == "a damaged set":
            shutil.copytree(moved, data)
            flip(data / "images" / "train" / "disc-0000.jpg")
        with pytest.raises(FocusDDError, match=r"(another set|not the set that was built|data not found)") as caught:
            resume(run)
        assert isinstance(caught.value, VerifyError) == (change != "no set")
    finally:
        shutil.rmtree(data, ignore_errors=True)
        moved.rename(data)


def test_a_run_with_all_its_epochs_and_without_our_files(stopped: Path, run: Path) -> None:
    checkpoint = torch.load(run / "weights" / "last.pt", weights_only=False)
    checkpoint["epoch"] = 2
    torch.save(checkpoint, run / "weights" / "last.pt")
    exact_resume.remove(run / "weights")
    with pytest.raises(WeightsError, match="has all 3 epochs"):
        resume(run).train()


@pytest.mark.parametrize("tail", ["2", "1,0.1", "2,0.1,3\n", "3,0.1,4\n1", ""])
def test_results_csv_with_a_row_cut_short(tmp_path: Path, tail: str) -> None:
    """The epoch that a cut row stands for is run again; a row `12` that was cut to `1` is no row of epoch 1."""
    file = tmp_path / "results.csv"
    file.write_text("epoch,time,loss\n1,0.1,5\n" + tail)
    cut_results(file, 1)
    assert file.read_text() == "epoch,time,loss\n1,0.1,5\n"
    file.write_text("")
    cut_results(file, 1)
    assert not file.exists()
