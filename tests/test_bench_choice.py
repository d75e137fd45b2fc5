"""Whether a build chooses what the definition says, as the benchmark tells it: on values by hand, and on the demo's
pictures with ties. Nothing is timed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_bench_build import options  # noqa: F401

from focusdd_det import select
from focusdd_det.bench.agreement import Look, differences, looks_of, same_choice, sources_of
from focusdd_det.bench.build import agreement
from focusdd_det.bench.definition import Composite, Patch, Seen, best_window, choose, confidence
from focusdd_det.bench.loop import seen_by_class
from focusdd_det.bench.options import BenchOptions
from focusdd_det.bench.pictures import prepare
from focusdd_det.bench.scenes import Scene
from focusdd_det.demo.write import write_sources
from focusdd_det.layouts import Layout, Layouts
from focusdd_det.plan import Group, make_plan

TIMES = 3  # files of each picture: as many sources with the same score


def seen(sha: int, p: float, folder: str = "a", name: str = "", phash: int = 0) -> Seen:
    return Seen(bytes([sha] * 32), name or f"{sha:02d}", folder, p, 0.5, (sha, 0), phash)


def chosen(sources: list[Seen], ipc: int = 1, key: int = 3, **config: Any) -> list[Composite]:
    given: Any = SimpleNamespace(**{"alpha": 0.0, "seed": 0, "stratify": False, "near_duplicate": 0, **config})
    return choose(sources, Group("g", "g", 0, (), len(sources), ipc), given, Layouts(Layout(2, key)))


def keys(composites: list[Composite]) -> list[list[int]]:
    return [[key.sha[0] for key in composite.keys] for composite in composites]


# ---- the definition ----


def test_the_realism_score_is_that_of_the_paper_to_four_digits() -> None:
    # 0.5 + 30 * (1 - 0.99^9 = 0.0864828) * 0.6 = 2.0566895
    assert Seen(b"", "", "", 0.5, 0.6, (0, 0), 0).score(30) == 20567
    assert Seen(b"", "", "", 0.12344, 0.6, (0, 0), 0).score(0) == 1234, "p is rounded first"


def test_confidence_is_in_steps_of_a_65535th() -> None:
    assert confidence([0.2, 0.3, 0.5], [0, 2]) == (13107 + 32768) / 65535
    assert confidence([0.2, 0.3, 0.5], []) == 32768 / 65535, "no output of its own: the largest"
    assert confidence([0.5, 0.5], [0, 1]) == 1


def test_the_best_window_and_its_share() -> None:
    assert best_window(np.array([[0.0, 0, 0], [0, 1, 2], [0, 3, 4]]), 2) == (1.0, (1, 1))
    assert best_window(np.array([[1.0, 0, 1], [0, 0, 0], [1, 0, 1]]), 2) == (0.25, (0, 0)), "the first of equals"
    assert best_window(np.array([[1.0, 0], [0, 2 + 1e-8]]), 1) == (float(np.float32(0.6667)), (1, 1))


def test_the_best_become_key_patches_and_ties_go_by_content_not_by_name() -> None:
    sources = [seen(9, 0.5, name="first"), seen(2, 0.5), seen(7, 0.9), seen(5, 0.50004), seen(1, 0.1)]
    assert keys(chosen(sources, key=4)) == [[7, 2, 5, 9]], "0.50004 is 0.5 in four digits"
    assert chosen(sources, key=4)[0].keys[0] == Patch(bytes([7] * 32), (7, 0))
    assert keys(chosen(sources[::-1], key=4)) == [[7, 2, 5, 9]]


def test_composites_are_made_until_the_sources_run_out() -> None:
    sources = [seen(i, i / 100) for i in range(1, 12)]
    made = chosen(sources, ipc=5)
    assert len(made) == 2, "eleven sources, four a composite"
    assert keys(made)[0] == [11, 10, 9]
    used = [*(k.sha for c in made for k in c.keys), *(sha for c in made for sha in c.backgrounds)]
    assert len(set(used)) == 8
    assert keys(chosen([*sources, seen(20, 1.0), seen(20, 1.0, name="again")]))[0] == [20, 11, 10], "a content once"


def test_backgrounds_are_drawn_with_probability_p() -> None:
    sources = [seen(1, 0.9), seen(2, 0.0), seen(3, 0.001), seen(4, 1.0)]
    drawn = [chosen(sources, seed=seed, key=0)[0].backgrounds for seed in range(40)]
    first = [order[0][0] for order in drawn]
    assert set(first) == {1, 4} and 8 < first.count(1) < 32
    assert all(order[-1][0] == 2 for order in drawn), "p = 0 comes last"
    assert len(set(drawn)) > 1


def test_folders_take_turns() -> None:
    sources = [seen(1, 0.9), seen(2, 0.8), seen(3, 0.7, "b"), seen(4, 0.6, "b"), seen(5, 0.5)]
    assert keys(chosen(sources, key=4)) == [[1, 2, 3, 4]]
    assert keys(chosen(sources, key=4, stratify=True)) == [[1, 3, 2, 4]]


def test_near_duplicates_are_passed_over() -> None:
    sources = [seen(1, 0.9, phash=0b0000), seen(2, 0.8, phash=0b0011), seen(3, 0.7, phash=0b1111 << 8)]
    sources += [seen(i, 0.1, phash=0xFF << (8 * i)) for i in (4, 5, 6)]
    assert keys(chosen(sources, key=4)) == [[1, 2, 3, 4]]
    assert keys(chosen(sources, key=4, near_duplicate=1)) == [[1, 2, 3, 4]]
    assert keys(chosen(sources, key=4, near_duplicate=2)) == [[1, 3, 4, 5]]


# ---- the comparison ----


def made(*numbers: int, corner: int = 0) -> Composite:
    key, rest = numbers[:3], numbers[3:]
    return Composite(tuple(Patch(bytes([n]), (corner, 0)) for n in key), tuple(bytes([n]) for n in rest))


def test_choices_are_compared_part_by_part_and_as_a_whole() -> None:
    theirs = {"g": [made(1, 2, 3, 4), made(5, 6, 7, 8)]}
    assert same_choice(theirs, theirs) == {"chosen": 1, "windows": 1, "backgrounds": 1, "composites": 1, "of": 2}
    swapped = same_choice({"g": [made(1, 3, 2, 4), made(5, 6, 7, 8)]}, theirs)
    assert swapped == {"chosen": 1, "windows": 1, "backgrounds": 1, "composites": 0.5, "of": 2}, "the same sets"
    turned = same_choice({"g": theirs["g"][::-1]}, theirs)
    assert (turned["chosen"], turned["composites"]) == (1, 0)
    moved = same_choice({"g": [made(1, 2, 3, 4), made(5, 6, 7, 8, corner=1)]}, theirs)
    assert moved == {"chosen": 1, "windows": 0.5, "backgrounds": 1, "composites": 0.5, "of": 2}
    other = same_choice({"g": [made(1, 2, 3, 9), made(5, 6, 4, 8)]}, theirs)
    assert other == pytest.approx({"chosen": 5 / 6, "windows": 5 / 6, "backgrounds": 0.5, "composites": 0, "of": 2})


def test_composites_that_only_one_makes_are_different() -> None:
    theirs = {"g": [made(1, 2, 3, 4)], "h": [made(1, 2, 3, 4)]}
    fewer = same_choice({"g": [made(1, 2, 3, 4)]}, theirs)
    assert fewer == same_choice(theirs, {"g": [made(1, 2, 3, 4)]})
    assert fewer == {"chosen": 0.5, "windows": 0.5, "backgrounds": 0.5, "composites": 0.5, "of": 2}
    assert same_choice({}, {"g": []})["composites"] == 0, "nothing is no agreement"


def test_differences_of_what_was_seen() -> None:
    a, b, c, d = (("g", bytes([n])) for n in range(4))
    mine = {a: Look(0.5, 0.6, (0, 0)), b: Look(0.9, 0.61, (1, 1)), c: Look(0.1, 0.5, (2, 2))}
    theirs = {a: Look(0.53, 0.6, (0, 0)), b: Look(0.9, 0.6, (1, 2)), d: Look(0.7, 0.5, (0, 0))}
    found = differences(mine, theirs, [b, c])
    assert found == pytest.approx({"p": 0.03, "p_chosen": 0, "share": 0.01, "window": 0.25, "alone": 2})
    assert differences({}, {}, []) == {"p": 0, "p_chosen": 0, "share": 0, "window": 0, "alone": 0}


# ---- both, on the demo's pictures ----


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's class folders; of each picture TIMES files that differ in a comment, so that their scores are tied."""
    top = tmp_path_factory.mktemp("pictures")
    write_sources(top, 6)
    for file in sorted(top.rglob("*.jpg")):
        data = file.read_bytes()
        for number in range(1, TIMES):
            file.with_name(f"{file.stem}-{number}.jpg").write_bytes(
                data[:2] + b"\xff\xfe\x00\x03%d" % number + data[2:]
            )
    return top


