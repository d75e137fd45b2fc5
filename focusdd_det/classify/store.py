"""A teacher's logits for views that were drawn beforehand, on disk.

store.json                 what the labels follow from: the set, the teacher and the kind of device it ran on, how views
                           were drawn, T, top k, versions
epoch_00000.safetensors    views int32 [N, 10] and logits float16 [N, C]; with top k: values float16 [N, K],
                           indices int32 [N, K], rest float32 [N] (log of the sum of exp(t/T) over the others)
COMPLETE                   the sha256 of every file above, written last;  relabel.log.json: command, threads, times

Files are memory-mapped; when one is first used, it is checked against its hash, and its views and labels are looked
through. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from focusdd_det.classify.classset import ClassSet
from focusdd_det.classify.views import FIELDS, Row, ViewSettings
from focusdd_det.disk import sha256
from focusdd_det.errors import ConfigError, VerifyError
from focusdd_det.sealed import DESCRIPTION, SEAL, Kind, check_file, open_sealed

KIND = Kind("focusdd_det logits 1", "logits", "tools/relabel_cls.py", log="relabel.log.json")
_OPEN_EPOCHS = 4
_ROWS = 4096  # logits that are looked through at once
_DTYPES = {"views": "I32", "logits": "F16", "values": "F16", "indices": "I32", "rest": "F32"}


def epoch_name(epoch: int) -> str:
    """File of an epoch."""
    return f"epoch_{epoch:05d}.safetensors"


def bytes_of_epoch(pictures: int, classes: int, topk: int) -> int:
    """Size of an epoch's file, without its header of some 300 bytes."""
    return pictures * (4 * len(FIELDS) + (topk * 6 + 4 if topk else classes * 2))


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
        self.description, self._hashes = open_sealed(self.folder, KIND)
        try:
            self._take(self.description)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise VerifyError(
                f"{self.folder / DESCRIPTION}: not a description of a store: {what}; {KIND.again}"
            ) from error
        if len(self._hashes) != self.pool or set(self._hashes) != set(map(epoch_name, range(self.pool))):
            raise VerifyError(f"{self.folder / SEAL} does not name the {self.pool} epochs of store.json; {KIND.again}")
        self.sha256 = sha256((self.folder / SEAL).read_bytes())
        self._checked = torch.zeros(self.pool, dtype=torch.uint8)
        with contextlib.suppress(RuntimeError, OSError):  # what one loading process checked, the others need not
            self._checked.share_memory_()  # type: ignore[no-untyped-call]
        self._open: OrderedDict[int, _Epoch] = OrderedDict()

    def _take(self, described: Mapping[str, Any]) -> None:
        """Attributes from store.json, whoever wrote it."""
        the_set, teacher, views, accuracy = (described[key] for key in ("set", "teacher", "views", "accuracy"))
        names, topk = the_set["names"], described["topk"]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError("set.names: expected the names of the classes")
        checks = [
            (_whole(the_set["n"], 1), "set.n", "a number of pictures"),
            (isinstance(the_set["sha256"], str), "set.sha256", "a hash"),
            (isinstance(teacher, dict), "teacher", "its name and hashes"),
            (_whole(described["pool"], 1), "pool", "a number of epochs"),
            (_whole(topk, 0) and topk <= len(names), "topk", f"0 to {len(names)}"),
            (_number(described["temperature"]) and described["temperature"] > 0, "temperature", "above 0"),
            (all(_whole(views[key]) for key in ("size", "seed")), "views", "a whole size and seed"),
            (all(_number(views[key]) for key in ("flip", "cutmix", "beta")), "views", "numbers for flip, cutmix, beta"),
            (accuracy is None or isinstance(accuracy, dict), "accuracy", "what was measured, or null"),
        ]
        for key in ("scale", "ratio"):
            checks.append(
                (isinstance(views[key], list) and all(map(_number, views[key])), f"views.{key}", "two numbers")
            )
        for key in ("name", "sha256", "spec"):
            checks.append((isinstance(teacher, dict) and isinstance(teacher[key], str), f"teacher.{key}", "a text"))
        if isinstance(accuracy, dict):
            checks += [(_number(accuracy[key]), f"accuracy.{key}", "a number") for key in ("top1", "top5", "n")]
        problems = [f"{key}: expected {text}" for ok, key, text in checks if not ok]
        if problems:
            raise ValueError("; ".join(problems))
        self.pool, self.topk, self.temperature = int(described["pool"]), int(topk), float(described["temperature"])
        self.names, self.accuracy = tuple(names), accuracy
        self.settings = ViewSettings(**{**views, "scale": tuple(views["scale"]), "ratio": tuple(views["ratio"])})
        self._pictures, self._set = int(the_set["n"]), the_set["sha256"]

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
                + f": {_names(self.names)}\n  the set has: {_names(class_set.names)}\n{KIND.again.capitalize()}"
            )
        if class_set.sha256 != self._set or len(class_set) != self._pictures:
            raise VerifyError(
                f"{self.folder} was made for another set ({self._pictures} pictures, sha256 {self._set[:12]}) than "
                f"{class_set.folder} ({len(class_set)} pictures, sha256 {class_set.sha256[:12]}); {KIND.again} for "
                "this set"
            )
        if size != self.settings.size:
            raise ConfigError(
                f"{self.folder} holds views of {self.settings.size} px, but {size} px are asked for; train at "
                f"imgsz={self.settings.size}, or {KIND.again} with size={size}"
            )
        if pool > self.pool:
            raise ConfigError(
                f"{self.folder} holds {self.pool} epochs of views, but pool={pool} are asked for; give at most that, "
                f"or {KIND.again} with epochs={pool}"
            )

    def row(self, epoch: int, index: int) -> tuple[Row, dict[str, Tensor]]:
        """The view of a picture in an epoch (see views.FIELDS), and what the loss needs: `logits` float16 [C], or
        `values` float16 [K], `indices` int32 [K] and `rest` float32 [].

        Raises:
            VerifyError: the epoch's file is missing, damaged, or holds what cannot be.
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
        if not self._checked[epoch]:
            with self._turn(path):
                self._check_file(epoch, path)
        file = _Epoch(path, self._pictures, len(self.names), self.topk)
        self._open[epoch] = file
        while len(self._open) > _OPEN_EPOCHS:
            self._open.popitem(last=False)
        return file

    def _check_file(self, epoch: int, path: Path) -> None:
        if self._checked[epoch]:  # by another process meanwhile
            return
        check_file(path, self._hashes[path.name], KIND)
        _Epoch(path, self._pictures, len(self.names), self.topk).check(self.settings.size)
        self._checked[epoch] = 1

    @contextlib.contextmanager
    def _turn(self, path: Path) -> Iterator[None]:
        """One process at a time, so that the others find a file checked. Where the file system knows no locks, each
        checks for itself."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                file = stack.enter_context(path.open("rb"))
                fcntl.flock(file, fcntl.LOCK_EX)  # ends with the file
            yield


