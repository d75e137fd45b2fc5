"""What an installed package holds: an editable install would hide what is missing."""

from __future__ import annotations

import configparser
from pathlib import Path

from conftest import REPOSITORY

SETUP = configparser.ConfigParser()
SETUP.read(REPOSITORY / "setup.cfg")


def lines(section: str, key: str) -> list[str]:
    return SETUP[section][key].split()


def folder(package: str) -> Path:
    moved = dict(line.split(" = ") for line in SETUP["options"]["package_dir"].strip().splitlines())
    return REPOSITORY / moved.get(package, package.replace(".", "/"))


def test_every_package_is_named() -> None:
    there = {p.parent.relative_to(REPOSITORY).as_posix() for p in (REPOSITORY / "focusdd_det").rglob("__init__.py")}
    assert set(lines("options", "packages")) == {name.replace("/", ".") for name in there} | {"focusdd_det.cfg"}
    assert all(folder(package).is_dir() for package in lines("options", "packages"))


def test_every_other_file_of_a_package_is_named() -> None:
    """Templates, models, shipped configs."""
    for package in lines("options", "packages"):
        given = lines("options.package_data", package) if package in SETUP["options.package_data"] else []
        named = {file for pattern in given for file in folder(package).glob(pattern)}
        assert all(list(folder(package).glob(pattern)) for pattern in given), package
        there = {f for f in folder(package).iterdir() if f.is_file() and f.suffix not in (".py", ".pyc")}
        assert there <= named, package
