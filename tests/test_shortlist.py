"""Of a class' sources only those that can come to the front are kept; what is chosen is what all of them would give."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_build import bench, make, tree  # noqa: F401
from test_screening import many  # noqa: F401

from focusdd_det import composites, ranking
from focusdd_det.build import load_config
from focusdd_det.errors import DiskError
from focusdd_det.layouts import Layout, Layouts
from focusdd_det.methods import METHODS, FocusDD, is_monotone
from focusdd_det.plan import Group
from focusdd_det.ranking import Ranking, rank
from focusdd_det.scoring import scores
from focusdd_det.scoring.scores import ScoreStore
from focusdd_det.select import Candidates, joined
from focusdd_det.shortlist import shortlist

OURS = dict(METHODS)  # other tests enter methods of their own
KEPT = [name for name, method in OURS.items() if is_monotone(method)]


def sources(seed: int, n: int) -> Candidates:
    """As a store gives them, by rising hash: equal scores, near duplicates, folders of very different sizes."""
    rng = np.random.default_rng(seed)
    sha = rng.integers(0, 256, (n, 32)).astype(np.uint8)
    return Candidates(
        ids=np.arange(n),
        sha=sha[np.lexsort(sha[:, ::-1].T)],
        folder=np.minimum(rng.geometric(0.4, n) - 1, 6).astype(np.int32),
        p=np.round(rng.beta(2, 1, n), 2) * (rng.random(n) > 0.05),
        score=rng.integers(0, 30, n),
        phash=rng.integers(0, 5 * n, n).astype(np.uint64),
        entropy=rng.uniform(2, 8, n),
        unusable=rng.random(n) < 0.1,
    )


def cut(table: Candidates, size: int) -> Iterator[Candidates]:
    for start in range(0, len(table), size):
        yield table.at(np.arange(start, min(start + size, len(table))))


def config(**more: Any) -> Any:
    return load_config(sources=["x"], out="x", **more)


def names(table: Candidates, positions: Any) -> list[bytes]:
    return [table.sha[position].tobytes() for position in positions]


def test_all_but_the_methods_that_compare_features_are_kept_short() -> None:
    assert set(OURS) - set(KEPT) == {"herding", "kmeans"}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("stratify", [True, False])
def test_a_monotone_order_is_what_its_contract_says(name: str, stratify: bool) -> None:
    """One source left out: those before it keep their places, no other comes later."""
    method, settings = METHODS[name], config(method=name, stratify=stratify)
    table = sources(3, 60)
    for how in (method.order, method.backgrounds):
        before = names(table, how(table, settings, "a"))
        for out in range(len(table)):
            left = table.at(np.delete(np.arange(len(table)), out))
            after = names(left, how(left, settings, "a"))
            place = before.index(table.sha[out].tobytes())
            assert after[:place] == before[:place]
            assert all(after.index(each) <= before.index(each) for each in after)


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("stratify", [True, False])
@pytest.mark.parametrize(("depth", "block"), [(1, 7), (20, 7), (20, 64), (150, 30)])
def test_the_first_of_each_order_are_those_of_all_sources(name: str, stratify: bool, depth: int, block: int) -> None:
    method, settings = METHODS[name], config(method=name, stratify=stratify)
    table = sources(depth, 400)

    def orders(some: Candidates) -> list[Any]:
        return [method.order(some, settings, "a"), method.backgrounds(some, settings, "a")]

    kept, whole = shortlist(cut(table, block), orders, depth)
    assert not whole
    assert len(kept) <= 2 * depth  # two orders
    for mine, theirs in zip(orders(kept), orders(table), strict=True):
        assert names(kept, mine[:depth]) == names(table, theirs[:depth])


def test_where_all_fit_all_are_kept() -> None:
    table = sources(0, 50)
    kept, whole = shortlist(cut(table, 7), lambda some: pytest.fail("no order is needed"), 50)
    assert whole
    assert all(np.array_equal(getattr(kept, name), getattr(table, name)) for name in ("ids", "sha", "p", "unusable"))
    nothing, whole = shortlist([table.at(np.arange(0))], lambda some: [], 5)
    assert whole and not len(nothing)


Composite = tuple[int, int, tuple[int, ...]]  # number, turn, ids


def composed(
    table: Candidates, settings: Any, block: int, grids: tuple[int, ...], unusable: set[int], empty: set[int]
) -> tuple[list[Composite], list[int]]:
    """The composites as a build makes them, and the depths of its rankings: some sources turn out to be unusable when
    they are cut, and some proposals to be empty."""
    method = METHODS[settings.method]
    group = Group("a", "a", 0, ("a",), len(table), settings.ipc)
    layouts = Layouts(Layout(2, 4 if method.all_keys else 3), grids, settings.seed)
    made: list[Composite] = []
    found = rank(group, cut(table, block), method, layouts, settings)
    depths, stream, number = [found.depth], found.proposals(), 0
    while len(made) < settings.ipc:
        proposal = next(stream, None)
        if proposal is None and found.depth:
            found = rank(group, cut(table, block), method, layouts, settings, found.deeper)
            depths.append(found.depth)
            stream = found.proposals(number)
            continue
        if proposal is None:
            break
        positions = (*proposal.keys, *proposal.backgrounds)
        damaged = [each for each in positions if int(found.candidates.ids[each]) in unusable and not found.banned[each]]
        if damaged:
            found.banned[damaged[0]] = table.unusable[found.candidates.ids[damaged[0]]] = True
            stream = found.proposals(number)
            continue
        number = proposal.number + 1
        if proposal.number not in empty:
            ids = tuple(int(found.candidates.ids[each]) for each in positions)
            made.append((proposal.number, proposal.turn, ids))
    return made, depths


def test_the_composites_are_those_of_all_sources_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    deepened = given_up = reused = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        settings = config(
            ipc=int(rng.integers(1, 12)),
            seed=seed,
            method=KEPT[seed % len(KEPT)],
            near_duplicate=int(rng.choice([0, 2, 5])),
            stratify=bool(rng.random() < 0.5),
            least_entropy=float(rng.choice([0, 5])),
            selection=str(rng.choice(["grow", "paper"])),
            short_class=str(rng.choice(["reduce", "reuse"])),
        )
        n = int(rng.integers(50, 400))
        unusable = set(rng.choice(n, n // 8, replace=False).tolist())
        empty = set(np.flatnonzero(rng.random(400) < rng.choice([0.3, 0.97])).tolist())
        grids = (1, 2, 3) if rng.random() < 0.3 else ()
        monkeypatch.setattr(ranking, "_DEPTH", n)
        expected, depths = composed(sources(seed, n), settings, n, grids, unusable, empty)
        assert depths == [0]
        monkeypatch.setattr(ranking, "_DEPTH", 1)
        monkeypatch.setattr(ranking, "_SPARE", 2)
        made, depths = composed(sources(seed, n), settings, int(rng.integers(1, 60)), grids, unusable, empty)
        assert made == expected, seed
        deepened += len(depths) > 1
        given_up += settings.short_class == "reuse" and not made
        reused += any(turn for _, turn, _ in made)
    assert deepened > 20 and given_up and reused  # what it is about was reached


def test_an_order_that_is_not_marked_gets_all_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    class Middling(FocusDD):
        def order(self, candidates: Candidates, config: Any, group: str) -> Any:
            return np.argsort(np.abs(candidates.score - np.median(candidates.score)), kind="stable")

    monkeypatch.setitem(METHODS, "middling", Middling())
    monkeypatch.setattr(ranking, "_DEPTH", 1)
    table = sources(2, 300)
    group, layouts = Group("a", "a", 0, ("a",), 300, 1), Layouts(Layout(2, 3), (), 0)
    found = rank(group, cut(table, 50), METHODS["middling"], layouts, config(method="focusdd", ipc=1))
    assert (len(found.candidates), found.depth) == (300, 0)


@pytest.mark.parametrize("screen", ["off", "bf16"])
def test_a_build_has_the_same_bytes_however_short_its_lists_are(
    bench: Path,  # noqa: F811
    many: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    screen: str,
) -> None:
    real = composites._write
    monkeypatch.setattr(composites, "_write", lambda b, g, d, *rest: None if d.proposal < 9 else real(b, g, d, *rest))
    keys = {"sources": [str(many)], "ipc": 2, "batch": 10, "classes": ["disc", "square"]}
    plain = make(bench, tmp_path / "plain", screen="off", **keys)
    monkeypatch.setattr(ranking, "_DEPTH", 1)
    monkeypatch.setattr(ranking, "_SPARE", 2)
    monkeypatch.setattr(scores, "BLOCK", 11)
    depths: list[int] = []
    rank_ = composites.Workbench.rank

    def spied(self: Any, group: Group, reach: int = 0) -> Ranking:
        found = rank_(self, group, reach)
        depths.append(found.depth)
        return found

    monkeypatch.setattr(composites.Workbench, "rank", spied)
    short = make(bench, tmp_path / "short", screen=screen, **keys)
    assert {16, 32} <= set(depths)
    assert tree(short) == tree(plain)


def test_blocks_are_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folder numbers go on from block to block; the last block may be full."""
    store = filled(tmp_path / "s.sqlite", 91)
    whole = next(store.blocks("a", 30.0))
    monkeypatch.setattr(scores, "BLOCK", 7)
    blocks = list(store.blocks("a", 30.0))
    assert [len(block) for block in blocks] == [7] * 13
    table = joined(blocks)
    for name, column in vars(whole).items():
        assert column is None or np.array_equal(getattr(table, name), column), name
    assert set(table.folder) == {0, 1, 2, 3}
    assert [len(block) for block in store.blocks("nothing", 30.0)] == [0]


