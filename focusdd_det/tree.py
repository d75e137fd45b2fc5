"""What lies below a folder, in no order and in flat memory. Links are followed, but not back up."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from focusdd_det.errors import DataError

_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def entries_below(
    start: Path, enter: Callable[[str], bool] = lambda name: True, pass_over: bool = False
) -> Iterator[os.DirEntry[str]]:
    """Every entry below a folder but for the folders that are entered.

    Hidden names (companions of pictures such as ._x.jpg, and what tools keep) are passed over. A link to a folder is
    entered like a folder, unless it leads to one that it lies in.

    Args:
        start: the folder.
        enter: for the name of a folder, whether to go into it; other folders come as entries.
        pass_over: whether folders that cannot be listed are left out.

    Raises:
        DataError: a folder cannot be listed, or a link cannot be followed although it leads somewhere.
    """
    pending = [(str(start), frozenset({_place(start)}))]
    while pending:
        folder, above = pending.pop()
        try:
            entries = os.scandir(folder)
        except OSError as error:
            if pass_over:
                continue
            raise _cannot_list(folder, error) from error
        with entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    inside = enter(entry.name) and entry.is_dir()
                except OSError as error:
                    inside = False
                    if error.errno not in _NOWHERE and not pass_over:
                        raise _cannot_list(entry.path, error) from error
                if not inside:
                    yield entry
                elif (place := _place(entry)) not in above:
                    pending.append((entry.path, above | {place}))


def _cannot_list(folder: str, error: OSError) -> DataError:
    return DataError(f"cannot list {folder}: {error.strerror}; make it readable or remove it")


def _place(folder: Path | os.DirEntry[str]) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None  # it cannot be listed either, which is said there
    return status.st_dev, status.st_ino
