"""Sources decoded, and their views on the way to what looks at them, in full batches.

On a CPU decoding and looking take turns: side by side they would only wait for each other's threads. On a GPU, or with
decoding processes, the next batch is filled while one is looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from focusdd_det.config import SetConfig
from focusdd_det.methods import Method
from focusdd_det.scoring.decoding import Outcome, Task, choose, in_processes, in_threads, in_turns
from focusdd_det.scoring.glance import Glance, Known, glance
from focusdd_det.scoring.scores import ScoreStore
from focusdd_det.sources import Located

_COMMIT = 2.0  # seconds between two commits

Seen = TypeVar("Seen")  # what a look at a batch gives (looking.Seen)
Batch = Sequence[tuple[Located, Glance]]
Pixels = NDArray[np.uint8]  # [sources, looks, view, view, 3], zeros behind the last source


class Batches(Generic[Seen]):
    """Views on their way to what looks, in full batches.

    Args:
        shape: of the pixels of a batch.
        look: a batch and its pixels -> what was seen.
        finish: takes what was seen, in order, in the caller's thread.
        store: committed every few seconds.
        ahead: whether a batch is filled while the one before is looked at.
        pinned: pixels lie in pinned memory, so that they reach a GPU without another copy and while it works.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        look: Callable[[Batch, Pixels], list[Seen]],
        finish: Callable[[list[Seen]], None],
        store: ScoreStore,
        ahead: bool,
        pinned: bool,
    ) -> None:
        self.shape, self.look, self.finish, self.store, self.pinned = shape, look, finish, store, pinned
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="vit") if ahead else None
        self.waiting: Future[list[Seen]] | None = None
        self.committed = time.monotonic()
        self._blank()

    def __enter__(self) -> Batches[Seen]:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._send()
                self._receive()
        finally:
            if self.pool:
                self.pool.shutdown()

    def add(self, located: Located, seen: Glance) -> None:
        """One source; its pixels are copied, the only time that they are: a process' views are lent."""
        for i, view in enumerate(seen.views):
            self.pixels[len(self.batch), i] = view
        self.batch.append((located, replace(seen, views=())))
        if len(self.batch) == self.shape[0]:
            self._send()

    def _send(self) -> None:
        if not self.batch:
            return
        if self.pool is None:
            self._done(self.look(self.batch, self.pixels))
        else:
            following = self.pool.submit(self.look, self.batch, self.pixels)
            self._receive()
            self.waiting = following
        self._blank()

    def _receive(self) -> None:
        if self.waiting is not None:
            seen, self.waiting = self.waiting.result(), None
            self._done(seen)

    def _done(self, seen: list[Seen]) -> None:
        self.finish(seen)
        if time.monotonic() - self.committed > _COMMIT:
            self.store.commit()
            self.committed = time.monotonic()

    def _blank(self) -> None:
        self.batch: list[tuple[Located, Glance]] = []
        self.pixels: Pixels = torch.zeros(self.shape, dtype=torch.uint8, pin_memory=self.pinned).numpy()


def outcomes_of(
    sources: Iterator[Located],
    view: int,
    method: Method,
    config: SetConfig,
    workers: int,
    known: Known,
    on_gpu: bool,
) -> tuple[Generator[Outcome, None, None], bool]:
    """The sources decoded, in order; and whether that goes on while a batch is looked at."""
    whole = not method.looks and not method.needs_teacher
    depth = 4 * workers + config.batch
    if choose(config.loader, workers, on_gpu, whole) == "processes":
        return in_processes(sources, Task(view, config, known), workers, depth), True

    def work(located: Located) -> Glance | str:
        return glance(located, view, method, config, known)

    if on_gpu:
        return in_threads(sources, work, workers, depth), True
    return in_turns(sources, work, workers, config.batch), False
