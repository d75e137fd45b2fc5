"""Full disks, read-only places, two builders, and outputs that overlap what is not ours."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.child import Fault
from faults.support import Run, Workshop, temporary_files, tree, until
from focusdd_det.build import build, load_config
from focusdd_det.detset import is_ours, verify
from focusdd_det.errors import ConfigError, DiskError

Build = Callable[..., Run]


def ends_cleanly_and_goes_on(
    begin: Build, folder: Path, unbroken: Path, run: Run, make_room: Callable[[], object]
) -> None:
    """Exit code 5, one message, no temporary files; once there is room the same command ends with the same bytes."""
    assert run.wait() == 5, run.err
    assert "Traceback" not in run.err
    assert "error: " in run.err
    assert temporary_files(folder) == []
    make_room()
    again = begin(out=folder / "set")
    assert again.wait() == 0, again.err
    assert tree(folder / "set") == tree(unbroken)


@pytest.mark.parametrize("at", [0, 4, 8, 40, 66, 77])
def test_a_disk_that_fills_up(begin: Build, small_disk: Path, unbroken: Path, at: int) -> None:
    """A real file system without a free byte, from the n-th write on; scores, composites and seal alike."""
    run = begin(Fault("fill", str(small_disk), at), out=small_disk / "set")
    ends_cleanly_and_goes_on(begin, small_disk, unbroken, run, (small_disk / "filler").unlink)


@pytest.mark.parametrize("at", [3, 8, 50])
def test_a_limit_on_file_sizes(begin: Build, tmp_path: Path, unbroken: Path, at: int) -> None:
    """RLIMIT_FSIZE: the kernel refuses to let files grow."""
    run = begin(Fault("limit", str(tmp_path), at))
    ends_cleanly_and_goes_on(begin, tmp_path, unbroken, run, lambda: None)


@pytest.mark.parametrize(("call", "at"), [("fsync", 0), ("fsync", 7), ("fsync", 40), ("replace", 0), ("replace", 35)])
def test_a_full_disk_on_fsync_or_rename(begin: Build, tmp_path: Path, unbroken: Path, call: str, at: int) -> None:
    """The last rename is that of the whole folder."""
    run = begin(Fault(call, at=at))
    ends_cleanly_and_goes_on(begin, tmp_path, unbroken, run, lambda: None)


def test_too_little_space_is_seen_before_the_work(begin: Build, small_disk: Path) -> None:
    run = begin(out=small_disk / "set", ipc=3, image_size=4096)
    assert run.wait() == 5
    assert "needed" in run.err
    assert not list(small_disk.rglob("*.jpg"))


def test_a_read_only_output(begin: Build, small_disk: Path, unbroken: Path) -> None:
    """A file system that is mounted read-only: at the start, and from the middle of a build on."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    run = begin(out=small_disk / "set")
    assert run.wait() == 5
    assert "Read-only file system" in run.err
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert begin(Fault("kill", str(small_disk), 30), out=small_disk / "set").wait() == -9
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert begin(out=small_disk / "set").wait() == 5
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert begin(out=small_disk / "set").wait() == 0
    assert tree(small_disk / "set") == tree(unbroken)


def test_two_builders_on_one_folder(begin: Build, tmp_path: Path, unbroken: Path) -> None:
    """The second one, with overwrite and another seed even, leaves the first alone."""
    first = begin(Fault("stop", str(tmp_path), 30))  # it holds the lock for as long as we like
    until(lambda: Path(f"/proc/{first.pid}/stat").read_text().split(") ")[-1][0] == "T", "the first builder's stop")
    assert (tmp_path / "set.incomplete" / ".lock").exists()
    second, third = begin(), begin(seed=5, overwrite=True)
    assert (second.wait(), third.wait()) == (5, 5)
    assert "another build" in second.err
    assert "another build" in third.err
    os.kill(first.pid, 18)
    assert first.wait() == 0
    assert tree(tmp_path / "set") == tree(unbroken)


def test_two_builders_on_one_file_of_scores(workshop: Workshop, begin: Build, tmp_path: Path) -> None:
    scores = tmp_path / "scores.sqlite"
    first = begin(out=tmp_path / "a", scores=str(scores))
    until(lambda: (tmp_path / "a.incomplete" / "images" / "train").is_dir() and scores.exists(), "the scores")
    until(lambda: (tmp_path / "scores.sqlite-journal").exists() or first.process.exitcode is not None, "a transaction")
    os.kill(first.pid, 19)
    if first.process.exitcode is None:
        second = begin(out=tmp_path / "b", scores=str(scores), method="random")
        assert second.wait() == 5, second.err
        assert "used by another build" in second.err
    os.kill(first.pid, 18)
    assert first.wait() == 0


