"""Another machine's habits: locale, time zone, hash seed, order of directories, workers; the bytes stay the same."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import focusdd_det.sources
from faults.support import Workshop, tree

TOOL = Path(__file__).resolve().parents[2] / "tools" / "build_det_set.py"


class Shuffled:
    """os.scandir, with its entries in another order every time."""

    def __init__(self, path: Any) -> None:
        with os.scandir(path) as entries:
            self.entries = list(entries)
        random.Random(len(self.entries)).shuffle(self.entries)

    def __enter__(self) -> Any:
        return iter(self.entries)

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Any:
        return iter(self.entries)


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 1},
        {"workers": 7},
        {"workers": 3, "teacher_batch": 5},
        {"workers": 3, "loader": "processes"},
    ],
)
def test_another_order_of_directories_and_number_of_workers(
    workshop: Workshop, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """So every picture also meets others in its batch, at another place in it."""

    class Os:
        scandir = Shuffled

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

    monkeypatch.setattr(focusdd_det.sources, "os", Os())
    folder = workshop.build(tmp_path / "set", **options)
    ignored = {"build.yaml", "COMPLETE"} if "teacher_batch" in options else set()
    found, expected = tree(folder), tree(unbroken)
    assert {k: v for k, v in found.items() if k not in ignored} == {
        k: v for k, v in expected.items() if k not in ignored
    }


def test_another_locale_time_zone_and_hash_seed(workshop: Workshop, unbroken: Path, tmp_path: Path) -> None:
    """The real command, as a process of an ASCII locale on the other side of the world, with no network names."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONHASHSEED": "4242"}
    environment |= {"TZ": "Pacific/Kiritimati", "LANG": "C", "PYTHONIOENCODING": "ascii"}
    argv = [sys.executable, str(TOOL), *workshop.argv(tmp_path / "set")]
    done = subprocess.run(argv, env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"\\xe9toile bleue" in done.stdout
    assert tree(tmp_path / "set") == tree(unbroken)


def test_a_set_that_was_moved_is_whole(workshop: Workshop, unbroken: Path, tmp_path: Path) -> None:
    """No path of this machine is in any file that is hashed."""
    for path in unbroken.rglob("*"):
        if path.is_file() and path.name != "build.log.json":
            assert str(workshop.top).encode() not in path.read_bytes()
            assert str(unbroken).encode() not in path.read_bytes()
