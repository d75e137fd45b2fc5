"""The headers of a plain tar: written the same for the same name and size, read as if an enemy had written them.

Only regular files, a pax header for a name that the plain one has no room for, and nothing else: no links, devices,
folders or sparse files. A header is looked at before anything that it claims is believed.
"""

from __future__ import annotations

import re
import tarfile
import unicodedata
from collections.abc import Callable

from focusdd_det.errors import VerifyError

BLOCK, RECORD = 512, 10_240
_MOST_PAX = 16_384  # bytes of a pax header: two names
_LONGEST, _LONGEST_PART, _DEEPEST = 1_000, 255, 4  # bytes of a name, of one of its parts, and how many parts
_PAX = re.compile(rb"([1-9]\d{0,4}) ([A-Za-z]+)=")


def header(name: str, size: int) -> bytes:
    """The header of a regular file: no time, no owner, mode 644."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT)


def padding(size: int, unit: int = BLOCK) -> int:
    """Zero bytes that fill `size` up to whole blocks."""
    return -size % unit


def unsafe(name: str) -> str:
    """Why a name may not come out of an archive; empty if it may."""
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or any(part in ("", ".", "..") for part in parts):
        return "leads outside"
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name):
        return "has control characters"
    try:
        lengths = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        return "is not valid text"
    if max(lengths) > _LONGEST_PART or sum(lengths) > _LONGEST or len(parts) > _DEEPEST:
        return "is too long or too deep"
    return ""


def next_member(read: Callable[[int], bytes], left: int) -> tuple[str, int] | None:
    """The name and size of the file whose bytes come next; None at the end of the archive.

    Args:
        read: gives that many bytes, fewer only at the end of the file.
        left: bytes of the archive from here on; no size may claim more.

    Raises:
        VerifyError: anything but a regular file with a safe name.
    """
    long_name = None
    while True:
        block = read(BLOCK)
        left -= len(block)
        if block == bytes(BLOCK):
            return None
        if len(block) < BLOCK:
            raise VerifyError("the archive is cut short")
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError, UnicodeError) as error:
            raise VerifyError(f"not a tar header where one should be ({error})") from error
        kind = info.type
        if not 0 <= info.size <= left:
            raise VerifyError(f"{info.name[:80]!r} claims {info.size} bytes where {left} are left")
        if kind == tarfile.XHDTYPE and long_name is None and info.size <= _MOST_PAX:
            size = info.size + padding(info.size)
            long_name = _pax_name(read(size)[: info.size])
            left -= size
            continue
        if kind not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            what = _KINDS.get(kind, f"an entry of kind {kind!r}")
            raise VerifyError(f"{info.name[:80]!r} is {what}; `focusdd pack` writes regular files alone")
        name = info.name if long_name is None else long_name
        if why := unsafe(name):
            raise VerifyError(f"the name {name[:80]!r} {why}")
        return name, info.size


_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.XHDTYPE: "a pax header that is too large, or one too many",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


def _pax_name(data: bytes) -> str:
    """The `path` of a pax header, which may hold nothing else."""
    found = _PAX.match(data)
    if not found or found[2] != b"path" or int(found[1]) != len(data) or not data.endswith(b"\n"):
        raise VerifyError(f"a pax header with something other than a path: {data[:60]!r}")
    try:
        return data[found.end() : -1].decode("utf-8")
    except UnicodeDecodeError as error:
        raise VerifyError("a pax header whose path is not text") from error
