"""`least_entropy`: clip art and cut-outs on a blank ground are passed over, and nothing else changes."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from pathlib import Path

import cv2
import numpy as np
import pytest
import test_build_cls as cls
from test_build import bench, made, make, options, tree  # noqa: F401
from test_build_cls import bench as cls_bench  # noqa: F401

from focusdd_det import detset
from focusdd_det.build import build, load_class_config, load_config
from focusdd_det.detset import read_manifest, verify
from focusdd_det.errors import ConfigError, DataError
from focusdd_det.scoring.decode import decode
from focusdd_det.scoring.glance import grey_entropy, view_pixels
from focusdd_det.selector import Selector

LEAST = 3.2
CLIP_ART = ("disc/clip-0.png", "disc/clip-1.png")


def clip_art(at: int) -> np.ndarray:
    """A red disc with a black outline on a white ground."""
    picture = np.full((110, 120, 3), 255, np.uint8)
    cv2.circle(picture, (40 + at, 50), 30, (40, 40, 220), -1)
    cv2.circle(picture, (40 + at, 50), 30, (0, 0, 0), 3)
    return picture


@pytest.fixture(scope="module")
def mixed(bench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The sources of the bench, with two drawings among the discs."""
    top = tmp_path_factory.mktemp("mixed") / "sources"
    shutil.copytree(bench / "sources", top)
    for i, name in enumerate(CLIP_ART):
        cv2.imwrite(str(top / name), clip_art(20 * i))
    return top


def paths(folder: Path) -> set[str]:
    return {cell.path for item in read_manifest(folder) for cell in item.cells}


def composites(folder: Path) -> dict[str, str]:
    """The files of a set that do not speak of its config or its sources."""
    return {k: v for k, v in tree(folder).items() if k not in ("build.yaml", "README.md", "COMPLETE")}


@pytest.mark.parametrize(
    ("levels", "bits"),
    [
        ([7], 0.0),
        ([0, 255], 1.0),
        ([0, 0, 0, 255], 0.8113),  # -(3/4 log2 3/4 + 1/4 log2 1/4)
        ([10, 20, 30, 40], 2.0),
        (list(range(256)), 8.0),
    ],
)
def test_entropy_of_grey_levels(levels: list[int], bits: float) -> None:
    grey = np.tile(np.array(levels, np.uint8), (16, 4))
    assert grey_entropy(np.repeat(grey[..., None], 3, axis=2)) == bits
    assert str(grey_entropy(np.full((3, 2, 3), 90, np.uint8))) == "0.0"  # not -0.0


def test_the_drawings_have_little_and_the_sources_much(mixed: Path) -> None:
    found = {
        path.relative_to(mixed).as_posix(): grey_entropy(view_pixels(decode(path.read_bytes(), 32)[0], 32, "squash"))
        for path in mixed.rglob("*.*")
    }
    assert {name for name, bits in found.items() if bits < LEAST} == set(CLIP_ART)


@pytest.mark.parametrize(
    "more",
    [{}, {"loader": "processes"}, {"method": "random"}, {"method": "realism"}, {"method": "herding", "ipc": 14}],
    ids=str,
)
def test_clip_art_is_in_no_cell(bench: Path, mixed: Path, tmp_path: Path, more: dict[str, object]) -> None:  # noqa: F811
    more = {"ipc": 4, "empty": "keep", "classes": ["disc"], "sources": [str(mixed)], **more}
    without = make(bench, tmp_path / "off", **{**more, "ipc": 16 if more["ipc"] == 14 else 4})
    assert paths(without) >= set(CLIP_ART)  # all 16 sources are used
    folder = make(bench, tmp_path / "set", least_entropy=LEAST, **more)
    assert verify(folder) == []
    assert paths(folder)
    assert not paths(folder) & set(CLIP_ART)


