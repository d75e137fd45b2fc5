"""A first look in low precision and a second in full give the set that full precision for all gives."""

from __future__ import annotations

import itertools
import json
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import test_build_cls
from conftest import draw
from test_build import bench, make, options, tree  # noqa: F401
from test_build_cls import bench as cls_bench  # noqa: F401

from focusdd_det import composites
from focusdd_det.build import build, load_config
from focusdd_det.detset import read_manifest, verify
from focusdd_det.errors import DataError, WeightsError
from focusdd_det.labelling import TeacherBoxes
from focusdd_det.layouts import Layout, Layouts
from focusdd_det.methods import METHODS, FocusDD, monotone
from focusdd_det.plan import Group, make_plan
from focusdd_det.ranking import rank
from focusdd_det.scoring import looking, screening
from focusdd_det.scoring.deviations import Deviation, deviation, optimistic
from focusdd_det.scoring.screening import screen_precision, screens, unsettled
from focusdd_det.select import Candidates, ranked
from focusdd_det.selector import Selector
from focusdd_det.windows import realism

LOGIT, SHARE = 0.3, 0.01  # how far the made-up first looks are off


# ---- what a first look can be off ----


def test_deviations_are_measured_in_the_logit_of_p() -> None:
    p, again = np.array([0.5, 0.9, 0.0005]), np.array([0.5249792, 0.9, 0.0001])  # sigmoid(0.1); rounding below 1e-3
    seen = deviation(p, again, np.array([0.7, 0.6, 0.5]), np.array([0.7, 0.61, 0.5]))
    assert seen.logit == pytest.approx(0.1, abs=1e-6)
    assert seen.share == pytest.approx(0.01)
    assert seen.sources == 3
    assert seen.joined(Deviation(0.2, 0.001, 2)) == Deviation(0.2, seen.share, 5)
    assert deviation(*[np.zeros(0)] * 4) == Deviation()


def test_what_is_not_a_number_leaves_nothing_to_the_first_look() -> None:
    seen = deviation(np.array([np.nan]), np.array([0.5]), np.array([0.5]), np.array([0.5]))
    assert seen.logit == np.inf
    assert optimistic(np.array([0.0, 0.7]), np.array([0.5, 0.5]), seen)[0].tolist() == [1.0, 1.0]


def test_the_bound_is_twice_the_largest_deviation_and_never_below_p() -> None:
    p, share = np.array([0.5, 0.9999, 0.0]), np.array([0.6, 0.999, 0.0])
    best, most = optimistic(p, share, Deviation(0.25, 0.02, 9))
    assert best[0] == pytest.approx(1 / (1 + np.exp(-0.5)))
    assert (best >= p + 1e-4).all()
    assert best[1] == 1.0
    assert most.tolist() == pytest.approx([0.64, 1.0, 0.04])
    least = optimistic(p, share, Deviation())
    assert least[0][0] > 0.5
    assert least[1][0] > 0.6


# ---- which methods ----


def test_the_methods_whose_order_follows_p_and_score_are_screened_and_no_others() -> None:
    assert [name for name, method in METHODS.items() if screens(method)] == [
        "focusdd",
        "realism",
        "min_as",
        "random_as",
        "ranked_crops",
    ]

    class Middling(FocusDD):
        def order(self, candidates: Candidates, config: Any, group: str) -> Any:
            return ranked(candidates, -np.abs(candidates.score), config.stratify)

    assert not screens(Middling())  # it overrides what is marked, and does not say so again
    monotone(Middling.order)
    assert screens(Middling())