def test_features_of_two_widths_are_a_damaged_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path / "s.sqlite", 20)
    monkeypatch.setattr(scores, "BLOCK", 7)
    store.db.execute("UPDATE source SET feature = ?", (np.ones(4, np.float16).tobytes(),))
    assert joined(store.blocks("a", 30.0, features=True)).features.shape == (20, 4)
    ids = [row[0] for row in store.db.execute("SELECT rowid FROM source ORDER BY sha DESC LIMIT 6")]
    store.db.execute(
        f"UPDATE source SET feature = ? WHERE rowid IN ({','.join('?' * 6)})", (np.ones(3, np.float16).tobytes(), *ids)
    )
    with pytest.raises(DiskError, match="not one vector a source"):
        joined(store.blocks("a", 30.0, features=True))


def filled(path: Path, n: int) -> ScoreStore:
    """A store of n made-up sources of one class, in some folders."""
    store = ScoreStore(path)
    rng = np.random.default_rng(0)
    digests = rng.integers(0, 256, (n, 32)).astype(np.uint8)
    for start in range(0, n, 1000):
        rows = []
        for i in range(start, min(n, start + 1000)):
            where = ("r", f"{i}", f"f{i * i % 9}", "a", "s", store.run, None, 1, 1)
            rows.append((*where, digests[i].tobytes(), 9, 9, i % 997 / 997, i % 89 / 89, 0, 0, i, None, None, 7.0))
        store.put(rows)
    store.commit()
    return store


def test_the_memory_of_a_ranking_does_not_grow_with_the_sources(tmp_path: Path) -> None:
    settings, layouts = config(ipc=3), Layouts(Layout(2, 3), (), 0)
    peaks, firsts = [], []
    for n in (10_000, 40_000):
        store = filled(tmp_path / f"{n}.sqlite", n)
        group = Group("a", "a", 0, ("f",), n, 3)
        tracemalloc.start()
        found = rank(group, store.blocks("a", 30.0), METHODS["focusdd"], layouts, settings)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        all_ = joined(store.blocks("a", 30.0))
        theirs = METHODS["focusdd"].order(all_, settings, "a")
        firsts.append(names(found.candidates, found.order[:100]) == names(all_, theirs[:100]))
        store.close()
    assert firsts == [True, True]
    assert peaks[1] < 1.25 * peaks[0]
