"""Whole epochs of a training, one at a time: Ultralytics' own loop over the training's own loader.

A step on a batch that is there already leaves out what a user pays beside it: pictures read, decoded and put together,
and of stored targets the first use of each epoch's file (its hash, pages that no memory holds yet) and the check that
every picture is the view that the teacher saw. Here nothing is left out but validation and what is written.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ultralytics.utils import DEFAULT_CFG_DICT

from focusdd_det.bench.options import BenchOptions
from focusdd_det.trainer import FocusDDTrainer

ROUNDS, QUICK_ROUNDS = 5, 3  # at most: an epoch is many steps already
BATCHES, QUICK_BATCHES = 8, 2  # of an epoch
WARMUP = 1  # epochs of each case before those that count
STALLED = 300.0  # seconds without a batch after which the loading processes are no longer waited for


class Extent(NamedTuple):
    """How much is timed: epochs that count, batches of an epoch, processes that a training is given to load."""

    rounds: int
    batches: int
    workers: int

    @classmethod
    def of(cls, options: BenchOptions) -> Extent:
        """As the options have it; `workers` no more than a training takes unless it is told to."""
        rounds, batches = (QUICK_ROUNDS, QUICK_BATCHES) if options.quick else (ROUNDS, BATCHES)
        return cls(min(rounds, options.rounds), batches, min(options.workers, int(DEFAULT_CFG_DICT["workers"])))

    def pool(self, ahead: int) -> int:
        """Epochs of views with which none is used twice.

        Args:
            ahead: batches that are loaded before they are asked for.
        """
        return WARMUP + self.rounds + math.ceil(ahead / self.batches)


class _EpochOver(Exception):
    """Leaves Ultralytics' loop."""


class EpochTrainer(FocusDDTrainer):
    """A training whose epochs are asked for one by one. Each ends where validation and the checkpoint would begin."""

    ready = False

    def _setup_train(self) -> None:
        """Once: the loop begins with it, and here the loop is entered for every epoch."""
        if not self.ready:
            super()._setup_train()
        self.ready = True

    def run_callbacks(self, event: str) -> None:
        """As ever, with the check of the teacher's outputs that closes an epoch; then it is over."""
        super().run_callbacks(event)
        if event == "on_train_epoch_end":
            raise _EpochOver

    def run_epoch(self) -> None:
        """The next one."""
        with contextlib.suppress(_EpochOver):
            self._do_train()
        self.start_epoch += 1


class Lead:
    """How far ahead of the training the processes are that load for it.

    They load during other cases' turns too. So that an epoch pays for as many batches as it takes, it begins and ends
    with everything loaded that is loaded ahead.
    """

    def __init__(self, loader: Any) -> None:
        """Begin to count; before the loader is used for the first time."""
        self.loader, self._made, self._taken = loader, multiprocessing.Value("q", 0), 0
        self.ahead: int = loader.num_workers * (loader.prefetch_factor or 0)
        if self.ahead:
            loader.collate_fn = partial(_counted, loader.collate_fn, self._made)

    @property
    def made(self) -> int:
        """Batches that the processes have loaded."""
        return int(self._made.value)

    def regain(self, taken: int, stalled: float = STALLED) -> bool:
        """Wait until the lead is what it was before so many more batches were taken.

        Returns:
            Whether it is: a process that died or that makes no more batches is not waited for.
        """
        self._taken += taken
        seen, since = -1, time.monotonic()
        while self.ahead and self.made < self._taken + self.ahead:
            if self.made != seen:
                seen, since = self.made, time.monotonic()
            workers = getattr(self.loader.iterator, "_workers", ())
            if time.monotonic() - since > stalled or not all(worker.is_alive() for worker in workers):
                return False
            time.sleep(0.001)
        return True


def _counted(collate: Callable[[Any], Any], made: Any, samples: Any) -> Any:
    try:
        return collate(samples)
    finally:
        with made.get_lock():
            made.value += 1


class Epoch:
    """An epoch a call: loading and steps.

    Attributes:
        in_time: whether the processes that load were as far ahead at the end of every epoch as at its beginning.
    """

    def __init__(self, trainer: EpochTrainer) -> None:
        self.trainer, self.lead, self.in_time = trainer, Lead(trainer.train_loader), True

    def __call__(self) -> None:
        self.trainer.run_epoch()
        self.in_time &= self.lead.regain(len(self.trainer.train_loader))


def forget(folder: Path) -> None:
    """Ask the system to keep nothing of the folder's files in memory: in a training, too, they come from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not written yet cannot be let go of
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
