"""Runs what is not there yet: stages as processes of the same Python; a failed one stops only the arms that need it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import yaml

from focusdd_det import disk
from focusdd_det.devices import processors
from focusdd_det.errors import DiskError, FocusDDError
from focusdd_det.experiment import results
from focusdd_det.experiment.grid import Arm
from focusdd_det.experiment.results import Failure, Result
from focusdd_det.experiment.spec import Experiment
from focusdd_det.experiment.stages import PLACES, Finished, Stage, Work, write_stage
from focusdd_det.progress import progress_bar

log = logging.getLogger("focusdd")

POLL = 0.2  # seconds between two looks at the running processes
GRACE = 60.0  # seconds that they get to stop
TAIL = 30  # lines of a failed stage's log that are kept
MARK = "experiment.yaml"  # stands in every work folder of ours


@dataclass
class _Cell:
    arm: Arm
    seed: int
    done: bool = False
    failed: str = ""


@dataclass
class _Running:
    stage: Stage
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float = field(default_factory=time.monotonic)


def run(experiment: Experiment, out: Path, parallel: int = 1) -> int:
    """Run every stage that is not there; returns how many arms and seeds could not be finished.

    Raises:
        DiskError: `out` is not ours, or another experiment is running there.
        KeyboardInterrupt: stopped; the running stages were stopped first, and the same command goes on.
    """
    with opened(experiment, out):
        work = Work(experiment, out)
        cells = [_Cell(arm, seed) for seed in experiment.seeds for arm in experiment.arms]
        running: dict[str, _Running] = {}
        failures: dict[str, tuple[int, str]] = {}
        with progress_bar(len(cells), "arms and seeds", unit="run") as bar, _stopped_at_the_end(running):
            while True:
                for cell in cells:
                    _advance(work, cell, running, failures, parallel)
                    if (cell.done or cell.failed) and cell in cells:
                        bar.update(1)
                cells = [cell for cell in cells if not cell.done and not cell.failed]
                if not cells and not running:
                    break
                if running:
                    _reap(running, failures)
    return sum(1 for _ in results.read(out, experiment)[1])


@contextlib.contextmanager
def opened(experiment: Experiment, out: Path) -> Iterator[None]:
    """The work folder, made and locked, with what is run there written in it.

    Raises:
        DiskError: it holds something else, another experiment is running there, or it cannot be made.
    """
    held = [path.name for path in out.iterdir() if path.name != ".lock"] if out.is_dir() else []
    if (out.exists() and not out.is_dir()) or (held and MARK not in held):
        raise DiskError(f"{out} exists and is no work folder of an experiment; choose another `out`")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot make {out}: {error.strerror}; choose another `out`") from error
    with disk.locked(out):
        try:
            disk.write_atomic(out / MARK, _description(experiment).encode())
            for name in PLACES:
                (out / name).mkdir(exist_ok=True)
        except OSError as error:
            raise DiskError(f"cannot write in {out}: {error.strerror}; choose another `out`") from error
        yield


def _description(experiment: Experiment) -> str:
    plain = {
        key: value for key, value in experiment.__dict__.items() if key not in ("arms", "paper") and value is not None
    }
    plain["seeds"] = list(experiment.seeds)
    plain["arms"] = {arm.name: dict(arm.overrides) for arm in experiment.arms}
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    return f"# what was run here last; written by focusdd experiment\n{text}"


# ---- one arm and seed ----


def _advance(
    work: Work, cell: _Cell, running: dict[str, _Running], failures: dict[str, tuple[int, str]], parallel: int
) -> None:
    """Start the next stage of a cell, if it may; note its end."""
    try:
        found = work.next(cell.arm, cell.seed)
        if isinstance(found, Finished):
            _record(work, cell, found)
            cell.done = True
            return
    except FocusDDError as error:
        _fail(work, cell, "plan", error.exit_code, str(error))
        return
    if found.name in failures:
        _fail(work, cell, found.name, *failures[found.name])
    elif found.name not in running and len(running) < parallel and not _taken(found, running):
        running[found.name] = _start(work, cell, found, parallel)


def _taken(stage: Stage, running: dict[str, _Running]) -> bool:
    return bool(stage.alone) and any(other.stage.alone == stage.alone for other in running.values())


def _record(work: Work, cell: _Cell, found: Finished) -> None:
    values, per_class, covered = results.measured(work.experiment.task, found.measured)
    result = Result(
        cell.arm.name,
        work.experiment.arm_sha256(cell.arm),
        cell.seed,
        values,
        per_class,
        covered,
        found.steps.composites,
        found.steps.epochs,
        found.steps.iterations,
        dict(found.stages),
        {**work.versions, "code": work.code_of(found.stages.values())},
        work.inputs(cell.arm, cell.seed),
    )
    known, failed = results.read(work.out, work.experiment)
    same = [f for f in failed if (f.arm_sha256, f.seed) == (result.arm_sha256, result.seed)]
    if same or not any(other == result for other in known):
        results.append(work.out, results.result_record(result))
    metric = work.experiment.metric
    log.info("%s, seed %d: %s %.2f", cell.arm.name, cell.seed, metric, values.get(metric, float("nan")))


def _fail(work: Work, cell: _Cell, stage: str, code: int, tail: str) -> None:
    cell.failed = stage
    failure = Failure(cell.arm.name, work.experiment.arm_sha256(cell.arm), cell.seed, stage, code, tail)
    results.append(work.out, results.failure_record(failure))
    last = next((line for line in reversed(tail.splitlines()) if line.strip()), "")
    log.error("%s, seed %d: %s failed (exit code %d): %s", cell.arm.name, cell.seed, stage, code, last)


# ---- processes ----


def _start(work: Work, cell: _Cell, stage: Stage, parallel: int) -> _Running:
    file = write_stage(work, stage)
    how = "goes on" if work.begun(stage) else "starts"
    log.info("%s, seed %d: %s %s", cell.arm.name, cell.seed, stage.name, how)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if parallel > 1:  # each with all cores would only wait for the others
        environment.setdefault("OMP_NUM_THREADS", str(max(1, processors() // parallel)))
    journal = work.place("stages", f"{stage.name}.log").open("ab")
    process = subprocess.Popen(
        command_of(file),
        stdin=subprocess.PIPE,
        stdout=journal,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    return _Running(stage, process, journal)


def command_of(file: Path) -> list[str]:
    """The process that runs the stage which a file describes."""
    return [sys.executable, "-m", "focusdd_det.experiment.child", str(file)]


def _reap(running: dict[str, _Running], failures: dict[str, tuple[int, str]]) -> None:
    """Wait until a process ends."""
    while True:
        ended = [name for name, one in running.items() if one.process.poll() is not None]
        for name in ended:
            one = running.pop(name)
            _close(one)
            code = one.process.returncode
            if code:
                if code == 130 or code in (-signal.SIGINT, -signal.SIGTERM):
                    raise KeyboardInterrupt  # somebody stopped the stage: with Ctrl-C, the whole experiment
                failures[name] = (code, _tail(Path(one.log.name)))
            log.info("%s: %s after %.0f s", name, "failed" if code else "done", time.monotonic() - one.began)
        if ended:
            return
        time.sleep(POLL)


def _tail(journal: Path) -> str:
    with contextlib.suppress(OSError):
        text = journal.read_bytes()[-20_000:].decode("utf-8", "replace")
        return "\n".join(line.rsplit("\r", 1)[-1] for line in text.splitlines()[-TAIL:])
    return ""


def _close(one: _Running) -> None:
    with contextlib.suppress(OSError):
        if one.process.stdin is not None:
            one.process.stdin.close()
    one.log.close()


@contextlib.contextmanager
def _stopped_at_the_end(running: dict[str, _Running]) -> Iterator[None]:
    """No stage outlives the experiment."""
    try:
        yield
    finally:
        for one in running.values():
            one.process.terminate()
        deadline = time.monotonic() + GRACE
        for one in running.values():
            try:
                one.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()
            _close(one)
