"""What breaks a training from outside ends it with what broke and how to go on."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ultralytics.utils import LOCAL_RANK, LOGGER

from focusdd_det.commandline import spelled
from focusdd_det.errors import DISK_FULL, DataError, DiskError, FocusDDError, Interrupted

_PR_SET_PDEATHSIG = 1  # of prctl(2)


@contextlib.contextmanager
def guarded(trainer: Any) -> Iterator[None]:
    """Around the loop of an Ultralytics trainer.

    Raises:
        DiskError: a full disk.
        DataError: a picture of the data disappeared.
        FocusDDError: a data-loading process died.
    """
    try:
        yield
    except DiskError as error:
        raise DiskError(f"{error.__cause__ or error}: the run folder cannot be written. {_go_on(trainer)}") from error
    except FocusDDError as error:
        told = str(error)
        if not told.startswith("Caught "):  # torch's note that it happened in a loading process, with its traceback
            raise
        raise type(error)(told.rsplit(f"{type(error).__name__}: ", 1)[-1].strip()) from error
    except (OSError, EOFError, RuntimeError) as error:  # a dead process shows as any of them
        if dead := _dead_workers(trainer):
            raise FocusDDError(
                f"{' and '.join(dead)} died (the system kills processes when memory runs out: try "
                f"workers={trainer.args.workers // 2}). {_go_on(trainer)}"
            ) from error
        if "Image Not Found" in str(error):
            told = str(error).strip().splitlines()[-1]
            raise DataError(f"{told}: a picture was taken away. {_go_on(trainer)}") from error
        if not isinstance(error, OSError) or error.errno not in DISK_FULL:
            raise
        raise DiskError(f"{error}: the run folder cannot be written. {_go_on(trainer)}") from error


def end_with_parent() -> None:
    """Several GPUs: a process of the training ends when the one that started it does, however that ended (Linux)."""
    if LOCAL_RANK != -1 and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _dead_workers(trainer: Any) -> list[str]:
    workers = getattr(getattr(getattr(trainer, "train_loader", None), "iterator", None), "_workers", ())
    wait([w.sentinel for w in workers], timeout=2)  # its connection breaks a moment before it is gone
    return [f"picture-loading process {w.pid} (exit code {w.exitcode})" for w in workers if w.exitcode]


def _go_on(trainer: Any) -> str:
    if Path(trainer.last).is_file():
        return f"When that is mended, go on with resume={trainer.last}"
    return "No epoch was finished: when that is mended, give the same command again"


def run_to_end(trainer: Any, command: str) -> int:
    """Train, and name the run folder.

    Args:
        trainer: of Ultralytics' kind.
        command: what goes on with a stopped training, as in `focusdd detect train`.

    Raises:
        Interrupted: stopped by the user, with the command that goes on.
        FocusDDError: one of the processes of a training on several GPUs failed.
    """
    try:
        trainer.train()
    except KeyboardInterrupt as error:
        last = Path(trainer.last)
        again = spelled(command, f"resume={last}") if last.is_file() else "the same command"
        raise Interrupted(f"stopped; what was saved last is kept. To go on: {again}") from error
    except subprocess.CalledProcessError as error:
        raise FocusDDError(f"a process of the training failed; its error stands above. {_go_on(trainer)}") from error
    LOGGER.info(f"run folder: {trainer.save_dir}")
    return 0
