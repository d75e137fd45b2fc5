"""Builds that are killed or interrupted go on, and end with the bytes of an unbroken one."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.child import Fault
from faults.support import Run, Workshop, temporary_files, tree, until
from focusdd_det.detset import read_manifest, verify

Build = Callable[..., Run]
TOOL = Path(__file__).resolve().parents[2] / "tools" / "build_det_set.py"
# Moments of one composite, by what is about to happen; before them lies what the build had done when it was killed.
WITHIN = ("image half written", "image written", "label", "label written", "soft", "soft written", "manifest line")


def kill_and_go_on(begin: Build, tmp_path: Path, unbroken: Path, fault: Fault) -> None:
    killed = begin(fault)
    assert killed.wait() == -signal.SIGKILL, killed.err
    again = begin()
    assert again.wait() == 0, again.err
    assert tree(tmp_path / "set") == tree(unbroken)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("set")) == ["set"]


def test_the_unbroken_build_is_whole(unbroken: Path, moments: list[str]) -> None:
    assert verify(unbroken) == []
    assert len(list(read_manifest(unbroken))) == 9
    assert len(moments) == 2 + 9 * len(WITHIN) + 2 * 8 + 1  # build.yaml, composites, files about them, the last rename


@pytest.mark.parametrize(("composite", "step"), [(0, 1), (2, 6), (4, 0), (4, 3), (7, 5), (8, 6)])
def test_sigkill_inside_a_composite(
    begin: Build, tmp_path: Path, unbroken: Path, moments: list[str], composite: int, step: int
) -> None:
    at = 2 + composite * len(WITHIN) + step
    assert ("manifest.jsonl" in moments[at]) == (WITHIN[step] == "manifest line")
    kill_and_go_on(begin, tmp_path, unbroken, Fault("kill", str(tmp_path), at))


@pytest.mark.parametrize("moment", [0, 1, 65, 69, -2, -1])
def test_sigkill_before_the_first_and_after_the_last_composite(
    begin: Build, tmp_path: Path, unbroken: Path, moments: list[str], moment: int
) -> None:
    """While build.yaml, the sorted manifest, README.md and COMPLETE are written, and before the folder is renamed."""
    at = moment % len(moments)
    kill_and_go_on(begin, tmp_path, unbroken, Fault("kill", str(tmp_path), at))


@pytest.mark.parametrize("source", [3, 30])
def test_sigkill_while_sources_are_looked_at(
    begin: Build, workshop: Workshop, tmp_path: Path, unbroken: Path, source: int
) -> None:
    kill_and_go_on(
        begin, tmp_path, unbroken, Fault("kill", str(workshop.sources), source, reads=True, events=("open",))
    )


def test_sigkill_from_outside_after_the_fifth_image(begin: Build, tmp_path: Path, unbroken: Path) -> None:
    run = begin()
    images = tmp_path / "set.incomplete" / "images" / "train"
    until(lambda: images.is_dir() and sum(not p.name.startswith(".") for p in images.iterdir()) >= 5, "image 5")
    run.process.kill()
    assert run.wait() == -signal.SIGKILL
    assert begin(flags=("--resume",)).wait() == 0
    assert tree(tmp_path / "set") == tree(unbroken)


def test_sigkill_again_and_again(begin: Build, tmp_path: Path, unbroken: Path) -> None:
    """Every run gets one composite further than the one before."""
    for done in range(4):
        assert begin(Fault("kill", str(tmp_path), 2 + len(WITHIN) + 3)).wait() == -signal.SIGKILL
        assert len(list(read_manifest(tmp_path / "set.incomplete"))) == done + 1
    assert begin().wait() == 0
    assert tree(tmp_path / "set") == tree(unbroken)


def test_a_cut_last_manifest_line(begin: Build, tmp_path: Path, unbroken: Path) -> None:
    """What a power cut leaves of a line that was being written."""
    assert begin(Fault("kill", str(tmp_path), 40)).wait() == -signal.SIGKILL
    manifest = tmp_path / "set.incomplete" / "manifest.jsonl"
    data = manifest.read_bytes()
    manifest.write_bytes(data[:-40])
    assert begin().wait() == 0
    assert tree(tmp_path / "set") == tree(unbroken)


@pytest.mark.parametrize("damage", ["image flipped", "label gone", "soft cut", "line of another set", "stray folder"])
def test_damage_to_a_build_that_was_stopped(begin: Build, tmp_path: Path, unbroken: Path, damage: str) -> None:
    assert begin(Fault("kill", str(tmp_path), 40)).wait() == -signal.SIGKILL
    work = tmp_path / "set.incomplete"
    first = next(iter(read_manifest(work))).id
    if damage == "image flipped":
        path = work / "images" / "train" / f"{first}.jpg"
        path.write_bytes(path.read_bytes()[:-3] + b"abc")
    elif damage == "label gone":
        (work / "labels" / "train" / f"{first}.txt").unlink()
    elif damage == "soft cut":
        (work / "soft" / "train" / f"{first}.safetensors").write_bytes(b"")
    elif damage == "line of another set":
        line = (work / "manifest.jsonl").read_text().splitlines()[0]
        with (work / "manifest.jsonl").open("a") as file:
            file.write(line.replace(first, "999_other_00000").replace('"group":"ball"', '"group":"other"') + "\n")
    else:
        (work / "images" / "train" / "mine").mkdir()
        (work / "images" / "train" / "mine" / "notes.txt").write_text("kept")
    assert begin().wait() == 0
    assert tree(tmp_path / "set") == tree(unbroken)
    if damage == "stray folder":
        assert (tmp_path / "set.strays" / "images" / "train" / "mine" / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize("at", [1, 25, 44])
def test_sigint(begin: Build, tmp_path: Path, unbroken: Path, at: int) -> None:
    run = begin(Fault("interrupt", str(tmp_path), at))
    assert run.wait() == 130, run.err
    assert temporary_files(tmp_path / "set.incomplete") == []
    assert "interrupted" in run.err
    assert shlex.split(run.err.split("To go on: ")[1].splitlines()[0]) == ["focusdd", "build", *run.argv]
    assert begin().wait() == 0
    assert tree(tmp_path / "set") == tree(unbroken)


def test_sigint_to_the_real_command(begin: Build, workshop: Workshop, tmp_path: Path, unbroken: Path) -> None:
    """tools/build_det_set.py as users start it: Ctrl-C; it prints itself, a folder with a space included."""
    folder = tmp_path / "with space"
    folder.mkdir()
    argv = [sys.executable, str(TOOL), *workshop.argv(folder / "set")]
    run = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in its background lets its children ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        images = folder / "set.incomplete" / "images" / "train"
        until(lambda: images.is_dir() and any(images.iterdir()), "the first image")
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, err
    assert temporary_files(folder) == []
    assert shlex.split(err.split("To go on: ")[1].splitlines()[0]) == ["python", *argv[1:]]
    assert begin(out=folder / "set").wait() == 0
    assert tree(folder / "set") == tree(unbroken)


@pytest.mark.slow
def test_sigkill_at_every_moment(begin: Build, tmp_path: Path, unbroken: Path, moments: list[str]) -> None:
    for at in range(len(moments)):
        out = tmp_path / f"{at}" / "set"
        out.parent.mkdir()
        assert begin(Fault("kill", str(out.parent), at), out=out).wait() == -signal.SIGKILL, moments[at]
        assert begin(out=out).wait() == 0, moments[at]
        assert tree(out) == tree(unbroken), moments[at]
