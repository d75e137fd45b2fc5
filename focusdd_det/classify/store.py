"""A teacher's logits for views that were drawn beforehand, on disk.

store.json                 what determines the bytes: the set, the teacher, how views were drawn, T, top k, versions
epoch_00000.safetensors    views int32 [N, 10] and logits float16 [N, C]; with top k: values float16 [N, K],
                           indices int32 [N, K], rest float32 [N] (log of the sum of exp(t/T) over the others)
COMPLETE                   the sha256 of every file above, written last;  relabel.log.json: command, times

Files are memory-mapped and checked against their hashes when they are first used. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save as save_tensors
from torch import Tensor

from focusdd_det.classify.classset import ClassSet
from focusdd_det.classify.views import FIELDS, Row, ViewSettings
from focusdd_det.detset import sha256, write_atomic
from focusdd_det.errors import ConfigError, DiskError, VerifyError
from focusdd_det.selector import sha256_file

FORMAT = "focusdd_det logits 1"
LOG = "relabel.log.json"
_DONE = "done.json"  # the hashes of the epochs of an unfinished store
_OURS = re.compile(r"COMPLETE|store\.json|relabel\.log\.json|done\.json|epoch_\d{5,}\.safetensors|\..*\.tmp")
_OPEN_EPOCHS = 4
_AGAIN = "make it again with tools/relabel_cls.py"


def epoch_name(epoch: int) -> str:
    """File of an epoch."""
    return f"epoch_{epoch:05d}.safetensors"


def bytes_of_epoch(pictures: int, classes: int, topk: int) -> int:
    """Size of an epoch's file, without its header of some 300 bytes."""
    return pictures * (4 * len(FIELDS) + (topk * 6 + 4 if topk else classes * 2))


def compare(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two descriptions: `key: old value, now new value`."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += compare(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {_short(a)}, now {_short(b)}")
    return lines


def is_store(folder: Path) -> bool:
    """Whether a folder holds a store, or part of one, of this package."""
    return read_description(folder) is not None


def read_description(folder: Path) -> dict[str, Any] | None:
    """store.json of a folder; None where there is none of ours."""
    try:
        content = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


