"""What a build must choose, by the definition alone (DESIGN section 3): Python's own sort, one source after the other.

None of the build's ranking is used here, so that what the two choose can be compared, ties included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from focusdd_det.config import SetConfig
from focusdd_det.layouts import Layouts
from focusdd_det.plan import Group
from focusdd_det.seeds import uniform

MASS = 1 - 0.99**9  # 0.0865: what LF-ViT's attention adds up to
STEPS = 65535  # a probability is a whole multiple of 1/65535 (scoring/contents.py)


class Patch(NamedTuple):
    """A key patch: the source's content hash and the top left token (row, column) of its window."""

    sha: bytes
    corner: tuple[int, int]


class Composite(NamedTuple):
    """What one composite is made of, in order; backgrounds are content hashes."""

    keys: tuple[Patch, ...]
    backgrounds: tuple[bytes, ...]


Choice = Mapping[str, Sequence[Composite]]  # class -> its composites, best first


@dataclass(frozen=True)
class Seen:
    """What was seen of one source.

    Attributes:
        sha: sha256 of the file, 32 bytes.
        name: of the file; of equal contents in a class the least name counts.
        folder: its class folder, the stratum.
        p: confidence in [0, 1], a whole multiple of 1/65535.
        share: of the attention in the best window, in [0, 1], rounded to 1e-4, as float32; corner: that window.
        phash: 64-bit difference hash.
    """

    sha: bytes
    name: str
    folder: str
    p: float
    share: float
    corner: tuple[int, int]
    phash: int

    def score(self, alpha: float) -> int:
        """S = p + alpha * 0.0865 * share (Eq. 5) in units of 1e-4, rounded half up."""
        return math.floor((round(self.p, 4) + alpha * MASS * self.share) * 1e4 + 0.5)

    def draw(self, seed: int, group: str) -> float:
        """log of u^(1/p): the largest becomes a background first."""
        p = round(self.p, 4)
        return math.log(uniform(seed, group, self.sha.hex())) / p if p > 0 else -math.inf


def confidence(probabilities: Sequence[float], own: Sequence[int]) -> float:
    """p of a class from all probabilities of a source: the sum over its own outputs, or the largest if it has none."""
    steps = [round(each * STEPS) for each in probabilities]
    return min(1.0, (sum(steps[i] for i in own) if own else max(steps)) / STEPS)


def best_window(attention: NDArray[np.float64], k: int) -> tuple[float, tuple[int, int]]:
    """The share of the k x k window of [g, g] attention that has most of it, and its corner; ties, to 1e-6, go to the
    first in row order."""
    places = range(len(attention) - k + 1)
    shares = {(r, c): attention[r : r + k, c : c + k].sum() / attention.sum() for r in places for c in places}
    rounded = {corner: round(float(share), 6) for corner, share in shares.items()}
    corner = max(rounded, key=rounded.__getitem__)  # the first of equals
    return float(np.float32(round(rounded[corner], 4))), corner  # the precision that shares have everywhere


def choose(seen: Sequence[Seen], group: Group, config: SetConfig, layouts: Layouts) -> list[Composite]:
    """The first `group.ipc` composites of a class, fewer where the sources run out.

    Composite i takes the best unused sources as key patches, then its backgrounds from the unused rest. Of `config`
    alpha, seed, stratify and near_duplicate count.
    """
    sources = list({each.sha: each for each in sorted(seen, key=lambda s: s.name, reverse=True)}.values())
    best = sorted(sources, key=lambda s: (-s.score(config.alpha), s.sha))
    best = _round_robin(best) if config.stratify else best
    drawn = sorted(sources, key=lambda s: (-s.draw(config.seed, group.name), s.sha))
    chosen: dict[bytes, int] = {}  # content -> difference hash
    keys, backgrounds = (_free(order, chosen, config.near_duplicate) for order in (best, drawn))
    made: list[Composite] = []
    while len(made) < group.ipc:
        layout = layouts.of(group.name, len(made))
        key, rest = _take(keys, layout.n_key, chosen), _take(backgrounds, layout.n_background, chosen)
        if len(key) < layout.n_key or len(rest) < layout.n_background:
            break
        made.append(Composite(tuple(Patch(s.sha, s.corner) for s in key), tuple(s.sha for s in rest)))
    return made


def _round_robin(best: Sequence[Seen]) -> list[Seen]:
    """The best of each folder, then the second best of each, and so on."""
    turns: Counter[str] = Counter()
    turn = []
    for each in best:
        turn.append(turns[each.folder])
        turns[each.folder] += 1
    return [best[i] for i in sorted(range(len(best)), key=lambda i: (turn[i], i))]


def _free(order: Sequence[Seen], chosen: Mapping[bytes, int], near: int) -> Iterator[Seen]:
    """Those that are neither chosen nor within `near` bits of one that is; near=0: equal pictures may meet."""
    for each in order:
        like = near and any((each.phash ^ other).bit_count() <= near for other in chosen.values())
        if each.sha not in chosen and not like:
            yield each


def _take(stream: Iterator[Seen], count: int, chosen: dict[bytes, int]) -> list[Seen]:
    taken: list[Seen] = []
    while len(taken) < count and (each := next(stream, None)) is not None:
        chosen[each.sha] = each.phash
        taken.append(each)
    return taken