def scene_of(options: BenchOptions, pictures: Path, work: Path, near: int = 0) -> Scene:  # noqa: F811
    """Scored in fp32 at every pixel; two composites of 18 sources a class."""
    given = BenchOptions(**{**vars(options), "sources": str(pictures)})
    bench = prepare(given, work, 0, 0, batch=16, decode="full", near_duplicate=near)
    plan = make_plan(bench.config)
    scene = Scene(bench, plan, list(plan.stream()), "fp32", work, decode="full")
    scene.score()
    return scene


def plainly(scene: Scene) -> dict[str, list[Seen]]:
    return seen_by_class(scene.sources, scene.plain, scene.columns, scene.config)


@pytest.mark.parametrize("near", [0, 6])
def test_every_pixel_in_fp32_gives_what_the_definition_says(
    near: int,
    options: BenchOptions,  # noqa: F811
    pictures: Path,
    tmp_path: Path,
) -> None:
    scene = scene_of(options, pictures, tmp_path, near)
    found = agreement(scene, plainly(scene))
    same = {name: found[name] for name in ("chosen", "windows", "backgrounds", "composites", "window")}
    assert same == dict.fromkeys(same, 1.0)
    assert found["p"] < 1e-4 and found["share"] < 2e-4 and found["alone"] == 0
    if near:
        assert 8 <= found["of"] < 16, "six pictures a class, of some of which all files are alike"
    else:
        assert found["of"] == 16