def test_auto_screens_where_it_pays(bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(screening, "precision_of", lambda precision, device: "bf16")

    def found(**more: Any) -> str | None:
        config = load_config(**options(bench, tmp_path / "set", **more))
        return screen_precision(config, METHODS[config.method], make_plan(config), "cpu")

    assert found(ipc=1, classes=["disc"], grid=1, n_key=1) is None  # 1 of 14, but 14 are few
    monkeypatch.setattr(screening, "_LEAST", 0)
    assert found(ipc=2) is None  # 24 of 40 sources are wanted
    assert found(ipc=1, classes=["disc"]) is None
    assert found(ipc=1, classes=["disc"], grid=1, n_key=1) == "bf16"  # 1 of 14
    assert found(ipc=1, classes=["disc"], grid=1, n_key=1, method="random") is None
    assert found(ipc=1, classes=["disc"], grid=1, n_key=1, method="herding") is None
    assert found(ipc=1, classes=["disc"], grid=1, n_key=1, precision="bf16") is None
    assert found(ipc=1, classes=["disc"], grid=1, n_key=1, screen="off") is None
    assert found(ipc=2, screen="fp16") == "fp16"
    monkeypatch.setattr(screening, "precision_of", lambda precision, device: "fp32")
    assert found(ipc=1, classes=["disc"], grid=1, n_key=1) is None


@pytest.mark.parametrize("more", [{"method": "herding"}, {"method": "random"}, {"precision": "bf16"}])
def test_a_screening_that_cannot_be_is_said(
    bench: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    more: dict[str, str],
) -> None:
    for screen, said in (("auto", 0), ("bf16", 1)):
        config = load_config(**options(bench, tmp_path / "set", screen=screen, **more))
        caplog.clear()
        with caplog.at_level("WARNING", "focusdd"):
            assert screen_precision(config, METHODS[config.method], make_plan(config), "cpu") is None
        assert sum("screen=bf16 does nothing here" in line for line in caplog.messages) == said


# ---- what is chosen, without a ViT ----


class World:
    """Sources with true scores, first looks that are off by at most LOGIT and SHARE, and which were looked at again."""

    def __init__(self, seed: int, n: int, config: Any, layout: Layout) -> None:
        rng = np.random.default_rng(seed)
        logit = rng.normal(1.5, 2.0, n)
        self.p = np.round(1 / (1 + np.exp(-logit)), 4)
        self.share = np.round(rng.uniform(0.6, 0.8, n), 4)
        self.p_first = np.round(1 / (1 + np.exp(-(logit + rng.uniform(-LOGIT, LOGIT, n)))), 4)
        self.share_first = np.round(self.share + rng.uniform(-SHARE, SHARE, n), 4)
        self.sha = rng.integers(0, 256, (n, 32)).astype(np.uint8)
        self.folder = rng.integers(0, 5, n).astype(np.int32)
        self.phash = rng.integers(0, 40, n).astype(np.uint64)  # many near duplicates
        self.config, self.layouts = config, Layouts(layout, (), 0)
        self.group = Group("a", "a", 0, ("a",), n, config.ipc)
        self.once = np.ones(n, bool)

    def ranking(self, settled: bool = False) -> Any:
        p, share, once = self.p.copy(), self.share.copy(), self.once & (not settled)
        best = optimistic(self.p_first[once], self.share_first[once], Deviation(LOGIT / 2, SHARE / 2, 1))
        p[once], share[once] = best
        table = Candidates(
            ids=np.arange(len(p)), sha=self.sha, folder=self.folder, p=p,
            score=realism(p, share, self.config.alpha), phash=self.phash, once=once,
        )  # fmt: skip
        return rank(self.group, [table], METHODS[self.config.method], self.layouts, self.config)

    def chosen(self) -> list[Any]:
        """The composites as a build makes them: a few at a time, looking again where it has to."""
        made: list[Any] = []
        ranking = self.ranking()
        stream = ranking.proposals()
        while len(made) < self.config.ipc:
            batch = [each for _, each in zip(range(min(3, self.config.ipc - len(made))), stream, strict=False)]
            again = unsettled(ranking, batch)
            if len(again):
                assert self.once[again].all()
                self.once[again] = False
                ranking = self.ranking()
                stream = ranking.proposals(len(made))
                continue
            if not batch:
                break
            made += batch
        return made


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stratify": False},
        {"alpha": 0.0},
        {"near_duplicate": 3},
        {"selection": "paper"},
        {"method": "realism"},
        {"short_class": "reuse", "ipc": 70},
        {"ipc": 70, "near_duplicate": 2},
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_that_of_the_true_scores(more: dict[str, Any], seed: int) -> None:
    config = load_config(**{"sources": ["x"], "out": "x", "method": "focusdd", "near_duplicate": 0, "ipc": 6, **more})
    layout = Layout(2, 4 if METHODS[config.method].all_keys else 3)
    world = World(seed, 250, config, layout)
    wanted = [each for _, each in zip(range(config.ipc), world.ranking(settled=True).proposals(), strict=False)]
    assert world.chosen() == wanted
    if config.ipc == 6 and config.selection == "grow" and not config.near_duplicate:
        assert world.once.sum() > 100  # and most sources were never looked at again


def test_a_bound_that_is_too_small_is_what_the_test_above_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("focusdd_det.scoring.deviations.SAFETY", 0.0)
    config = load_config(sources=["x"], out="x", method="focusdd", near_duplicate=0, ipc=6)
    different = 0
    for seed in range(8):
        world = World(seed, 250, config, Layout(2, 3))
        wanted = [each for _, each in zip(range(6), world.ranking(settled=True).proposals(), strict=False)]
        different += world.chosen() != wanted
    assert different


# ---- whole builds ----


@pytest.fixture(scope="module")
def many(bench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """150 sources of a class, of which few are wanted."""
    top = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(8)
    for folder in ("disc", "square"):
        (top / "sources" / folder).mkdir(parents=True)
        for i in range(75):
            cv2.imwrite(str(top / "sources" / folder / f"{i}.jpg"), draw(rng, 64)[0])
    return top / "sources"


def log(folder: Path) -> Any:
    return json.loads((folder / "build.log.json").read_text())["screening"]


def before_the_second_look(patch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Something happens to the sources when all were looked at once."""
    real = screening.Screen.settle_all

    def settle_all(self: Any, groups: Any, bar: Any) -> None:
        happens()
        real(self, groups, bar)

    patch.setattr(screening.Screen, "settle_all", settle_all)


@pytest.mark.parametrize("method", ["focusdd", "min_as", "random_as", "ranked_crops", "realism"])
def test_a_screened_set_has_the_same_bytes(bench: Path, many: Path, tmp_path: Path, method: str) -> None:  # noqa: F811
    keys = {"sources": [str(many)], "ipc": 1, "method": method, "batch": 10, "classes": ["disc", "square"]}
    plain = make(bench, tmp_path / "plain", screen="off", **keys)
    screened = make(bench, tmp_path / "screened", screen="bf16", **keys)
    assert verify(screened) == []
    assert tree(screened) == tree(plain)
    assert log(plain) is None
    seen = log(screened)
    assert 8 <= seen["looked_again"] < 150
    assert seen["looked_twice"] > seen["looked_again"]  # the batches that were looked at in both precisions
    assert 0 < seen["logit"] < 1
    assert 0 <= seen["share"] < 0.1


@pytest.mark.parametrize("method", ["focusdd", "realism"])
def test_a_second_look_at_every_pixel(bench: Path, many: Path, tmp_path: Path, method: str) -> None:  # noqa: F811
    """decode=full: the first look is at a picture of reduced size, and the set is that of full decoding."""
    for file in sorted(many.rglob("*.jpg")):  # large and smooth
        to = tmp_path / "large" / file.relative_to(many)
        to.parent.mkdir(parents=True, exist_ok=True)
        picture = cv2.GaussianBlur(cv2.imread(str(file)), (0, 0), 3)
        cv2.imwrite(str(to), cv2.resize(picture, (320, 320), interpolation=cv2.INTER_CUBIC))
    keys = {"sources": [f"{tmp_path}/large"], "ipc": 1, "method": method, "batch": 10, "classes": ["disc", "square"]}
    scores, plainly = str(tmp_path / "scores.sqlite"), str(tmp_path / "plain.sqlite")
    plain = make(bench, tmp_path / "plain", screen="off", decode="full", scores=plainly, **keys)
    make(bench, tmp_path / "other", screen="bf16", scores=scores, **keys)  # what it learned is of another pair of looks
    screened = make(bench, tmp_path / "screened", screen="bf16", decode="full", scores=scores, **keys)
    assert tree(screened) == tree(plain)
    seen = log(screened)
    assert 10 <= seen["looked_again"] == seen["looked_twice"] < 150
    assert seen["logit"] > log(tmp_path / "other")["logit"]  # other pixels, not another precision alone
    rows = "SELECT sig, path, p, share, win_row, win_col, phash, entropy FROM source"
    with sqlite3.connect(plainly) as db:
        full = set(db.execute(rows))
    with sqlite3.connect(scores) as db:
        found = set(db.execute(rows))
    assert len(found & full) == seen["looked_again"]  # all that a look at every pixel tells
    assert {row[0] for row in found - full}.isdisjoint({row[0] for row in full})


def test_what_overflows_and_cannot_be_decoded_again_is_not_used(
    bench: Path,  # noqa: F811
    many: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sources = shutil.copytree(many, tmp_path / "sources")
    monkeypatch.setattr(Selector, "__call__", overflowing(lambda pixels: slice(None)))
    anew = looking.Looker.anew

    def lost(self: Any, batch: Any, pixels: Any) -> Any:
        for located, _ in batch[: 3 if lost_batches else None]:
            (sources / located.source.path).write_bytes(b"no picture")
        lost_batches.append(len(batch))
        return anew(self, batch, pixels)

    lost_batches: list[int] = []
    monkeypatch.setattr(looking.Looker, "anew", lost)
    keys = {"sources": [str(sources)], "ipc": 1, "batch": 10, "classes": ["disc", "square"], "max_bad": 1}
    folder = make(bench, tmp_path / "set", screen="bf16", decode="full", **keys)
    assert verify(folder) == []
    lines = (folder / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) == lost_batches[0] + 3 * (len(lost_batches) - 1) == 10 + 3 * 14


def test_a_screening_does_not_decide_whose_entropy_is_too_small_from_other_pixels(
    bench: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = load_config(**options(bench, tmp_path / "set", screen="bf16", decode="full", least_entropy=3.0))
    assert screen_precision(config, METHODS["focusdd"], make_plan(config), "cpu") is None
    assert "not both decode=full and least_entropy" in caplog.text
    assert screen_precision(replace(config, decode="reduced"), METHODS["focusdd"], make_plan(config), "cpu") == "bf16"


def test_a_screened_set_for_classifiers_has_the_same_bytes(cls_bench: Path, tmp_path: Path) -> None:  # noqa: F811
    plain = test_build_cls.make(cls_bench, tmp_path / "plain", screen="off")
    screened = test_build_cls.make(cls_bench, tmp_path / "screened", screen="bf16")
    assert log(screened)["looked_again"] > 0
    assert tree(screened) == tree(plain)


def test_what_was_seen_twice_is_kept_and_serves_a_build_that_is_not_screened(
    bench: Path,  # noqa: F811
    many: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {"sources": [str(many)], "batch": 10, "classes": ["disc"], "scores": str(tmp_path / "scores.sqlite")}
    first = log(make(bench, tmp_path / "first", screen="bf16", ipc=1, **keys))
    seen: list[int] = []
    real = looking.Looker.__call__

    def counted(self: Any, batch: Any, pixels: Any) -> Any:
        seen.append(len(batch))
        return real(self, batch, pixels)

    monkeypatch.setattr(looking.Looker, "__call__", counted)
    again = log(make(bench, tmp_path / "again", screen="bf16", ipc=1, alpha=0.0, **keys))
    assert sum(seen) == again["looked_again"] < 75  # no first look, and a second only at what another alpha wants
    seen.clear()
    plain = make(bench, tmp_path / "plain", screen="off", ipc=1, **keys)
    assert sum(seen) == 75 - 10 - first["looked_again"] - again["looked_again"]  # 10: a batch of the first build
    assert tree(plain) == tree(tmp_path / "first")


def test_a_source_that_changes_between_the_looks_is_quarantined(
    bench: Path,  # noqa: F811
    many: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = tmp_path / "sources"
    (copy / "disc").mkdir(parents=True)
    for file in (many / "disc").iterdir():
        (copy / "disc" / file.name).write_bytes(file.read_bytes())
    keys = {"sources": [str(copy)], "ipc": 1, "batch": 10, "classes": ["disc"]}
    chosen = [cell.path for item in read_manifest(make(bench, tmp_path / "plain", **keys)) for cell in item.cells]

    def damage() -> None:
        (copy / chosen[0]).write_bytes(b"no picture")
        (copy / chosen[1]).write_bytes((many / chosen[2]).read_bytes())

    before_the_second_look(monkeypatch, damage)
    screened = make(bench, tmp_path / "screened", screen="bf16", **keys)
    lines = [json.loads(line) for line in (screened / "quarantine.jsonl").read_text().splitlines()]
    assert {line["path"] for line in lines} == set(chosen[:2])
    assert any("its content changed" in line["reason"] for line in lines)
    assert verify(screened) == []


def test_a_build_that_was_stopped_between_the_looks_goes_on(
    bench: Path,  # noqa: F811
    many: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {"sources": [str(many)], "ipc": 1, "batch": 10, "classes": ["disc", "square"]}
    plain = make(bench, tmp_path / "plain", screen="off", **keys)
    real = screening.Screen._put
    calls = 0

    def stopped(self: Any, *rest: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        real(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(screening.Screen, "_put", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(bench, tmp_path / "screened", screen="bf16", **keys)
    with sqlite3.connect(tmp_path / "screened.incomplete" / "scores.sqlite") as db:
        assert db.execute("SELECT COUNT(DISTINCT sig) FROM source").fetchone()[0] > 2
    assert tree(make(bench, tmp_path / "screened", screen="bf16", **keys)) == tree(plain)


def test_composites_that_the_teacher_empties_are_replaced_as_without_a_screening(
    bench: Path,  # noqa: F811
    many: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = TeacherBoxes.label

    def often_nothing(self: Any, looks: Any, cells: Any, *rest: Any) -> Any:
        return None if int(cells[0].sha256, 16) % 2 else real(self, looks, cells, *rest)

    monkeypatch.setattr(TeacherBoxes, "label", often_nothing)
    keys = {"sources": [str(many)], "ipc": 5, "batch": 10, "classes": ["disc"]}
    plain = make(bench, tmp_path / "plain", screen="off", **keys)
    assert any(item.proposal != item.index for item in read_manifest(plain))
    assert tree(make(bench, tmp_path / "screened", screen="bf16", **keys)) == tree(plain)


def test_replacements_beyond_those_that_were_settled_before_are_looked_at_again(
    bench: Path,  # noqa: F811
    many: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late = []
    real, settle = composites._write, screening.Screen.settle

    def spied(self: Any, ids: Any, *progress: Any) -> None:
        late.extend([] if progress else ids)  # composing has no bar for it
        settle(self, ids, *progress)

    monkeypatch.setattr(composites, "_write", lambda b, g, d, *rest: None if d.proposal < 8 else real(b, g, d, *rest))
    monkeypatch.setattr(screening.Screen, "settle", spied)
    keys = {"sources": [str(many)], "ipc": 4, "batch": 10, "classes": ["disc"]}
    plain = make(bench, tmp_path / "plain", screen="off", **keys)
    assert tree(make(bench, tmp_path / "screened", screen="bf16", **keys)) == tree(plain)
    assert late


def test_a_look_further_off_than_any_before_never_makes_a_source_serve_twice(
    bench: Path,  # noqa: F811
    many: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first look at one source is off by more than the bound, which shows only while the class is composed, if at
    all. Then the composites are chosen anew; if it never shows, the set is another one, but a whole one."""
    real_write, real_look = composites._write, looking.Looker.__call__
    monkeypatch.setattr(
        composites, "_write", lambda b, g, d, *rest: None if d.proposal < 5 else real_write(b, g, d, *rest)
    )
    keys = {"sources": [str(many)], "ipc": 6, "batch": 10, "classes": ["disc"], "teacher_batch": 1}
    plain = make(bench, tmp_path / "plain", screen="off", **keys)
    keyed = sorted({c.sha256 for item in read_manifest(plain) for c in item.cells if c.kind == "key"})[:6]
    same = 0
    for number, sha in enumerate(keyed):

        def call(self: Any, batch: Any, pixels: Any, sha: str = sha) -> Any:
            seen = real_look(self, batch, pixels)
            for i, (_, found) in enumerate(batch if self.selector.precision != "fp32" else ()):
                if found.sha.hex() == sha:
                    seen.p[i] = 1 / (1 + np.exp(0.25) * (1 - seen.p[i]) / seen.p[i])
                    row = list(seen.rows[i])
                    row[12] = float(seen.p[i])
                    seen.rows[i] = tuple(row)
            return seen

        with monkeypatch.context() as patch:
            patch.setattr(looking.Looker, "__call__", call)
            out = make(bench, tmp_path / f"screened-{number}", screen="bf16", **keys)
        used = [cell.path for item in read_manifest(out) for cell in item.cells]
        assert len(used) == len(set(used)) == 24
        assert verify(out) == []
        same += tree(out) == tree(plain)
    assert same  # where it showed


def overflowing(which: Any) -> Any:
    """A ViT whose first look gives no numbers for some pictures of a batch: [n, 3, s, s] -> positions."""
    real = Selector.__call__

    def call(self: Any, pixels: Any) -> Any:
        p, attention = (found.clone() for found in real(self, pixels))
        if self.precision != "fp32":
            at = which(pixels)
            p[at] = float("nan")
            attention[at] = float("inf")
        return p, attention

    return call


@pytest.mark.parametrize("decode", ["reduced", "full"])
@pytest.mark.parametrize("every", [True, False])
def test_a_first_look_that_overflows_is_not_believed(
    bench: Path,  # noqa: F811
    many: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: bool,
    decode: str,
) -> None:
    keys = {"sources": [str(many)], "ipc": 1, "batch": 10, "classes": ["disc"], "decode": decode}
    plain = make(bench, tmp_path / "plain", screen="off", **keys)
    turns = itertools.count()
    which = (lambda pixels: slice(None)) if every else (lambda pixels: [4] if next(turns) == 2 else [])
    monkeypatch.setattr(Selector, "__call__", overflowing(which))
    screened = make(bench, tmp_path / "screened", screen="bf16", **keys)
    assert tree(screened) == tree(plain)
    assert np.isfinite(log(screened)["logit"])


def test_numbers_that_are_none_in_full_precision_are_refused(
    bench: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Selector, "__call__", overflowing(lambda pixels: [0]))
    with pytest.raises(WeightsError, match="infinite or undefined numbers"):
        make(bench, tmp_path / "set", precision="bf16")
    with sqlite3.connect(tmp_path / "set.incomplete" / "scores.sqlite") as db:
        assert db.execute("SELECT COUNT(*) FROM source").fetchone()[0] == 0


def test_a_disk_that_is_gone_at_the_second_look_costs_no_first_look(
    bench: Path,  # noqa: F811
    many: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = tmp_path / "sources"
    shutil.copytree(many, copy)
    keys = {"sources": [str(copy)], "ipc": 1, "batch": 10, "classes": ["disc"]}
    with monkeypatch.context() as patch:
        before_the_second_look(patch, lambda: copy.rename(tmp_path / "gone"))
        with pytest.raises(DataError, match="is gone in the middle of the build"):
            make(bench, tmp_path / "screened", screen="bf16", **keys)
    (tmp_path / "gone").rename(copy)
    looks: list[str] = []
    real = looking.Looker.__call__

    def counted(self: Any, batch: Any, pixels: Any) -> Any:
        looks.append(self.selector.precision)
        return real(self, batch, pixels)

    monkeypatch.setattr(looking.Looker, "__call__", counted)
    screened = make(bench, tmp_path / "screened", screen="bf16", **keys)
    assert looks and set(looks) == {"fp32"}
    assert (screened / "quarantine.jsonl").read_text() == ""


def test_too_many_sources_that_are_damaged_between_the_looks_end_the_build(
    bench: Path,  # noqa: F811
    many: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = tmp_path / "sources"
    shutil.copytree(many, copy)

    def damage() -> None:
        for file in (copy / "disc").iterdir():
            file.write_bytes(b"no picture")

    before_the_second_look(monkeypatch, damage)
    with pytest.raises(DataError, match="more than max_bad"):
        make(bench, tmp_path / "set", screen="bf16", sources=[str(copy)], ipc=10, batch=10, classes=["disc"])


def test_first_looks_of_another_build_are_not_trusted_before_some_were_looked_at_again(
    bench: Path,  # noqa: F811
    many: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {"sources": [str(many)], "ipc": 1, "batch": 10, "classes": ["disc"], "scores": str(tmp_path / "s.sqlite")}
    make(bench, tmp_path / "rough", precision="bf16", **keys)
    known: list[int] = []
    real = screening.unsettled

    def spied(ranking: Any, taken: Any) -> Any:
        known.append(int(ranking.candidates.once.sum()))
        return real(ranking, taken)

    monkeypatch.setattr(screening, "unsettled", spied)
    make(bench, tmp_path / "set", screen="bf16", **keys)
    assert known[0] == 75 - 10  # a batch was looked at again before the first ranking


def test_the_first_look_may_be_asked_for_in_another_build(bench: Path, tmp_path: Path) -> None:  # noqa: F811
    config = load_config(**options(bench, tmp_path / "set", screen="bf16"))
    build(config)
    assert build(replace(config, screen="off")).composites == 6  # the same set: nothing to do
