"""What lies below a folder, links and circles of links included."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from focusdd_det.errors import DataError
from focusdd_det.tree import entries_below


def names(folder: Path, **more: object) -> list[str]:
    return sorted(os.path.relpath(entry.path, folder) for entry in entries_below(folder, **more))  # type: ignore[arg-type]


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_files_at_every_depth_but_hidden_ones(tmp_path: Path) -> None:
    touch(tmp_path / "a", tmp_path / "b/c/d", tmp_path / ".hidden", tmp_path / ".folder/e")
    (tmp_path / "empty").mkdir()
    assert names(tmp_path) == ["a", "b/c/d"]


def test_links_are_followed_but_not_back_up(tmp_path: Path) -> None:
    top = tmp_path / "top"
    touch(top / "a/x", tmp_path / "other/y")
    (top / "a/up").symlink_to(top)
    (top / "a/self").symlink_to(top / "a")
    (top / "link").symlink_to(tmp_path / "other")
    (top / "twice").symlink_to(tmp_path / "other")  # beside it, not above it
    (tmp_path / "other/back").symlink_to(top)
    assert names(top) == ["a/x", "link/y", "twice/y"]


def test_links_that_lead_nowhere_are_entries(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    assert names(tmp_path) == ["gone", "ring"]


def test_folders_that_are_not_entered_are_entries(tmp_path: Path) -> None:
    touch(tmp_path / "x.jpg/y", tmp_path / "z")
    assert names(tmp_path, enter=lambda name: not name.endswith(".jpg")) == ["x.jpg", "z"]


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "closed/x")
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"cannot list .*closed: Permission denied"):
        names(tmp_path)
    assert names(tmp_path, pass_over=True) == []


class Linked:
    """An entry whose folder cannot be reached."""

    name, path = "linked", "top/linked"

    def is_dir(self) -> bool:
        raise PermissionError(13, "Permission denied")


class Listing(list[Linked]):
    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_a_link_that_cannot_be_followed_is_not_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount that went away must not make a set smaller without a word."""
    monkeypatch.setattr(os, "scandir", lambda path: Listing([Linked()]))
    with pytest.raises(DataError, match="cannot list top/linked: Permission denied"):
        list(entries_below(tmp_path))
    assert [entry.name for entry in entries_below(tmp_path, pass_over=True)] == ["linked"]
