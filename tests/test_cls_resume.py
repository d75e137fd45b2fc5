"""A classification training that is resumed, and the pictures of an epoch: both depend on (seed, epoch) alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cls_support import (
    NET,
    SIZE,
    Killed,
    kill_in,
    make_pictures,
    make_teacher,
    options,
    rows,
    same,
    train,
    write_folders,
)
from safetensors.torch import load_file

from focusdd_det.classify import nets
from focusdd_det.classify.classset import read_class_set
from focusdd_det.classify.subsets import Subsets, SubsetSampler, SubsetViews
from focusdd_det.classify.trainer import FocusDDClassificationTrainer
from focusdd_det.classify.views import ViewDataset, ViewSettings
from focusdd_det.errors import ConfigError, VerifyError, WeightsError
from focusdd_det.training.replay import replay_loader


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


# ---- pictures ----


def batches(folder: Path, workers: int, subset: int = 0) -> list[dict[str, Any]]:
    data = read_class_set(folder, "train")
    settings = ViewSettings(size=SIZE, seed=3)
    subsets = Subsets(data.classes, subset, 3) if subset else None
    dataset = SubsetViews(data, settings, subsets) if subsets else ViewDataset(data, settings)
    sampler = SubsetSampler(subsets, 3) if subsets else None
    loader = replay_loader(dataset, 4, workers, seed=3, sampler=sampler)
    found = [batch for _ in range(2) for batch in loader]
    loader.close()
    return found


@pytest.mark.parametrize("subset", [0, 2])
def test_batches_do_not_depend_on_the_workers(pictures: Path, subset: int) -> None:
    alone, others = batches(pictures, 0, subset), batches(pictures, 2, subset)
    assert len(alone) == len(others) == (4 if subset else 8)
    assert not torch.equal(alone[0]["img"], alone[len(alone) // 2]["img"]), "two epochs must differ"
    for a, b in zip(alone, others, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_every_epoch_draws_a_new_balanced_subset() -> None:
    classes = np.array([0] * 9 + [1] * 2 + [2] * 9, np.int64)
    subsets = Subsets(classes, 4, 7)
    sampler = SubsetSampler(subsets, 7)
    assert len(sampler) == 10
    epochs = [list(sampler) for _ in range(3)]
    assert [{epoch for epoch, _ in drawn} for drawn in epochs] == [{0}, {1}, {2}]
    for drawn in epochs:
        indices = [index for _, index in drawn]
        assert len(set(indices)) == 10
        assert np.bincount(classes[indices]).tolist() == [4, 2, 4]
    chosen = [{index for _, index in drawn} for drawn in epochs]
    assert chosen[0] != chosen[1] != chosen[2]
    again = SubsetSampler(Subsets(classes, 4, 7), 7)
    again.next_epoch = 2
    assert list(again) == epochs[2], "an epoch's subset depends on the seed and the epoch alone"
    assert [i for _, i in epochs[0]] != sorted(i for _, i in epochs[0])


def test_partners_are_of_the_epochs_subset(pictures: Path) -> None:
    data = read_class_set(pictures, "train")
    subsets = Subsets(data.classes, 2, 0)
    views = SubsetViews(data, ViewSettings(size=SIZE), subsets)
    for epoch in range(3):
        subset = set(subsets.of(epoch).tolist())
        partners = {int(views.drawn(epoch, index)[0][5]) for index in subset}
        assert partners - {-1} <= subset
        assert len(partners - {-1}) > 1


def test_fine_tuning_on_random_subsets_runs(tmp_path: Path, pictures: Path, teacher: Path) -> None:
    trainer = train(tmp_path, pictures, teacher=str(teacher), subset_ipc=2, epochs=2, batch=3)
    assert len(trainer.train_loader) == 2
    assert json.loads((Path(trainer.save_dir) / "accuracy.json").read_text())["last"]["n"] == 12


def test_a_picture_left_over_alone_is_left_out(tmp_path: Path, pictures: Path, caplog: Any) -> None:
    trainer = train(tmp_path, pictures, batch=6, epochs=1, eval_data=None)  # 13 = 6 + 6 + 1
    assert len(trainer.train_loader) == 2
    assert "alone in a batch" in caplog.text


# ---- resume ----


@pytest.mark.parametrize(("every", "ema", "dies", "starts"), [(1, True, 2, 2), (2, False, 3, 2), (2, False, 4, 4)])
def test_resume_equals_the_unbroken_run(
    every: int, ema: bool, dies: int, starts: int, tmp_path: Path, pictures: Path, teacher: Path
) -> None:
    values = {"teacher": str(teacher), "epochs": 5, "every": every, "ema": ema, "dropout": 0.3, "temperature": 4}
    common = options(tmp_path, pictures, **values, batch=6)
    FocusDDClassificationTrainer(overrides={**common, "name": "unbroken"}).train()
    broken = FocusDDClassificationTrainer(overrides={**common, "name": "broken"}, _callbacks=kill_in(dies))
    with pytest.raises(Killed):
        broken.train()
    run, other = tmp_path / "runs" / "broken", tmp_path / "runs" / "unbroken"
    torch.rand(7)
    resumed = FocusDDClassificationTrainer(overrides={"resume": str(run)})
    resumed.train()
    assert resumed.start_epoch == starts
    for name in ("last", "best"):
        a, b = (load_file(folder / "weights" / f"{name}.safetensors") for folder in (run, other))
        assert same(a, b)
    assert rows(run) == rows(other)
    a, b = (json.loads((folder / "accuracy.json").read_text()) for folder in (run, other))
    assert a == b


@pytest.fixture
def killed(tmp_path: Path, teacher: Path) -> tuple[Path, Path, Path]:
    """A run that died in its second epoch: run folder, its pictures, its teacher."""
    data = write_folders(write_folders(tmp_path / "pictures", "train", 2, 0), "val", 1, 1)
    own = tmp_path / "teacher.json"
    own.write_bytes(teacher.read_bytes())
    (tmp_path / "teacher.safetensors").write_bytes(teacher.with_suffix(".safetensors").read_bytes())
    values = options(tmp_path, data, teacher=str(own), every=1)
    with pytest.raises(Killed):
        FocusDDClassificationTrainer(overrides=values, _callbacks=kill_in(1)).train()
    return tmp_path / "runs" / "run", data, own


def test_another_set_or_teacher_is_not_the_run_that_is_resumed(killed: tuple[Path, Path, Path]) -> None:
    run, data, teacher = killed
    kept = (data / "train" / "bar" / "0.png").read_bytes()
    (data / "train" / "bar" / "0.png").write_bytes(kept + b" ")
    with pytest.raises(VerifyError, match="other pictures than what this run began with"):
        FocusDDClassificationTrainer(overrides={"resume": str(run / "weights" / "last.pt")})
    (data / "train" / "bar" / "0.png").write_bytes(kept)
    net = nets.make_net(NET, 4)
    nets.save_spec(teacher, net, ("square", "other", "disc", "bar"), SIZE)
    with pytest.raises(WeightsError, match="has other weights"):
        FocusDDClassificationTrainer(overrides={"resume": str(run / "weights" / "last.pt")})


def test_a_resumed_run_keeps_its_options(killed: tuple[Path, Path, Path]) -> None:
    resume = {"resume": str(killed[0])}
    with pytest.raises(ConfigError, match="keeps lr0, temperature as it began"):
        FocusDDClassificationTrainer(overrides={**resume, "lr0": 0.5, "temperature": 3})
    trainer = FocusDDClassificationTrainer(overrides={**resume, "plots": False})
    assert trainer.options.temperature == 20
    assert Path(trainer.save_dir) == killed[0]


def test_a_run_that_moved_goes_on_where_it_is(killed: tuple[Path, Path, Path], tmp_path: Path) -> None:
    moved = killed[0].rename(tmp_path / "moved")
    trainer = FocusDDClassificationTrainer(overrides={"resume": str(moved)})
    trainer.train()
    assert len(rows(moved)) == 3
    assert not killed[0].exists()


def test_last_pt_is_not_opened_to_resume(killed: tuple[Path, Path, Path]) -> None:
    (killed[0] / "weights" / "last.pt").write_bytes(b"anything")
    FocusDDClassificationTrainer(overrides={"resume": str(killed[0])}).train()
    assert len(rows(killed[0])) == 3


def test_nothing_to_resume(tmp_path: Path, pictures: Path) -> None:
    train(tmp_path, pictures, epochs=1)
    with pytest.raises(WeightsError, match="the run is finished"):
        FocusDDClassificationTrainer(overrides={"resume": str(tmp_path / "runs" / "run")})
    with pytest.raises(WeightsError, match="nothing to resume"):
        FocusDDClassificationTrainer(overrides={"resume": str(tmp_path / "nowhere")})