class _Epoch:
    """An open epoch file: views in memory, logits memory-mapped."""

    def __init__(self, path: Path, pictures: int, classes: int, topk: int) -> None:
        shapes = {"views": [pictures, len(FIELDS)]}
        shapes |= (
            {"values": [pictures, topk], "indices": [pictures, topk], "rest": [pictures]}
            if topk
            else {"logits": [pictures, classes]}
        )
        self._path, self._classes = path, classes
        try:
            file: Any = safe_open(str(path), framework="pt")  # type: ignore[no-untyped-call]
            slices: dict[str, Any] = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
            found = {key: [part.get_dtype(), *part.get_shape()] for key, part in slices.items()}
            expected = {key: [_DTYPES[key], *shape] for key, shape in shapes.items()}
            if found != expected:
                raise ValueError(f"holds {found}, expected {expected}")
            self.views: NDArray[np.int32] = file.get_tensor("views").numpy()
            self._rest: Tensor | None = file.get_tensor("rest") if topk else None
            self._slices = {key: part for key, part in slices.items() if key not in ("views", "rest")}
        except Exception as error:  # safetensors raises its own kinds
            raise VerifyError(f"{path}: {error}; {KIND.again}") from error

    def check(self, size: int) -> None:
        """Refuse what no relabelling writes; whether a crop lies in its picture shows when that is decoded.

        Raises:
            VerifyError: views, logits or indices that cannot be.
        """
        x, y, w, h, flip, partner, bx, by, bw, bh = self.views.astype(np.int64).T
        alone = partner == -1
        fits = np.minimum(bw, bh) >= 1
        fits &= (np.minimum(bx, by) >= 0) & (np.maximum(bx + bw, by + bh) <= size)
        empty = (bx == 0) & (by == 0) & (bw == 0) & (bh == 0)
        self._require(
            (np.minimum(x, y) >= 0) & (np.minimum(w, h) >= 1), "the crop {0}, {1}, {2} x {3} lies in no picture"
        )
        self._require((flip == 0) | (flip == 1), "the flip {4} is neither 0 nor 1")
        self._require((partner >= -1) & (partner < len(x)), f"the partner {{5}} is not one of {len(x)} pictures")
        self._require(
            np.where(alone, empty, fits),
            f"the box {{6}}, {{7}}, {{8}} x {{9}} with partner {{5}} does not fit a view of {size} px",
        )
        for first in range(0, len(x), _ROWS):
            part = {key: kept[first : first + _ROWS] for key, kept in self._slices.items()}
            for key in part.keys() & {"logits", "values"}:
                self._require(part[key].isfinite().all(dim=1).numpy(), f"{key} that are not finite", first)
            if "indices" in part:
                indices = part["indices"].sort(dim=1).values
                known = (indices[:, :1] >= 0).all(dim=1) & (indices[:, -1:] < self._classes).all(dim=1)
                self._require(known.numpy(), f"indices beyond the {self._classes} classes", first)
                self._require((indices.diff(dim=1) > 0).all(dim=1).numpy(), "indices that name a class twice", first)
        if self._rest is not None:
            self._require((self._rest < math.inf).numpy(), "a rest that is no number")

    def _require(self, good: NDArray[np.bool_], what: str, first: int = 0) -> None:
        if not good.all():
            bad = first + int(np.argmin(good))
            raise VerifyError(f"{self._path}: picture {bad}: {what.format(*self.views[bad].tolist())}; {KIND.again}")

    def soft(self, index: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {key: part[index : index + 1][0] for key, part in self._slices.items()}
        if self._rest is not None:
            found["rest"] = self._rest[index]
        return found


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


def shares_by_k(logits: Tensor, temperature: float) -> NDArray[np.float64]:
    """[B, C] float64: the share of softmax(t/T) that each row's k + 1 largest logits hold."""
    p = (logits.double() / temperature).softmax(dim=1).sort(dim=1, descending=True).values
    return np.asarray(p.cumsum(dim=1).cpu().numpy(), np.float64)


def _whole(value: object, least: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f", ... ({len(names)})" if len(names) > 20 else "")
