"""Relabelling: the bytes, going on after a stop, refusals, and the command."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from class_data import CLASSES, tiny_net, write_class_folders, write_class_set, write_shuffled_teacher, write_teacher
from conftest import REPOSITORY
from safetensors.torch import load_file
from torch import nn

from focusdd_det import disk, sealed
from focusdd_det.classify import relabel as relabelling
from focusdd_det.classify.accuracy import Accuracy
from focusdd_det.classify.relabel import load_config, relabel, relabel_command
from focusdd_det.classify.store import KIND, LogitStore, epoch_name
from focusdd_det.classify.teacher import ClassTeacher
from focusdd_det.config import cfg_dir, parse_yaml
from focusdd_det.errors import ConfigError, DataError, DiskError, VerifyError, WeightsError


class Place:
    """A set, a teacher and an output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.set = write_class_set(folder / "set")
        self.teacher = write_teacher(folder / "teacher")

    def config(self, **options: Any) -> relabelling.RelabelConfig:
        common = {
            "data": str(self.set), "teacher": str(self.teacher), "eval_data": "none", "size": 32, "epochs": 4,
            "batch": 5, "workers": 1, "device": "cpu", "out": str(self.folder / "out"),
        }  # fmt: skip
        return load_config(**{**common, **options})

    def out(self, name: str = "out") -> Path:
        return self.folder / name


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def content(folder: Path) -> dict[str, str]:
    """Hashes of all that is vouched for."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != KIND.log
    }


class Stop(Exception):
    """What a test stops a run with."""


def stop_after(monkeypatch: pytest.MonkeyPatch, epochs: int) -> None:
    add = sealed.Writer.add

    def interrupted(self: sealed.Writer, name: str, tensors: Any) -> None:
        if len(self.done) == epochs:
            raise Stop
        add(self, name, tensors)

    monkeypatch.setattr(sealed.Writer, "add", interrupted)


@pytest.mark.parametrize("options", [{}, {"topk": 2, "temperature": 0.2}])
def test_the_bytes_are_the_same_for_any_number_of_workers(place: Place, options: dict[str, Any]) -> None:
    for workers in (1, 3):
        relabel(place.config(workers=workers, out=str(place.out(f"w{workers}")), **options))
    assert content(place.out("w1")) == content(place.out("w3"))


@pytest.mark.parametrize("after", [0, 1, 3])
def test_the_bytes_are_the_same_after_a_stop(place: Place, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    relabel(place.config(out=str(place.out("whole"))))
    with monkeypatch.context() as patch:
        stop_after(patch, after)
        with pytest.raises(Stop):
            relabel(place.config())
    assert not place.out().exists() and len(list(place.out("out.incomplete").glob("epoch_*"))) == after
    relabel(place.config(workers=3))
    assert content(place.out()) == content(place.out("whole"))
    assert not place.out("out.incomplete").exists()


def test_an_epoch_that_was_damaged_meanwhile_is_made_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    relabel(place.config(out=str(place.out("whole"))))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stop):
            relabel(place.config())
    victim = place.out("out.incomplete") / "epoch_00001.safetensors"
    victim.write_bytes(victim.read_bytes()[:-4])
    relabel(place.config())
    assert content(place.out()) == content(place.out("whole"))


def test_another_batch_gives_the_same_views_and_near_logits(place: Place) -> None:
    for batch in (5, 64):
        relabel(place.config(batch=batch, out=str(place.out(f"b{batch}"))))
    for epoch in range(4):
        first, second = (load_file(place.out(f"b{b}") / epoch_name(epoch)) for b in (5, 64))
        assert torch.equal(first["views"], second["views"])
        torch.testing.assert_close(first["logits"].float(), second["logits"].float(), rtol=2e-3, atol=2e-3)


def test_a_teacher_with_shuffled_classes_gives_the_same_columns(place: Place) -> None:
    shuffled = write_shuffled_teacher(place.folder / "shuffled", tiny_net(3), CLASSES, [2, 0, 1])
    relabel(place.config(out=str(place.out("plain"))))
    relabel(place.config(out=str(place.out("shuffled_out")), teacher=str(shuffled)))
    first, second = (load_file(place.out(n) / "epoch_00002.safetensors") for n in ("plain", "shuffled_out"))
    torch.testing.assert_close(first["logits"].float(), second["logits"].float(), rtol=2e-3, atol=2e-3)
    assert first["logits"].float().std() > 0.1
    assert LogitStore(place.out("shuffled_out")).description["teacher"]["classes"] == list(CLASSES)


def test_the_same_command_finds_its_store(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    first = relabel(place.config())
    before = content(place.out())
    monkeypatch.setattr(relabelling, "_Job", None)  # nothing is labelled
    assert relabel(place.config(workers=2)) == first
    assert content(place.out()) == before


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, r"views\.seed: 0, now 1"),
        ({"epochs": 5}, "pool: 4, now 5"),
        ({"topk": 2, "temperature": 0.2}, "topk: 0, now 2"),
        ({"batch": 6}, r"teacher\.batch: 5, now 6"),
    ],
)
def test_another_store_is_not_replaced(place: Place, change: dict[str, Any], key: str) -> None:
    relabel(place.config(epochs=4))
    before = content(place.out())
    with pytest.raises(ConfigError, match=rf"holds another store(.|\n)*{key}(.|\n)*overwrite=true"):
        relabel(place.config(**change))
    assert content(place.out()) == before


def test_an_unfinished_store_of_another_seed_is_not_gone_on_with(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stop):
            relabel(place.config())
    with pytest.raises(ConfigError, match=r"begun otherwise(.|\n)*views\.seed: 0, now 1"):
        relabel(place.config(seed=1))
    relabel(place.config(seed=1, overwrite=True))
    relabel(place.config(seed=1, out=str(place.out("whole"))))
    assert content(place.out()) == content(place.out("whole"))


def test_overwrite_replaces_a_store_once_the_new_one_is_whole(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    relabel(place.config())
    before = content(place.out())
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stop):
            relabel(place.config(seed=1, overwrite=True))
    assert content(place.out()) == before
    relabel(place.config(seed=1, overwrite=True))
    assert LogitStore(place.out()).settings.seed == 1
    assert sorted(p.name for p in place.folder.iterdir() if p.is_dir()) == ["out", "set"]


def test_what_is_not_ours_is_not_touched(place: Place) -> None:
    place.out().mkdir()
    (place.out() / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(DiskError, match="no store of this program"):
            relabel(place.config(overwrite=overwrite))
    assert [p.name for p in place.out().iterdir()] == ["thesis.txt"]


def test_a_finished_store_that_is_damaged_is_named(place: Place) -> None:
    relabel(place.config())
    (place.out() / "epoch_00003.safetensors").write_bytes(b"x")
    with pytest.raises(VerifyError, match=r"epoch_00003\.safetensors is damaged.*overwrite=true"):
        relabel(place.config())
    relabel(place.config(overwrite=True))
    LogitStore(place.out()).row(3, 0)


def test_a_topk_that_keeps_too_little_is_refused_with_one_that_would_do(place: Place) -> None:
    # at T = 10^5 the softmax is flat: the top 2 of 3 hold two thirds, so all 3 are needed
    with pytest.raises(ConfigError, match=r"topk=2: at temperature 100000.*only 66\.\d %.*topk=3 would do"):
        relabel(place.config(topk=2, temperature=1e5))
    assert not place.out().exists()
    with pytest.raises(ConfigError, match="only 3 classes"):
        relabel(place.config(topk=4))


def test_the_teachers_accuracy_is_measured_first_and_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    val = write_class_folders(place.folder / "val")
    stop_after(monkeypatch, 0)
    with pytest.raises(Stop):
        relabel(place.config(eval_data=str(val)))
    monkeypatch.undo()
    monkeypatch.setattr(relabelling, "accuracy", None)  # it is not measured again
    result = relabel(place.config(eval_data=str(val)))
    assert result.accuracy is not None and result.accuracy["n"] == 6 and 0 <= result.accuracy["top1"] <= 100
    assert LogitStore(place.out()).accuracy == result.accuracy


def test_evaluation_data_is_required(place: Place) -> None:
    with pytest.raises(ConfigError, match=r"eval_data=None: expected class folders.*none"):
        place.config(eval_data=None)
    few = write_class_folders(place.folder / "val", ("n01", "n03"))
    with pytest.raises(DataError, match="n02"):
        relabel(place.config(eval_data=str(few)))


def test_logits_beyond_float16_are_refused(place: Place) -> None:
    net = tiny_net(3)
    net.module.classifier.weight.data.mul_(1e7)
    bad = write_shuffled_teacher(place.folder / "bad", net, CLASSES, [0, 1, 2])
    with pytest.raises(WeightsError, match="float16"):
        relabel(place.config(teacher=str(bad)))


def test_a_full_disk_is_said_before_the_work(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(sealed.shutil, "disk_usage", lambda _: usage(1, 1, 100))
        with pytest.raises(DiskError, match="GB needed"):
            relabel(place.config())
    relabel(place.config())


def test_one_writer_at_a_time(place: Place) -> None:
    work = place.out("out.incomplete")
    work.mkdir()
    with disk.locked(work), pytest.raises(DiskError, match="being written"):
        relabel(place.config())


def test_no_output_inside_the_data(place: Place) -> None:
    with pytest.raises(ConfigError, match="lie in each other"):
        relabel(place.config(out=str(place.set / "labels")))


def test_the_set_is_left_as_it_was(place: Place) -> None:
    before = {p: p.read_bytes() for p in place.set.rglob("*") if p.is_file()}
    relabel(place.config(out=None))
    assert {p: p.read_bytes() for p in place.set.rglob("*") if p.is_file()} == before
    assert (place.folder / "set_labels" / "COMPLETE").is_file()


def test_nothing_but_plain_files_without_times_is_vouched_for(place: Place) -> None:
    relabel(place.config())
    text = (place.out() / "store.json").read_text()
    assert str(place.folder) not in text
    assert {p.suffix for p in place.out().iterdir()} == {".json", ".safetensors", ""}
    assert "command" in json.loads((place.out() / KIND.log).read_text())


def test_every_key_of_the_config_is_explained() -> None:
    lines = (cfg_dir() / "relabel_cls.yaml").read_text().splitlines()
    keys = set(parse_yaml("\n".join(lines)))
    explained = {line.split(":")[0] for line in lines if line[:1].isalpha() and "  # " in line}
    assert keys == explained == set(relabelling.RelabelConfig.__dataclass_fields__)


def test_the_tool(place: Place) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / "relabel_cls.py")]
    command += [f"data={place.set}", f"teacher={place.teacher}", "eval_data=none", "size=32", "batch=4"]
    done = subprocess.run([*command, "epochs=2", "scale=[0.5,1.0]"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "7 pictures x 2 epochs = 14 views of 32 px, all 3 logits each" in done.stdout
    store = LogitStore(place.folder / "set_labels")
    assert store.settings.scale == (0.5, 1.0) and store.pool == 2


def test_the_size_alone(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert relabel_command([f"data={place.set}", "teacher=x", "eval_data=none", "--dry-run", "epochs=1000"]) == 0
    # 7 pictures x 1000 epochs x (10 * 4 + 3 * 2 bytes) = 322,000 bytes
    assert "7000 views of 224 px, all 3 logits each: 0.3 MB" in capsys.readouterr().out
    assert relabel_command(["--help"]) == 0
    assert "topk" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="did you mean temperature"):
        relabel_command(["temprature=3"])
    shutil.rmtree(place.set)
    with pytest.raises(DataError, match="not a folder"):
        relabel_command([f"data={place.set}", "teacher=x", "eval_data=none", "--dry-run"])


def test_a_store_that_is_all_but_published_is_only_published(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    relabel(place.config())
    log = (place.out() / KIND.log).read_bytes()
    before = content(place.out())
    place.out().replace(place.out("out.incomplete"))
    monkeypatch.setattr(relabelling, "_Job", None)  # nothing is labelled
    with monkeypatch.context() as patch:
        replace = Path.replace

        def refused(self: Path, target: Path) -> Path:
            if target == place.out():
                raise OSError(13, "Permission denied")
            return replace(self, target)

        patch.setattr(Path, "replace", refused)
        with pytest.raises(DiskError, match=r"complete in .* cannot be renamed(.|\n)*same command again"):
            relabel(place.config())
    relabel(place.config(workers=2))
    assert content(place.out()) == before and (place.out() / KIND.log).read_bytes() == log
    assert not place.out("out.incomplete").exists()


def test_a_sealed_unfinished_store_that_was_damaged_is_mended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    relabel(place.config())
    before = content(place.out())
    work = place.out().replace(place.out("out.incomplete"))
    (work / "epoch_00002.safetensors").write_bytes(b"x")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stop):
            relabel(place.config())
    assert not (work / "COMPLETE").exists()
    relabel(place.config())
    assert content(place.out()) == before


class Sharp(nn.Module):
    """One logit towers in dark pictures; in bright ones all are alike."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dark = (x.mean(dim=(1, 2, 3)) < 0.5).float()
        return torch.stack([20 * dark, 0 * dark, 0 * dark], dim=1)


