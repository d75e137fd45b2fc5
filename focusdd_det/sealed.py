"""A folder of tensor files that is whole or says that it is not: begun as `<out>.incomplete`, gone on with, sealed.

store.json     what determines the bytes;  *.safetensors: the tensors
COMPLETE       the sha256 of every file above, written last;  *.log.json: command, times

Only the same description goes on with an unfinished folder; another one is refused, naming what differs. Files are
written whole or not at all, and nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_tensors

from focusdd_det import disk
from focusdd_det.disk import file_sha256, sha256, write_atomic
from focusdd_det.errors import ConfigError, DiskError, VerifyError

DESCRIPTION, SEAL, LOG = "store.json", "COMPLETE", "store.log.json"
_DONE = "done.json"  # the hashes of the files of an unfinished folder
_OURS = re.compile(r"[a-z]+_\d{5,}\.safetensors|\..*\.tmp")


@dataclass(frozen=True)
class Kind:
    """A sort of folder: the format in its description, what it stores, in messages, the tool that makes it, its log."""

    format: str
    what: str
    tool: str
    log: str = LOG

    @property
    def again(self) -> str:
        return f"make it again with {self.tool}"


def compare(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two descriptions: `key: old value, now new value`."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += compare(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {short(a)}, now {short(b)}")
    return lines


def read_description(folder: Path, kind: Kind) -> dict[str, Any] | None:
    """store.json of a folder; None where there is none of this kind."""
    try:
        content = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and content.get("format") == kind.format else None


def open_sealed(folder: Path, kind: Kind) -> tuple[dict[str, Any], dict[str, str]]:
    """The description of a finished folder, and the hash of each of its files.

    Raises:
        VerifyError: none, an unfinished or a damaged one.
    """
    path = folder / SEAL
    try:
        seal = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(seal, dict) or not all(isinstance(value, str) for value in seal.values()):
            raise ValueError("expected a hash for each file")
        data = (folder / DESCRIPTION).read_bytes()
    except FileNotFoundError as error:
        unfinished = folder.with_name(folder.name + disk.INCOMPLETE)
        hint = f"; {unfinished} is an unfinished one: run the same {kind.tool} command again"
        hint = hint if unfinished.is_dir() else ""
        missing = Path(str(error.filename)).name
        raise VerifyError(f"{folder} is not a finished store of {kind.what} (no {missing}){hint}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise VerifyError(f"{path}: {error}; {kind.again}") from error
    described = read_description(folder, kind)
    if described is None or sha256(data) != seal.pop(DESCRIPTION, None):
        raise VerifyError(
            f"{folder / DESCRIPTION} is damaged: not the bytes that COMPLETE names; {kind.again} (overwrite=true)"
        )
    return described, seal


def check_file(path: Path, digest: str, kind: Kind) -> None:
    """That a file is what COMPLETE says.

    Raises:
        VerifyError: missing or damaged, naming the file.
    """
    try:
        found = file_sha256(path)
    except OSError as error:
        raise VerifyError(f"cannot read {path}: {error.strerror}; {kind.again}") from error
    if found != digest:
        raise VerifyError(f"{path} is damaged: not the bytes that COMPLETE names; {kind.again} (overwrite=true)")


def check_whole(folder: Path, kind: Kind) -> None:
    """That every file of a finished folder is what COMPLETE says.

    Raises:
        VerifyError: missing or damaged, naming the file.
    """
    for name, digest in open_sealed(folder, kind)[1].items():
        check_file(folder / name, digest, kind)


class Writer:
    """An unfinished folder: files are added in any order, each whole or not at all.

    Attributes:
        folder: `<out>.incomplete`.
        names: the tensor files that it will have.
        done: the hashes of those that are there, intact.
    """

    def __init__(self, folder: Path, names: Sequence[str], kind: Kind) -> None:
        """Look at what is there; the caller holds the lock and has called `begun`."""
        self.folder, self.names, self.kind = folder, tuple(names), kind
        self.done: dict[str, str] = {}
        recorded = {**_hashes(folder / SEAL), **_hashes(folder / _DONE)}  # SEAL: all but renamed
        for name in names:
            with contextlib.suppress(OSError):
                if name in recorded and file_sha256(folder / name) == recorded[name]:
                    self.done[name] = recorded[name]

    def missing(self) -> list[str]:
        """The files that are not written yet, in order."""
        return [name for name in self.names if name not in self.done]

    def begin(self, description: Mapping[str, Any]) -> None:
        """Write store.json; what is there is kept.

        Raises:
            DiskError: full disk, no permission.
        """
        self._description = as_json(description)
        if self.missing() and (self.folder / SEAL).exists():  # damaged since
            write_atomic(self.folder / _DONE, as_json(self.done))
            (self.folder / SEAL).unlink()
        write_atomic(self.folder / DESCRIPTION, self._description)

    def add(self, name: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Write a file.

        Raises:
            DiskError: full disk, no permission.
        """
        data = bytes(save_tensors({key: np.ascontiguousarray(value) for key, value in tensors.items()}))
        write_atomic(self.folder / name, data)
        self.done[name] = sha256(data)
        write_atomic(self.folder / _DONE, as_json(self.done))

    def finish(self, log: Mapping[str, Any]) -> None:
        """Seal the folder; one that is sealed keeps the log of the run that did the work.

        Raises:
            DiskError: full disk, no permission.
        """
        seal = {**self.done, DESCRIPTION: sha256(self._description)}
        if _hashes(self.folder / SEAL) != seal:
            write_atomic(self.folder / self.kind.log, as_json(log))
            write_atomic(self.folder / SEAL, as_json(seal))
        (self.folder / _DONE).unlink(missing_ok=True)


