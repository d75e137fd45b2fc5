"""Whole builds with each method, ours and the user's, on drawn sources with tiny models."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_build_cls
import torch
import yaml
from conftest import REPOSITORY
from test_build import bench, make, options, tree  # noqa: F401
from test_build_cls import bench as cls_bench  # noqa: F401

from focusdd_det import plugins
from focusdd_det.build import load_config
from focusdd_det.detset import Item, read_manifest, verify
from focusdd_det.errors import ConfigError, DiskError
from focusdd_det.methods import METHODS, by_herding, window_scores
from focusdd_det.plan import make_plan
from focusdd_det.scoring.decode import decode
from focusdd_det.scoring.glance import view_pixels
from focusdd_det.scoring.scores import ScoreStore
from focusdd_det.selector import load_selector
from focusdd_det.teacher import Detector, load_detector
from focusdd_det.types import Detections

NEW = ("herding", "kmeans", "min_as", "random_as", "ranked_crops", "teacher")


def cells(folder: Path, kind: str) -> dict[str, tuple[int, int, int] | None]:
    return {c.path: c.crop for item in read_manifest(folder) for c in item.cells if c.kind == kind}


@pytest.mark.parametrize("method", NEW)
def test_the_same_bytes_whatever_the_workers(bench: Path, tmp_path: Path, method: str) -> None:  # noqa: F811
    one = make(bench, tmp_path / "one", method=method, workers=1)
    assert verify(one) == []
    assert len(list(read_manifest(one))) == 6
    assert tree(make(bench, tmp_path / "three", method=method, workers=3)) == tree(one)


@pytest.mark.parametrize("method", ["herding", "kmeans", "min_as", "random_as", "ranked_crops"])
def test_the_same_for_classifiers(cls_bench: Path, tmp_path: Path, method: str) -> None:  # noqa: F811
    folder = test_build_cls.make(cls_bench, tmp_path / "set", method=method)
    assert verify(folder) == []
    items = list(read_manifest(folder))
    assert [len(item.cells) for item in items] == [1 if method in ("herding", "kmeans") else 4] * 6


def test_min_as_and_random_as_differ_from_focusdd_in_the_window_alone(bench: Path, tmp_path: Path) -> None:  # noqa: F811
    keep = {"empty": "keep", "conf": 0.3}
    ours = make(bench, tmp_path / "focusdd", **keep)
    selector = load_selector(str(bench / "vit.json"), None)
    for method in ("min_as", "random_as"):
        other = make(bench, tmp_path / method, method=method, **keep)
        assert cells(other, "background") == cells(ours, "background")
        mine, theirs = cells(ours, "key"), cells(other, "key")
        assert list(mine) == list(theirs)
        assert [c[2] for c in theirs.values() if c] == [c[2] for c in mine.values() if c]
        assert sum(mine[path] != theirs[path] for path in mine) > len(mine) / 3
        for item in read_manifest(other):
            for cell in item.cells:
                if cell.kind == "key" and method == "min_as":
                    assert attention_in(selector, bench, cell) <= attention_in(selector, bench, cell, mine[cell.path])


def test_ranked_crops_are_random_as_with_no_backgrounds(bench: Path, tmp_path: Path) -> None:  # noqa: F811
    ours = make(bench, tmp_path / "ours", method="ranked_crops")
    same = make(bench, tmp_path / "same", method="random_as", n_key=4)
    assert (ours / "manifest.jsonl").read_bytes() == (same / "manifest.jsonl").read_bytes()
    assert {cell.kind for item in read_manifest(ours) for cell in item.cells} == {"key"}


def attention_in(selector: Any, bench: Path, cell: Any, crop: tuple[int, int, int] | None = None) -> float:  # noqa: F811
    """The attention in the 3 x 3 window of the 4 x 4 grid that a crop was cut for."""
    picture = decode((bench / "sources" / cell.path).read_bytes())[0]
    pixels = torch.from_numpy(view_pixels(picture, 32, "squash")).permute(2, 0, 1)[None]
    attention = selector(pixels)[1][0].double().numpy()
    x, y, side = crop or cell.crop
    column = round((x + side / 2) / cell.width * 4 - 1.5)
    row = round((y + side / 2) / cell.height * 4 - 1.5)
    return round(float(attention[row : row + 3, column : column + 3].sum() / attention.sum()), 4)


def test_herding_chooses_by_the_vit_s_features_and_its_sets_grow(bench: Path, tmp_path: Path) -> None:  # noqa: F811
    made = make(bench, tmp_path / "made", method="herding", empty="keep", classes=["disc"], ipc=4)
    files = sorted((bench / "sources" / "disc").iterdir(), key=lambda f: hashlib.sha256(f.read_bytes()).hexdigest())
    views = np.stack([view_pixels(decode(f.read_bytes(), 32)[0], 32, "squash") for f in files])
    selector = load_selector(str(bench / "vit.json"), None)
    probabilities, _, features = selector.with_features(torch.from_numpy(views).permute(0, 3, 1, 2))
    order = by_herding(features.numpy().astype(np.float16), 4)
    items = list(read_manifest(made))
    assert [item.cells[0].path for item in items] == [f"disc/{files[i].name}" for i in order[:4]]
    assert [i.cells[0].p for i in items] == pytest.approx(probabilities[order[:4], 0].tolist(), abs=2e-4)
    for item in items:
        (cell,) = item.cells
        assert cell.crop is not None
        assert cell.crop[2] == min(cell.width, cell.height)
    small = make(bench, tmp_path / "small", method="herding", ipc=2)
    large = make(bench, tmp_path / "large", method="herding", ipc=5)
    assert tree(make(bench, tmp_path / "grown", method="herding", ipc=5, grow_from=str(small))) == tree(large)


def test_clusters_are_not_grown(bench: Path, tmp_path: Path) -> None:  # noqa: F811
    small = make(bench, tmp_path / "small", method="kmeans", ipc=1)
    assert yaml.safe_load((small / "build.yaml").read_text())["config"]["selection"] == "paper"
    with pytest.raises(ConfigError, match="grow_from: method=kmeans"):
        make(bench, tmp_path / "grown", method="kmeans", ipc=2, grow_from=str(small))
    assert not list(tmp_path.glob("grown*"))


def test_features_are_kept_for_both_coresets_and_only_for_them(
    bench: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from focusdd_det.selector import Selector

    calls: list[int] = []
    forward = Selector.__call__
    monkeypatch.setattr(Selector, "__call__", lambda self, x: calls.append(len(x)) or forward(self, x))
    store = tmp_path / "scores.sqlite"
    lengths = "SELECT DISTINCT length(feature) FROM source"
    make(bench, tmp_path / "focusdd", scores=str(store))
    assert sqlite3.connect(store).execute(lengths).fetchall() == [(None,)]
    make(bench, tmp_path / "herding", scores=str(store), method="herding")
    assert sqlite3.connect(store).execute(lengths).fetchall() == [(48,)]  # 24 channels, float16
    calls.clear()
    kmeans = make(bench, tmp_path / "kmeans", scores=str(store), method="kmeans")
    assert calls == []
    assert tree(kmeans) == tree(make(bench, tmp_path / "again", method="kmeans"))
    with sqlite3.connect(store) as db:
        db.execute("UPDATE source SET feature = x'00' WHERE path = 'disc/0.jpg'")
    with pytest.raises(DiskError, match=r"scores\.sqlite is damaged: its features"):
        make(bench, tmp_path / "damaged", scores=str(store), method="kmeans")


def test_an_older_file_of_scores_gets_the_column(bench: Path, tmp_path: Path) -> None:  # noqa: F811
    store = tmp_path / "scores.sqlite"
    first = make(bench, tmp_path / "first", scores=str(store))
    with sqlite3.connect(store) as db:  # as it was before there were features
        db.executescript(
            "ALTER TABLE source RENAME TO new; DROP INDEX by_group; CREATE TABLE source ("
            "root TEXT, path TEXT, folder TEXT, grp TEXT, sig TEXT, run INTEGER, offset INTEGER, size INTEGER, "
            "mtime INTEGER, sha BLOB, width INTEGER, height INTEGER, p REAL, share REAL, win_row INTEGER, "
            "win_col INTEGER, phash INTEGER, bad TEXT, PRIMARY KEY (root, path)); "
            "INSERT INTO source SELECT root, path, folder, grp, sig, run, offset, size, mtime, sha, width, height, p, "
            "share, win_row, win_col, phash, bad FROM new; DROP TABLE new"
        )
    assert tree(make(bench, tmp_path / "again", scores=str(store))) == tree(first)  # what it held still counts
    assert verify(make(bench, tmp_path / "herding", scores=str(store), method="herding")) == []
    with sqlite3.connect(tmp_path / "other.sqlite") as db:
        db.execute("CREATE TABLE source (run INTEGER, grp TEXT)")
    with pytest.raises(DiskError, match="other columns than ours"):
        ScoreStore(tmp_path / "other.sqlite")


# --- the detection teacher's choice


def test_the_teacher_s_windows(bench: Path, tmp_path: Path) -> None:  # noqa: F811
    """Every source of a class judged anew, picture by picture, with boxes that are mapped by hand."""
    made = make(bench, tmp_path / "made", method="teacher", classes=["disc"], ipc=1, empty="keep")
    assert "selector: null" in (made / "build.yaml").read_text()
    config = load_config(**options(bench, tmp_path / "x"))
    detector = load_detector(str(bench / "teacher.pt"), names=("disc", "square", "bar"))
    best: dict[str, tuple[float, tuple[int, int, int]]] = {}
    for file in (bench / "sources" / "disc").iterdir():
        picture, width, height = decode(file.read_bytes())
        found = letterboxed(detector, picture, config)
        side, windows = int(0.75 * min(width, height) + 0.5), []
        for row in range(2):
            for column in range(2):
                x = int(np.floor((column + 1.5) / 4 * width - side / 2 + 0.5))
                y = int(np.floor((row + 1.5) / 4 * height - side / 2 + 0.5))
                windows.append((min(max(x, 0), width - side), min(max(y, 0), height - side), side))
        corners = np.array([(x, y, x + s, y + s) for x, y, s in windows], np.float64)
        scores = np.round(window_scores(found, 0, corners), 4)
        best[f"disc/{file.name}"] = (float(scores.max()), windows[int(scores.argmax())])
    keys = {c.path: c for item in read_manifest(made) for c in item.cells if c.kind == "key"}
    first = sorted((score for score, _ in best.values()), reverse=True)[:3]
    assert first[0] > 0.05
    assert sorted((best[path][0] for path in keys), reverse=True) == pytest.approx(first, abs=2e-3)
    for path, cell in keys.items():
        assert cell.p == pytest.approx(best[path][0], abs=2e-3)
        assert cell.crop == best[path][1]


def letterboxed(detector: Detector, picture: np.ndarray, config: Any) -> Detections:
    from focusdd_det.compose import letterbox

    height, width = picture.shape[:2]
    look, scale, left, top = letterbox(picture, 96)
    found = detector.detect([look], config.conf, config.iou, config.max_det, 1, 96)[0]
    boxes = np.clip((found.boxes - np.array([left, top] * 2)) / scale, 0, [width, height] * 2)
    return Detections(boxes.astype(np.float32), found.classes, found.conf, found.scores)


def test_what_the_teacher_found_is_kept_for_the_next_build(
    bench: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    detect = Detector.detect
    monkeypatch.setattr(Detector, "detect", lambda self, looks, *a, **k: seen.append(len(looks)) or detect(self, looks, *a, **k))  # fmt: skip  # noqa: E501
    store = str(tmp_path / "scores.sqlite")
    common = {"method": "teacher", "scores": store, "empty": "keep"}
    make(bench, tmp_path / "a", **common)
    assert sum(seen) == 1 + 40 + 6  # a probe, the sources, the composites
    seen.clear()
    make(bench, tmp_path / "b", ipc=1, seed=3, **common)
    assert sum(seen) == 1 + 3
    seen.clear()
    make(bench, tmp_path / "c", conf=0.2, **common)
    assert sum(seen) == 1 + 40 + 6


def test_a_plan_says_that_the_teacher_will_look_at_every_source(bench: Path, tmp_path: Path) -> None:  # noqa: F811
    plan = make_plan(load_config(**options(bench, tmp_path / "x", method="teacher")))
    assert "teacher.pt looks at each of the 40 sources at 96 px" in plan.table()
    assert "looks at each" not in make_plan(load_config(**options(bench, tmp_path / "x"))).table()


def test_a_plan_says_where_there_are_no_backgrounds(bench: Path, tmp_path: Path) -> None:  # noqa: F811
    def says(method: str) -> bool:
        return "n_key=" in make_plan(load_config(**options(bench, tmp_path / "x", method=method))).table()

    assert [m for m in ("focusdd", "random_as", "ranked_crops", "random") if says(m)] == ["ranked_crops", "random"]


def test_key_patches_are_counted_against_the_grid_where_there_are_backgrounds(bench: Path, tmp_path: Path) -> None:  # noqa: F811
    one = options(bench, tmp_path / "x", grid=1, ipc=1)  # n_key is 3
    with pytest.raises(ConfigError, match=r"n_key=3: expected 0 to grid\^2 = 1"):
        make_plan(load_config(**one))
    assert make_plan(load_config(**{**one, "method": "random"})).composites == 3
    assert make_plan(load_config(**{**one, "method": "whole"})).composites == 3


# --- the user's own


@pytest.fixture
def middling(tmp_path: Path) -> Iterator[Path]:
    """The file that docs/methods.md shows."""
    text = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    path = tmp_path / "middling.py"
    path.write_text(code)
    yield path
    plugins._loaded.pop("middling.py", None)
    METHODS.pop("middling", None)


def test_a_method_of_the_user_s_builds_both_kinds_of_set(
    bench: Path,  # noqa: F811
    cls_bench: Path,  # noqa: F811
    middling: Path,
    tmp_path: Path,
) -> None:
    mine = {"plugins": [str(middling)], "method": "middling"}
    sets = [make(bench, tmp_path / "det", **mine), test_build_cls.make(cls_bench, tmp_path / "cls", **mine)]
    digest = hashlib.sha256(middling.read_bytes()).hexdigest()
    for folder in sets:
        assert verify(folder) == []
        assert yaml.safe_load((folder / "build.yaml").read_text())["plugins"] == {"middling.py": digest}
    usual = test_build_cls.make(cls_bench, tmp_path / "usual", scores=str(tmp_path / "scores.sqlite"))

    def keys(folder: Path) -> dict[str, float]:
        return {c.path: c.p for i in read_manifest(folder) if i.index == 0 for c in i.cells if c.kind == "key"}

    with sqlite3.connect(tmp_path / "scores.sqlite") as db:
        every = {path: round(p, 4) for path, p in db.execute("SELECT path, p FROM source WHERE grp = 'n02'")}
    middle = float(np.median(list(every.values())))
    nearest = sorted(every.values(), key=lambda p: abs(p - middle))[:3]
    chosen = [p for path, p in keys(sets[1]).items() if path.startswith("n02")]
    assert sorted(abs(p - middle) for p in chosen) == pytest.approx([abs(p - middle) for p in nearest], abs=1e-4)
    assert keys(sets[1]) != keys(usual)


@pytest.mark.parametrize("kind", ["det", "cls"])
def test_a_changed_file_does_not_go_on_with_a_build_of_the_old_one(
    bench: Path,  # noqa: F811
    cls_bench: Path,  # noqa: F811
    middling: Path,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from focusdd_det import detset

    mine = {"plugins": [str(middling)], "method": "middling"}
    written, before = detset.append, middling.read_text()

    def build_it() -> Path:
        if kind == "det":
            return make(bench, tmp_path / "set", **mine)
        return test_build_cls.make(cls_bench, tmp_path / "set", **mine)

    def stop(folder: Path, item: Item) -> None:
        if item.class_index == 1:
            raise KeyboardInterrupt
        written(folder, item)

    monkeypatch.setattr(detset, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        build_it()
    monkeypatch.setattr(detset, "append", written)
    middling.write_text(before.replace("np.median(candidates.p)", "candidates.p.max()"))
    with pytest.raises(ConfigError, match=r"begun with another configuration:\n  plugins\.middling\.py: '[0-9a-f]{64}"):
        build_it()
    middling.write_text(before)
    folder = build_it()  # as it was: the build goes on
    assert verify(folder) == []
    middling.write_text(before.replace("np.median(candidates.p)", "candidates.p.max()"))
    with pytest.raises(ConfigError, match=r"holds another set:\n  plugins\.middling\.py:"):
        build_it()
    other = (make if kind == "det" else test_build_cls.make)(
        *((bench if kind == "det" else cls_bench), tmp_path / "other"), **mine
    )
    assert [i.line() for i in read_manifest(other)] != [i.line() for i in read_manifest(folder)]


def test_a_method_of_the_user_s_that_gives_nonsense_is_named(bench: Path, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "odd.py"
    path.write_text(
        "from focusdd_det.methods import RandomCrops, register\n\n"
        "class Odd(RandomCrops):\n    def order(self, candidates, config, group):\n"
        "        return super().order(candidates, config, group) + 1\n\nregister('odd', Odd())\n"
    )
    try:
        with pytest.raises(ConfigError, match=r"method=odd: order\(\) gave 14 positions between 1 and 14, expected"):
            make(bench, tmp_path / "set", plugins=[str(path)], method="odd")
    finally:
        METHODS.pop("odd", None)