@pytest.mark.parametrize("epochs", [1, 4, 8])
def test_the_mass_of_topk_is_measured_on_all_classes(
    place: Place, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    data = place.folder / "plain"
    for name, level in (("a", 0), ("b", 255), ("c", 255)):
        (data / name).mkdir(parents=True)
        for i in range(8):
            (data / name / f"{i}.png").write_bytes(
                bytes(cv2.imencode(".png", np.full((32, 32, 3), level, np.uint8))[1])
            )
    teacher = ClassTeacher(Sharp(), "sharp", "0" * 64, "1" * 64, ("a", "b", "c"))
    monkeypatch.setattr(relabelling, "load_classifier", lambda *_: teacher)
    monkeypatch.setattr(relabelling, "PILOT", 6)
    common = {"data": str(data), "topk": 1, "temperature": 1.0, "cutmix": 0.0, "epochs": epochs}
    # of six views two are of the dark class: (2 * 1 + 4 / 3) / 6
    with pytest.raises(ConfigError, match=r"only 55\.6 % .*33\.3 % in the flattest of 6 views.*topk=3 would do"):
        relabel(place.config(**common))
    monkeypatch.setattr(relabelling, "LEAST_MASS", 0.5)
    relabel(place.config(**common))
    assert LogitStore(place.out()).description["mass"] == {"mean": 0.5556, "least": 0.3333}


@pytest.mark.parametrize(("epochs", "pictures"), [(256, 1000), (300, 1000), (1, 257), (1000, 3), (7, 50)])
def test_the_pilot_is_spread_over_epochs_and_pictures(epochs: int, pictures: int) -> None:
    places = [divmod(position, pictures) for position in relabelling._pilot(epochs, pictures)]
    assert len(places) == 256
    for axis, n in ((0, epochs), (1, pictures)):
        tenths = [sum(place[axis] * 10 // n == tenth for place in places) for tenth in range(10)]
        assert min(tenths) >= 15 or n < 10
        assert len({place[axis] for place in places}) >= min(n, 100)


def test_a_full_disk_is_said_before_the_teacher_is_asked(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stop):
            relabel(place.config())
    with monkeypatch.context() as patch:
        patch.setattr(sealed.shutil, "disk_usage", lambda _: usage(1, 1, 102_000))  # one epoch more, not two
        patch.setattr(relabelling, "_Job", None)
        with pytest.raises(DiskError, match="GB needed"):
            relabel(place.config(topk=3, out=str(place.out("other"))))
        patch.undo()
        patch.setattr(sealed.shutil, "disk_usage", lambda _: usage(1, 1, 102_000))
        relabel(place.config())
    assert not place.out("other.incomplete").exists()


@pytest.mark.parametrize(("top1", "warned"), [(80.0, False), (56.0, False), (54.0, True)])
def test_near_chance_counts_from_chance(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, top1: float, warned: bool
) -> None:
    two = write_class_set(place.folder / "two", names=CLASSES[:2])
    val = write_class_folders(place.folder / "val", CLASSES[:2])
    monkeypatch.setattr(relabelling, "accuracy", lambda *_: Accuracy(top1, 100.0, 4, {}))
    monkeypatch.setattr(relabelling.log, "propagate", True)
    relabel(place.config(data=str(two), eval_data=str(val), epochs=1))
    assert ("near chance" in caplog.text) is warned


def test_the_next_command_says_what_the_store_needs(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"data={place.set}", f"teacher={place.teacher}", "eval_data=none", "epochs=1", "device=cpu", "batch=4"]
    assert relabel_command([*words, "size=32", "topk=3", "temperature=0.2"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(" eval_data=none imgsz=32 temperature=0.2")
    assert relabel_command([*words, "size=224", f"out={place.out()}"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(" eval_data=none")
    assert parse_yaml((cfg_dir() / "train_cls.yaml").read_text())["imgsz"] == relabelling.TRAINED_AT


def test_another_kind_of_device_does_not_go_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stop):
            relabel(place.config())
    load = relabelling.load_classifier
    monkeypatch.setattr(relabelling, "device_of", lambda _: "cuda:1")
    monkeypatch.setattr(relabelling, "load_classifier", lambda *a: load(*a[:4], "cpu", *a[5:]))
    with pytest.raises(ConfigError, match=r'begun otherwise(.|\n)*teacher\.device: "cpu", now "cuda"'):
        relabel(place.config())


def test_a_refused_relabel_leaves_no_empty_folder(place: Place) -> None:
    with pytest.raises(ConfigError, match="would do"):
        relabel(place.config(topk=2, temperature=1e5))
    assert not place.out("out.incomplete").exists()
    place.out("out.incomplete").mkdir()
    with pytest.raises(ConfigError, match="would do"):
        relabel(place.config(topk=2, temperature=1e5))
    assert place.out("out.incomplete").is_dir()  # somebody else's
