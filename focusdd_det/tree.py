"""What lies below a folder, in no order and in flat memory. Links are followed, but not back up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from focusdd_det.errors import DataError


def entries_below(start: Path, enter: Callable[[str], bool] = lambda name: True) -> Iterator[os.DirEntry[str]]:
    """Every entry below a folder but for the folders that are entered.

    Hidden names (companions of pictures such as ._x.jpg, and what tools keep) are passed over. A link to a folder is
    entered like a folder, unless it leads to one that it lies in.

    Args:
        start: the folder.
        enter: for the name of a folder, whether to go into it; other folders come as entries.

    Raises:
        DataError: a folder cannot be listed.
    """
    pending = [(str(start), frozenset({_place(start)}))]
    while pending:
        folder, above = pending.pop()
        try:
            entries = os.scandir(folder)
        except OSError as error:
            raise DataError(f"cannot list {folder}: {error.strerror}; make it readable or remove it") from error
        with entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if not (enter(entry.name) and is_folder(entry)):
                    yield entry
                elif (place := _place(entry)) not in above:
                    pending.append((entry.path, above | {place}))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; a link that leads nowhere, or in a circle, is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _place(folder: Path | os.DirEntry[str]) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None  # it cannot be listed either, which is said there
    return status.st_dev, status.st_ino
