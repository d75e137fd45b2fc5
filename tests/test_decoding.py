"""Decoding ahead: threads and processes give the same, a process that dies is told, nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import numpy as np
import pytest

from focusdd_det.build import load_config
from focusdd_det.errors import FocusDDError
from focusdd_det.scoring import decoding
from focusdd_det.scoring.decoding import Task, choose, in_processes, in_threads
from focusdd_det.scoring.glance import Glance, Known, Whole, glance
from focusdd_det.sources import Located, Root, stream

VIEW = 32
DEPTH = 10


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class folder with 40 pictures, one empty file and one that is no picture."""
    top = tmp_path_factory.mktemp("pictures")
    (top / "ball").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        size = (int(rng.integers(40, 90)), int(rng.integers(40, 90)), 3)
        cv2.imwrite(str(top / "ball" / f"{i:02d}.jpg"), rng.integers(0, 256, size).astype(np.uint8))
    (top / "ball" / "empty.jpg").write_bytes(b"")
    (top / "ball" / "page.jpg").write_bytes(b"<html>404</html>")
    (top / "ball" / "folder.jpg").mkdir()
    return top


def sources(top: Path) -> Iterator[Located]:
    return stream(Root("r", top, {"ball": "ball"}))


def task(known: Known | None = None) -> Task:
    return Task(VIEW, load_config(out="unused"), known or Known())


def seen(outcomes: Iterator[tuple[Located, Glance | str]]) -> list[tuple[str, object]]:
    """Everything of every outcome, in order; the pixels are copied, because they are only lent."""
    found: list[tuple[str, object]] = []
    for located, outcome in outcomes:
        if isinstance(outcome, str):
            found.append((located.source.path, outcome))
        else:
            pixels = [view.tobytes() for view in outcome.views]
            found.append(
                (
                    located.source.path,
                    (outcome.sha, outcome.width, outcome.height, outcome.phash, outcome.entropy, pixels),
                )
            )
    return found


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_and_processes_give_the_same_in_the_same_order(pictures: Path, workers: int) -> None:
    what = task()
    expected = [(s.source.path, glance(s, VIEW, Whole(), what.config)) for s in sources(pictures)]
    by_threads = seen(in_threads(sources(pictures), lambda s: glance(s, VIEW, Whole(), what.config), workers, DEPTH))
    assert len(by_threads) == 43
    assert by_threads == seen(in_processes(sources(pictures), what, workers, DEPTH))
    assert by_threads == seen(iter([(s, e) for s, (_, e) in zip(sources(pictures), expected, strict=True)]))


def test_nothing_runs_further_ahead_than_it_may(pictures: Path) -> None:
    asked = 0

    def counted() -> Iterator[Located]:
        nonlocal asked
        for located in sources(pictures):
            asked += 1
            yield located

    outcomes = in_processes(counted(), task(), 2, DEPTH)
    for taken in range(1, 30):
        next(outcomes)
        assert asked <= taken + DEPTH
    outcomes.close()


def test_no_pixels_cross_the_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ball").mkdir()
    big = np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8).repeat(100, 0).repeat(100, 1)
    for i in range(3):
        cv2.imwrite(str(tmp_path / "ball" / f"{i}.jpg"), big)
    sizes: dict[str, list[int]] = {"send": [], "recv": []}

    def note(name: str) -> None:
        real = getattr(Connection, name)

        def call(self: Connection, *what: object) -> object:
            answer = real(self, *what)
            sizes[name].append(len(pickle.dumps(what[0] if what else answer)))
            return answer

        monkeypatch.setattr(Connection, name, call)

    note("send")
    note("recv")
    for _, outcome in in_processes(sources(tmp_path), task(), 1, DEPTH):
        assert isinstance(outcome, Glance)
        assert outcome.views[0].std() > 10
    _the_task, *asked = sizes["send"]
    assert len(asked) == len(sizes["recv"]) == 3
    assert max(asked + sizes["recv"]) < 1000 < 3 * VIEW**2


def test_known_contents_are_not_decoded(pictures: Path) -> None:
    what = task()
    good = [g for s in sources(pictures) if isinstance(g := glance(s, VIEW, Whole(), what.config), Glance)]
    half = {g.sha for g in good[::2]}
    known = Known(b"".join(sha[:8] for sha in half))
    for outcomes in (
        in_processes(sources(pictures), task(known), 2, DEPTH),
        in_threads(sources(pictures), lambda s: glance(s, VIEW, Whole(), what.config, known), 2, DEPTH),
    ):
        found = [outcome for _, outcome in outcomes if isinstance(outcome, Glance)]
        assert {g.sha for g in found if not len(g.views)} == half
        assert {g.sha for g in found if len(g.views)} == {g.sha for g in good} - half


