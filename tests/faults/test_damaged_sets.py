"""Bytes that change on disk after a set was made: verify names the file, --resume repairs it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.support import Workshop, flip, tree
from focusdd_det.cli import main
from focusdd_det.detset import read_manifest, verify
from focusdd_det.errors import DiskError, VerifyError

Damage = Callable[[Path], Path]


def first(folder: Path, part: str, suffix: str) -> Path:
    return folder / part / "train" / f"{next(iter(read_manifest(folder))).id}{suffix}"


def flipped(name: str, position: int | None = None) -> Damage:
    def damage(folder: Path) -> Path:
        path = folder / name if "*" not in name else sorted(folder.glob(name))[0]
        flip(path, position)
        return path

    return damage


def deleted(name: str) -> Damage:
    def damage(folder: Path) -> Path:
        path = sorted(folder.glob(name))[0]
        path.unlink()
        return path

    return damage


def cut_last_line(folder: Path) -> Path:
    path = folder / "manifest.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    return path


def line_lost(folder: Path) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    return path


def changed_number(key: str) -> Damage:
    def damage(folder: Path) -> Path:
        path = folder / "manifest.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        start = lines[1].index(f'"{key}":') + len(key) + 3
        assert lines[1][start].isdigit()
        lines[1] = lines[1][:start] + str((int(lines[1][start]) + 1) % 10) + lines[1][start + 1 :]
        path.write_text("".join(lines))
        return path

    return damage


def changed_text(old: str, new: str) -> Damage:
    def damage(folder: Path) -> Path:
        path = folder / "manifest.jsonl"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        return path

    return damage


DAMAGES: dict[str, Damage] = {
    "a flipped byte in an image": flipped("images/train/*.jpg"),
    "a flipped byte in a label": flipped("labels/train/*.txt"),
    "a flipped byte in a soft-target file": flipped("soft/train/*.safetensors"),
    "a flipped byte in the manifest": flipped("manifest.jsonl"),
    "a flipped byte in data.yaml": flipped("data.yaml"),
    "a flipped byte in README.md": flipped("README.md"),
    "a flipped byte in build.yaml": flipped("build.yaml"),
    "a flipped byte in the format of build.yaml": flipped("build.yaml", 70),
    "a flipped byte in COMPLETE": flipped("COMPLETE"),
    "a deleted image": deleted("images/train/*.jpg"),
    "a deleted label": deleted("labels/train/*.txt"),
    "a deleted soft-target file": deleted("soft/train/*.safetensors"),
    "a deleted build.yaml": deleted("build.yaml"),
    "a deleted COMPLETE": deleted("COMPLETE"),
    "a deleted manifest": deleted("manifest.jsonl"),
    "a cut last manifest line": cut_last_line,
    "a lost manifest line": line_lost,
    "another index in the manifest": changed_number("index"),
    "another class index in the manifest": changed_number("class_index"),
    "another number of boxes in the manifest": changed_number("boxes"),
    "another proposal in the manifest": changed_number("proposal"),
    "another id in the manifest": changed_text('"id":"000_ball', '"id":"000_bell'),
    "another group in the manifest": changed_text('"group":"ball"', '"group":"bell"'),
    "another class name in the manifest": changed_text('"class_name":"ball"', '"class_name":"bell"'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_verify_names_it(damage: Damage, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(unbroken, tmp_path / "set")
    path = damage(folder)
    assert main(["verify", str(folder)]) == 6
    assert str(path) in capsys.readouterr().err


# One build each; the others are repaired by the slow test.
REPAIRED = [
    "a flipped byte in an image", "a flipped byte in the manifest", "a flipped byte in build.yaml",
    "a flipped byte in COMPLETE", "a deleted label", "another index in the manifest", "another id in the manifest",
]  # fmt: skip


def repair(damage: Damage, workshop: Workshop, unbroken: Path, folder: Path) -> None:
    shutil.copytree(unbroken, folder)
    damage(folder)
    with pytest.raises((VerifyError, DiskError), match=r"damaged|not a set"):
        workshop.build(folder)
    workshop.build(folder, resume=True)
    assert tree(folder) == tree(unbroken)
    assert verify(folder) == []


@pytest.mark.parametrize("name", REPAIRED)
def test_resume_repairs_it(name: str, workshop: Workshop, unbroken: Path, tmp_path: Path) -> None:
    repair(DAMAGES[name], workshop, unbroken, tmp_path / "set")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DAMAGES if name not in REPAIRED])
def test_resume_repairs_the_rest(name: str, workshop: Workshop, unbroken: Path, tmp_path: Path) -> None:
    repair(DAMAGES[name], workshop, unbroken, tmp_path / "set")


def test_stray_files_are_named_and_moved_aside_never_deleted(
    workshop: Workshop, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(unbroken, tmp_path / "set")
    strays = ["images/train/holiday.jpg", "labels/other.cache", "notes.txt", "soft/mine/x.bin", "images/train/x.npy"]
    for name in strays:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    assert main(["verify", str(folder)]) == 6
    told = capsys.readouterr().err
    assert all(str(folder / name).split("/x.bin")[0] in told for name in strays)
    workshop.build(folder, resume=True)
    assert tree(folder) == tree(unbroken)
    assert all((tmp_path / "set.strays" / name).read_bytes() == name.encode() for name in strays)


def test_a_folder_of_a_set_that_is_a_link_elsewhere(unbroken: Path, tmp_path: Path) -> None:
    """Training tools write caches beside labels/: through a link they would write outside."""
    folder = shutil.copytree(unbroken, tmp_path / "set")
    (folder / "labels").rename(tmp_path / "elsewhere")
    (folder / "labels").symlink_to(tmp_path / "elsewhere")
    assert [p for p in verify(folder) if p.startswith(f"{folder / 'labels'}:")]


def test_both_build_yaml_and_complete_are_damaged(workshop: Workshop, unbroken: Path, tmp_path: Path) -> None:
    """Nothing proves any more that the folder is ours: it is left alone."""
    folder = shutil.copytree(unbroken, tmp_path / "set")
    (folder / "build.yaml").write_bytes(b"")
    (folder / "COMPLETE").write_bytes(b"")
    before = tree(folder)
    with pytest.raises(DiskError, match="not a set of this program"):
        workshop.build(folder, resume=True)
    assert tree(folder) == before
