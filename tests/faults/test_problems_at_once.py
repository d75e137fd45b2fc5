"""Mistakes in sources and maps: reported all at once, before any model is opened."""

from __future__ import annotations

import logging
import shutil
import tarfile
from pathlib import Path

import pytest

from faults.support import FOLDERS, Workshop, tree, write_map, write_sources
from focusdd_det.build import load_config
from focusdd_det.detset import read_manifest
from focusdd_det.errors import ConfigError, DataError
from focusdd_det.plan import make_plan

NO_MODELS = {"teacher": "absent.pt", "selector": "absent.json"}  # opened first, they would be the error


def test_everything_wrong_with_the_sources_in_one_message(workshop: Workshop, tmp_path: Path) -> None:
    """A misspelt folder in a user's map, an unknown class, a folder that is not there, a class too small, at once."""
    few = write_sources(tmp_path / "few", per_class=5)
    (tmp_path / "own.yaml").write_text("bal: ball\nstar: étoile blue\n", encoding="utf-8")
    (tmp_path / "misspelt.yaml").write_text("bal: ball\n")
    with pytest.raises(DataError) as caught:
        workshop.build(
            tmp_path / "set",
            sources=[
                str(few), f"{few}::{tmp_path / 'own.yaml'}", f"{few}::{tmp_path / 'misspelt.yaml'}",
                str(tmp_path / "absent"), {"path": str(few), "mpa": "x"},
            ],
            classes=["ball", "kitte"],
            short_class="error",
            **NO_MODELS,
        )  # fmt: skip
    told = str(caught.value)
    for part in (
        "no class `kitte`, did you mean kite?",
        "`star: étoile blue`: the set has no such class, did you mean étoile bleue?",
        "`bal`, did you mean ball?",
        f"no source folder {tmp_path / 'absent'}",
        "'mpa': 'x'",
        "1 classes have too few sources for ipc=3 (4 a composite): ball (1 of 3)",
    ):
        assert part in told
    assert not (tmp_path / "set.incomplete").exists()


