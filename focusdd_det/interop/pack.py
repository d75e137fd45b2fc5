"""A set or a store as one tar, and back: `set.tar`, `set.tar.sha256` beside it, `SHA256SUMS` first inside.

    SHA256SUMS            `sha256sum -c` understands it
    set/COMPLETE ...      the files of the set, in plan order

The same set gives the same bytes: no times, no owners, a fixed order and a fixed top folder. The hashes are those of
the manifest and of COMPLETE; a file that differs from them is not packed. build.log.json (of a
store: store.log.json, relabel.log.json), which says on which machine and where it was made, is left out unless it is
asked for. The gallery is left out, too, and written anew where the set comes out: a page with scripts that somebody
else packed is vouched for by nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from focusdd_det import detset
from focusdd_det.disk import file_sha256, write_atomic
from focusdd_det.errors import ConfigError, DataError, DiskError, VerifyError
from focusdd_det.interop.finished import open_set
from focusdd_det.interop.folders import new_folder, refuse_existing, require_space
from focusdd_det.interop.tar import BLOCK, RECORD, header, next_member, padding, unsafe
from focusdd_det.sealed import DESCRIPTION, SEAL
from focusdd_det.showing.gallery import NAME as GALLERY
from focusdd_det.showing.gallery import write_gallery

SUMS, TOP = "SHA256SUMS", "set/"
_CHUNK = 1 << 20
_MOST_SUMS = 256 << 20  # bytes; two million files
_TAIL = 1 << 20  # bytes after the end of an archive
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_LOGS = ("store.log.json", "relabel.log.json")
_STORE_FILE = re.compile(r"[a-z]+_\d{5,}\.safetensors")
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "zip"}


@dataclass(frozen=True)
class Contents:
    """What is packed.

    Attributes:
        kind: detection set, classification set or store.
        files: path relative to the folder -> sha256, in order.
        size: bytes of the archive.
    """

    kind: str
    files: dict[str, str]
    size: int

    @property
    def sums(self) -> bytes:
        """SHA256SUMS."""
        return "".join(f"{digest}  {TOP}{name}\n" for name, digest in self.files.items()).encode()


def contents(folder: Path, log: bool = False) -> Contents:
    """What an archive of a set or store will hold. Reads its records, and of the other files the sizes.

    Args:
        log: with build.log.json or store.log.json.

    Raises:
        DataError: neither; or names that no archive should carry.
        VerifyError: unfinished or damaged.
    """
    kind, files = _store_files(folder, log) if (folder / DESCRIPTION).is_file() else _set_files(folder, log)
    for name in files:
        if why := unsafe(TOP + name):
            raise DataError(
                f"{folder}: the name {name[:80]!r} {why}; it is not packed. Rename that class and build anew"
            )
    found = Contents(kind, files, 0)
    try:
        sizes = [(name, (folder / name).stat().st_size) for name in files]
    except OSError as error:
        raise VerifyError(f"cannot read {error.filename}: {error.strerror}; get it again") from error
    members = [(SUMS, len(found.sums)), *((TOP + name, size) for name, size in sizes)]
    size = sum(len(header(name, length)) + length + padding(length) for name, length in members) + 2 * BLOCK
    return Contents(kind, files, size + padding(size, RECORD))


def _set_files(folder: Path, log: bool) -> tuple[str, dict[str, str]]:
    source = open_set(folder)
    seal = json.loads((folder / "COMPLETE").read_text(encoding="utf-8"))
    files = {"COMPLETE": file_sha256(folder / "COMPLETE"), **{name: seal[name] for name in detset.HASHED}}
    for name in detset.FREE:
        if name not in files and name != GALLERY and (folder / name).is_file() and (log or name != "build.log.json"):
            files[name] = file_sha256(folder / name)
    for item in source.items():
        for part in detset.TASKS[source.task]:
            files[detset.part_path(Path(), part, item).as_posix()] = item.sha256[part]
    return {"detect": "detection set", "classify": "classification set"}[source.task], files


def _store_files(folder: Path, log: bool) -> tuple[str, dict[str, str]]:
    seal = _store_seal(folder)
    files = {SEAL: file_sha256(folder / SEAL), DESCRIPTION: seal.pop(DESCRIPTION), **dict(sorted(seal.items()))}
    files |= {name: file_sha256(folder / name) for name in _LOGS if log and (folder / name).is_file()}
    return "store", files


def _store_seal(folder: Path) -> dict[str, str]:
    """COMPLETE of a store: file -> sha256.

    Raises:
        VerifyError: missing, or not such a table.
    """
    try:
        seal = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if not str(described["format"]).startswith("focusdd_det ") or DESCRIPTION not in seal:
            raise ValueError("not a store of this program")
        if not all(isinstance(v, str) and (k == DESCRIPTION or _STORE_FILE.fullmatch(k)) for k, v in seal.items()):
            raise ValueError("expected a hash for each file of a store")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VerifyError(f"{folder} is not a finished store: {error}; make it again, or get it again") from error
    return dict(seal)


def pack(
    folder: Path, out: Path, found: Contents | None = None, progress: Callable[[int], object] = lambda _: None
) -> str:
    """Write a set or store as one tar, with its hash in a file beside it.

    The archive appears whole or not at all; a run that was killed begins anew.

    Args:
        found: from `contents`; None reads it here.
        progress: called with the number of files that were written.

    Returns:
        sha256 of the archive.

    Raises:
        ConfigError: `out` lies in the set.
        DataError, VerifyError: as `contents`; a file is not what the records say.
        DiskError: `out` exists, no space, or another process writes it.
    """
    if folder.resolve() in out.resolve().parents:
        raise ConfigError(f"out={out} lies in {folder}: a set stays as it was sealed. Choose another `out`")
    beside = out.with_name(out.name + ".sha256")
    refuse_existing(out)
    if beside.exists() and not re.fullmatch(rf"[0-9a-f]{{64}}  {re.escape(out.name)}\n", _text(beside)):
        raise DiskError(f"{beside} exists and is not of a pack that was stopped; move it away, or choose another `out`")
    found = found or contents(folder)
    require_space(out, found.size)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _alone(temporary) as file:
            try:
                digest = _write(file, folder, found, progress)
                refuse_existing(out)
                write_atomic(beside, f"{digest}  {out.name}\n".encode())
                temporary.replace(out)  # last: an archive that is there has its hash beside it
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise DiskError(f"cannot write {out}: {error.strerror}; free some space, or choose another `out`") from error
    return digest


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[IO[bytes]]:
    """An empty file that this process alone writes; what a killed one left in it is thrown away."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DiskError(
                f"{path} is being written by another process; wait for it, or choose another `out`"
            ) from error
        file.truncate()
        yield file