def test_a_stale_lock(workshop: Workshop, begin: Build, tmp_path: Path, unbroken: Path) -> None:
    """The lock of a process that was killed is none: only a living one holds it."""
    assert begin(Fault("kill", str(tmp_path), 30)).wait() == -9
    lock = tmp_path / "set.incomplete" / ".lock"
    assert lock.exists()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DiskError, match="another build"):
            workshop.build(tmp_path / "set")
    assert tree(workshop.build(tmp_path / "set")) == tree(unbroken)


def test_an_output_equal_to_inside_or_around_the_source(workshop: Workshop, tmp_path: Path) -> None:
    sources = shutil.copytree(workshop.sources, tmp_path / "data" / "sources")
    (tmp_path / "link").symlink_to(sources)
    (tmp_path / "up").symlink_to(tmp_path / "data")
    before = tree(tmp_path)
    outs = [
        sources, sources / "ball", sources / "new" / "set", tmp_path / "data", tmp_path, tmp_path / "link",
        tmp_path / "link" / "set", tmp_path / "up", tmp_path / "up" / "sources", sources / ".." / "sources" / "x",
    ]  # fmt: skip
    for out in outs:
        for source in (sources, tmp_path / "link", tmp_path / "up" / "sources"):
            with pytest.raises(ConfigError, match="lie in each other"):
                workshop.build(out, sources=[str(source)], overwrite=True)
    work = sources.rename(tmp_path / "set.incomplete")  # where the build would work
    with pytest.raises(ConfigError, match="lie in each other"):
        workshop.build(tmp_path / "set", sources=[str(work)], overwrite=True)
    work.rename(sources)
    with pytest.raises(ConfigError, match="lie in each other"):
        workshop.build(tmp_path / "set", sources=[str(sources)], scores=str(sources / "scores.sqlite"))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("out", ["", " ", "/", "."])
def test_an_output_that_is_no_new_folder(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, DiskError), match=r"out=|not a set|lie in each other"):
        build(load_config(**{**workshop.options(tmp_path), "out": out, "overwrite": True}))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_overwrite_of_what_is_not_ours(workshop: Workshop, tmp_path: Path) -> None:
    """A folder with a build.yaml of something else, and a file: nothing is touched."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "build.yaml").write_text("steps: [compile]\n")
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    for name in ("theirs", "file"):
        with pytest.raises(DiskError, match="not a set of this program"):
            workshop.build(tmp_path / name, overwrite=True)
    assert tree(tmp_path) == before


def test_an_output_that_is_a_link(workshop: Workshop, tmp_path: Path, unbroken: Path) -> None:
    """The set is built beside the place that the link stands for, on that disk."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    workshop.build(tmp_path / "link")
    assert tree(tmp_path / "real") == tree(unbroken)
    assert (tmp_path / "link").is_symlink()


def test_sigkill_while_an_old_set_is_replaced(begin: Build, workshop: Workshop, tmp_path: Path, unbroken: Path) -> None:
    """At each of the two renames and while the old one is removed, one whole set is there; the same command ends it."""
    renames = 1 + 9 * 3 + 8  # build.yaml, the composites' files, what is written at the end
    for name, at in (("old", renames), ("new", renames + 1)):
        out = tmp_path / name / "set"
        out.parent.mkdir()
        shutil.copytree(unbroken, out)
        fault = Fault("kill", str(out), at, events=("os.rename",))
        assert begin(fault, out=out, seed=1, overwrite=True).wait() == -9
        assert sorted(p.name for p in out.parent.iterdir() if not verify(p)) == (
            ["set", "set.incomplete"] if name == "old" else ["set.incomplete", "set.replaced"]
        )
        assert begin(out=out, seed=1, overwrite=True).wait() == 0
        assert verify(out) == []
        assert tree(out) != tree(unbroken)
        assert [p.name for p in out.parent.iterdir()] == ["set"]
    left = shutil.copytree(unbroken, tmp_path / "left")
    shutil.rmtree(left / "images")
    assert is_ours(left)


def test_a_damaged_or_foreign_file_of_scores(workshop: Workshop, begin: Build, tmp_path: Path, unbroken: Path) -> None:
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE bookmarks (url TEXT)")
    before = foreign.read_bytes()
    with pytest.raises(DiskError, match="something else"):
        workshop.build(tmp_path / "a", scores=str(foreign))
    assert foreign.read_bytes() == before
    (tmp_path / "noise.sqlite").write_bytes(b"not a database" * 500)
    with pytest.raises(DiskError, match="remove it"):
        workshop.build(tmp_path / "b", scores=str(tmp_path / "noise.sqlite"))
    assert begin(Fault("kill", str(tmp_path / "set.inc"), 30)).wait() == -9
    scores = tmp_path / "set.incomplete" / "scores.sqlite"
    scores.write_bytes(scores.read_bytes()[:5000])
    with pytest.raises(DiskError, match="remove it"):
        workshop.build(tmp_path / "set")
    scores.unlink()
    assert tree(workshop.build(tmp_path / "set")) == tree(unbroken)