def test_a_process_that_only_decodes_has_no_torch() -> None:
    """300 MB and seconds each."""
    from focusdd_det.scoring import decoding

    end = "from focusdd_det.scoring.decoding import serve"
    assert end in decoding._BEGIN
    code = decoding._BEGIN.partition(end)[0] + end + "; print([m for m in sys.modules if m in ('torch', 'timm')])"
    package = str(Path(decoding.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, package], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_killed_process_ends_the_build_by_the_name_of_its_picture(pictures: Path) -> None:
    before = set(children(os.getpid()))
    endless = chain.from_iterable(sources(pictures) for _ in range(1000))
    outcomes = in_processes(endless, task(), 2, DEPTH)
    next(outcomes)
    os.kill((set(children(os.getpid())) - before).pop(), signal.SIGKILL)
    with pytest.raises(FocusDDError, match=r"died \(exit status -9\) while it looked at r:ball/.*again: it goes on"):
        for _ in outcomes:
            pass
    assert set(children(os.getpid())) <= before


def test_an_unforeseen_error_in_a_process_is_told_like_one_in_a_thread(pictures: Path) -> None:
    """A task without a config is what nobody sends."""
    with pytest.raises(FocusDDError, match=r"r:ball/.* could not be looked at \(.*Error"):
        seen(in_processes(sources(pictures), Task(VIEW, None, Known()), 1, DEPTH))  # type: ignore[arg-type]


def test_a_process_that_cannot_start_is_told(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("focusdd_det.scoring.decoding._BEGIN", "raise SystemExit('no such thing')")
    with pytest.raises(FocusDDError, match=r"could not start \(exit status 1\).*loader=threads"):
        seen(in_processes(sources(pictures), task(), 2, DEPTH))


PARENT = """
import sys, os, signal
import focusdd_det
from itertools import chain
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_decoding as t
from focusdd_det.scoring.decoding import in_processes
signal.signal(signal.SIGINT, signal.default_int_handler)
endless = chain.from_iterable(t.sources(Path({top!r})) for _ in range(10**6))
for i, _ in enumerate(in_processes(endless, t.task(), 2, t.DEPTH)):
    if i == 20:
        print(*t.children(os.getpid()), flush=True)
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_a_build_that_is_ended(pictures: Path, kind: signal.Signals) -> None:
    shared = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()  # noqa: PTH208
    code = PARENT.format(tests=str(Path(__file__).parent), top=str(pictures))
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert run.stdout is not None
    workers = [int(p) for p in run.stdout.readline().split()]
    assert len(workers) == 2
    run.send_signal(kind)
    run.wait(60)
    end = time.monotonic() + 30
    while any(map(alive, workers)):
        assert time.monotonic() < end, "a decoding process outlives its build"
        time.sleep(0.02)
    while shared and set(os.listdir("/dev/shm")) - shared:  # noqa: PTH208
        assert time.monotonic() < end, "shared memory outlives its build"  # other tests' is there for a moment only
        time.sleep(0.02)


def test_all_processes_are_told_to_end_before_one_is_waited_for(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    hang_up, wait = decoding._Worker.hang_up, subprocess.Popen.wait

    def told(self: decoding._Worker) -> None:
        events.append("told")
        hang_up(self)

    def waited(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        events.append("waited for")
        return wait(self, timeout)

    monkeypatch.setattr(decoding._Worker, "hang_up", told)
    monkeypatch.setattr(subprocess.Popen, "wait", waited)
    seen(in_processes(sources(pictures), task(), 3, DEPTH))
    assert events[:3] == ["told"] * 3
    assert events.count("waited for") >= 3


def test_how_the_loader_is_chosen() -> None:
    assert choose("auto", 2, False, True) == "threads"
    assert choose("auto", 2, True, True) == "processes"
    assert choose("auto", 16, False, True) == "processes"
    assert choose("threads", 16, True, True) == "threads"
    assert choose("processes", 1, False, True) == "processes"
    assert choose("processes", 16, True, False) == "threads"


def test_known_is_a_set_of_beginnings() -> None:
    assert b"a" * 32 not in Known()
    known = Known(b"a" * 8 + b"c" * 8)
    assert [c * 32 in known for c in (b"a", b"b", b"c", b"d")] == [True, False, True, False]
    assert b"a" * 8 + b"z" * 24 in known


def test_the_config_travels(pictures: Path) -> None:
    """The limit on pixels holds in the processes too."""
    small = Task(VIEW, load_config(out="unused", max_pixels=100), Known())
    reasons = {outcome for _, outcome in in_processes(sources(pictures), small, 1, DEPTH) if isinstance(outcome, str)}
    assert sum("max_pixels=100" in reason for reason in reasons) > 5
    assert json.dumps(sorted(reasons))
