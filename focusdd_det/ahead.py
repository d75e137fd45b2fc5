"""Work done in threads, ahead of who asks for it. Imported by decoding processes: no torch here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def ahead(items: Iterable[In], work: Callable[[In], Out], workers: int, depth: int) -> Generator[Out, None, None]:
    """`work` of each item in threads, in order, never more than `depth` ahead of the consumer: memory stays flat."""
    stream = iter(items)
    pending: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode") as pool:
        try:
            pending.extend(pool.submit(work, item) for item in islice(stream, max(1, depth)))
            while pending:
                done = pending.popleft()
                pending.extend(pool.submit(work, item) for item in islice(stream, 1))
                yield done.result()
        finally:
            for future in pending:
                future.cancel()