class LogitStore:
    """A finished store, read row by row.

    Attributes:
        folder: where it lies.
        sha256: hash of all of it.
        description: store.json.
        settings: how its views were drawn.
        pool: epochs of views that it holds.
        temperature, topk: T of `rest`; how many logits a view has, 0 for all.
        names: the classes, in the order of the logits.
        accuracy: of the teacher, as measured before it labelled: {"top1", "top5", "n", ...}; None: not measured.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a store.

        Raises:
            VerifyError: no store, an unfinished or a damaged one.
        """
        self.folder = Path(folder)
        seal = self._read_seal()
        self.description = self._read_description(seal)
        try:
            described = self.description
            self.sha256 = sha256((self.folder / "COMPLETE").read_bytes())
            self.pool, self.topk = int(described["pool"]), int(described["topk"])
            self.temperature = float(described["temperature"])
            self.names = tuple(described["set"]["names"])
            self.accuracy: dict[str, Any] | None = described["accuracy"]
            views = described["views"]
            self.settings = ViewSettings(**{**views, "scale": tuple(views["scale"]), "ratio": tuple(views["ratio"])})
            self._pictures, self._set = int(described["set"]["n"]), str(described["set"]["sha256"])
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise VerifyError(
                f"{self.folder / 'store.json'}: not a description of a store ({error}); {_AGAIN}"
            ) from error
        expected = {"store.json", *(epoch_name(epoch) for epoch in range(self.pool))}
        if set(seal) != expected:
            raise VerifyError(
                f"{self.folder / 'COMPLETE'} does not name the {self.pool} epochs of store.json; {_AGAIN}"
            )
        self._hashes = seal
        self._checked: set[int] = set()
        self._open: OrderedDict[int, _Epoch] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # file handles stay in their process

    def check(self, class_set: ClassSet, size: int, pool: int = 0) -> None:
        """Refuse a use that the store was not made for.

        Args:
            class_set: the pictures to train on.
            size: of the views, px.
            pool: how many epochs of different views are wanted; 0: whatever it holds.

        Raises:
            VerifyError: other pictures, or other classes or another order of them.
            ConfigError: another resolution, or fewer epochs than are wanted.
        """
        if tuple(class_set.names) != self.names:
            same = sorted(class_set.names) == sorted(self.names)
            raise VerifyError(
                f"{self.folder} was made for "
                + ("these classes in another order" if same else f"{len(self.names)} other classes")
                + f": {_names(self.names)}\n  the set has: {_names(class_set.names)}\n{_AGAIN.capitalize()}"
            )
        if class_set.sha256 != self._set or len(class_set) != self._pictures:
            raise VerifyError(
                f"{self.folder} was made for another set ({self._pictures} pictures, sha256 {self._set[:12]}) than "
                f"{class_set.folder} ({len(class_set)} pictures, sha256 {class_set.sha256[:12]}); {_AGAIN} for this set"
            )
        if size != self.settings.size:
            raise ConfigError(
                f"{self.folder} holds views of {self.settings.size} px, but {size} px are asked for; train at "
                f"imgsz={self.settings.size}, or {_AGAIN} with size={size}"
            )
        if pool > self.pool:
            raise ConfigError(
                f"{self.folder} holds {self.pool} epochs of views, but pool={pool} are asked for; give at most that, "
                f"or {_AGAIN} with epochs={pool}"
            )

    def row(self, epoch: int, index: int) -> tuple[Row, dict[str, Tensor]]:
        """The view of a picture in an epoch (see views.FIELDS), and what the loss needs: `logits` float16 [C], or
        `values` float16 [K], `indices` int32 [K] and `rest` float32 [].

        Raises:
            VerifyError: the epoch's file is missing or damaged.
        """
        file = self._epoch(epoch)
        return file.views[index], file.soft(index)

    def view(self, epoch: int, index: int) -> Row:
        """The view alone.

        Raises:
            VerifyError: as `row`.
        """
        row: Row = self._epoch(epoch).views[index]
        return row

    def _epoch(self, epoch: int) -> _Epoch:
        file = self._open.get(epoch)
        if file is not None:
            return file
        if not 0 <= epoch < self.pool:
            raise VerifyError(f"{self.folder} holds the epochs 0 to {self.pool - 1}, not {epoch}")
        path = self.folder / epoch_name(epoch)
        if epoch not in self._checked:
            try:
                digest = sha256_file(path)
            except OSError as error:
                raise VerifyError(f"cannot read {path}: {error.strerror}; {_AGAIN}") from error
            if digest != self._hashes[path.name]:
                raise VerifyError(f"{path} is damaged: not the bytes that COMPLETE names; {_AGAIN} (overwrite=true)")
            self._checked.add(epoch)
        file = _Epoch(path, self._pictures, len(self.names), self.topk)
        self._open[epoch] = file
        while len(self._open) > _OPEN_EPOCHS:
            self._open.popitem(last=False)
        return file

    def _read_seal(self) -> dict[str, str]:
        path = self.folder / "COMPLETE"
        try:
            seal = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(seal, dict) or not all(isinstance(value, str) for value in seal.values()):
                raise ValueError("expected a hash for each file")
        except FileNotFoundError as error:
            unfinished = self.folder.with_name(self.folder.name + ".incomplete")
            hint = (
                f"; {unfinished} is an unfinished one: run the same relabel command again"
                if unfinished.is_dir()
                else ""
            )
            raise VerifyError(f"{self.folder} is not a finished store of logits (no COMPLETE){hint}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise VerifyError(f"{path}: {error}; {_AGAIN}") from error
        return seal

    def _read_description(self, seal: Mapping[str, str]) -> dict[str, Any]:
        path = self.folder / "store.json"
        try:
            digest = sha256(path.read_bytes())
        except OSError as error:
            raise VerifyError(f"cannot read {path}: {error.strerror}; {_AGAIN}") from error
        described = read_description(self.folder)
        if described is None or digest != seal.get("store.json"):
            raise VerifyError(f"{path} is damaged: not the bytes that COMPLETE names; {_AGAIN} (overwrite=true)")
        return described


class _Epoch:
    """An open epoch file: views in memory, logits memory-mapped."""

    def __init__(self, path: Path, pictures: int, classes: int, topk: int) -> None:
        shapes = {"views": [pictures, len(FIELDS)]}
        shapes |= (
            {"values": [pictures, topk], "indices": [pictures, topk], "rest": [pictures]}
            if topk
            else {"logits": [pictures, classes]}
        )
        try:
            file: Any = safe_open(str(path), framework="pt")  # type: ignore[no-untyped-call]
            found = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  (no mapping)
            if found != shapes:
                raise ValueError(f"holds {found}, expected {shapes}")
            self.views: NDArray[np.int32] = file.get_tensor("views").numpy()
            self._rest: Tensor | None = file.get_tensor("rest") if topk else None
            self._slices = {key: file.get_slice(key) for key in shapes if key not in ("views", "rest")}
        except Exception as error:  # safetensors raises its own kinds
            raise VerifyError(f"{path}: {error}; {_AGAIN}") from error

    def soft(self, index: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {key: part[index : index + 1][0] for key, part in self._slices.items()}
        if self._rest is not None:
            found["rest"] = self._rest[index]
        return found


class StoreWriter:
    """An unfinished store: epochs are added in any order, each whole or not at all.

    Attributes:
        folder: `<store>.incomplete`.
        description: store.json.
    """

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        """Go on with what is there, or begin; the caller holds the lock and has compared the descriptions.

        Raises:
            DiskError: full disk, no permission.
        """
        self.folder, self.description = folder, description
        self.done: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            recorded = json.loads((folder / _DONE).read_text(encoding="utf-8"))
            for name, digest in recorded.items() if isinstance(recorded, dict) else ():
                with contextlib.suppress(OSError):
                    if sha256_file(folder / Path(name).name) == digest:
                        self.done[name] = digest
        write_atomic(folder / "store.json", _json(description))

    def missing(self) -> list[int]:
        """The epochs that are not written yet."""
        return [epoch for epoch in range(self.description["pool"]) if epoch_name(epoch) not in self.done]

    def add(self, epoch: int, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Write an epoch.

        Raises:
            DiskError: full disk, no permission.
        """
        data = bytes(save_tensors(dict(tensors)))
        write_atomic(self.folder / epoch_name(epoch), data)
        self.done[epoch_name(epoch)] = sha256(data)
        write_atomic(self.folder / _DONE, _json(self.done))

    def finish(self, log: Mapping[str, Any]) -> None:
        """Seal the store.

        Raises:
            DiskError: full disk, no permission.
        """
        write_atomic(self.folder / LOG, _json(dict(log)))
        seal = {**self.done, "store.json": sha256(_json(self.description))}
        write_atomic(self.folder / "COMPLETE", _json(seal))
        (self.folder / _DONE).unlink(missing_ok=True)


def remove_store(folder: Path) -> None:
    """Delete a store of ours, store.json last: what is left of a removal that was cut off is still ours.

    Raises:
        DiskError: the folder is no store, holds other things, or cannot be removed.
    """
    clear_store(folder)
    try:
        (folder / ".lock").unlink(missing_ok=True)
        folder.rmdir()
    except OSError as error:
        raise DiskError(f"cannot remove {folder}: {error}; remove it yourself") from error


def clear_store(folder: Path) -> None:
    """Delete the files of a store of ours; the folder and its lock stay.

    Raises:
        DiskError: as `remove_store`.
    """
    if not is_store(folder):
        raise DiskError(f"{folder} holds no store.json of this program; it is not removed. Choose another `out`")
    present = sorted(path for path in folder.iterdir() if path.name != ".lock")
    strays = [path.name for path in present if not _OURS.fullmatch(path.name) or path.is_dir()]
    if strays:
        raise DiskError(f"{folder} holds {', '.join(strays[:5])} beside the store; move that away first")
    try:
        for path in sorted(present, key=lambda path: path.name == "store.json"):
            path.unlink()
    except OSError as error:
        raise DiskError(f"cannot remove {folder}: {error}; remove it yourself") from error


def require_space(folder: Path, need: int) -> None:
    """Check the free disk.

    Raises:
        DiskError: less than `need` bytes.
    """
    have = shutil.disk_usage(folder).free
    if have < need:
        raise DiskError(
            f"{folder}: {have / 1e9:.2f} GB free, {need / 1e9:.2f} GB needed; free some space, choose another `out`, "
            "fewer `epochs` or a `topk`"
        )


def top_k(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest logits and the rest.

    Args:
        logits: [B, C] float32.

    Returns:
        values float16 [B, K], indices int32 [B, K], and rest float32 [B]: log of the sum of exp(t/T) over the other
        classes, -inf when there are none.
    """
    values, indices = logits.topk(k, dim=1)
    rest = (logits / temperature).scatter(1, indices, float("-inf")).logsumexp(dim=1)
    return values.half(), indices.to(torch.int32), rest


def mass_by_k(logits: Tensor, temperature: float) -> NDArray[np.float64]:
    """[C] float64: the mean share of softmax(t/T) that the k + 1 largest logits hold."""
    p = (logits.double() / temperature).softmax(dim=1).sort(dim=1, descending=True).values
    return np.asarray(p.cumsum(dim=1).mean(dim=0).cpu().numpy(), np.float64)


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f", ... ({len(names)})" if len(names) > 20 else "")