def test_a_set_is_that_of_the_sources_without_clip_art(
    bench: Path,  # noqa: F811
    made: Path,  # noqa: F811
    mixed: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """To the byte; none of them is quarantined, and `max_bad` does not know of them."""
    logger = logging.getLogger("focusdd")
    caplog.set_level(logging.INFO, "focusdd")
    logger.addHandler(caplog.handler)
    try:
        folder = make(bench, tmp_path / "set", sources=[str(mixed)], least_entropy=LEAST, max_bad=0)
    finally:
        logger.removeHandler(caplog.handler)
    assert composites(folder) == composites(made)
    assert (folder / "quarantine.jsonl").read_bytes() == b""
    card = (folder / "README.md").read_text()
    assert "sources: 42 usable, 0 quarantined" in card
    assert "less than 3.2 bits of entropy (clip art, cut-outs on a blank ground): 2 of the 42 usable: disc 2\n" in card
    assert "least_entropy=3.2: 2 of 42 usable sources passed over" in caplog.text
    assert "least_entropy: 3.2" in (folder / "build.yaml").read_text()


def test_a_limit_that_nothing_is_below_changes_nothing_but_the_card(
    bench: Path,  # noqa: F811
    made: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    assert "entropy" not in (made / "README.md").read_text()
    low = make(bench, tmp_path / "low", least_entropy=LEAST)
    assert composites(low) == composites(made)
    assert "0 of the 40 usable\n" in (low / "README.md").read_text()


def test_a_class_that_is_left_with_too_few(bench: Path, mixed: Path, tmp_path: Path) -> None:  # noqa: F811
    """As one whose sources turn out to be unusable: fewer composites, or the same sources again."""
    more = {"sources": [str(mixed)], "classes": ["disc"], "ipc": 4, "empty": "keep", "least_entropy": LEAST}
    folder = make(bench, tmp_path / "fewer", **more)
    assert len(list(read_manifest(folder))) == 3
    assert "fewer than 4 composites: disc 3" in (folder / "README.md").read_text()
    reused = make(bench, tmp_path / "reused", short_class="reuse", **more)
    assert len(list(read_manifest(reused))) == 4
    assert not paths(reused) & set(CLIP_ART)
    with pytest.raises(DataError, match=r"no composite was made.*least_entropy=8 passed over 16 sources"):
        make(bench, tmp_path / "none", **{**more, "least_entropy": 8})


def test_sets_grow_with_it(bench: Path, mixed: Path, tmp_path: Path) -> None:  # noqa: F811
    more = {"sources": [str(mixed)], "least_entropy": LEAST}
    small = make(bench, tmp_path / "small", ipc=1, **more)
    grown = make(bench, tmp_path / "grown", ipc=2, grow_from=str(small), **more)
    assert tree(grown) == tree(make(bench, tmp_path / "large", ipc=2, **more))
    with pytest.raises(ConfigError, match=r"config\.least_entropy: 3\.2 there, 0\.0 asked for"):
        make(bench, tmp_path / "other", ipc=2, grow_from=str(small), sources=[str(mixed)])


def test_a_classification_set_passes_over_too(cls_bench: Path, tmp_path: Path) -> None:  # noqa: F811
    photos = tmp_path / "photos"
    shutil.copytree(cls_bench / "photos", photos)
    for i in range(4):
        cv2.imwrite(str(photos / "n01" / f"clip-{i}.png"), clip_art(10 * i))
    more = {"sources": [str(photos)], "classes": ["n01"], "ipc": 4}
    drawn = {f"n01/clip-{i}.png" for i in range(4)}
    assert paths(cls.make(cls_bench, tmp_path / "off", **more)) >= drawn
    folder = cls.make(cls_bench, tmp_path / "set", least_entropy=LEAST, **more)
    assert len(list(read_manifest(folder))) == 3
    assert not paths(folder) & drawn
    with pytest.raises(ConfigError, match=r"least_entropy=9\.0: expected 0 \(off\) to 8 bits"):
        load_class_config(least_entropy=9)


def as_before(folder: Path, *keys: str) -> None:
    """A set as a version made it that did not know these keys."""
    file = folder / "build.yaml"
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(tuple(f"  {key}:" for key in keys))]
    assert len(kept) == len(lines) - len(keys)
    file.write_text("".join(kept))
    (folder / "COMPLETE").write_bytes(detset.seal(folder))


def test_a_set_of_an_earlier_version_is_known_and_grows(
    bench: Path,  # noqa: F811
    cls_bench: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    for name, one, keys in (
        ("detect", load_config(**options(bench, tmp_path / "detect", ipc=1)), ["own_conf", "contradiction"]),
        ("classify", None, []),
    ):
        old = tmp_path / name
        if one is None:
            cls.make(cls_bench, old, ipc=1)
        else:
            build(one)
        as_before(old, "least_entropy", "decode", *keys)
        before = tree(old)
        if one is None:
            cls.make(cls_bench, old, ipc=1)
            larger = cls.make(cls_bench, tmp_path / "grown-cls", grow_from=str(old))
        else:
            build(one)
            larger = make(bench, tmp_path / "grown", grow_from=str(old))
        assert tree(old) == before  # the same command has nothing to do
        assert {i.line() for i in read_manifest(old)} < {i.line() for i in read_manifest(larger)}


@pytest.mark.parametrize("loader", ["threads", "processes"])
@pytest.mark.parametrize("moved", [False, True])
def test_scores_of_an_earlier_version_are_kept_or_looked_at_anew(
    bench: Path,  # noqa: F811
    mixed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loader: str,
    moved: bool,
) -> None:
    """Without the option they count; with it what has no entropy is looked at once more, by name and by content."""
    store = tmp_path / "scores.sqlite"
    more = {"scores": str(store), "loader": loader}
    first = make(bench, tmp_path / "first", sources=[str(mixed)], **more)
    with sqlite3.connect(store) as db:
        assert db.execute("SELECT COUNT(*) FROM source WHERE entropy IS NULL").fetchone() == (0,)
        for table in ("source", "content"):
            db.execute(f"ALTER TABLE {table} DROP COLUMN entropy")
    calls: list[int] = []
    forward = Selector.__call__
    monkeypatch.setattr(Selector, "__call__", lambda self, x: calls.append(len(x)) or forward(self, x))
    sources = mixed
    if moved:
        sources = shutil.copytree(mixed, tmp_path / "moved" / "sources")
        for path in sources.rglob("*.*"):
            path.rename(path.with_name(f"x{path.name}"))
    off = make(bench, tmp_path / "off", sources=[str(sources)], **more)
    assert calls == []
    assert {k: v for k, v in composites(off).items() if moved is False or k.startswith("images")}.items() <= composites(
        first
    ).items()
    clip = {str(Path(name).with_name(f"x{Path(name).name}")) if moved else name for name in CLIP_ART}
    on = make(bench, tmp_path / "on", sources=[str(sources)], least_entropy=LEAST, **more)
    assert calls == [64]  # all 42, in one batch, which at this size is one part
    assert tree(on) == tree(make(bench, tmp_path / "fresh", sources=[str(sources)], least_entropy=LEAST))
    assert not paths(on) & clip
    calls.clear()
    make(bench, tmp_path / "again", sources=[str(sources)], least_entropy=4.0, seed=1, **more)
    make(bench, tmp_path / "back", sources=[str(mixed)], least_entropy=LEAST, **more)
    assert calls == []  # now they are known, under either name


def test_a_build_begun_by_an_earlier_version_goes_on(
    bench: Path,  # noqa: F811
    made: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(folder: Path, item: detset.Item) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(detset, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        make(bench, tmp_path / "set")
    monkeypatch.undo()
    work = tmp_path / "set.incomplete"
    with sqlite3.connect(work / "scores.sqlite") as db:
        db.execute("ALTER TABLE source DROP COLUMN entropy")
    text = (work / "build.yaml").read_text()
    (work / "build.yaml").write_text(text.replace("  least_entropy: 0.0\n", ""))
    assert tree(make(bench, tmp_path / "set")) == tree(made)
