"""Something changes between a run and its resume: it is refused, naming the key; a larger ipc grows from a set."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from faults.child import Fault
from faults.support import Run, Workshop, tree, write_picture, write_selector, write_sources, write_teacher
from focusdd_det.detset import read_manifest
from focusdd_det.errors import ConfigError, DataError, VerifyError

Build = Callable[..., Run]


@pytest.fixture(scope="module")
def stopped(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build that was killed after some composites."""
    from faults.support import start

    top = tmp_path_factory.mktemp("stopped")
    assert start(workshop.argv(top / "set"), top / "logs", Fault("kill", str(top), 30)).wait() == -9
    return top / "set.incomplete"


def other_map(workshop: Workshop, folder: Path) -> dict[str, Any]:
    content = yaml.safe_load((workshop.top / "map.yaml").read_text(encoding="utf-8"))
    content["folders"] = {"ball": "kite", "star": "étoile bleue", "kite": "ball"}
    (folder / "map.yaml").write_text(yaml.safe_dump(content))
    return {"class_map": str(folder / "map.yaml")}


CHANGES: dict[str, tuple[Callable[[Workshop, Path], dict[str, Any]], str]] = {
    "ipc": (lambda w, f: {"ipc": 2}, r"config\.ipc: 3 there, 2 asked for"),
    "seed": (lambda w, f: {"seed": 7}, r"config\.seed: 0 there, 7 asked for"),
    "teacher": (lambda w, f: {"teacher": str(write_teacher(f / "teacher.pt", seed=3))}, r"teacher\.sha256"),
    "selector": (lambda w, f: {"selector": str(write_selector(f, seed=3))}, r"selector\.sha256"),
    "map": (other_map, r"maps\.class_map"),
    "alpha": (lambda w, f: {"alpha": 2.0}, r"config\.alpha"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_key_is_refused_and_named(key: str, workshop: Workshop, stopped: Path, tmp_path: Path) -> None:
    make, message = CHANGES[key]
    work = shutil.copytree(stopped, tmp_path / "set.incomplete")
    before = tree(work)
    (tmp_path / "new").mkdir()
    with pytest.raises(ConfigError, match=message):
        workshop.build(tmp_path / "set", resume=True, **make(workshop, tmp_path / "new"))
    assert tree(work) == before


def test_another_version_of_a_library_is_refused_and_named(workshop: Workshop, stopped: Path, tmp_path: Path) -> None:
    work = shutil.copytree(stopped, tmp_path / "set.incomplete")
    text = (work / "build.yaml").read_text()
    (work / "build.yaml").write_text(text.replace("  pillow: ", "  pillow: 1."))
    with pytest.raises(ConfigError, match=r"versions\.pillow"):
        workshop.build(tmp_path / "set")


def test_resume_without_anything_to_resume(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave --resume out"):
        workshop.build(tmp_path / "set", resume=True)
    assert list(tmp_path.iterdir()) == []


def test_sources_added_between_a_run_and_its_resume(workshop: Workshop, tmp_path: Path) -> None:
    """The set is that of the sources there are now; composites of the old selection do not stay in it."""
    import numpy as np

    from faults.support import start

    sources = shutil.copytree(workshop.sources, tmp_path / "sources")
    argv = workshop.argv(tmp_path / "set", sources=[str(sources)])
    assert start(argv, tmp_path / "logs", Fault("kill", str(tmp_path / "set.inc"), 50)).wait() == -9
    rng = np.random.default_rng(77)
    for i in range(6):
        write_picture(sources / "ball" / f"new{i}.JPEG", rng)
    for path in sorted((sources / "star").iterdir())[:6]:
        path.unlink()
    workshop.build(tmp_path / "set", sources=[str(sources)])
    workshop.build(tmp_path / "fresh", sources=[str(sources)])
    assert tree(tmp_path / "set") == tree(tmp_path / "fresh")
    assert sum(item.class_index == 1 for item in read_manifest(tmp_path / "set")) == 2


def test_grow_from_gives_a_prefix_byte_for_byte(workshop: Workshop, unbroken: Path, tmp_path: Path) -> None:
    small = workshop.build(tmp_path / "small", ipc=1)
    grown = workshop.build(tmp_path / "grown", grow_from=str(small))
    assert tree(grown) == tree(unbroken)
    large = tree(grown)
    parts = {name: digest for name, digest in tree(small).items() if name.endswith((".jpg", ".txt", ".safetensors"))}
    assert len(parts) == 3 * 3 + 1  # and the contact sheet, which shows other composites
    assert [name for name, digest in parts.items() if large[name] != digest] == ["contact_sheet.jpg"]


def test_grow_from_a_set_whose_sources_changed(workshop: Workshop, tmp_path: Path) -> None:
    sources = write_sources(tmp_path / "sources", per_class=8, seed=9)
    workshop.build(tmp_path / "small", sources=[str(sources)], ipc=1)
    gone = next(iter(read_manifest(tmp_path / "small"))).cells[0].path
    (sources / gone).unlink()
    with pytest.raises(DataError, match="cannot be made of the sources as they are now"):
        workshop.build(tmp_path / "grown", sources=[str(sources)], ipc=2, grow_from=str(tmp_path / "small"))


def test_grow_from_a_damaged_set(workshop: Workshop, unbroken: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(unbroken, tmp_path / "small")
    next((folder / "labels" / "train").iterdir()).unlink()
    with pytest.raises(VerifyError, match="not an intact set"):
        workshop.build(tmp_path / "grown", ipc=3, grow_from=str(folder))
