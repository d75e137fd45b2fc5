"""Files that appear whole or not at all, their hashes, and folders that one process at a time works in."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from focusdd_det.errors import ConfigError, DiskError

INCOMPLETE = ".incomplete"


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file of any size."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_folder_name(name: str) -> bool:
    """Whether a class can have a folder of its own name: one step down, and visible."""
    return not name.startswith(".") and not set(name) & set("/\\\0") and bool(name.strip())


def write_atomic(path: Path, data: bytes | Iterable[bytes]) -> None:
    """A file that is there whole or not at all. `data` may come piece by piece; it must raise no OSError of its own.

    Raises:
        DiskError: full disk, no permission; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise DiskError(
            f"cannot write {path}: {error.strerror}; free some space or fix the permission, then run the same command "
            "again: it goes on where it stopped"
        ) from error


def append_lines(path: Path, lines: bytes) -> None:
    """Whole lines more, in one write, on the disk before it returns. One that a kill cut short is ended first.

    Raises:
        DiskError: full disk, no permission.
    """
    try:
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                lines = lines if file.read(1) == b"\n" else b"\n" + lines
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DiskError(
            f"cannot write {path}: {error.strerror}; free some space and run the same command again"
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time. The lock dies with its process, so that there are no stale ones.

    Raises:
        DiskError: another process is building here.
    """
    path = folder / ".lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DiskError(f"cannot write in {folder}: {error.strerror}; choose another `out`") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DiskError(
                f"{folder} is being written by another build; wait for it, or choose another `out`"
            ) from error
        yield
    finally:
        os.close(descriptor)


def refuse_overlap(out: Path, roots: Iterable[Path]) -> None:
    """No output equal to, inside or around a source.

    Raises:
        ConfigError: naming both.
    """
    target = out.resolve()
    for root in roots:
        source = root.resolve()
        if target == source or source in target.parents or target in source.parents:
            raise ConfigError(f"out={out} and the source {root} lie in each other; choose an `out` elsewhere")
