"""Training without the teacher: what is stored, that it is what the teacher says, and every refusal."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import NAMES, pack_set, save_detector, tiny_yaml, write_set
from test_aside import NoWait
from test_trainer import Killed, _callbacks, kill_in, options, rows, same, weights
from ultralytics.cfg import get_cfg
from ultralytics.data.augment import v8_transforms
from ultralytics.data.dataset import YOLODataset
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG_DICT

from focusdd_det import demo as demo_package
from focusdd_det import sealed
from focusdd_det.checkpoints import safe_checkpoint
from focusdd_det.cli import main, run_main
from focusdd_det.commandline import parse_tokens
from focusdd_det.compose import encode_jpeg
from focusdd_det.demo.scenes import plan_many, render
from focusdd_det.demo.write import yolo_labels
from focusdd_det.errors import ConfigError, DataError, DiskError, VerifyError, WeightsError
from focusdd_det.losses import supervision_terms
from focusdd_det.teacher import load_detector
from focusdd_det.trainer import FocusDDTrainer, add_stored_heads
from focusdd_det.training.command import train
from focusdd_det.training.replay import Pool, ReplayDataset, View, pooled, replay_loader, rewind
from focusdd_det.training.run_files import student_head
from focusdd_det.training.run_guard import guarded
from focusdd_det.training.sparse_heads import sparse_supervision_terms, thin
from focusdd_det.training.store_targets import USAGE, TargetsConfig, load_config, store_command, store_targets, training
from focusdd_det.training.supervision import TEACHER_KEY, Options
from focusdd_det.training.targets import AUGMENTATION, KIND, VIEWS, TargetStore, epoch_name, pool_files

FLOOR, TOPK, POOL = 0.8, 2, 4  # the tiny teacher is sure of much: at 0.8 some anchors are left out
VIEW = {"imgsz": 64, "seed": 0, "degrees": 10.0, "shear": 2.0, "flipud": 0.2, "mixup": 0.2}  # mosaic, HSV: the usual


def config(data: Path, teacher: Path, out: Path, **more: Any) -> TargetsConfig:
    base = {
        "data": str(data), "teacher": str(teacher), "out": str(out), **VIEW, "pool": POOL, "close_mosaic": POOL,
        "floor": FLOOR, "topk": TOPK, "batch": 4, "workers": 0, "device": "cpu",
    }  # fmt: skip
    return load_config(**{**base, **more})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, drawn_set: Path, teacher_file: Path) -> Path:
    """A thinned store."""
    return store_targets(config(drawn_set, teacher_file, tmp_path_factory.mktemp("store") / "soft")).folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, drawn_set: Path, teacher_file: Path) -> Path:
    """A store that leaves nothing out."""
    out = tmp_path_factory.mktemp("whole") / "soft"
    return store_targets(config(drawn_set, teacher_file, out, floor=0, topk=0)).folder


def student(tmp_path: Path, data: Path, **more: Any) -> dict[str, Any]:
    return {**options(tmp_path, data), **VIEW, **more}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != sealed.LOG}


def views_of(
    folder: Path, pool: Pool, names: Sequence[str] = NAMES, view: Mapping[str, Any] = VIEW
) -> tuple[ReplayDataset, Any]:
    """What a training on stored targets sees, and Ultralytics' keys for it."""
    cfg = get_cfg(overrides=dict(view))
    cfg.augmentations = []
    data = ReplayDataset(
        img_path=str(folder / "images" / "train"), imgsz=cfg.imgsz, batch_size=3, augment=True, hyp=cfg, task="detect",
        data={"names": dict(enumerate(names)), "channels": 3}, seed=0, pool=pool,
    )  # fmt: skip
    return data, cfg


# ---- what is stored ----


