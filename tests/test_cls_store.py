"""The stored logits: bytes, refusals, and what is read back."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from class_data import CLASSES, write_class_set, write_teacher
from safetensors.torch import load_file

from focusdd_det.classify.classset import read_class_set
from focusdd_det.classify.loss import soft_cross_entropy, soft_cross_entropy_topk
from focusdd_det.classify.relabel import load_config, relabel
from focusdd_det.classify.store import LogitStore, bytes_of_epoch, is_store, remove_store
from focusdd_det.classify.teacher import load_classifier
from focusdd_det.classify.views import ViewDataset, ViewSettings, draw
from focusdd_det.errors import ConfigError, DiskError, VerifyError

POOL = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """set/, teacher.json, whole/ and top2/ (two of three logits)."""
    folder = tmp_path_factory.mktemp("stores")
    write_class_set(folder / "set")
    teacher = write_teacher(folder / "teacher")
    common = {
        "data": str(folder / "set"), "teacher": str(teacher), "eval_data": "none", "size": 32, "epochs": POOL,
        "batch": 4, "workers": 1, "device": "cpu",
    }  # fmt: skip
    relabel(load_config(**common, out=str(folder / "whole")))
    relabel(load_config(**common, out=str(folder / "top2"), topk=2, temperature=0.2))
    return folder


def test_the_stored_view_shown_to_the_teacher_gives_the_stored_logits(made: Path) -> None:
    class_set = read_class_set(made / "set", "train")
    store = LogitStore(made / "whole")
    store.check(class_set, 32, POOL)
    data = ViewDataset(class_set, store.settings, store=store)
    live = ViewDataset(class_set, ViewSettings(32))
    teacher = load_classifier(str(made / "teacher.json"), None, CLASSES, 32)
    for place in [(e, i) for e in range(POOL) for i in range(len(class_set))]:
        sample = data[place]
        assert torch.equal(sample["img"], live[place]["img"]) and sample["share"] == live[place]["share"]
        expected = teacher(sample["img"][None].float() / 255)[0]
        assert sample["soft"]["logits"].dtype == torch.float16
        torch.testing.assert_close(sample["soft"]["logits"].float(), expected, rtol=2e-3, atol=2e-3)
        row = draw(ViewSettings(32), *place, class_set.keys, {place[1]: (32, 32)})
        assert (store.view(*place) == row).all()
    assert store.names == CLASSES and store.accuracy is None and (store.pool, store.topk) == (POOL, 0)


def test_top_k_rows_are_the_largest_logits_and_the_rest(made: Path) -> None:
    whole, top = LogitStore(made / "whole"), LogitStore(made / "top2")
    for index in range(7):
        logits = whole.row(1, index)[1]["logits"].float()
        soft = top.row(1, index)[1]
        assert soft["indices"].dtype == torch.int32 and soft["values"].dtype == torch.float16
        values, indices = logits.topk(2)
        assert soft["indices"].tolist() == indices.tolist()
        torch.testing.assert_close(soft["values"].float(), values)
        other = next(c for c in range(3) if c not in indices.tolist())
        assert soft["rest"].item() == pytest.approx(logits[other].item() / 0.2, rel=2e-3, abs=2e-2)


def test_both_forms_reach_the_loss_in_a_batch(made: Path) -> None:
    class_set = read_class_set(made / "set", "train")
    torch.manual_seed(0)
    student = torch.randn(7, 3)
    losses = []
    for name in ("whole", "top2"):
        store = LogitStore(made / name)
        data = ViewDataset(class_set, store.settings, pool=2, store=store)
        soft = data.collate_fn([data[(2, i)] for i in range(7)])["soft"]  # the pool is 2: the views of epoch 0
        if name == "whole":
            assert torch.equal(soft["logits"], load_file(made / "whole" / "epoch_00000.safetensors")["logits"])
            losses.append(soft_cross_entropy(student, soft["logits"], 0.2))
        else:
            losses.append(soft_cross_entropy_topk(student, soft["values"], soft["indices"], soft["rest"], 0.2))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=1e-2)  # of three classes, one is the bucket


def test_the_files_are_as_large_as_was_said(made: Path) -> None:
    for name, topk in (("whole", 0), ("top2", 2)):
        size = (made / name / "epoch_00000.safetensors").stat().st_size
        assert 0 <= size - bytes_of_epoch(7, 3, topk) < 600
    assert sorted(p.name for p in (made / "whole").iterdir()) == [
        "COMPLETE", *(f"epoch_0000{e}.safetensors" for e in range(POOL)), "relabel.log.json", "store.json",
    ]  # fmt: skip


def test_another_set_is_refused(made: Path, tmp_path: Path) -> None:
    other = read_class_set(write_class_set(tmp_path / "other", count=8), "train")
    with pytest.raises(VerifyError, match=r"another set \(7 pictures.*\(8 pictures"):
        LogitStore(made / "whole").check(other, 32)
    other_bytes = read_class_set(write_class_set(tmp_path / "as_many", size=40), "train")
    with pytest.raises(VerifyError, match=r"another set \(7 pictures.*\(7 pictures"):
        LogitStore(made / "whole").check(other_bytes, 32)


def test_other_classes_and_another_order_are_refused(made: Path) -> None:
    store, class_set = LogitStore(made / "whole"), read_class_set(made / "set", "train")
    with pytest.raises(VerifyError, match=r"these classes in another order: n03, n01, n02\n.*n01, n02, n03"):
        store.check(class_set.only(sorted(CLASSES)), 32)
    with pytest.raises(VerifyError, match="3 other classes"):
        store.check(class_set.only(CLASSES[:2]), 32)


def test_another_resolution_is_refused(made: Path) -> None:
    with pytest.raises(ConfigError, match=r"views of 32 px, but 64 px.*imgsz=32"):
        LogitStore(made / "whole").check(read_class_set(made / "set", "train"), 64)


def test_a_shorter_pool_is_refused(made: Path) -> None:
    store, class_set = LogitStore(made / "whole"), read_class_set(made / "set", "train")
    with pytest.raises(ConfigError, match=r"holds 3 epochs.*pool=4"):
        store.check(class_set, 32, 4)
    with pytest.raises(ConfigError, match="pool=4"):
        ViewDataset(class_set, store.settings, pool=4, store=store)


@pytest.mark.parametrize("victim", ["epoch_00001.safetensors", "store.json", "COMPLETE"])
def test_damage_is_found_before_it_is_used(made: Path, tmp_path: Path, victim: str) -> None:
    folder = tmp_path / "store"
    shutil.copytree(made / "whole", folder)
    data = bytearray((folder / victim).read_bytes())
    data[-3] ^= 1
    (folder / victim).write_bytes(data)
    with pytest.raises(VerifyError, match=f"{victim}.*relabel_cls"):
        LogitStore(folder).row(1, 0)


def test_an_unfinished_store_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "whole", tmp_path / "store.incomplete")
    with pytest.raises(VerifyError, match=r"not a finished store.*store\.incomplete is an unfinished one"):
        LogitStore(tmp_path / "store")


def test_a_missing_epoch_is_named(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "whole", tmp_path / "store")
    (tmp_path / "store" / "epoch_00002.safetensors").unlink()
    store = LogitStore(tmp_path / "store")
    store.row(1, 0)
    with pytest.raises(VerifyError, match=r"epoch_00002\.safetensors.*No such file"):
        store.row(2, 0)


def test_a_store_goes_to_other_processes(made: Path) -> None:
    store = LogitStore(made / "whole")
    before = store.row(2, 5)
    other = pickle.loads(pickle.dumps(store))
    assert torch.equal(other.row(2, 5)[1]["logits"], before[1]["logits"])
    for epoch in (0, 1, 2) * 3:
        assert (other.view(epoch, 3) == store.view(epoch, 3)).all()


def test_only_a_store_is_removed(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "whole", tmp_path / "store")
    (tmp_path / "store" / "thesis.txt").write_text("mine")
    with pytest.raises(DiskError, match=r"thesis\.txt"):
        remove_store(tmp_path / "store")
    assert len(list((tmp_path / "store").iterdir())) == POOL + 4
    (tmp_path / "store" / "thesis.txt").unlink()
    remove_store(tmp_path / "store")
    assert not (tmp_path / "store").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "store.json").write_text(json.dumps({"format": "of somebody else"}))
    assert not is_store(tmp_path / "other")
    with pytest.raises(DiskError, match="not removed"):
        remove_store(tmp_path / "other")
