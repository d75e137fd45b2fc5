"""What runs in the process of a build under test: the real command, with a fault that waits for its moment.

The moments are those at which the process itself opens a file for writing or renames one below a folder; Python's audit
hook announces them just before they happen, without a change to the code under test.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMALL = 3000  # bytes: the output of a build fits, its pictures and scores do not


@dataclass(frozen=True)
class Fault:
    """What happens, and when.

    Attributes:
        kind: kill (SIGKILL), stop (SIGSTOP), interrupt (SIGINT), limit (RLIMIT_FSIZE: writing more than a few bytes
            fails), fill (the file system of `below` is filled to the last byte), fsync or replace (the call fails with
            ENOSPC), record.
        below: only what happens below this folder counts.
        at: the number of the moment, from 0; for fsync and replace the number of the call.
        match: only paths that contain this count.
        events: which announcements count.
        reads: opens for reading count instead of opens for writing.
    """

    kind: str = ""
    below: str = ""
    at: int = 0
    match: str = ""
    events: tuple[str, ...] = ("open", "os.rename")
    reads: bool = False


def main(argv: list[str], logs: str, fault: Fault) -> None:
    """`focusdd build ARGV` with its output in files; ends the process with the command's exit code."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(str(Path(logs) / name), os.O_WRONLY | os.O_TRUNC), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["focusdd", "build", *argv]
    from tqdm import tqdm

    from focusdd_det.cli import main as focusdd

    tqdm.set_lock(threading.RLock())  # its own one is a semaphore that outlives a killed process
    arm(fault, Path(logs))
    code = focusdd(["build", *argv])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def arm(fault: Fault, logs: Path) -> None:
    """Set the fault up in this process."""
    if fault.kind in ("fsync", "replace"):
        _fail_call(fault)
    elif fault.kind:
        _on_moment(fault, logs)


def _fail_call(fault: Fault) -> None:
    """The operating system's call, not one of ours, fails as on a full disk, from the `at`-th time on."""
    real = getattr(os, fault.kind)
    seen = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > fault.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    setattr(os, fault.kind, failing)


def _on_moment(fault: Fault, logs: Path) -> None:
    seen = 0
    busy = False
    record = os.open(logs / "moments", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if fault.kind == "record" else -1

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen, busy
        if event not in fault.events or busy or not isinstance(args[0], (str, os.PathLike)):
            return
        path = os.fspath(args[0])
        writes = event != "open" or (isinstance(args[1], str) and any(c in args[1] for c in "wax+"))
        if writes == fault.reads or not path.startswith(fault.below) or fault.match not in path:
            return
        if record >= 0:
            os.write(record, f"{event} {path}\n".encode())
        elif seen == fault.at:
            busy = True
            _happen(fault)
            busy = False
        seen += 1

    sys.addaudithook(hook)


def _happen(fault: Fault) -> None:
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    elif fault.kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, resource.RLIM_INFINITY))
    elif fault.kind == "fill":
        fill(Path(fault.below))


def fill(folder: Path) -> None:
    """Use up the file system that a folder lies on, for real."""
    while not folder.is_mount():
        folder = folder.parent
    with (folder / "filler").open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