@pytest.mark.parametrize("workers", [0, 2])
def test_stored_targets_are_the_live_heads_on_the_same_views(
    workers: int, store: Path, drawn_set: Path, teacher_file: Path
) -> None:
    """Through the training's loader: other batches, another order and other processes than they were made in, which
    read the store as well."""
    teacher = load_detector(teacher_file, "cpu", NAMES)
    data, cfg = views_of(drawn_set, Pool(POOL, 3))
    loader = replay_loader(data, 3, workers, seed=0, then=partial(add_stored_heads, TargetStore(store)))
    seen, left_out = set(), 0
    for epoch in (0, 5, 7):
        if epoch == 7:
            data.close_mosaic(cfg)
        rewind(loader, epoch)
        for batch in loader:
            live = thin(teacher.heads(batch["img"].float() / 255), FLOOR, TOPK)
            mine = batch[TEACHER_KEY]
            seen |= set(batch["view"])
            left_out += batch["img"].shape[0] * 84 - len(mine.anchor)
            for name in ("picture", "anchor", "classes"):
                assert torch.equal(getattr(mine, name), getattr(live, name)), name
            for name in ("values", "boxes", "rest", "background", "total"):
                assert torch.allclose(getattr(mine, name).float(), getattr(live, name), rtol=2e-3, atol=2e-3), name
    loader.close()
    expected = {View(False, e, i) for e in (0, 1) for i in range(10)} | {View(True, 1, i) for i in range(10)}
    assert seen == expected
    assert 30 < left_out < 84 * 30 - 30, "the floor should leave out some and keep some"


def test_what_a_pool_cycles_through() -> None:
    pool = Pool(mixed=3, closed=2)
    assert [pooled(pool, False, e, 7) for e in (0, 2, 3)] == [View(False, 0, 7), View(False, 2, 7), View(False, 0, 7)]
    assert [pooled(pool, True, e, 7) for e in (4, 5)] == [View(True, 0, 7), View(True, 1, 7)]
    assert pooled(Pool(3, 0), True, 4, 7) == View(False, 1, 7)  # closing changes nothing where nothing is mixed


def test_the_keys_that_decide_the_views_are_all_of_ultralytics() -> None:
    """A version of Ultralytics that adds an augmentation must not be trained on views that the teacher never saw."""
    source = inspect.getsource(v8_transforms) + inspect.getsource(YOLODataset.build_transforms)
    used = set(re.findall(r"hyp\.(\w+)", source)) | {"augmentations"}
    assert used - {"mask_ratio", "overlap_mask"} == set(AUGMENTATION)


def test_the_usual_views_are_those_of_a_usual_training() -> None:
    usual = load_config(data="-", teacher="-").views
    assert {key: usual[key] for key in VIEWS if key != "augmentations"} == {
        key: DEFAULT_CFG_DICT[key] for key in VIEWS if key != "augmentations"
    }
    assert usual["augmentations"] == []


def test_store_on_disk(store: Path) -> None:
    found = TargetStore(store)
    names = [epoch_name(closed, e) for closed in (False, True) for e in range(POOL)]
    assert sorted(path.name for path in store.iterdir()) == sorted([*names, "COMPLETE", "store.json", sealed.LOG])
    assert (found.pool, found.reg_max, found.strides) == (Pool(POOL, POOL), 16, [8, 16, 32])
    actual = sum((store / name).stat().st_size for name in names)
    pilot = found.description["pilot"]
    per_view = pilot["anchors"] * (4 + 4 * TOPK + 2 + 128) + 8 + 4 + 2 * 3 + 48
    assert actual == pytest.approx(2 * POOL * (10 * per_view + 1000), rel=0.15), "the estimate is not the size"
    assert 0.1 < pilot["share"] < 1


