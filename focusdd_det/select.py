"""Scores of one class -> which sources become key patches and which backgrounds, composite by composite. Arrays only.

The drawing is sequential: composite i takes the best unused sources as key patches and then its backgrounds from the
unused rest. So the composites of a small set are the first ones of a larger set (DESIGN section 3, selection).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from focusdd_det.layouts import Layout
from focusdd_det.seeds import uniform

Order = NDArray[np.int64]


@dataclass(frozen=True)
class Candidates:
    """Sources of one class, as columns of equal length n.

    Attributes:
        ids: [n] int64, rows of the score store.
        sha: [n, 32] uint8, content hashes; they break ties, so that neither path nor order ever decides.
        folder: [n] int32, index of the class folder: the stratum.
        p: [n] float64 in [0, 1], confidence, rounded to 1e-4 (not that of a source which was looked at `once`).
        score: [n] int64, realism score S in units of 1e-4.
        phash: [n] uint64, difference hash of the view.
        features: [n, d] float16, the ViT's, of length 1; only for methods that need them.
        once: [n] bool, of a screening: looked at once, so p and score are the best that the source can have, not what
            it has.
        entropy: [n] float64, of the view's grey levels, bits; NaN where nobody looked.
        unusable: [n] bool, fine as a view, but not as a whole. They keep their place, so that a build that goes on
            ranks as the one did that found out.
    """

    ids: Order
    sha: NDArray[np.uint8]
    folder: NDArray[np.int32]
    p: NDArray[np.float64]
    score: Order
    phash: NDArray[np.uint64]
    features: NDArray[np.float16] | None = None
    once: NDArray[np.bool_] | None = None
    entropy: NDArray[np.float64] | None = None
    unusable: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        n = len(self.ids)
        sizes = {len(column) for column in (self.sha, self.folder, self.p, self.score, self.phash)}
        if sizes - {n} or self.sha.shape != (n, 32):
            raise ValueError(f"candidates need columns of one length and sha [n, 32]; got {sizes}, {self.sha.shape}")
        if self.features is not None and (self.features.ndim != 2 or len(self.features) != n):
            raise ValueError(f"candidates need features [{n}, d], got {self.features.shape}")
        if self.entropy is not None and self.entropy.shape != (n,):
            raise ValueError(f"candidates need entropy [{n}], got {self.entropy.shape}")

    def __len__(self) -> int:
        return len(self.ids)

    def barred(self, least_entropy: float) -> NDArray[np.bool_]:
        """[n] not to be chosen: unusable, or of less entropy, in bits (clip art, cut-outs on a blank ground)."""
        barred = np.zeros(len(self), np.bool_) if self.unusable is None else self.unusable.copy()
        return barred if self.entropy is None else barred | (self.entropy < least_entropy)

    def at(self, positions: Order) -> Candidates:
        """Some of them, copied."""
        columns: dict[str, Any] = {n: None if column is None else column[positions] for n, column in vars(self).items()}
        return Candidates(**columns)


def joined(blocks: Iterable[Candidates]) -> Candidates:
    """Blocks of one class as one table. They are freed on the way: a large class is not in memory twice."""
    parts: list[dict[str, Any]] = [dict(vars(block)) for block in blocks]
    if len(parts) == 1:
        return Candidates(**parts[0])
    columns: dict[str, Any] = {}
    for field in fields(Candidates):
        column = [part.pop(field.name) for part in parts]
        columns[field.name] = None if column[0] is None else _stacked(column)
    return Candidates(**columns)


def _stacked(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """As np.concatenate; empties the list."""
    whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    end = len(whole)
    while parts:
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return whole


def ranked(candidates: Candidates, key: Order, stratify: bool) -> Order:
    """Positions by falling `key`, ties by content hash; with `stratify`, round robin over the folders, best first."""
    order = _sorted(candidates.sha, -key)
    if not stratify or not len(order):
        return order
    folders = candidates.folder[order]
    by_folder = np.argsort(folders, kind="stable")  # inside a folder the best come first
    starts = np.r_[0, np.flatnonzero(np.diff(folders[by_folder])) + 1]
    lengths = np.diff(np.r_[starts, len(order)])
    turn = np.empty(len(order), np.int64)
    turn[by_folder] = np.arange(len(order)) - np.repeat(starts, lengths)
    return order[np.argsort(turn, kind="stable")]


def background_order(candidates: Candidates, seed: int, group: str) -> Order:
    """Positions in the order of a draw without replacement with probability proportional to p.

    The key is u^(1/p), u from hash(seed, class, sha256), the largest first (Efraimidis and Spirakis 2006).
    """
    each = (
        math.log(uniform(seed, group, row.tobytes().hex())) / p if p > 0 else -math.inf
        for row, p in zip(candidates.sha, candidates.p, strict=True)
    )
    keys = np.fromiter(each, np.float64, len(candidates))
    return _sorted(candidates.sha, np.negative(keys, out=keys))


@dataclass(frozen=True)
class Proposal:
    """The sources of one composite, as positions in the candidates; `turn` counts how often the sources ran out."""

    number: int
    keys: tuple[int, ...]
    backgrounds: tuple[int, ...]
    turn: int = 0


def proposals(
    order: Order,
    backgrounds: Order,
    phash: NDArray[np.uint64],
    layout: Callable[[int], Layout],
    near: int = 0,
    banned: NDArray[np.bool_] | None = None,
    reserved: int = 0,
    reuse: bool = False,
) -> Iterator[Proposal]:
    """Composites of one class, best first, until the sources run out. A pure function of its arguments.

    Args:
        order: positions, best key patch first.
        backgrounds: positions, first drawn background first.
        phash: [n] difference hashes by position.
        layout: number of a composite -> how many of each it takes.
        near: a source whose hash differs in at most this many bits from a chosen one is passed over for good; 0: off.
        banned: [n] those that turned out to be unusable, or are not wanted.
        reserved: the first so many of `order` never become backgrounds (`selection: paper`).
        reuse: start again when the sources run out (`short_class: reuse`), each time one source further on, so that
            the same sources meet in other groups.
    """
    no_key = np.zeros(len(phash), np.bool_) if banned is None else banned.copy()
    no_background = no_key.copy()
    no_background[order[:reserved]] = True
    number = 0
    for turn in itertools.count():
        used: set[int] = set()
        chosen = _Chosen(phash, near)
        key_stream = _unused(np.roll(order, -turn), used, no_key, chosen)
        background_stream = _unused(np.roll(backgrounds, -turn), used, no_background, chosen)
        first = number
        while True:
            shape = layout(number)
            keys = _take(key_stream, shape.n_key, used, chosen)
            rest = None if keys is None else _take(background_stream, shape.n_background, used, chosen)
            if keys is None or rest is None:
                break
            yield Proposal(number, keys, rest, turn)
            number += 1
        if not reuse or number == first:
            return


class _Chosen:
    """The difference hashes chosen so far."""

    def __init__(self, phash: NDArray[np.uint64], near: int) -> None:
        self.phash = phash
        self.near = near
        self.hashes = np.empty(64, np.uint64)  # room, doubled when it is full
        self.count = 0

    def add(self, position: int) -> None:
        if self.count == len(self.hashes):
            self.hashes = np.resize(self.hashes, 2 * self.count)
        self.hashes[self.count] = self.phash[position]
        self.count += 1

    def has_like(self, position: int) -> bool:
        if not self.near:
            return False
        differing = np.bitwise_xor(self.hashes[: self.count], self.phash[position])
        return bool((np.bitwise_count(differing) <= self.near).any())


def _unused(order: Order, used: set[int], banned: NDArray[np.bool_], chosen: _Chosen) -> Iterator[int]:
    for position in map(int, order):
        if position not in used and not banned[position] and not chosen.has_like(position):
            yield position


def _take(stream: Iterator[int], count: int, used: set[int], chosen: _Chosen) -> tuple[int, ...] | None:
    taken = []
    for _ in range(count):
        position = next(stream, None)
        if position is None:
            return None
        used.add(position)
        chosen.add(position)
        taken.append(position)
    return tuple(taken)


def _sorted(sha: NDArray[np.uint8], key: NDArray[np.int64] | NDArray[np.float64]) -> Order:
    """Positions by rising `key`, ties by content hash.

    A score store gives its sources by rising hash: there a stable sort of the keys alone does it, and the hashes, four
    times as large, are not copied.
    """
    first = sha[:, :8].copy().view(">u8").ravel()
    if (first[1:] > first[:-1]).all():
        return np.argsort(key, kind="stable")
    return np.lexsort((*_hash_columns(sha), key))


def _hash_columns(sha: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], ...]:
    """Content hashes as sort keys for lexsort: least significant word first."""
    words = np.ascontiguousarray(sha).reshape(len(sha), 32).view(">u8").astype(np.uint64)
    return tuple(words[:, i] for i in (3, 2, 1, 0))
