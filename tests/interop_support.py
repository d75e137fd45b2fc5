"""Sets with real soft targets and cells, for the tests of exports, archives and cards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml
from conftest import write_set

from focusdd_det import detset
from focusdd_det.detset import Cell, part_path, read_manifest
from focusdd_det.disk import sha256
from focusdd_det.labels import parse_rows
from focusdd_det.showing.gallery import write_gallery
from focusdd_det.types import Detections


def reseal(folder: Path) -> Path:
    (folder / "COMPLETE").write_bytes(detset.seal(folder))
    return folder


def det_set(folder: Path, names: tuple[str, ...] = ("disc", "square", "bar"), count: int = 5) -> Path:
    """`write_set` with soft targets that can be read, cells of two sources, and classes of these names."""
    write_set(folder, count=count)
    lines = []
    for number, item in enumerate(read_manifest(folder)):
        rows = parse_rows(part_path(folder, "labels", item).read_text(), 3)
        conf = np.linspace(0.9, 0.3, len(rows)).astype(np.float32)
        found = Detections(
            np.tile(np.array([[0, 0, 1, 1]], np.float32), (len(rows), 1)),
            rows[:, 0].astype(np.int64),
            conf,
            np.zeros((len(rows), len(names)), np.float32),
        )
        soft = detset.soft_bytes(found)
        part_path(folder, "soft", item).write_bytes(soft)
        cell = Cell("key", f"root{number % 2}", f"a/{number}.jpg", "a", "0" * 64, 90, 80, (0, 0, 40), 0.5, 0.5, True)
        name = names[item.class_index]
        item = replace(item, sha256={**item.sha256, "soft": sha256(soft)}, class_name=name, group=name, cells=(cell,))
        lines.append(item.line())
    (folder / "manifest.jsonl").write_text("".join(lines))
    (folder / "data.yaml").write_bytes(detset.data_yaml(names))
    return reseal(folder)


def store(folder: Path) -> Path:
    """A finished store of soft targets, as far as its records go."""
    folder.mkdir(parents=True)
    (folder / "mixed_00000.safetensors").write_bytes(b"tensors" * 1000)
    (folder / "store.json").write_text(json.dumps({"format": "focusdd_det soft targets 1"}))
    (folder / "store.log.json").write_text("{}")
    files = ("mixed_00000.safetensors", "store.json")
    (folder / "COMPLETE").write_text(json.dumps({name: sha256((folder / name).read_bytes()) for name in files}))
    return folder


def rename_classes(folder: Path, names: tuple[str, ...]) -> Path:
    """A classification set with its classes called otherwise; the files keep their own names."""
    lines = []
    for item in read_manifest(folder):
        renamed = replace(item, class_name=names[item.class_index])
        part_path(folder, "images", renamed).parent.mkdir(exist_ok=True)
        part_path(folder, "images", item).rename(part_path(folder, "images", renamed))
        lines.append(renamed.line())
    for path in (folder / "train").iterdir():
        if not any(path.iterdir()):
            path.rmdir()
    (folder / "manifest.jsonl").write_text("".join(lines))
    (folder / "data.yaml").write_bytes(detset.data_yaml(names, "classify"))
    return reseal(folder)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def with_gallery(folder: Path) -> Path:
    """As a build leaves a set."""
    write_gallery(folder, folder / "gallery.html")
    return folder


def head_of(card: str) -> dict[str, object]:
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found
