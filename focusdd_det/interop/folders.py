"""A new folder that appears whole or not at all: it is made in `<out>.incomplete` and renamed at the end."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from focusdd_det import disk
from focusdd_det.errors import DiskError

_MARK, _INSIDE = ".focusdd", "new"


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Inside, an empty folder to fill; afterwards it is `out`. After an error nothing of it is left.

    What a killed run left in `<out>.incomplete` is removed, and the work begins anew.

    Raises:
        DiskError: `out` is there already, something that is not ours is in the way, another process writes there, or
            the disk is full.
    """
    refuse_existing(out)
    work = out.with_name(out.name + disk.INCOMPLETE)
    if work.exists() and not (work / _MARK).is_file() and (not work.is_dir() or any(work.iterdir())):
        raise DiskError(f"{work} exists and was not begun by this command; move it away, or choose another `out`")
    try:
        work.mkdir(parents=True, exist_ok=True)
        (work / _MARK).touch()
    except OSError as error:
        raise DiskError(f"cannot make {work}: {error.strerror}; choose another `out`") from error
    with disk.locked(work):
        try:
            _clear(work)
            (work / _INSIDE).mkdir()
            yield work / _INSIDE
            refuse_existing(out)
            (work / _INSIDE).rename(out)
        except BaseException as error:
            with contextlib.suppress(OSError):
                _clear(work)
                _remove(work)
            if isinstance(error, OSError):
                raise DiskError(f"cannot write {out}: {error}; free some space, or choose another `out`") from error
            raise
        _remove(work)


def refuse_existing(out: Path) -> None:
    """DiskError if there is something at `out`, if only a broken link."""
    if out.exists() or out.is_symlink():
        raise DiskError(f"{out} exists; nothing is written into it or over it. Choose another `out`")


def require_space(out: Path, need: int) -> None:
    """Check the free disk before anything is written.

    Raises:
        DiskError: less than `need` bytes where `out` will be.
    """
    place = next(folder for folder in out.absolute().parents if folder.is_dir())
    have = shutil.disk_usage(place).free
    if have < need:
        raise DiskError(f"{place}: {have / 1e9:.2f} GB free, {need / 1e9:.2f} GB needed; free some space")


def _clear(work: Path) -> None:
    inside = work / _INSIDE
    if inside.is_symlink():
        inside.unlink()
    elif inside.exists():
        shutil.rmtree(inside)


def _remove(work: Path) -> None:
    """The emptied `<out>.incomplete`; something of somebody's that was put there stays."""
    with contextlib.suppress(OSError):
        (work / _MARK).unlink()
        (work / ".lock").unlink()
        work.rmdir()
