"""Trainings that are hit by a fault: the real command in a process of its own, and what to compare afterwards."""

from __future__ import annotations

import csv
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_yaml

from faults import child
from faults.support import Run, context

EPOCHS = 3
PRELOADED = ("focusdd_det.build", "focusdd_det.cli", "focusdd_det.trainer", "albumentations", "scipy.special")
context.set_forkserver_preload(list(PRELOADED))


@dataclass(frozen=True)
class Moment:
    """When and how a training is hit from inside Ultralytics' loop.

    Attributes:
        epoch, batch: the batch after which it happens, from 0.
        kind: kill or interrupt (this process), worker (SIGKILL to a process that loads pictures, once the epoch is
            saved: what was loaded ahead must not last to the end).
        workers: processes that load pictures; Ultralytics itself allows none on a CPU.
    """

    epoch: int = -1
    batch: int = 0
    kind: str = ""
    workers: int = 0


def options(top: Path, **more: Any) -> dict[str, Any]:
    """Arguments of a training that takes a second, in `top/runs/run`; `more` wins.

    Batches of 4 of 10 pictures and nbs 16: gradients are still being accumulated when an epoch ends.
    """
    base = {
        "model": str(tiny_yaml(top)),
        "epochs": EPOCHS,
        "imgsz": 64,
        "batch": 4,
        "nbs": 16,
        "project": str(top / "runs"),
        "name": "run",
        "device": "cpu",
        "plots": False,
        "verbose": False,
        "warmup_epochs": 1,
        "close_mosaic": 1,
    }
    return {**base, **more}


def words(values: dict[str, Any]) -> list[str]:
    """The same as on a command line."""
    return [f"{key}={value}" for key, value in values.items()]


def main(argv: list[str], logs: str, fault: child.Fault, moment: Moment) -> None:
    """`focusdd detect train ARGV` with its output in files; ends as a program does."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(str(Path(logs) / name), os.O_WRONLY | os.O_TRUNC), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["focusdd", "detect", "train", *argv]
    from tqdm import tqdm
    from ultralytics.utils.callbacks import default_callbacks

    from focusdd_det.cli import run_main
    from focusdd_det.training.command import train

    tqdm.set_lock(threading.RLock())  # its own one is a semaphore that outlives a killed process
    default_callbacks["on_pretrain_routine_start"].append(lambda trainer: _workers(trainer, moment))
    event = "on_model_save" if moment.kind == "worker" else "on_train_batch_end"
    default_callbacks[event].append(lambda trainer: _strike(trainer, moment))
    child.arm(fault, Path(logs))
    sys.exit(run_main(train, argv))


def _workers(trainer: Any, moment: Moment) -> None:
    trainer.args.workers = moment.workers


def _strike(trainer: Any, moment: Moment) -> None:
    if (trainer.epoch, trainer._batch) != (moment.epoch, moment.batch):
        return
    pid = trainer.train_loader.iterator._workers[0].pid if moment.kind == "worker" else os.getpid()
    os.kill(pid, signal.SIGINT if moment.kind == "interrupt" else signal.SIGKILL)


def start(argv: list[str], logs: Path, fault: child.Fault | None = None, moment: Moment | None = None) -> Run:
    """A training in a fresh process, with a fault waiting in it."""
    logs.mkdir(parents=True, exist_ok=True)
    for name in ("out", "err"):
        (logs / name).write_bytes(b"")
    arguments = (argv, str(logs), fault or child.Fault(), moment or Moment())
    process = context.Process(target=main, args=arguments)
    process.start()
    return Run(argv, logs, process)


def weights(file: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint of our own making holds."""
    checkpoint = torch.load(file, weights_only=False)
    return dict((checkpoint["ema"] or checkpoint["model"]).state_dict())


def rows(run: Path) -> list[dict[str, str]]:
    """results.csv without the clock."""
    with (run / "results.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "time"} for row in csv.DictReader(file)]


def equal_runs(run: Path, other: Path) -> bool:
    """The same weights, bit by bit, and the same results."""
    for name in ("last.pt", "best.pt"):
        a, b = weights(run / "weights" / name), weights(other / "weights" / name)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    return rows(run) == rows(other)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


Train = Callable[..., Run]
