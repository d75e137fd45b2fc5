"""Checkpoints and sets that come from strangers: nothing in them runs, nothing leads outside."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from faults.support import Workshop
from focusdd_det.detset import Item, read_data_yaml, read_manifest, seal, verify
from focusdd_det.errors import ConfigError, VerifyError, WeightsError


class Canary:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


HTML = b"<!DOCTYPE html><html><body>Sign in to download</body></html>" * 20


def hostile(kind: str, good: bytes, path: Path, canary: Path) -> None:
    """Write a checkpoint of a kind that must not be loaded."""
    if kind == "a pickle that runs code":
        torch.save({"model": Canary(canary), "epoch": 1}, path)
    elif kind == "a bare pickle":
        path.write_bytes(pickle.dumps(Canary(canary)))
    elif kind == "an old torch file":
        torch.save({"model": Canary(canary)}, path, _use_new_zipfile_serialization=False)
    elif kind == "TorchScript":
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(path))
    elif kind == "a model of somebody's own class":
        torch.save({"model": Stranger()}, path)
    elif kind == "a table of tensors of something else":
        torch.save({"weight": torch.zeros(3)}, path)
    else:
        cut = {"empty": b"", "cut short": good[: len(good) // 2], "HTML": HTML, "noise": b"PK\x03\x04" + bytes(500)}
        path.write_bytes(cut[kind])


class Stranger(torch.nn.Module):
    """A class that Ultralytics does not know."""


KINDS = [
    "a pickle that runs code", "a bare pickle", "an old torch file", "TorchScript", "a model of somebody's own class",
    "a table of tensors of something else", "empty", "cut short", "HTML", "noise",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ["teacher", "selector_weights"])
def test_a_checkpoint_that_is_not_one(workshop: Workshop, tmp_path: Path, kind: str, role: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / "hostile.pt"
    hostile(kind, (workshop.top / "teacher.pt").read_bytes(), path, canary)
    with pytest.raises(WeightsError, match=r"hostile\.pt") as caught:
        workshop.build(tmp_path / "set", **{role: str(path)})
    assert caught.value.exit_code == 4
    assert not canary.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hostile.pt"]


def safetensors(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


LIES = {
    "a length beyond the file": struct.pack("<Q", 1 << 62) + b"{}",
    "no JSON": safetensors(b"\xff" * 40),
    "offsets beyond the file": safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}}),
    "offsets backwards": safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, bytes(16)),
    "a shape of another size": safetensors({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 16]}}, bytes(16)),
    "a shape that overflows": safetensors(
        {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 16]}}, bytes(16)
    ),
    "tensors that overlap": safetensors(
        {n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "ab"}, bytes(16)
    ),
    "an unknown type": safetensors({"a": {"dtype": "P9", "shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
    "a hundred thousand brackets": safetensors(b"[" * 100_000),
    "empty": b"",
    "HTML": HTML,
}


@pytest.mark.parametrize("lie", LIES)
def test_safetensors_with_a_lying_header(workshop: Workshop, tmp_path: Path, lie: str) -> None:
    path = tmp_path / "lie.safetensors"
    path.write_bytes(LIES[lie])
    with pytest.raises(WeightsError, match=r"lie\.safetensors"):
        workshop.build(tmp_path / "set", selector_weights=str(path))


def test_selector_weights_that_are_not_finite(workshop: Workshop, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(workshop.top / "vit.safetensors")
    state["blocks.1.mlp.fc1.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(WeightsError, match="not finite"):
        workshop.build(tmp_path / "set", selector_weights=str(tmp_path / "nan.safetensors"))


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 8)}]\n" for i in range(12)
)
DATA = {
    "download": "train: images/train\nval: images/train\nnames: {0: a}\ndownload: https://example.org/x.zip\n",
    "a script": "train: images/train\nval: images/train\nnames: {0: a}\ndownload: |\n  os.mkdir('canary')\n",
    "path": "path: /\ntrain: images/train\nval: images/train\nnames: {0: a}\n",
    "../": "train: ../../home\nval: images/train\nnames: {0: a}\n",
    "absolute": "train: images/train\nval: /etc\nnames: {0: a}\n",
    "a python object": "train: !!python/object/apply:os.mkdir [canary]\nval: images/train\nnames: {0: a}\n",
    "a bomb of aliases": BOMB + "train: images/train\nval: images/train\nnames: {0: *m}\n",
    "names that are lists": "train: images/train\nval: images/train\nnames: {0: [a]}\n",
    "names with a gap": "train: images/train\nval: images/train\nnames: {0: a, 2: b}\n",
    "no names": "train: images/train\nval: images/train\nnames: {}\n",
    "a wrong tag": "train: !!timestamp x\nval: images/train\nnames: {0: a}\n",
    "brackets": "[" * 5_000,
    "not UTF-8": "names: \udcff\udcfe",
}


@pytest.mark.parametrize("kind", DATA)
def test_a_data_yaml_that_asks_for_more(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Even with a COMPLETE that vouches for it."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(unbroken, tmp_path / "set")
    (folder / "data.yaml").write_bytes(DATA[kind].encode("utf-8", "surrogateescape"))
    (folder / "COMPLETE").write_bytes(seal(folder))
    with pytest.raises(VerifyError, match=r"data\.yaml"):
        read_data_yaml(folder)
    assert any("data.yaml" in problem for problem in verify(folder))
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("id", "../../../etc/passwd"), ("id", "/etc/passwd"), ("id", ".hidden"), ("id", "a\0b"), ("id", "\ud800"),
        ("id", ""), ("id", "x" * 300), ("id", "a/b"), ("id", 7), ("path", "/etc/passwd"), ("path", "a/../../b"),
        ("path", "..") , ("path", 7), ("crop", [0, 0]), ("crop", "abc"), ("crop", [0, 0, -4]), ("crop", [0.5, 0, 4]),
        ("width", "7"), ("width", 0), ("p", "x"), ("p", 1e400), ("boxes", -1), ("boxes", True), ("index", 1 << 70),
        ("sha256", {}), ("sha256", {"images": 1, "labels": 2, "soft": 3}), ("cells", {}), ("cells", "abc"),
        ("cells", [[]]), ("extra", 1), ("confirmed", "yes"),
    ],
)  # fmt: skip
def test_a_manifest_that_leads_outside_or_lies(unbroken: Path, tmp_path: Path, key: str, value: object) -> None:
    folder = shutil.copytree(unbroken, tmp_path / "set")
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    raw = json.loads(lines[3])
    place = raw["cells"][0] if key in raw["cells"][0] and key not in raw else raw
    place[key] = value
    lines[3] = json.dumps(raw)
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "COMPLETE").write_bytes(seal(folder))
    with pytest.raises(ValueError, match=r"."):
        Item.parse(lines[3])
    with pytest.raises(VerifyError, match="line 4"):
        list(read_manifest(folder))
    assert any("manifest.jsonl, line 4" in problem for problem in verify(folder))


def test_label_caches_of_somebody_else_are_not_opened(workshop: Workshop, unbroken: Path, tmp_path: Path) -> None:
    """Ultralytics' caches are pickles of NumPy. The one that stock Ultralytics leaves is passed over, others are named
    and moved away; nothing loads any of them."""
    folder = shutil.copytree(unbroken, tmp_path / "set")
    places = [folder / "labels" / "train.cache", folder / "images" / "train.cache", folder / "labels.cache"]
    for i, place in enumerate(places):
        with place.open("wb") as file:
            np.save(file, np.array([Canary(tmp_path / f"canary{i}")], dtype=object), allow_pickle=True)
    problems = verify(folder)
    assert all(any(str(place) in problem for problem in problems) for place in places[1:])
    workshop.build(folder, resume=True)
    assert not any(place.exists() for place in places[1:])
    assert not list(tmp_path.glob("canary*"))


def test_a_config_and_a_map_that_run_nothing(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from focusdd_det.build import load_config

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.yaml"
    for text in ("!!python/object/apply:os.mkdir [canary]", "ipc: !!python/name:os.system ''", BOMB):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"x\.yaml"):
            load_config(path)
        with pytest.raises(ConfigError, match=r"x\.yaml"):
            workshop.build(tmp_path / "set", class_map=str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["x.yaml"]


def test_a_set_from_outside_that_names_a_plugin_is_only_explained(
    workshop: Workshop, unbroken: Path, tmp_path: Path
) -> None:
    """Its build.yaml says how the pictures were looked at, not which files are run, opened or fetched."""
    import yaml

    from focusdd_det.cli import main
    from focusdd_det.showing.command import _settings

    folder = shutil.copytree(unbroken, tmp_path / "set")
    (tmp_path / "plugin.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'canary')!r})\n")
    content = yaml.safe_load((folder / "build.yaml").read_text())
    content["config"] |= {"plugins": [str(tmp_path / "plugin.py")], "download": True, "selector_weights": "evil.pt"}
    content["config"] |= {"class_map": "/etc/passwd", "device": "cuda:9"}
    (folder / "build.yaml").write_text(yaml.safe_dump(content))
    (folder / "COMPLETE").write_bytes(seal(folder))
    item = next(iter(read_manifest(folder)))
    words = [f"id={item.id}", f"selector={workshop.top / 'vit.json'}", f"class_map={workshop.top / 'map.yaml'}"]
    assert main(["explain", str(folder), *words, f"out={tmp_path / 'out'}", "device=cpu"]) == 0
    assert not (tmp_path / "canary").exists()
    assert list((tmp_path / "out").glob("*.png"))
    assert not {"plugins", "download", "selector_weights", "class_map", "device"} & set(_settings(folder))
