"""Fixtures of the fault tests: one workshop and one unbroken build for all of them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import child
from faults.support import Run, Workshop, start, write_map, write_selector, write_sources, write_teacher

Build = Callable[..., Run]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Sources, map and models; no test changes them."""
    top = tmp_path_factory.mktemp("workshop")
    write_sources(top / "sources")
    write_map(top / "map.yaml")
    write_selector(top)
    write_teacher(top / "teacher.pt")
    return Workshop(top)


@pytest.fixture(scope="session")
def unbroken(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set that a build makes when nothing goes wrong. Read only."""
    top = tmp_path_factory.mktemp("unbroken")
    fault = child.Fault("record", str(top))
    run = start(workshop.argv(top / "set"), top / "logs", fault)
    assert run.wait() == 0, run.err
    return top / "set"


@pytest.fixture(scope="session")
def moments(unbroken: Path) -> list[str]:
    """Every open-for-writing and rename of that build, in order: the points at which one can be hit."""
    return (unbroken.parent / "logs" / "moments").read_text().splitlines()


@pytest.fixture
def begin(workshop: Workshop, tmp_path: Path) -> Build:
    """Start a build at `tmp_path / "set"`; options by name, `fault=` and `flags=` (such as --resume) apart."""
    count = 0

    def run(fault: child.Fault | None = None, flags: tuple[str, ...] = (), **options: Any) -> Run:
        nonlocal count
        count += 1
        out = Path(options.pop("out", tmp_path / "set"))
        return start([*workshop.argv(out, **options), *flags], tmp_path / f"logs{count}", fault)

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB of its own; the test is left out, loudly, where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "focusdd-test", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"NO SMALL DISK: mounting a tmpfs needs root here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
