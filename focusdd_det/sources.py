"""Class folders and tar archives -> a stream of sources.

A root is a folder of class folders (ImageNet's train/<synset>/*.JPEG), a folder of <synset>.tar archives, or one tar
that holds either. Archives are read in place, never unpacked. The order of the stream is of no consequence to what is
built, so nothing has to be held or sorted: memory does not grow with the number of files.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from focusdd_det.errors import DataError
from focusdd_det.tree import entries_below
from focusdd_det.types import Source

MAX_BYTES = 1 << 28  # of one picture file; a larger one is not read into memory
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
# Photographs that are not read here.
OTHER = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".nef", ".arw")


@dataclass(frozen=True)
class Root:
    """One place that sources come from.

    Attributes:
        name: stands for the place in manifests, so that they hold no absolute path.
        path: a folder, or a .tar file.
        folders: class folder -> class of the set, for the folders that are used.
    """

    name: str
    path: Path
    folders: Mapping[str, str]


@dataclass(frozen=True)
class Located:
    """A source and where its bytes are: a whole file (`offset` None) or a stretch of an archive."""

    source: Source
    file: Path
    size: int
    mtime_ns: int
    offset: int | None = None
    problem: str | None = None

    def demand_folder(self) -> None:
        """A source that was there before may have gone with its disk: no reason to quarantine all that is on it.

        Raises:
            DataError: its folder is gone.
        """
        if not self.file.parent.is_dir():
            raise DataError(
                f"{self.file.parent} is gone in the middle of the build; is the disk still there? What is done is "
                "kept: bring it back and run the same command again"
            )

    def read(self) -> bytes:
        """The bytes of the picture file.

        Raises:
            OSError: unreadable, too large, or shorter than the archive's index says.
        """
        if not 0 <= self.size <= MAX_BYTES:
            raise OSError(f"{self.size} bytes, more than the {MAX_BYTES} that are read of one picture")
        if self.offset is None:
            with self.file.open("rb") as file:
                return file.read(MAX_BYTES)
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            data = os.pread(descriptor, self.size, self.offset)
        finally:
            os.close(descriptor)
        if len(data) != self.size:
            raise OSError(f"{self.file} ends inside this member")
        return data


def folder_names(root: Root) -> set[str]:
    """The class folders (or archives standing for them) that are at a root.

    Raises:
        DataError: the root is neither a readable folder nor a plain tar.
    """
    if root.path.is_file():
        with _open_tar(root.path) as archive:
            members = _members(archive, root.path)
            return _classes_of((member.name for member in members if _is_class_member(member)), root.path)
    try:
        entries = list(os.scandir(root.path))
    except OSError as error:
        raise DataError(
            f"cannot read source folder {root.path}: {error.strerror}; expected class folders such as n01440764/*.JPEG"
        ) from error
    return {entry.name.removesuffix(".tar") for entry in entries if _is_folder(entry) or entry.name.endswith(".tar")}


def tar_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar, one by one.

    Raises:
        DataError: it is no plain tar, damaged or cut short.
    """
    with _open_tar(path) as archive:
        yield from _members(archive, path)


def stream(
    root: Root, folders: Collection[str] | None = None, left_out: Counter[str] | None = None
) -> Iterator[Located]:
    """All picture files of a root whose class folder is in `root.folders` (and in `folders`, if given).

    Things that look like pictures but cannot be one (a folder named x.JPEG, a link that goes in circles, an archive
    member with a path that leads outside) come with a `problem` instead of being passed over. Photographs of
    formats that are not read are counted in `left_out` by their endings, in folders.
    """
    wanted = {f for f in root.folders if folders is None or f in folders}
    if root.path.is_file():
        yield from _stream_tar(root, root.path, "", wanted, None)
        return
    for folder in sorted(wanted):
        if (root.path / folder).is_dir():
            yield from _stream_folder(root, root.path / folder, folder, left_out)
        archive = root.path / f"{folder}.tar"
        if archive.is_file():
            yield from _stream_tar(root, archive, f"{archive.name}!", wanted, folder)


def locate(root: Root, path: str, folder: str, group: str, offset: int | None, size: int, mtime_ns: int) -> Located:
    """A source that was seen before, from the columns that were kept of it."""
    if root.path.is_file():
        file = root.path
    else:  # `!` marks what lies in an archive; without an offset it is part of a name
        file = root.path / (path if offset is None else path[: path.index(".tar!") + len(".tar")])
    return Located(Source(root.name, path, folder, group), file, size, mtime_ns, offset)