def test_dry_run_writes_nothing(
    drawn_set: Path, teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        f"data={drawn_set}",
        f"teacher={teacher_file}",
        "imgsz=64",
        "pool=3",
        "device=cpu",
        f"out={tmp_path / 'o'}",
    ]
    assert main(["detect", "targets", *words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "(3 + 3 epochs" in said
    assert " MB at " in said
    assert "of the sum of f" in said
    assert list(tmp_path.iterdir()) == []


def test_help_and_the_next_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(store_command, ["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{key}:" in said for key in TargetsConfig.__dataclass_fields__)
    for line in USAGE.splitlines():
        if "store_targets.py" in line:
            load_config(**{k: v for k, v in parse_tokens(line.split(".py")[1].split("  ")[0].split(), {}, {}).items()
                           if k != "dry_run"})  # fmt: skip
    other = load_config(data="set", teacher="t.pt", hsv_h=0, imgsz=320)
    assert training(other, Path("soft")).endswith("data=set targets=soft epochs=100 imgsz=320 hsv_h=0.0")


MEMORY = """
import sys, threading, time
from pathlib import Path
from focusdd_det.training.replay import View
from focusdd_det.training.targets import TargetStore

def private():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1024

def watch():
    while True:
        seen.append(private())
        time.sleep(0.002)

store, began = TargetStore(sys.argv[1]), private()
seen = [began]
threading.Thread(target=watch, daemon=True).start()
for first in range(0, 1000, 100):
    store.heads([View(False, 0, first + i) for i in range(16)])
print(max(seen) - began)
whole = Path(sys.argv[1], "mixed_00000.safetensors").read_bytes()  # what it is measured against
print(private() - began)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_store_is_not_read_into_memory(tmp_path: Path) -> None:
    """An epoch of 166 MB, checked against its hash and read here and there."""
    anchors = 1_000_000
    writer = sealed.Writer(tmp_path, pool_files(Pool(1, 0)), KIND)
    writer.begin(
        {
            "format": KIND.format, "set": {"sha256": "", "names": [str(i) for i in range(80)], "n": 1000},
            "teacher": {"sha256": "", "reg_max": 16, "strides": [8, 16, 32]}, "floor": 0.01, "topk": 8,
            "views": {**dict.fromkeys(VIEWS), "imgsz": 640}, "pool": {"mixed": 1, "closed": 0},
        }
    )  # fmt: skip
    tensors = {
        "offsets": np.arange(0, anchors + 1, 1000), "anchors": np.zeros(anchors, np.int32),
        "boxes": np.zeros((anchors, 64), np.float16), "values": np.zeros((anchors, 8), np.float16),
        "classes": np.zeros((anchors, 8), np.int16), "rest": np.zeros(anchors, np.float16),
        "background": np.zeros((1000, 80), np.float16), "total": np.zeros(1000, np.float32),
        "looks": np.zeros((1000, 48), np.uint8),
    }  # fmt: skip
    writer.add(epoch_name(False, 0), tensors)
    writer.finish({})
    words = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    (tmp_path / epoch_name(False, 0)).unlink()  # pytest keeps what it finds
    most, whole = map(float, done.stdout.split())
    assert whole > 150
    assert most < 30


# ---- interruption ----


def test_a_stopped_store_goes_on_to_the_same_bytes(
    store: Path, drawn_set: Path, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add: Callable[..., None] = sealed.Writer.add

    def stop(self: sealed.Writer, name: str, tensors: Any) -> None:
        if name == epoch_name(True, 1):
            raise KeyboardInterrupt
        add(self, name, tensors)

    asked = config(drawn_set, teacher_file, tmp_path / "soft", workers=2)
    monkeypatch.setattr(sealed.Writer, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        store_targets(asked)
    work = tmp_path / "soft.incomplete"
    with pytest.raises(VerifyError, match=r"soft\.incomplete is an unfinished one"):
        TargetStore(tmp_path / "soft")
    (work / epoch_name(False, 2)).write_bytes(b"damaged while it was stopped")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"begun otherwise:\n  floor: 0.8, now 0.5"):
        store_targets(config(drawn_set, teacher_file, tmp_path / "soft", floor=0.5))
    store_targets(asked)
    assert bytes_of(tmp_path / "soft") == bytes_of(store)
    assert not work.exists()


def test_a_finished_store_that_could_not_be_renamed_is_only_published(
    store: Path, drawn_set: Path, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All the teacher's work is done by then: none of it is done again, but for a file that was damaged since; the log
    is of the run that did the work."""
    added: list[str] = []
    add: Callable[..., None] = sealed.Writer.add

    def count(self: sealed.Writer, name: str, tensors: Any) -> None:
        added.append(name)
        add(self, name, tensors)

    monkeypatch.setattr(sealed.Writer, "add", count)
    for damaged in ([], [epoch_name(False, 1)]):
        place = tmp_path / f"soft{len(damaged)}"
        work = Path(shutil.copytree(store, f"{place}.incomplete"))
        for name in damaged:
            (work / name).write_bytes(b"damaged")
        store_targets(config(drawn_set, teacher_file, place))
        assert added == damaged
        assert bytes_of(place) == bytes_of(store)
        assert ((place / sealed.LOG).read_bytes() == (store / sealed.LOG).read_bytes()) is not bool(damaged)


def test_another_store_at_the_same_place(store: Path, drawn_set: Path, teacher_file: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(store, tmp_path / "soft"))
    before = bytes_of(place)
    other_set = write_set(tmp_path / "set", seed=5)
    other_teacher = save_detector(tmp_path / "other.pt", names=NAMES, seed=4)
    for asked, key in (
        (config(drawn_set, teacher_file, place, fliplr=0.4), r"views\.fliplr: 0\.5, now 0\.4"),
        (config(drawn_set, teacher_file, place, pool=2), r"pool\.mixed: 4, now 2"),
        (config(drawn_set, other_teacher, place), r"teacher\.sha256"),
        (config(other_set, teacher_file, place), r"set\.sha256"),
    ):
        with pytest.raises(ConfigError, match=key):
            store_targets(asked)
    assert store_targets(config(drawn_set, teacher_file, place)).folder == place
    assert bytes_of(place) == before
    (place / epoch_name(True, 0)).write_bytes(b"damaged")
    with pytest.raises(VerifyError, match=rf"{epoch_name(True, 0)} is damaged.*overwrite=true"):
        store_targets(config(drawn_set, teacher_file, place))
    store_targets(config(drawn_set, teacher_file, place, pool=1, close_mosaic=0, overwrite=True))
    assert TargetStore(place).pool == Pool(1, 0)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["set", "soft"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DiskError, match="nothing there is touched"):
        store_targets(config(drawn_set, teacher_file, tmp_path / "mine", overwrite=True))


def test_too_little_disk_and_a_second_writer(
    drawn_set: Path, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(drawn_set, teacher_file, tmp_path / "soft")
    with sealed.working(tmp_path / "soft"), pytest.raises(DiskError, match="written by another"):
        store_targets(asked)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskError, match="GB needed"):
        store_targets(asked)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"pool": 0, "floor": 1.0, "imgsz": 65}, ConfigError, r"pool=0.*\n.*imgsz=65.*\n.*floor=1\.0"),
        ({"mosaic": 2.0}, ConfigError, "mosaic"),
        ({"teacher": "nowhere.pt"}, WeightsError, "not found"),
        ({"data": "COCO"}, DataError, "not a distilled set"),
        ({"teacher": "TWO"}, ConfigError, "two heads"),
        ({"out": "SET/soft"}, ConfigError, "lie in each other"),
    ],
)
def test_what_cannot_be_stored(
    more: dict[str, Any], error: type[Exception], message: str, drawn_set: Path, teacher_file: Path, drawn_coco: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    two = save_detector(tmp_path / "two.pt", "yolo26")
    places = {"COCO": str(drawn_coco), "TWO": str(two), "SET/soft": str(drawn_set / "soft_targets")}
    more = {key: places.get(value, value) if isinstance(value, str) else value for key, value in more.items()}
    with pytest.raises(error, match=message):
        store_targets(config(**{"data": drawn_set, "teacher": teacher_file, "out": tmp_path / "soft", **more}))
    assert not (tmp_path / "soft.incomplete").exists()


# ---- training ----


def first_losses(overrides: dict[str, Any], began: Callable[[Any], None] = lambda _: None) -> list[list[float]]:
    """The five terms of each step; `began` is given the trainer before the first one."""
    found: list[list[float]] = []

    def note(trainer: Any) -> None:
        found.append([float(value) for value in trainer.loss_items.values()])

    callbacks = {**_callbacks(), "on_train_start": [began], "on_train_batch_end": [note]}
    FocusDDTrainer(overrides=overrides, _callbacks=callbacks).train()
    return found


def test_the_loss_is_that_of_the_live_teacher(
    store: Path, whole: Path, drawn_set: Path, teacher_file: Path, tmp_path: Path
) -> None:
    """Three epochs with mosaic, affine, flips and HSV, the last one with mosaic closed; the same seed."""
    live = first_losses(student(tmp_path, drawn_set, teacher=str(teacher_file)))
    assert len(live) == 9
    exact = first_losses(student(tmp_path, drawn_set, targets=str(whole)))
    for mine, theirs in zip(exact, live, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3)
    thinned = first_losses(student(tmp_path, drawn_set, targets=str(store)))
    assert thinned[0] == pytest.approx(live[0], rel=0.1)  # with a floor of 0.8, for the test's sake
    assert thinned[0][:3] == pytest.approx(live[0][:3])  # the boxes of the set do not depend on it
    assert thinned[0][3] != pytest.approx(exact[0][3], rel=1e-6), "the floor should leave something out"


@pytest.mark.parametrize("kind", ["teacher", "targets"])
@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_step_does_not_wait_for_the_device(
    place: str, kind: str, store: Path, drawn_set: Path, teacher_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """From the loaded batch to the gradients, without Ultralytics' own loss on boxes. `meta` stands for a GPU."""
    given = {kind: str({"teacher": teacher_file, "targets": store}[kind])}
    trainer = FocusDDTrainer(overrides=student(tmp_path, drawn_set, supervision="kl", workers=0, **given))
    trainer._setup_train()
    batch = next(iter(trainer.train_loader))
    trainer.device = torch.device(place)
    trainer.model.to(place)
    if trainer.teacher:
        trainer.teacher.to(trainer.device)
    if place == "meta":
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with NoWait():
        loss, items = trainer.model(trainer.preprocess_batch(batch))
        loss.sum().backward()
    assert trainer.model.model[0].conv.weight.grad.device.type == place
    assert {"kl_cls_loss", "kl_dfl_loss"} <= set(items)


# What a term of a training from a store may be off at the default floor and topk, as a share of the same term of an
# untrained student; docs/results.md.
OFF = torch.tensor([0.001, 0.025])  # class, box


@pytest.mark.parametrize("weights", ["yolo_demo.pt", "yolo11n.pt"])
def test_how_far_the_loss_is_from_that_of_the_live_teacher_by_default(
    weights: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Trained teachers; a student from scratch, the demo's on its way, and one that has nearly become its teacher."""
    demo = Path(demo_package.__file__).parent
    if weights == "yolo_demo.pt":  # 8 classes, so that topk leaves none out
        file, model, imgsz, steps = demo / weights, str(demo / "yolo11-demo.yaml"), 192, 16
        drawn = [render(plan_many(f"test/{i}", (imgsz, imgsz))) for i in range(16)]
        pictures = [(encode_jpeg(picture.image, 92), yolo_labels(picture)) for picture in drawn]
    else:
        assets: Path = request.getfixturevalue("assets")
        file, model, imgsz, steps = assets / "weights" / weights, "yolo11n.yaml", 320, 0
        photographs = sorted((assets / "data" / "coco_mini" / "images" / "train2017").glob("*.jpg"))
        pictures = [(photograph.read_bytes(), "") for photograph in photographs[:16]]
    teacher = load_detector(file)
    data = pack_set(tmp_path / "set", pictures, teacher.names)
    asked = {"data": str(data), "teacher": str(file), "out": str(tmp_path / "soft"), "imgsz": imgsz}
    found = TargetStore(store_targets(load_config(**asked, pool=1, close_mosaic=0, workers=0, device="cpu")).folder)
    assert (found.floor, found.topk) == (0.01, 8)
    dataset, _ = views_of(data, Pool(1, 0), teacher.names, {"imgsz": imgsz})
    batches = list(replay_loader(dataset, 8, 0, seed=0, then=partial(add_stored_heads, found)))

    def terms(model: Any, batch: Any) -> tuple[Any, Any]:
        x = batch["img"].float() / 255
        heads = model(x)
        live = supervision_terms(heads, teacher.heads(x), student_reg_max=16, teacher_reg_max=16)
        return torch.stack(live), torch.stack(sparse_supervision_terms(heads, batch[TEACHER_KEY], reg_max=16))

    def measured(model: Any) -> tuple[Any, Any]:
        """[batches, 2] live, and how far the stored ones are off."""
        with torch.no_grad():
            live, stored = (torch.stack(each) for each in zip(*(terms(model, batch) for batch in batches), strict=True))
        assert (live != stored).all(), "the floor should leave something out"
        return live, (stored - live).abs()

    torch.manual_seed(0)
    learning = DetectionModel(model, nc=len(teacher.names), verbose=False)
    start, off = measured(learning)
    assert (off <= OFF * start).all()
    optimizer = torch.optim.AdamW(learning.parameters(), 0.003)
    for step in range(steps):
        live, _ = terms(learning, batches[step % len(batches)])
        optimizer.zero_grad()
        live.sum().backward()
        optimizer.step()
    if steps:
        live, off = measured(learning)
        assert (live < 0.7 * start).all()
        assert (off <= OFF * start).all()
    near = safe_checkpoint(file).float().eval()
    near.model[-1].training = True  # raw outputs
    for parameter in near.parameters():
        parameter.data += 0.03 * parameter.data.std(unbiased=False) * torch.randn_like(parameter)
    live, off = measured(near)
    assert (live < 0.1 * start).all()
    assert (off <= OFF * start).all()


def test_stored_targets_in_bf16(store: Path, drawn_set: Path, tmp_path: Path) -> None:
    full = first_losses(student(tmp_path, drawn_set, targets=str(store), epochs=1))
    half = first_losses(student(tmp_path, drawn_set, targets=str(store), epochs=1, precision="bf16"))
    assert half[0] == pytest.approx(full[0], rel=0.03, abs=1e-3)
    assert half != full


def test_resume_equals_the_unbroken_run(store: Path, drawn_set: Path, tmp_path: Path) -> None:
    common = student(tmp_path, drawn_set, targets=str(store), targets_pool=2, epochs=4, nbs=16)
    FocusDDTrainer(overrides={**common, "name": "unbroken"}).train()
    broken = FocusDDTrainer(overrides={**common, "name": "broken"}, _callbacks={**_callbacks(), **kill_in(3)})
    with pytest.raises(Killed):
        broken.train()
    run = tmp_path / "runs" / "broken"
    other = Path(shutil.copytree(store, tmp_path / "moved"))
    resumed = FocusDDTrainer(overrides={"resume": str(run / "weights" / "last.pt"), "targets": str(other)})
    resumed.train()
    assert (resumed.start_epoch, resumed.pool) == (3, Pool(2, 2))
    assert same(weights(tmp_path / "runs" / "unbroken" / "weights" / "last.pt"), weights(run / "weights" / "last.pt"))
    assert rows(tmp_path / "runs" / "unbroken") == rows(run)
    noted = yaml.safe_load((run / "focusdd.yaml").read_text())
    assert noted["targets_sha256"] == TargetStore(store).sha256
    assert noted["teacher_sha256"] == TargetStore(store).description["teacher"]["sha256"]


def test_resume_with_other_targets_is_refused(store: Path, whole: Path, drawn_set: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(store, tmp_path / "soft"))
    trainer = FocusDDTrainer(
        overrides=student(tmp_path, drawn_set, targets=str(place)), _callbacks={**_callbacks(), **kill_in(1)}
    )
    with pytest.raises(Killed):
        trainer.train()
    last = str(tmp_path / "runs" / "run" / "weights" / "last.pt")
    with pytest.raises(VerifyError, match="other ones than this run began with"):
        FocusDDTrainer(overrides={"resume": last, "targets": str(whole)})
    shutil.rmtree(place)
    with pytest.raises(VerifyError, match="give its new place with targets="):
        FocusDDTrainer(overrides={"resume": last})


def test_a_training_from_a_store_loads_no_teacher(
    drawn_set: Path, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Path(shutil.copy(teacher_file, tmp_path / "teacher.pt"))
    out = store_targets(config(drawn_set, teacher, tmp_path / "soft", pool=1, close_mosaic=0)).folder
    teacher.unlink()
    monkeypatch.setattr("focusdd_det.trainer.load_detector", lambda *_: pytest.fail("a teacher was loaded"))
    trainer = FocusDDTrainer(overrides=student(tmp_path, drawn_set, targets=str(out), epochs=1, close_mosaic=0))
    trainer.train()
    assert trainer.teacher is None
    assert float(rows(tmp_path / "runs" / "run")[0]["train/kl_dfl_loss"]) > 0


def test_one_store_serves_students_of_any_width(store: Path, drawn_set: Path, tmp_path: Path) -> None:
    wide = yaml.safe_load(tiny_yaml(tmp_path).read_text())
    wide["backbone"] = [[*layer[:3], [2 * layer[3][0], *layer[3][1:]]] for layer in wide["backbone"]]
    (tmp_path / "yolo11s-tiny.yaml").write_text(yaml.safe_dump(wide))
    for name in ("yolo11n-tiny.yaml", "yolo11s-tiny.yaml"):
        losses = first_losses(student(tmp_path, drawn_set, model=str(tmp_path / name), targets=str(store), epochs=1))
        assert all(step[3] > 0 and step[4] > 0 for step in losses)
    assert student_head("yolo11n.yaml") == student_head("yolo11s.yaml") == (16, [8.0, 16.0, 32.0])


def test_refusals_leave_no_run_folder(
    store: Path, whole: Path, drawn_set: Path, teacher_file: Path, tmp_path: Path
) -> None:
    def refused(error: type[Exception], match: str, **more: Any) -> None:
        with pytest.raises(error, match=match):
            FocusDDTrainer(overrides={**student(tmp_path, drawn_set, targets=str(store)), **more})
        assert not (tmp_path / "runs").exists()

    refused(ConfigError, "imgsz: 64 in the store, 96 asked for", imgsz=96)
    refused(ConfigError, "seed: 0 in the store, 1 asked for", seed=1)
    refused(ConfigError, r"fliplr: 0\.5 in the store, 0\.0 asked for\n  hsv_h: 0\.015 .* 0\.1", fliplr=0.0, hsv_h=0.1)
    refused(ConfigError, "augmentations: ", augmentations=[{"__version__": "2.0.8", "transform": {}}])
    refused(ConfigError, "holds 4 epochs of views, but targets_pool=5", targets_pool=5)
    refused(ConfigError, "multi_scale, rect would give other views", multi_scale=0.5, rect=True)
    refused(ConfigError, "summed up at temperature 1", kl_temperature=2.0)
    refused(ConfigError, "two ways to the same", teacher=str(teacher_file))
    refused(ConfigError, r"holds 16 bins .* reg_max=1", model=str(tiny_yaml(tmp_path, "yolo26")))
    refused(VerifyError, r"another set \(10 pictures", data=str(write_set(tmp_path / "other", seed=3)))
    refused(VerifyError, "not a finished store of soft targets", targets=str(tmp_path / "nowhere"))
    deep = yaml.safe_load(tiny_yaml(tmp_path).read_text())
    deep["head"] = [[[1, 2, 3], 1, "Detect", ["nc"]]]
    (tmp_path / "yolo11n-fine.yaml").write_text(yaml.safe_dump(deep))
    refused(
        ConfigError,
        r"strides \[8.0, 16.0, 32.0\], but .* \[4.0, 8.0, 16.0\]",
        model=str(tmp_path / "yolo11n-fine.yaml"),
    )
    assert TargetStore(whole).exact
    FocusDDTrainer(overrides=student(tmp_path, drawn_set, targets=str(whole), kl_temperature=2.0))


def test_other_classes_are_refused(store: Path, drawn_set: Path) -> None:
    found = TargetStore(store)
    digest = found.description["set"]["sha256"]
    found.check_set(drawn_set, digest, 10, NAMES)
    with pytest.raises(VerifyError, match="these classes in another order"):
        found.check_set(drawn_set, digest, 10, NAMES[::-1])
    with pytest.raises(VerifyError, match=r"3 other classes: disc, square, bar\n  the set has: disc, cat"):
        found.check_set(drawn_set, digest, 10, ("disc", "cat"))


def test_a_pool_without_closed_views(drawn_set: Path, teacher_file: Path, tmp_path: Path) -> None:
    out = store_targets(config(drawn_set, teacher_file, tmp_path / "soft", pool=1, close_mosaic=0)).folder
    found = TargetStore(out)
    with pytest.raises(ConfigError, match="holds no views without mosaic, but close_mosaic=1"):
        found.check_views(found.views, 10, 1, 0)
    assert found.check_views(found.views, 10, 0, 0) == Pool(1, 0)
    plain = {**VIEW, "mosaic": 0.0, "mixup": 0.0}
    out = store_targets(config(drawn_set, teacher_file, tmp_path / "plain", pool=1, close_mosaic=10, **plain)).folder
    assert TargetStore(out).pool == Pool(1, 0)  # nothing is mixed, so closing changes nothing
    trainer = FocusDDTrainer(overrides={**student(tmp_path, drawn_set, targets=str(out), epochs=2), **plain})
    trainer.train()


@pytest.mark.parametrize(
    "values", [{"targets": "t", "targets_pool": -1}, {"targets": "t", "targets_pool": True}, {"targets": 3}]
)
def test_wrong_options(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="targets"):
        Options.of(values)
    assert Options.of({"targets": "t"}).uses_targets
    assert not Options.of({"targets": "t", "supervision": "labels"}).uses_targets


def test_plan_names_the_store(store: Path, drawn_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"data={drawn_set}", f"targets={store}", "--dry-run", f"project={tmp_path / 'runs'}"]
    assert run_main(train, words) == 0
    assert f"targets       {store} (4 + 4 epochs of views" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# ---- damage ----


def test_a_damaged_file_is_named(store: Path, tmp_path: Path) -> None:
    for name in (epoch_name(False, 1), epoch_name(True, 0), "store.json", "COMPLETE"):
        place = Path(shutil.copytree(store, tmp_path / name))
        data = bytearray((place / name).read_bytes())
        data[len(data) // 2] ^= 1
        (place / name).write_bytes(data if name != "COMPLETE" else data[:-9])
        with pytest.raises(VerifyError, match=re.escape(name)):
            TargetStore(place).heads([View(False, 1, 3), View(True, 0, 3)])
    place = Path(shutil.copytree(store, tmp_path / "gone"))
    (place / epoch_name(False, 1)).unlink()
    with pytest.raises(VerifyError, match=f"cannot read .*{epoch_name(False, 1)}"):
        TargetStore(place).heads([View(False, 1, 3)])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_is_damaged_under_a_training_ends_it_in_one_sentence(
    workers: int, store: Path, drawn_set: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(store, tmp_path / "soft"))
    (place / epoch_name(False, 0)).write_bytes(b"none of it")
    then = partial(add_stored_heads, TargetStore(place))
    loader = replay_loader(views_of(drawn_set, Pool(POOL, POOL))[0], 3, workers, seed=0, then=then)
    with pytest.raises(VerifyError) as raised, guarded(SimpleNamespace(train_loader=loader)):
        next(iter(loader))
    loader.close()
    assert str(raised.value).startswith(f"{place / epoch_name(False, 0)} is damaged")


def test_a_lying_epoch_is_refused(store: Path, tmp_path: Path) -> None:
    """Sealed, but not what store.json describes."""
    place = Path(shutil.copytree(store, tmp_path / "soft"))
    description = json.loads((place / "store.json").read_text())
    description["topk"] = 3
    (place / "store.json").write_bytes(sealed.as_json(description))
    seal = json.loads((place / "COMPLETE").read_text())
    seal["store.json"] = sealed.sha256(sealed.as_json(description))
    (place / "COMPLETE").write_bytes(sealed.as_json(seal))
    with pytest.raises(VerifyError, match=epoch_name(False, 0) + ".*expected"):
        TargetStore(place).heads([View(False, 0, 0)])
    del description["views"]["fliplr"]
    (place / "store.json").write_bytes(sealed.as_json(description))
    seal["store.json"] = sealed.sha256(sealed.as_json(description))
    (place / "COMPLETE").write_bytes(sealed.as_json(seal))
    with pytest.raises(VerifyError, match=r"not a description of a store .*fliplr"):
        TargetStore(place)
    assert sealed.read_description(place, KIND) == description


def test_pixels_that_the_teacher_did_not_see_are_refused(store: Path) -> None:
    found = TargetStore(store)
    views = [View(False, 0, 0), View(False, 0, 1)]
    looks = [found._epoch(False, 0).looks[i] for i in (0, 1)]
    found.heads(views, [looks[0], looks[1] + 1])  # another machine's rounding
    with pytest.raises(VerifyError, match=r"picture 1 in epoch 0 of the pool is not the view that the teacher saw"):
        found.heads(views, [looks[0], looks[0]])


def test_transforms_of_albumentations_are_the_same_when_they_come_back(
    tmp_path: Path, drawn_set: Path, teacher_file: Path
) -> None:
    """JSON makes lists of their tuples, and a training may be given the transforms themselves."""
    import albumentations

    blur = albumentations.Blur(p=0.5)
    out = tmp_path / "soft"
    asked = config(drawn_set, teacher_file, out, pool=1, close_mosaic=0, augmentations=[albumentations.to_dict(blur)])
    assert store_targets(asked).folder == store_targets(asked).folder == out
    for given in ([albumentations.to_dict(blur)], [blur]):
        values = student(tmp_path, drawn_set, targets=str(out), augmentations=given, close_mosaic=0)
        assert FocusDDTrainer(overrides=values).pool == Pool(1, 0)