def test_ties_are_among_what_is_chosen_and_broken_otherwise_they_tell(
    options: BenchOptions,  # noqa: F811
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = scene_of(options, pictures, tmp_path)
    sources = plainly(scene)
    score = {(name, s.sha): s.score(scene.config.alpha) for name, each in sources.items() for s in each}
    for name, composites in scene.choice().items():
        scores = [score[name, key.sha] for composite in composites for key in composite.keys]
        assert len(scores) == 6 and len(set(scores)) <= 4

    def last_first(_: object, key: np.ndarray) -> np.ndarray:
        return np.lexsort((-np.arange(len(key)), key))

    monkeypatch.setattr(select, "_sorted", last_first)
    assert agreement(scene, sources)["composites"] < 0.5


def test_a_source_that_the_reference_lacks_is_different(
    options: BenchOptions,  # noqa: F811
    pictures: Path,
    tmp_path: Path,
) -> None:
    scene = scene_of(options, pictures, tmp_path)
    sources = plainly(scene)
    (name, sha), *_ = sorted(sources_of(scene.choice()))
    sources[name] = [s for s in sources[name] if s.sha != sha]
    assert (name, sha) not in looks_of(sources)
    found = agreement(scene, sources)
    assert found["alone"] == 1 and found["window"] < 1
    assert 0.9 < found["chosen"] < 1 and found["composites"] < 1
