"""The dataset card: valid for the hub, the same for the same set, and numbers only from runs on that set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from class_data import write_class_set
from interop_support import det_set, head_of, reseal

from focusdd_det.build import load_class_config, load_config
from focusdd_det.classmap import ClassMap
from focusdd_det.cli import main
from focusdd_det.config import as_plain
from focusdd_det.detset import read_manifest
from focusdd_det.disk import sha256
from focusdd_det.errors import ConfigError, DataError
from focusdd_det.interop.card import card_with_results
from focusdd_det.interop.finished import open_set
from focusdd_det.plan import Group, Plan
from focusdd_det.report import NUMBERS_HEADING, card

NAMES = ("disc", "square", "bar")


def the_card(folder: Path, task: str = "detect", names: tuple[str, ...] = NAMES) -> str:
    """The card that a build would write for these items."""
    config = load_config(sources=["x"], ipc=2) if task == "detect" else load_class_config(sources=["x"], ipc=2)
    identity = {
        "task": task,
        "config": as_plain(config),
        "selector": {"name": "vit|odd`", "sha256": "1" * 64, "spec": {}, "view": 224},
        "teacher": {"name": "teacher.pt", "sha256": "2" * 64} if task == "detect" else None,
        "versions": {"focusdd_det": "0.1.0"},
    }
    groups = tuple(Group(name, name, i, (name,), 9, 2) for i, name in enumerate(names))
    plan = Plan(ClassMap(names, {}, {}), {}, (), groups, {}, (), ())
    return card(list(read_manifest(folder)), plan, identity, dict.fromkeys(names, (9, 1)))


@pytest.fixture()
def made(tmp_path: Path) -> Path:
    folder = det_set(tmp_path / "set")
    (folder / "README.md").write_text(the_card(folder))
    return reseal(folder)


@pytest.fixture()
def made_cls(tmp_path: Path) -> Path:
    folder = write_class_set(tmp_path / "cls")
    lines = [
        line.replace('"cells":[]', '"cells":[' + json.dumps(CELL, separators=(",", ":")) + "]")
        for line in (folder / "manifest.jsonl").read_text().splitlines(keepends=True)
    ]
    (folder / "manifest.jsonl").write_text("".join(lines))
    (folder / "README.md").write_text(the_card(folder, "classify", ("n03", "n01", "n02")))
    return reseal(folder)


CELL = {
    "kind": "key", "root": "photos", "path": "a.jpg", "folder": "a", "sha256": "0" * 64, "width": 9, "height": 9,
    "crop": [0, 0, 5], "p": 0.5, "share": 0.5, "confirmed": False,
}  # fmt: skip


def accuracy(folder: Path, path: Path, **more: Any) -> Path:
    content = {
        "last": {"epoch": 60, "meaning": "headline", "top1": 43.4, "top5": 83.8, "n": 500, "per_class": {}},
        "labels": "hard",
        "imgsz": 128,
        "sha256": {"set": sha256((folder / "manifest.jsonl").read_bytes())},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, **more}))
    return path


def coco_result(**more: Any) -> dict[str, Any]:
    return {
        "weights": "/home/somebody/last.pt", "images": 177, "images_annotated": 5000, "settings": {"imgsz": 192},
        "all": {"AP": 0.0792, "AP50": 0.123}, "covered": {"AP": 0.3322}, "covered_classes": ["a", "b"], **more,
    }  # fmt: skip


@pytest.mark.parametrize("task", ["detect", "classify"])
def test_the_sections_and_facts(made: Path, made_cls: Path, task: str) -> None:
    folder = made if task == "detect" else made_cls
    text = (folder / "README.md").read_text()
    titles = ["How it was made", "Sources and licences", "Classes and contents", "Limits", "Measured numbers",
              "How to load it", "Citation"]  # fmt: skip
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == titles
    assert "27 usable, 3 quarantined" in text
    assert "reconstructed from its published text" in text
    if task == "detect":
        assert "| root0 | 3 | 1 | 1 | that of the pictures in `root0` |" in text
        assert "| root1 | 2 | 1 | 1 | that of the pictures in `root1` |" in text
        assert "teacher `teacher.pt`; nobody drew a box" in text
    assert "`vit?odd?`" in text  # a name cannot end a cell or a code span


@pytest.mark.parametrize("task", ["detect", "classify"])
def test_the_head_is_what_the_hub_expects(made: Path, made_cls: Path, task: str) -> None:
    head = head_of((made if task == "detect" else made_cls).joinpath("README.md").read_text())
    assert head["license"] == "other"
    assert head["task_categories"] == [{"detect": "object-detection", "classify": "image-classification"}[task]]
    assert head["size_categories"] == ["n<1K"]
    assert isinstance(head["pretty_name"], str)


def test_the_hub_s_own_reader_takes_the_head(made: Path, made_cls: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="NO huggingface_hub: the card's head was not checked by it")
    for folder in (made, made_cls):
        found = hub.DatasetCard.load(folder / "README.md")
        assert found.data.license == "other"
        assert found.data.to_dict()["configs"][0]["data_files"][0]["split"] == "train"
        assert found.text.startswith("\n# A distilled")


def test_the_card_is_the_same_for_the_same_set(made: Path) -> None:
    assert the_card(made) == the_card(made) == (made / "README.md").read_text()


def test_numbers_of_classifiers(made_cls: Path, tmp_path: Path) -> None:
    files = [accuracy(made_cls, tmp_path / f"run{i}" / "accuracy.json") for i in range(2)]
    text = card_with_results(open_set(made_cls), files)
    assert "| run0 | 43.40 | 83.80 | 500 | 60 | hard | 128 | yes |\n| run1 |" in text
    assert text.count(NUMBERS_HEADING) == 1
    before = (made_cls / "README.md").read_text()
    assert text.split(NUMBERS_HEADING)[0] == before.split(NUMBERS_HEADING)[0]
    assert text.split("## How to load it")[1] == before.split("## How to load it")[1]
    assert "has none of its own" not in text


def test_numbers_of_detectors(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    content = {"last": coco_result(meaning="headline"), "best": coco_result(meaning="selected on val", covered=None)}
    (run / "coco_eval.json").write_text(json.dumps(content))
    manifest = sha256((made / "manifest.jsonl").read_bytes())
    (run / "focusdd.yaml").write_text(f"set_manifest_sha256: {manifest}\n")
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps(coco_result()))
    text = card_with_results(open_set(made), [run / "coco_eval.json", alone])
    assert "| run | last.pt (headline) | 7.92 | 33.22 (2) | 12.30 | 177 of 5000 | 192 | yes |" in text
    assert "| run | last.pt (selected on val) | 7.92 | - | 12.30 |" in text
    assert "not recorded beside the file" in text
    assert "somebody" not in text  # no path of anybody's machine
    for other in ("0" * 64, "a" * 64, "''", "null"):  # another set, or none at all
        (run / "focusdd.yaml").write_text(f"set_manifest_sha256: {other}\n")
        with pytest.raises(DataError, match="another set"):
            card_with_results(open_set(made), [run / "coco_eval.json"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sha256": {"set": "0" * 64}}, "another set"),
        ({"last": None}, "no accuracy"),
        ({"last": {"meaning": "on training pictures", "top1": 99, "top5": 100, "n": 1, "epoch": 1}}, "no accuracy of"),
        ({"last": {"meaning": "headline", "top1": "99"}}, "not an accuracy.json"),
        (
            {"last": {"meaning": "headline", "top1": float("nan"), "top5": 1, "n": 1, "epoch": 1}},
            "not an accuracy.json",
        ),
        ({"sha256": 3}, "not an accuracy.json"),
    ],
)
def test_results_that_are_none(made_cls: Path, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        card_with_results(open_set(made_cls), [accuracy(made_cls, tmp_path / "r" / "accuracy.json", **change)])


def test_licences_and_names(made: Path, tmp_path: Path) -> None:
    head = {"license": "cc-by-4.0", "pretty_name": "Discs: 3 kinds"}
    text = card_with_results(open_set(made), [], {"root0": "CC BY | 4.0"}, head)
    assert "| root0 | 3 | 1 | 1 | CC BY ? 4.0 |" in text
    assert "that of the pictures in `root1`" in text
    assert head_of(text)["license"] == "cc-by-4.0"
    assert head_of(text)["pretty_name"] == "Discs: 3 kinds"
    assert "license_name" not in head_of(text)
    with pytest.raises(ConfigError, match="did you mean root"):
        card_with_results(open_set(made), [], {"rot0": "CC0"})


def test_the_command(made_cls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sealed = (made_cls / "README.md").read_bytes()
    one, two = (accuracy(made_cls, tmp_path / name / "accuracy.json") for name in ("r1", "r2"))
    out = tmp_path / "card.md"
    words = ["card", str(made_cls), f"results={one}", f"results={two}", "licence.photos=CC0", f"out={out}"]
    assert main(words) == 0
    assert "with 2 results" in capsys.readouterr().out
    assert "| r2 |" in out.read_text()
    assert "| CC0 |" in out.read_text()
    assert main(words) == 5
    assert main(["card", str(made_cls), f"out={tmp_path / 'x.md'}"]) == 2
    assert main(["card", str(made_cls), f"result={one}", f"out={tmp_path / 'x.md'}"]) == 2
    assert "did you mean results" in capsys.readouterr().err
    assert main(["card", str(made_cls), f"results={one}", f"out={made_cls / 'x.md'}"]) == 2
    assert main(["card", str(made_cls), f"results={tmp_path / 'none.json'}", f"out={tmp_path / 'x.md'}"]) == 3
    assert main(["card", str(made_cls), "licence.my-photos=1.10", f"out={tmp_path / 'x.md'}"]) == 2
    assert "my-photos" in capsys.readouterr().err
    assert main([*words[:2], "licence.photos=1.10", f"out={tmp_path / 'y.md'}"]) == 0
    assert "| 1.10 |" in (tmp_path / "y.md").read_text()
    assert main(["card", "--help"]) == 0
    assert (made_cls / "README.md").read_bytes() == sealed
    assert not (tmp_path / "x.md").exists()