def _write(file: IO[bytes], folder: Path, found: Contents, progress: Callable[[int], object]) -> str:
    whole = hashlib.sha256()
    written = 0

    def put(data: bytes) -> None:
        nonlocal written
        file.write(data)
        whole.update(data)
        written += len(data)

    put(header(SUMS, len(found.sums)) + found.sums + bytes(padding(len(found.sums))))
    for name, digest in found.files.items():
        path, own = folder / name, hashlib.sha256()
        try:
            source = path.open("rb")
        except OSError as error:
            raise VerifyError(f"cannot read {path}: {error.strerror}; get it again") from error
        with source:
            size = os.fstat(source.fileno()).st_size
            put(header(TOP + name, size))
            left = size
            while left and (data := source.read(min(left, _CHUNK))):
                own.update(data)
                put(data)
                left -= len(data)
        if left or own.hexdigest() != digest:
            raise VerifyError(f"{path}: not the bytes that the records of {folder} name; nothing was packed")
        put(bytes(padding(size)))
        progress(1)
    put(bytes(2 * BLOCK))
    put(bytes(padding(written, RECORD)))
    file.flush()
    os.fsync(file.fileno())
    return whole.hexdigest()


# --- and back


def peek(archive: Path) -> tuple[dict[str, str], int]:
    """What an archive says that it holds: file -> sha256, and the bytes of the archive. Reads its beginning alone.

    Raises:
        DataError: not there, or compressed.
        VerifyError: not an archive of `pack`.
    """
    with _open(archive) as (file, size):
        return _sums(_Reader(archive, file, size)), size


def unpack(archive: Path, out: Path, progress: Callable[[int], object] = lambda _: None) -> tuple[str, int]:
    """Write the set or store of an archive to `out`, every byte checked: against SHA256SUMS, against `<archive>.sha256`
    if that is there, and against the set's own manifest and COMPLETE.

    `out` appears when all of it is right. A run that was killed begins anew.

    Args:
        progress: called with the number of files that were written.

    Returns:
        The kind of what was in it, and the number of files.

    Raises:
        DataError: no such archive.
        VerifyError: damaged, or not one that `pack` wrote; nothing of it is left.
        DiskError: `out` exists, or no space.
    """
    refuse_existing(out)
    expected = _beside(archive)
    with _open(archive) as (file, size):
        reader = _Reader(archive, file, size)
        sums = _sums(reader)
        require_space(out, size)
        with new_folder(out) as work:
            left = dict(sums)
            while member := reader.member():
                name, length = member
                if name not in left:
                    told = "comes twice" if name in sums else f"is not in {SUMS}"
                    raise VerifyError(f"{archive}: {name[:120]!r} {told}")
                skipped = name == TOP + GALLERY
                copied = reader.skip(length) if skipped else reader.copy(work / name.removeprefix(TOP), length)
                if copied != left.pop(name):
                    raise VerifyError(f"{archive}: {name} is damaged: not the bytes that {SUMS} names; get it again")
                progress(1)
            if left:
                raise VerifyError(f"{archive}: {len(left)} files are missing, such as {next(iter(left))[:120]!r}")
            reader.finish(expected)
            kind = _check(work, archive)
            if kind != "store":
                write_gallery(work, work / GALLERY)
            return kind, len(sums)


