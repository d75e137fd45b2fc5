"""The teacher's forward beside the student's: a second CUDA stream, and nothing at all on any other device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


class Aside:
    """A queue of work that the device may do while it does the usual one.

    Order is kept where it matters: what is begun here starts after all that was handed to the device before, and
    whoever takes a result first makes the usual queue wait for it. The host waits for neither. So no tensor needs to be
    marked for the other stream: memory that is freed there is used again only behind one of the two waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, work goes to the second queue."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is handed to the usual queue from now on waits for what was begun here."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


@dataclass(frozen=True)
class Begun:
    """A result that may still be in the making."""

    value: Any
    join: Callable[[], None]

    def take(self) -> Any:
        """The result, for the usual queue."""
        self.join()
        return self.value
