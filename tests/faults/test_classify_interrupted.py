"""SIGKILL and SIGINT of the real commands for classifiers: what goes on afterwards gives the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cls_support import NET, make_pictures, make_teacher
from conftest import REPOSITORY

LIMIT = 240  # seconds that any of these commands may take on a loaded machine


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_pictures(tmp_path_factory.mktemp("killed"))
    make_teacher(folder)
    return folder


def start(tool: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / tool), *words]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ,
        # A shell that runs the tests in its background lets its children ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    told, _ = process.communicate(timeout=LIMIT)
    return process.returncode, told


def stop_when(process: subprocess.Popen[str], due: Callable[[], bool], how: signal.Signals) -> tuple[int, str]:
    """Send a signal as soon as something is true of what the process writes."""
    began = time.monotonic()
    while not due():
        assert process.poll() is None, f"it ended before: {process.communicate()[0][-2000:]}"
        assert time.monotonic() - began < LIMIT
        time.sleep(0.005)
    process.send_signal(how)
    return finish(process)


def train_words(place: Path, runs: Path, name: str) -> list[str]:
    return [
        f"data={place}", f"eval_data={place}", "labels=hard", f"model={NET}", "epochs=16", "every=2", "batch=4",
        "imgsz=32", "device=cpu", "plots=False", f"project={runs}", f"name={name}",
    ]  # fmt: skip


def saved_epoch(run: Path) -> int:
    try:
        return int(json.loads((run / "weights" / "resume.json").read_text())["epoch"])
    except (OSError, ValueError):
        return -1


def outcome(run: Path) -> tuple[bytes, object, list[str]]:
    rows = [",".join(row.split(",")[:1] + row.split(",")[2:]) for row in (run / "results.csv").read_text().splitlines()]
    last = json.loads((run / "accuracy.json").read_text())["last"]
    return (run / "weights" / "last.safetensors").read_bytes(), last, rows  # the second column is the clock


@pytest.fixture(scope="module")
def unbroken(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("unbroken")
    code, told = finish(start("train_cls.py", *train_words(place, runs, "run")))
    assert code == 0, told
    return runs / "run"


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_training_that_was_stopped_goes_on_to_the_same_run(
    how: signal.Signals, place: Path, unbroken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start("train_cls.py", *train_words(place, tmp_path, "run"))
    code, told = stop_when(process, lambda: saved_epoch(run) >= 3, how)
    assert code == (-9 if how is signal.SIGKILL else 130)
    if how is signal.SIGINT:
        assert "resume=" in told
    assert not (run / "accuracy.json").exists()
    code, told = finish(start("train_cls.py", f"resume={run}"))
    assert code == 0, told
    assert "resuming exactly after epoch" in told
    assert outcome(run) == outcome(unbroken)
    assert list(run.rglob(".*.tmp")) == []


@pytest.mark.slow
def test_a_relabelling_that_was_killed_goes_on_to_the_same_bytes(place: Path, tmp_path: Path) -> None:
    def words(out: Path) -> list[str]:
        return [
            f"data={place}", f"teacher={place / 'teacher.json'}", f"eval_data={place}", "epochs=40", "size=32",
            "batch=8", "workers=1", "device=cpu", f"out={out}",
        ]  # fmt: skip

    code, told = finish(start("relabel_cls.py", *words(tmp_path / "whole")))
    assert code == 0, told
    out = tmp_path / "out"
    work = tmp_path / "out.incomplete"
    done, following = "epoch_00002.safetensors", "epoch_00003.safetensors"  # an epoch counts once the next is begun
    code, _ = stop_when(start("relabel_cls.py", *words(out)), lambda: (work / following).is_file(), signal.SIGKILL)
    assert code == -9
    assert not out.exists()
    before = (work / done).stat().st_mtime_ns
    code, told = finish(start("relabel_cls.py", *words(out)))
    assert code == 0, told
    assert (out / done).stat().st_mtime_ns == before  # what was done is kept
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    differing = [n for n in names if (out / n).read_bytes() != (tmp_path / "whole" / n).read_bytes()]
    assert set(differing) <= {"relabel.log.json"}
    shutil.rmtree(out)
