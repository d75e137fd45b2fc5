"""Folders that are whole or say that they are not: logs, names and bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from focusdd_det import sealed
from focusdd_det.classify import store as logits
from focusdd_det.disk import file_sha256
from focusdd_det.errors import DiskError
from focusdd_det.training.replay import Pool, View
from focusdd_det.training.targets import KIND, VIEWS, TargetStore, pool_files

DESCRIBED = {"format": KIND.format}


def make(out: Path, seconds: float) -> list[str]:
    """Make a folder as a command does that took so long; the files that it had to write."""
    with sealed.working(out) as work:
        sealed.begun(work, DESCRIBED, (), False, KIND)
        writer = sealed.Writer(work, ["mixed_00000.safetensors"], KIND)
        missing = writer.missing()
        writer.begin(DESCRIBED)
        for name in missing:
            writer.add(name, {"total": np.zeros(2, np.float32)})
        writer.finish({"seconds": seconds})
    sealed.publish(work, out, False, KIND)
    return missing


def test_a_folder_that_only_has_to_be_renamed_keeps_the_log_of_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def refused(self: Path, target: Path) -> Path:
        if target == tmp_path / "out":
            raise PermissionError(13, "Permission denied")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refused)
        with pytest.raises(DiskError, match=r"complete in .* cannot be renamed(.|\n)*same command again"):
            make(tmp_path / "out", 9999)
    assert make(tmp_path / "out", 0.1) == []
    assert json.loads((tmp_path / "out" / sealed.LOG).read_text()) == {"seconds": 9999}


def test_a_folder_that_stays_empty_goes_again(tmp_path: Path) -> None:
    for was_there in (False, True):
        work = tmp_path / f"out{was_there}.incomplete"
        if was_there:
            work.mkdir()
        with pytest.raises(KeyboardInterrupt), sealed.working(tmp_path / f"out{was_there}"):
            raise KeyboardInterrupt
        assert work.exists() is was_there


# ---- the format: stores of earlier versions are opened and gone on with, so none of these ever changes ----


def test_bytes_of_a_store_of_logits(tmp_path: Path) -> None:
    views = np.array([[0, 0, 8, 8, 0, -1, 0, 0, 0, 0]], np.int32)
    values = np.array([[1.5, -2.0]], np.float16)
    writer = sealed.Writer(tmp_path, [logits.epoch_name(epoch) for epoch in range(2)], logits.KIND)
    writer.begin(
        {
            "format": "focusdd_det logits 1",
            "set": {"sha256": "5e7", "names": ["cat", "dög"], "n": 1},
            "teacher": {"name": "t", "sha256": "7ea", "spec": "5bec"},
            "views": {
                "size": 32, "scale": [0.5, 1.0], "ratio": [0.75, 1.25], "flip": 0.5, "cutmix": 0.0, "beta": 1.0,
                "seed": 0,
            },
            "temperature": 1.0, "topk": 0, "pool": 2, "accuracy": None, "mass": None,
        }
    )  # fmt: skip
    writer.add("epoch_00001.safetensors", {"views": views, "logits": values})
    assert unfinished(tmp_path) == ["done.json", "epoch_00001.safetensors", "store.json"]
    writer.add("epoch_00000.safetensors", {"views": views, "logits": -values})
    writer.finish({"seconds": 1.5})
    assert (tmp_path / "relabel.log.json").read_bytes() == b'{\n "seconds": 1.5\n}\n'
    assert sealed_as(tmp_path, "relabel.log.json") == {
        "epoch_00000.safetensors": "74ad3693340e4b9135b8546c60f6ab6c21cb0b5eabc039cfa9217ad401062b1f",
        "epoch_00001.safetensors": "f022b42508e271abf7802b0e84a44632a4b9b4ba53233e7b069e42dd1bc3e574",
        "store.json": "336802474edd494c6ec8caf32e223531e1e06488b5b34ca7727ca034e7552558",
    }
    found = logits.LogitStore(tmp_path)
    assert found.sha256 == "61b044e8a3fed54c84035c0076dbc43362a4d6e3d25c8455969785fcf6bec0ca"
    assert [found.row(epoch, 0)[1]["logits"].tolist() for epoch in range(2)] == [[-1.5, 2.0], [1.5, -2.0]]


def test_bytes_of_a_store_of_soft_targets(tmp_path: Path) -> None:
    tensors = {
        "offsets": np.array([0, 1]), "anchors": np.zeros(1, np.int32), "boxes": np.ones((1, 4), np.float16),
        "values": np.full((1, 1), 2.5, np.float16), "classes": np.ones((1, 1), np.int16),
        "rest": np.zeros(1, np.float16), "background": np.zeros((1, 2), np.float16), "total": np.ones(1, np.float32),
        "looks": np.full((1, 48), 7, np.uint8),
    }  # fmt: skip
    writer = sealed.Writer(tmp_path, pool_files(Pool(1, 1)), KIND)
    writer.begin(
        {
            "format": "focusdd_det soft targets 1",
            "set": {"sha256": "5e7", "names": ["cat", "dög"], "n": 1},
            "teacher": {"sha256": "7ea", "reg_max": 1, "strides": [32.0]},
            "views": {**dict.fromkeys(VIEWS, 0.0), "imgsz": 32},
            "pool": {"mixed": 1, "closed": 1}, "floor": 0.0, "topk": 1, "pilot": {"views": 1},
        }
    )  # fmt: skip
    writer.add("closed_00000.safetensors", tensors)
    assert unfinished(tmp_path) == ["closed_00000.safetensors", "done.json", "store.json"]
    writer.add("mixed_00000.safetensors", tensors)
    writer.finish({"seconds": 1.5})
    assert (tmp_path / "store.log.json").read_bytes() == b'{\n "seconds": 1.5\n}\n'
    assert sealed_as(tmp_path, "store.log.json") == {
        "closed_00000.safetensors": "88a34c4187167d0c29edbd5d36f714e7fc814a1124e93cc340bf7d298da9f80a",
        "mixed_00000.safetensors": "88a34c4187167d0c29edbd5d36f714e7fc814a1124e93cc340bf7d298da9f80a",
        "store.json": "53c066df60a440b10cbc197978e2d1bbb3291c840661b4acc6a5ae7019bccebb",
    }
    found = TargetStore(tmp_path)
    assert found.sha256 == "6268fc7c7a63b3771ce099f829db7e759e4061f840a36054b7d3f45c2a6212b5"
    assert found.heads([View(False, 0, 0)]).values.tolist() == [[2.5]]


def unfinished(folder: Path) -> list[str]:
    """The files, one of them and no other in done.json, with its hash."""
    names = sorted(path.name for path in folder.iterdir())
    done = json.loads((folder / "done.json").read_text())
    assert done == {name: file_sha256(folder / name) for name in names if name.endswith(".safetensors")}
    return names


def sealed_as(folder: Path, log: str) -> dict[str, Any]:
    """COMPLETE; it, the log and the files that it names are all that there is."""
    seal: dict[str, Any] = json.loads((folder / "COMPLETE").read_text())
    assert {path.name for path in folder.iterdir()} == {*seal, "COMPLETE", log}
    assert seal == {name: file_sha256(folder / name) for name in seal}
    return seal