def is_there(out: Path, description: Mapping[str, Any], measured: Sequence[str], overwrite: bool, kind: Kind) -> bool:
    """Whether the folder that is asked for is at `out` already; whether it is intact is still to be checked.

    Args:
        measured: keys of the description that are found out on the way, and so not compared.

    Raises:
        ConfigError: another of this kind is there, naming what differs.
        DiskError: something that is not ours.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    old = read_description(out, kind)
    if old is None:
        raise DiskError(
            f"{out} exists and is no store of this program that holds {kind.what}; nothing there is touched. Choose "
            "another `out`"
        )
    if overwrite:
        return False
    if differences := compare(_without(old, measured), description):
        raise ConfigError(
            f"{out} holds another store of {kind.what}:\n  " + "\n  ".join(differences) + "\nchoose another `out`, or "
            "replace it with overwrite=true"
        )
    return True


def begun(
    work: Path, description: Mapping[str, Any], measured: Sequence[str], overwrite: bool, kind: Kind
) -> dict[str, Any] | None:
    """The description of the unfinished folder at `work`, to be gone on with; None: begin.

    Raises:
        ConfigError: it was begun otherwise, naming what differs.
        DiskError: something that is not ours.
    """
    if not [path for path in work.iterdir() if path.name != ".lock" and not path.name.endswith(".tmp")]:
        return None
    old = read_description(work, kind)
    if old is None:
        raise DiskError(f"{work} holds no unfinished store of {kind.what}; move it away, or choose another `out`")
    differences = compare(_without(old, measured), description)
    if not differences and set(measured) <= set(old):
        return old
    if not overwrite:
        raise ConfigError(
            f"{work} is an unfinished store of {kind.what} that was begun otherwise:\n  "
            + "\n  ".join(differences or [f"{', '.join(measured)}: missing"])
            + "\ngive what it was begun with, choose another `out`, or begin again with overwrite=true"
        )
    _clear(work, kind)
    return None


@contextlib.contextmanager
def working(out: Path) -> Iterator[Path]:
    """`<out>.incomplete`, made and locked. If this made it and leaves nothing in it, it goes again.

    Raises:
        DiskError: it cannot be made, or another process writes there.
    """
    work = out.with_name(out.name + disk.INCOMPLETE)
    is_new = not work.exists()
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot make {work}: {error.strerror}; choose another `out`") from error
    with disk.locked(work):
        try:
            yield work
        except BaseException:
            if is_new and [path.name for path in work.iterdir()] == [".lock"]:
                with contextlib.suppress(OSError):
                    (work / ".lock").unlink()
                    work.rmdir()
            raise


def publish(work: Path, out: Path, overwrite: bool, kind: Kind) -> None:
    """`<out>.incomplete` becomes `out`; an older one makes room only now that the new one is whole.

    Raises:
        DiskError: something is in the way.
    """
    replaced = out.with_name(out.name + ".replaced")
    try:
        (work / ".lock").unlink(missing_ok=True)
        if out.exists() and any(out.iterdir()):
            if not overwrite or read_description(out, kind) is None:
                raise DiskError(f"{out} appeared meanwhile; the new store is complete in {work}: move it yourself")
            if replaced.exists():  # of a replacement that was cut off
                remove(replaced, kind)
            out.replace(replaced)
        work.replace(out)
        (out / ".lock").unlink(missing_ok=True)  # of a process that came meanwhile
    except OSError as error:
        raise DiskError(
            f"the store of {kind.what} is complete in {work} but cannot be renamed to {out}: {error.strerror}; fix "
            "that and run the same command again"
        ) from error
    if replaced.exists():
        remove(replaced, kind)


def remove(folder: Path, kind: Kind) -> None:
    """Delete a folder of ours, store.json last: what is left of a removal that was cut off is still ours.

    Raises:
        DiskError: it is none, holds other things, or cannot be removed.
    """
    _clear(folder, kind)
    try:
        (folder / ".lock").unlink(missing_ok=True)
        folder.rmdir()
    except OSError as error:
        raise DiskError(f"cannot remove {folder}: {error}; remove it yourself") from error


def _clear(folder: Path, kind: Kind) -> None:
    if read_description(folder, kind) is None:
        raise DiskError(f"{folder} holds no {DESCRIPTION} of this program; it is not removed. Choose another `out`")
    present = sorted(path for path in folder.iterdir() if path.name != ".lock")
    ours = (DESCRIPTION, SEAL, kind.log, _DONE)
    strays = [p.name for p in present if not (p.name in ours or _OURS.fullmatch(p.name)) or p.is_dir()]
    if strays:
        raise DiskError(f"{folder} holds {', '.join(strays[:5])} beside the store; move that away first")
    try:
        for path in sorted(present, key=lambda path: path.name == DESCRIPTION):
            path.unlink()
    except OSError as error:
        raise DiskError(f"cannot remove {folder}: {error}; remove it yourself") from error


def require_space(folder: Path, need: int, ways: str) -> None:
    """Check the free disk.

    Raises:
        DiskError: less than `need` bytes; `ways` says how to need less.
    """
    have = shutil.disk_usage(folder).free
    if have < need:
        raise DiskError(f"{folder}: {have / 1e9:.2f} GB free, {need / 1e9:.2f} GB needed; free some space, or {ways}")


def as_json(content: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file: the same for the same content."""
    return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def short(value: Any) -> str:
    """A value in a message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 100 else text[:97] + "..."


def _hashes(path: Path) -> dict[str, Any]:
    """File names and their hashes as a JSON file of ours gives them; none where it does not."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def _without(content: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in keys}