def _check(work: Path, archive: Path) -> str:
    """That what came out is a whole set or store by its own records."""
    if (work / DESCRIPTION).is_file():
        seal = _store_seal(work)
        problems = [
            f"{name}: not the bytes that COMPLETE names"
            for name, digest in seal.items()
            if not (work / name).is_file() or file_sha256(work / name) != digest
        ]
        strays = {path.name for path in work.iterdir()} - {*seal, SEAL, *_LOGS}
        problems += [f"{name}: not part of the store" for name in sorted(strays)]
        kind = "store"
    else:
        problems = [problem.replace(f"{work}/", "") for problem in detset.verify(work)]
        kind = {"detect": "detection set", "classify": "classification set"}.get(detset.task_of(work) or "", "")
        if not kind:
            problems = ["it holds neither a set nor a store of this program"]
    if problems:
        shown = "\n  ".join(problems[:10])
        raise VerifyError(f"{archive} does not hold what its own records say; nothing was written:\n  {shown}")
    return kind


class _Reader:
    """An archive from front to back, hashed on the way."""

    def __init__(self, path: Path, file: IO[bytes], size: int) -> None:
        self._path, self._file, self._left = path, file, size
        self._hash = hashlib.sha256()

    def read(self, count: int) -> bytes:
        data = self._file.read(count)
        self._hash.update(data)
        self._left -= len(data)
        return data

    def member(self) -> tuple[str, int] | None:
        """The next file, whose bytes must be read before the one after it."""
        try:
            return next_member(self.read, self._left)
        except VerifyError as error:
            raise VerifyError(f"{self._path}: {error}; nothing was written") from error

    def bytes_of(self, size: int) -> Iterator[bytes]:
        left = size
        while left:
            data = self.read(min(left, _CHUNK))
            if not data:
                raise VerifyError(f"{self._path}: the archive is cut short; get it again")
            left -= len(data)
            yield data
        if any(self.read(padding(size))):
            raise VerifyError(f"{self._path}: bytes between the files; not written by `focusdd pack`")

    def skip(self, size: int) -> str:
        """Read the next `size` bytes; their sha256."""
        digest = hashlib.sha256()
        for data in self.bytes_of(size):
            digest.update(data)
        return digest.hexdigest()

    def copy(self, target: Path, size: int) -> str:
        """Write the next `size` bytes to a new file; their sha256."""
        digest = hashlib.sha256()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # a file system that does not tell `A` from `a` meets the first of them here
            handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        except (FileExistsError, NotADirectoryError) as error:
            raise VerifyError(f"{self._path}: {target.name!r} is in the way of another file of the archive") from error
        with os.fdopen(handle, "wb") as file:
            for data in self.bytes_of(size):
                digest.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def finish(self, expected: str | None) -> None:
        """Read to the end, which must be empty, and compare the whole."""
        if self._left > _TAIL or any(self.read(self._left)):
            raise VerifyError(f"{self._path}: something follows the end of the archive; not written by `focusdd pack`")
        if expected is not None and self._hash.hexdigest() != expected:
            raise VerifyError(f"{self._path}: not the archive that {self._path.name}.sha256 names; get both again")


@contextlib.contextmanager
def _open(archive: Path) -> Iterator[tuple[IO[bytes], int]]:
    try:
        file = archive.open("rb")
        size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"cannot read {archive}: {error.strerror}; expected a tar of `focusdd pack`") from error
    with file:
        start = file.read(6)
        for magic, name in _PACKED.items():
            if start.startswith(magic):
                raise DataError(f"{archive} is compressed ({name}); unpack that first: expected a plain tar")
        file.seek(0)
        yield file, size


def _sums(reader: _Reader) -> dict[str, str]:
    member = reader.member()
    if member is None or member[0] != SUMS or member[1] > _MOST_SUMS:
        raise VerifyError(
            f"{reader._path} is not an archive of `focusdd pack`: expected {SUMS} first, got "
            f"{member[0][:80] if member else 'nothing'!r}. Unpack it with tar, then `focusdd verify` the folder"
        )
    found: dict[str, str] = {}
    for line in b"".join(reader.bytes_of(member[1])).decode("utf-8", "replace").split("\n")[:-1]:
        parts = _LINE.fullmatch(line)
        if not parts or not parts[2].startswith(TOP) or unsafe(parts[2]) or parts[2] in found:
            raise VerifyError(f"{reader._path}: {SUMS} has the line {line[:160]!r}; expected `sha256  {TOP}file` once")
        found[parts[2]] = parts[1]
    return found


def _beside(archive: Path) -> str | None:
    """The hash that <archive>.sha256 names; None without one."""
    path = archive.with_name(archive.name + ".sha256")
    if not path.exists():
        return None
    fields = _text(path).split()
    if not fields or not re.fullmatch(r"[0-9a-f]{64}", fields[0]):
        raise VerifyError(f"{path} holds no sha256; get it again, or move it away to do without")
    return fields[0]


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(4096).decode("utf-8", "replace")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
