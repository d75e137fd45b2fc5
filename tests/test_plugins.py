"""Methods in a file of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from focusdd_det.errors import ConfigError
from focusdd_det.methods import METHODS, FocusDD, RandomCrops, register
from focusdd_det.plugins import load_plugins

MINE = """
from focusdd_det.methods import RandomCrops, register

class LastFirst(RandomCrops):
    def order(self, candidates, config, group):
        return super().order(candidates, config, group)[::-1]

register("last_first", LastFirst())
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_a_file_adds_a_method_and_runs_once(mine: Path) -> None:
    first = load_plugins([str(mine)])
    method = METHODS["last_first"]
    assert load_plugins([str(mine)]) == first
    assert METHODS["last_first"] is method
    del METHODS["last_first"]


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`focusdd` exists already \(FocusDD\)"):
        register("focusdd", RandomCrops())
    register("focusdd", FocusDD())


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("gone.py", None, "cannot read"),
        ("mine.txt", "x = 1", "expected a Python file"),
        ("broken.py", "def (", "SyntaxError"),
        ("fails.py", "1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: str | None, says: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=says) as failed:
        load_plugins([str(path)])
    assert name in str(failed.value)


def test_two_files_of_one_name_are_refused(tmp_path: Path, mine: Path) -> None:
    other = tmp_path / "other" / "mine.py"
    other.parent.mkdir()
    other.write_text("x = 1")
    with pytest.raises(ConfigError, match=r"two files are called mine\.py"):
        load_plugins([str(mine), str(other)])
