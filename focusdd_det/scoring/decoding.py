"""Sources decoded ahead of the ViT, by threads or by processes of their own; both give the same, in the same order.

A process is sent where a picture lies and a place in memory that it shares with the build; it writes the pixels of the
view there and answers with a few numbers. The memory has no name and the processes hear of the build's end by the end
of their pipe, so a build that is killed, even by SIGKILL, leaves neither behind.

Imported by these processes: nothing here may import torch.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from focusdd_det.ahead import ahead
from focusdd_det.config import SetConfig
from focusdd_det.errors import FocusDDError
from focusdd_det.scoring.glance import Glance, Known, Whole, glance
from focusdd_det.sources import Located

Outcome = tuple[Located, Glance | str]
# Workers from which processes are taken. On two cores both are as fast, so this is an estimate: threads hold the
# interpreter's lock for some tenth of a decode, the process that is served for a tenth of that.
MANY = 8
_QUEUE = 32  # pictures that wait for one process: enough while a batch is at the ViT, and their messages fit the pipe
_END = 5.0  # seconds that a process has to end by itself

# In place of `import focusdd_det`, which imports torch: 300 MB and seconds a process.
_BEGIN = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; package = type(sys)('focusdd_det'); "
    "package.__path__ = [sys.argv[1]]; sys.modules['focusdd_det'] = package; "
    "from focusdd_det.scoring.decoding import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
)


@dataclass(frozen=True)
class Task:
    """What a process must know to look at any source."""

    view: int
    config: SetConfig
    known: Known

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.view, self.view, 3)


def choose(loader: str, workers: int, on_gpu: bool, whole: bool) -> str:
    """threads or processes.

    `auto` takes processes where decoding is what the rest waits for: beside a GPU, or with many workers. On a few cores
    that the ViT shares, threads are as fast (decoders release the interpreter's lock) and need no start. Methods that
    look at crops run code of their own (maybe a user's) on every picture: that stays in threads.
    """
    if not whole or os.name != "posix":
        return "threads"
    if loader == "auto":
        return "processes" if on_gpu or workers >= MANY else "threads"
    return loader


def in_threads(
    items: Iterator[Located], work: Callable[[Located], Glance | str], workers: int, depth: int
) -> Generator[Outcome, None, None]:
    """`work` of each item in threads, in order, never more than `depth` ahead of the consumer: memory stays flat.

    Raises:
        FocusDDError: `work` raised; names the source.
    """
    return ahead(items, lambda item: (item, _looked(item, work)), workers, depth)


def in_turns(
    items: Iterator[Located], work: Callable[[Located], Glance | str], workers: int, size: int
) -> Generator[Outcome, None, None]:
    """`work` of `size` items at a time in threads, in order; nothing is at work while the consumer is.

    Raises:
        FocusDDError: `work` raised; names the source.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        while chunk := list(islice(items, size)):
            futures = [pool.submit(_looked, item, work) for item in chunk]
            try:
                outcomes = [future.result() for future in futures]
            finally:
                for future in futures:
                    future.cancel()
            yield from zip(chunk, outcomes, strict=True)


def _looked(item: Located, work: Callable[[Located], Glance | str]) -> Glance | str:
    try:
        return work(item)
    except Exception as error:
        raise _failed(item, f"{type(error).__name__}: {error}") from error


def in_processes(items: Iterator[Located], task: Task, workers: int, depth: int) -> Generator[Outcome, None, None]:
    """`glance` of each item, as a whole, in processes; in order, never more than `depth` ahead of the consumer.

    The view of an outcome lies in the shared memory: it is valid until the next outcome is asked for.

    Raises:
        FocusDDError: a process died or could not start; names the source that it was looking at.
    """
    size = int(np.prod(task.shape))
    with contextlib.ExitStack() as stack:
        descriptor, memory = _shared(depth * size)
        stack.callback(os.close, descriptor)
        slots = np.frombuffer(memory, np.uint8).reshape(depth, *task.shape)
        pool = [stack.enter_context(_Worker(descriptor, depth)) for _ in range(workers)]
        stack.callback(_hang_up, pool)
        for worker in pool:
            worker.send(task)
        yield from _in_order(items, slots, pool)


def _hang_up(pool: Sequence[_Worker]) -> None:
    """On all, before any is waited for: they end together."""
    for worker in pool:
        worker.hang_up()


@dataclass
class _Job:
    """A source on its way; `answer` is None until it has been looked at."""

    located: Located
    slot: int
    answer: Any = None


def _in_order(items: Iterator[Located], slots: NDArray[np.uint8], pool: list[_Worker]) -> Iterator[Outcome]:
    jobs: deque[_Job] = deque()
    free = list(range(len(slots)))
    of = {worker.connection: worker for worker in pool}
    while True:
        while free:
            worker = min(pool, key=lambda w: len(w.jobs))
            item = next(items, None) if len(worker.jobs) < _QUEUE else None
            if item is None:
                break
            job = _Job(item, free.pop())
            jobs.append(job)
            worker.jobs.append(job)
            worker.send((job.slot, item))
        if not jobs:
            return
        if jobs[0].answer is None:
            for connection in wait(list(of)):
                of[connection].receive()  # type: ignore[index]
            continue
        job = jobs.popleft()
        if isinstance(job.answer, str):
            yield job.located, job.answer
        else:
            sha, width, height, phash, entropy = job.answer
            yield job.located, Glance(sha, width, height, (slots[job.slot],) if width else (), phash, entropy)
        free.append(job.slot)


@dataclass
class _Worker:
    """A process that decodes, and the sources that were given to it, the one that it looks at first."""

    descriptor: int
    depth: int
    jobs: deque[_Job] = field(default_factory=deque)
    ready: bool = False

    def __enter__(self) -> _Worker:
        self.connection, theirs = Pipe()
        package = str(Path(__file__).resolve().parents[1])
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BEGIN, package, str(theirs.fileno()), str(self.descriptor)],
                pass_fds=(theirs.fileno(), self.descriptor),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
                start_new_session=True,  # Ctrl-C is the build's to answer
            )
        except OSError as error:
            self.connection.close()
            raise FocusDDError(f"cannot start a decoding process ({error}); give loader=threads") from error
        finally:
            theirs.close()
        return self

    def hang_up(self) -> None:
        """Tell it to end; it does so by itself, and not in the middle of a write."""
        self.connection.close()

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        try:
            self.process.wait(_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def send(self, what: object) -> None:
        try:
            self.connection.send(what)
        except OSError as error:
            raise self._died() from error

    def receive(self) -> None:
        """One answer."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        self.ready = True
        job = self.jobs.popleft()
        if isinstance(answer, Exception):
            raise _failed(job.located, str(answer))
        job.answer = answer

    def _died(self) -> FocusDDError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END)
        how = f"exit status {self.process.returncode}"
        while self.jobs and self.connection.poll():  # what it answered before it died
            try:
                self.connection.recv()
            except (EOFError, OSError):
                break
            self.ready = True
            self.jobs.popleft()
        if not self.ready and (self.process.returncode or 0) > 0:
            return FocusDDError(
                f"a decoding process could not start ({how}); its error stands above. Try loader=threads"
            )
        source = self.jobs[0].located.source if self.jobs else "no source"
        return FocusDDError(
            f"a decoding process died ({how}) while it looked at {source}; what is done is kept. Run the same command "
            "again: it goes on there. If it ends at this source again, remove that file; if it ends elsewhere, the "
            "machine may be out of memory: lower workers, or give loader=threads"
        )


def serve(pipe: int, descriptor: int) -> None:
    """What a decoding process does until the build hangs up."""
    cv2.setNumThreads(1)  # there is one process a core
    connection = Connection(pipe)
    memory = mmap.mmap(descriptor, 0)
    with contextlib.suppress(EOFError, OSError):
        task: Task = connection.recv()
        slots = np.frombuffer(memory, np.uint8).reshape(-1, *task.shape)
        while True:
            slot, located = connection.recv()
            connection.send(_answer(located, task, slots[slot]))


def _answer(located: Located, task: Task, slot: NDArray[np.uint8]) -> object:
    """A reason; or hash, size, perceptual hash and entropy; or an error that nobody foresaw."""
    try:
        seen = glance(located, task.view, Whole(), task.config, task.known)
        if isinstance(seen, str):
            return seen
        if seen.views:
            slot[:] = seen.views[0]
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return seen.sha, seen.width, seen.height, seen.phash, seen.entropy


def _shared(size: int) -> tuple[int, mmap.mmap]:
    """Memory without a name: a descriptor that other processes can be given, and the memory itself."""
    try:
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("focusdd-views")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, size)
        return descriptor, mmap.mmap(descriptor, size)
    except OSError as error:
        raise FocusDDError(
            f"cannot share {size / 1e6:.0f} MB with decoding processes ({error}); lower workers or batch, or give "
            "loader=threads"
        ) from error


def _failed(located: Located, what: str) -> FocusDDError:
    return FocusDDError(
        f"{located.source} could not be looked at ({what}); what is done is kept. "
        "Run the same command again; if it ends here again, this is a bug: please report it"
    )