def test_a_misspelt_class_alone_is_a_mistake_in_the_command(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no class `bal`, did you mean ball\?"):
        workshop.build(tmp_path / "set", classes=["bal"], **NO_MODELS)


def test_everything_wrong_with_a_map_in_one_message(workshop: Workshop, tmp_path: Path) -> None:
    """Synsets that are misspelt or not of ImageNet-1K, a synset in two classes, two classes with one id."""
    (tmp_path / "map.yaml").write_text(
        "dog: {coco_id: 0, exact: [n02085620, n0208562]}\n"
        "cat: {coco_id: 1, exact: [n02085620, n99999999], exakt: []}\n"
        "cow: {coco_id: 1}\nox: {exact: []}\n"
    )
    with pytest.raises(DataError) as caught:
        workshop.build(tmp_path / "set", class_map=str(tmp_path / "map.yaml"), **NO_MODELS)
    told = str(caught.value)
    for part in (
        "`n0208562` is not an ImageNet-1K synset, did you mean n02085620",
        "`n99999999` is not an ImageNet-1K synset",
        "`n02085620` is exact in `dog` and in `cat`",
        "unknown key `exakt`, did you mean exact?",
        "`cow` has the coco_id of `cat`",
        "`ox` needs a coco_id",
    ):
        assert part in told


def test_everything_wrong_with_the_config_in_one_message(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        workshop.build(tmp_path / "set", ipcc=3, seed="x", empty="keeep", conf=float("nan"), **NO_MODELS)
    told = str(caught.value)
    for part in ("`ipcc`, did you mean ipc", "seed='x'", "did you mean keep", "conf=nan"):
        assert part in told


def test_folders_that_no_class_names(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "sources" / "zebra").mkdir(parents=True)
    with pytest.raises(DataError, match="none of its folders is in the class map; found zebra"):
        workshop.build(tmp_path / "set", sources=[str(tmp_path / "sources")], **NO_MODELS)
    sources = shutil.copytree(workshop.sources, tmp_path / "more")
    (sources / "zebra").mkdir()
    plan = make_plan(load_config(**workshop.options(tmp_path / "set", sources=[str(sources)])))
    assert "1 folders that no class of the map names are left out: zebra" in plan.table()


@pytest.mark.parametrize("rule", ["reduce", "skip", "reuse", "error"])
def test_too_few_sources_in_a_class(workshop: Workshop, tmp_path: Path, rule: str) -> None:
    sources = shutil.copytree(workshop.sources, tmp_path / "sources")
    for path in sorted((sources / "star").iterdir())[5:]:
        path.unlink()
    options = {"sources": [str(sources)], "short_class": rule}
    if rule == "error":
        with pytest.raises(DataError, match=r"étoile bleue \(1 of 3\)"):
            workshop.build(tmp_path / "set", **options, **NO_MODELS)
        return
    folder = workshop.build(tmp_path / "set", **options)
    assert sum(item.class_index == 1 for item in read_manifest(folder)) == {"reduce": 1, "skip": 0, "reuse": 3}[rule]
    assert rule == "reuse" or "étoile bleue" in (folder / "README.md").read_text(encoding="utf-8").split("| class |")[0]


def test_two_folders_for_one_class_and_one_folder_twice(workshop: Workshop, tmp_path: Path) -> None:
    """A folder beside its archive, and the same folder in two sources: taken together, and said."""
    sources = shutil.copytree(workshop.sources, tmp_path / "sources")
    with tarfile.open(sources / "ball.tar", "w") as archive:
        archive.add(sources / "ball", ".")
    options = workshop.options(tmp_path / "set", sources=[str(sources), str(workshop.sources)])
    told = make_plan(load_config(**options)).table()
    assert "found as a folder and as an archive, taken together: ball" in told
    assert "folders found in several sources, taken together: ball, kite, star" in told


def test_the_same_picture_under_many_names(
    workshop: Workshop,
    unbroken: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Used once; the composites are those without the copies, and the log says so."""
    sources = shutil.copytree(workshop.sources, tmp_path / "sources")
    for folder in FOLDERS:
        for path in sorted((sources / folder).iterdir()):
            shutil.copy(path, path.with_name(f"z copy of {path.name}"))
    monkeypatch.setattr(logging.getLogger("focusdd"), "propagate", True)
    with caplog.at_level("INFO", "focusdd"):
        folder = workshop.build(tmp_path / "set", sources=[str(sources)])
    assert "used once a class: 42, such as ball/00.JPEG (2 times)" in caplog.text
    parts = [{k: v for k, v in tree(f).items() if k.startswith(("images", "labels"))} for f in (folder, unbroken)]
    assert parts[0] == parts[1]


def test_two_folders_whose_names_look_alike_in_file_names(workshop: Workshop, tmp_path: Path) -> None:
    """With one set of composites a folder, folders of one class must not write over each other's files."""
    sources = tmp_path / "sources"
    names = ["A b", "a-b", "名前", "näme"]
    for name, folder in zip(names, [*FOLDERS, FOLDERS[0]], strict=True):
        shutil.copytree(workshop.sources / folder, sources / name)
    path = write_map(tmp_path / "map.yaml")
    folders = "".join(f"  {name}: ball\n" for name in names)
    path.write_text(path.read_text(encoding="utf-8").split("folders:")[0] + "folders:\n" + folders, encoding="utf-8")
    if "names:" not in path.read_text(encoding="utf-8"):
        path.write_text("names: [ball, étoile bleue, kite]\nfolders:\n" + folders, encoding="utf-8")
    folder = workshop.build(tmp_path / "set", sources=[str(sources)], class_map=str(path), ipc_unit="imagenet", ipc=1)
    items = list(read_manifest(folder))
    assert len({item.id for item in items}) == len(items) == 4


def test_copies_under_other_names_are_named_in_the_plan(workshop: Workshop, tmp_path: Path) -> None:
    """The same bytes twice in one class, and in two folders; files of one size and other bytes are no copies."""
    sources = write_sources(tmp_path / "sources", per_class=6)
    first, second = (sorted((sources / folder).iterdir()) for folder in list(FOLDERS)[:2])
    shutil.copy(first[0], first[0].with_name("zz copy.jpg"))
    padded = [first[1].read_bytes() + b"\n" * n for n in range(3)]
    first[2].write_bytes(padded[1])
    first[3].write_bytes(padded[1][:-1] + b"\r")
    shutil.copy(second[0], second[0].parent / "another.jpg")
    notes = " ".join(make_plan(load_config(**workshop.options(tmp_path / "set", sources=[str(sources)]))).notes)
    assert "the same picture under several names, used once: 2" in notes
    assert f"{first[0].name} = " in notes
    assert "zz copy.jpg" in notes
    assert "another.jpg" in notes
    assert first[2].name not in notes