def _stream_folder(root: Root, start: Path, folder: str, left_out: Counter[str] | None) -> Iterator[Located]:
    for entry in entries_below(start, enter=lambda name: not _looks_like_picture(name)):
        if not _looks_like_picture(entry.name):
            if left_out is not None and entry.name.lower().endswith(OTHER):
                left_out[Path(entry.name).suffix.lower()] += 1
            continue
        problem = None
        size = mtime = 0
        try:
            if entry.is_dir(follow_symlinks=False):
                problem = "a folder, not a picture"
            else:
                status = entry.stat()
                size, mtime = status.st_size, status.st_mtime_ns
                if not entry.is_file():
                    problem = "not a regular file"
        except OSError as error:
            problem = f"unreadable: {error.strerror}"
        path = Path(entry.path)
        relative = path.relative_to(root.path).as_posix()
        try:
            relative.encode("utf-8")
        except UnicodeEncodeError:  # a name that is not UTF-8 cannot be written into a manifest
            problem = problem or "its name is not valid UTF-8"
            relative = os.fsencode(relative).decode("utf-8", "backslashreplace")
        source = Source(root.name, relative, folder, root.folders[folder])
        yield Located(source, path, size, mtime, problem=problem)


def _stream_tar(root: Root, file: Path, prefix: str, wanted: set[str], folder: str | None) -> Iterator[Located]:
    mtime = file.stat().st_mtime_ns
    with _open_tar(file) as archive:
        for member in _members(archive, file):
            if member.isreg() and member.name.endswith(".tar") and folder is None:
                inner_folder = _tar_folder(member.name)
                stretch = archive.extractfile(member)
                if inner_folder in wanted and stretch is not None:
                    yield from _stream_inner(root, file, stretch, member, inner_folder, prefix, mtime)
            else:
                found = _member(root, file, member, 0, prefix, folder, wanted, mtime)
                if found is not None:
                    yield found


def _stream_inner(
    root: Root, file: Path, stretch: object, outer: tarfile.TarInfo, folder: str, prefix: str, mtime: int
) -> Iterator[Located]:
    try:
        archive = tarfile.TarFile("", "r", stretch)  # type: ignore[arg-type]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{file}: member {outer.name} is not a plain tar ({error}); expected one tar a class"
        ) from error
    with archive:
        path = f"{prefix}{outer.name}!"
        for member in _members(archive, file):
            found = _member(root, file, member, outer.offset_data, path, folder, {folder}, mtime)
            if found is not None:
                yield found


def _member(
    root: Root,
    file: Path,
    member: tarfile.TarInfo,
    base: int,
    prefix: str,
    folder: str | None,
    wanted: set[str],
    mtime: int,
) -> Located | None:
    if not _looks_like_picture(member.name):
        return None
    parts = member.name.split("/")
    if any(part.startswith(".") and part not in (".", "..") for part in parts):
        return None  # hidden, as in folders
    folder = folder or (parts[-2] if len(parts) > 1 else "")
    if folder not in wanted:
        return None
    problem = None
    if member.name.startswith("/") or ".." in parts:
        problem = "its path in the archive leads outside"
    elif not member.isreg():
        problem = "not a regular file in the archive"
    source = Source(
        root.name, prefix + member.name.encode("utf-8", "backslashreplace").decode(), folder, root.folders[folder]
    )
    return Located(source, file, member.size, mtime, base + member.offset_data, problem)


def _open_tar(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path} is not an uncompressed tar ({error}); expected ImageNet's tar files as they are published, "
            "or a folder of class folders"
        ) from error


def _members(archive: tarfile.TarFile, file: Path) -> Iterator[tarfile.TarInfo]:
    """The members one by one; memory does not grow with their number.

    Raises:
        DataError: the archive is damaged or cut short.
    """
    try:
        for member in archive:
            yield member
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
    except (tarfile.TarError, OSError, EOFError, OverflowError, ValueError) as error:
        raise DataError(f"{file} is damaged or cut short ({error}); copy or download it again") from error


def _is_class_member(member: tarfile.TarInfo) -> bool:
    return member.name.endswith(".tar") or (_looks_like_picture(member.name) and "/" in member.name)


def _classes_of(names: Iterable[str], archive: Path) -> set[str]:
    """The class folders in a tar: the innermost ones.

    Raises:
        DataError: one of that name lies below several others, so that it is hardly a class.
    """
    above: dict[str, str] = {}
    for name in names:
        folder = _tar_folder(name)
        parent = "" if name.endswith(".tar") else name.rpartition("/")[0].rpartition("/")[0]
        if above.setdefault(folder, parent) != parent:
            raise DataError(
                f"{archive}: folders called {folder} lie below {above[folder] or '.'} and {parent or '.'}. In one tar "
                "the innermost folder is the class: expected <class>/*.JPEG. Unpack it and give the folder, where the "
                "outermost is"
            )
    return set(above)


def _looks_like_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _tar_folder(name: str) -> str:
    parts = name.split("/")
    return parts[-1].removesuffix(".tar") if name.endswith(".tar") else parts[-2]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
