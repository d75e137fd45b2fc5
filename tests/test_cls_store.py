"""The stored logits: bytes, refusals, and what is read back."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from class_data import CLASSES, write_class_set, write_teacher
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from focusdd_det import sealed
from focusdd_det.classify.classset import read_class_set
from focusdd_det.classify.loss import soft_cross_entropy, soft_cross_entropy_topk
from focusdd_det.classify.relabel import load_config, relabel
from focusdd_det.classify.store import KIND, LogitStore, bytes_of_epoch, epoch_name
from focusdd_det.classify.teacher import load_classifier
from focusdd_det.classify.views import FIELDS, ViewDataset, ViewSettings, draw
from focusdd_det.disk import sha256
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
        sealed.remove(tmp_path / "store", KIND)
    assert len(list((tmp_path / "store").iterdir())) == POOL + 4
    (tmp_path / "store" / "thesis.txt").unlink()
    sealed.remove(tmp_path / "store", KIND)
    assert not (tmp_path / "store").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "store.json").write_text(json.dumps({"format": "of somebody else"}))
    assert sealed.read_description(tmp_path / "other", KIND) is None
    with pytest.raises(DiskError, match="not removed"):
        sealed.remove(tmp_path / "other", KIND)


Change = Callable[[Any], object]


def resealed(made: Path, folder: Path, name: str = "whole", described: Change = id, tensors: Change = id) -> Path:
    """A copy whose store.json or first epoch somebody changed, with hashes that fit."""
    shutil.copytree(made / name, folder)
    description = json.loads((folder / "store.json").read_text())
    described(description)
    (folder / "store.json").write_text(json.dumps(description))
    held = load_file(folder / "epoch_00000.safetensors")
    tensors(held)
    save_file({key: value.contiguous() for key, value in held.items()}, folder / "epoch_00000.safetensors")
    seal = {path.name: sha256(path.read_bytes()) for path in [folder / "store.json", *folder.glob("epoch_*")]}
    (folder / "COMPLETE").write_text(json.dumps(seal))
    return folder


def cell(field: str, value: int) -> Change:
    """Sets a field of picture 4's view."""
    return lambda held: held["views"][4].__setitem__(FIELDS.index(field), value)


def box(*values: int) -> Change:
    return lambda held: held["views"][4, 5:].copy_(torch.tensor(values))


def to(key: str, dtype: torch.dtype) -> Change:
    return lambda held: held.update({key: held[key].to(dtype)})


def put(key: str, value: float) -> Change:
    return lambda held: held[key][4].fill_(value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("whole", cell("x", -1), "picture 4: the crop -1, "),
        ("whole", cell("w", 0), "picture 4: the crop .* x .* lies in no picture"),
        ("whole", cell("flip", 2), "picture 4: the flip 2"),
        ("whole", box(7, 0, 0, 4, 4), "picture 4: the partner 7 is not one of 7"),
        ("whole", box(-2, 0, 0, 0, 0), "picture 4: the partner -2"),
        ("whole", box(1, -8, 0, 300, 32), "picture 4: the box -8, 0, 300 x 32 .*32 px"),
        ("whole", box(1, 30, 0, 3, 4), "picture 4: the box 30"),
        ("whole", box(1, 0, 0, 0, 0), "picture 4: the box 0"),
        ("whole", box(-1, 0, 0, 4, 4), "picture 4: the box .* partner -1"),
        ("whole", to("views", torch.float32), "F32.*expected.*I32"),
        ("whole", to("logits", torch.float64), "F64.*expected.*F16"),
        ("whole", put("logits", float("nan")), "picture 4: logits that are not finite"),
        ("top2", put("values", float("inf")), "picture 4: values that are not finite"),
        ("top2", put("rest", float("nan")), "picture 4: a rest"),
        ("top2", lambda held: held["indices"][4, 0].fill_(3), "picture 4: indices beyond the 3 classes"),
        ("top2", lambda held: held["indices"][4, 0].fill_(-1), "picture 4: indices beyond"),
        ("top2", put("indices", 1), "picture 4: indices that name a class twice"),
    ],
)
def test_a_sealed_epoch_that_cannot_be_is_refused(
    made: Path, tmp_path: Path, name: str, change: Change, message: str
) -> None:
    store = LogitStore(resealed(made, tmp_path / "store", name, tensors=change))
    with pytest.raises(VerifyError, match=rf"epoch_00000\.safetensors: .*{message}.*relabel_cls"):
        store.row(0, 0)
    store.row(1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("teacher"), "'teacher' is missing"),
        (lambda d: d.update(teacher=["resnet18"]), "teacher: expected"),
        (lambda d: d["teacher"].update(sha256=3), r"teacher\.sha256"),
        (lambda d: d["set"].update(names=[1, 2, 3]), r"set\.names"),
        (lambda d: d["set"].update(names="abc"), r"set\.names"),
        (lambda d: d["set"].update(n="7"), r"set\.n"),
        (lambda d: d.update(set=[]), "not a description"),
        (lambda d: d.update(topk=4), "topk: expected 0 to 3"),
        (lambda d: d.update(pool=3.5), "pool"),
        (lambda d: d.update(pool=10**15), "COMPLETE does not name"),
        (lambda d: d.update(temperature=float("nan")), "temperature"),
        (lambda d: d["views"].update(size=32.5), "whole size"),
        (lambda d: d["views"].update(scale="ab"), r"views\.scale"),
        (lambda d: d.update(accuracy=[1]), "accuracy: expected"),
    ],
)
def test_a_sealed_description_of_other_types_is_refused(
    made: Path, tmp_path: Path, change: Change, message: str
) -> None:
    with pytest.raises(VerifyError, match=message):
        LogitStore(resealed(made, tmp_path / "store", described=change))


@pytest.mark.parametrize("whose", ["own", "partner"])
def test_a_stored_crop_outside_its_picture_names_store_and_picture(made: Path, tmp_path: Path, whose: str) -> None:
    def change(held: Any) -> None:
        held["views"][4] = torch.tensor([0, 0, 33, 8, 0, -1, 0, 0, 0, 0])
        held["views"][2] = torch.tensor([0, 0, 8, 8, 0, 4, 0, 0, 4, 4])

    class_set = read_class_set(made / "set", "train")
    store = LogitStore(resealed(made, tmp_path / "other", tensors=change))
    data = ViewDataset(class_set, store.settings, store=store)
    with pytest.raises(VerifyError, match=rf"other, epoch 0: the crop 0, 0, 33 x 8 .*{class_set.paths[4]} of 32 x 32"):
        data[(0, 4 if whose == "own" else 2)]


def test_loading_processes_hash_each_file_once(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, hashed = tmp_path / "hashed", sealed.file_sha256

    def counted(path: Path) -> str:
        with counter.open("a") as file:
            file.write(f"{path.name}\n")
        time.sleep(0.3)  # so that the other one comes meanwhile
        return hashed(path)

    monkeypatch.setattr(sealed, "file_sha256", counted)
    store = LogitStore(made / "whole")
    data = ViewDataset(read_class_set(made / "set", "train"), store.settings, store=store)
    places: Any = [(epoch, index) for epoch in range(POOL) for index in range(4)]
    loader = DataLoader(data, 1, sampler=places, num_workers=2, multiprocessing_context="fork")
    assert len([batch["index"] for batch in loader]) == len(places)
    for epoch in range(POOL):
        store.row(epoch, 0)
    assert sorted(counter.read_text().split()) == [epoch_name(epoch) for epoch in range(POOL)]
