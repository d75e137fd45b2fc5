"""A first look in low precision at every source, a second one in full precision at those that can be chosen.

Every source that was looked at only once is ranked by the best p and share that it can have (deviations.py). Whoever is
chosen, or walked past, in that ranking is looked at again, and what is found takes the place of the bound; then the
ranking is made anew, until all that it takes were looked at twice. What lies behind them would lie there with its true
scores as well, because a method's order is monotone: so the choice is that of full precision for every source, at the
price of low precision for most. It rests on no first look being further off than twice the largest deviation seen.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from focusdd_det.config import SetConfig
from focusdd_det.layouts import Layouts
from focusdd_det.methods import Method, is_monotone
from focusdd_det.plan import Group, Plan, layouts_of
from focusdd_det.ranking import Ranking, rank
from focusdd_det.scoring.bad_sources import Judged
from focusdd_det.scoring.batches import Batches, outcomes_of
from focusdd_det.scoring.deviations import Deviation, deviation
from focusdd_det.scoring.glance import Glance, Known
from focusdd_det.scoring.looking import Looker, Seen, as_first
from focusdd_det.scoring.scores import FirstLook, Row, ScoreStore
from focusdd_det.select import Candidates, Order, Proposal
from focusdd_det.selector import Selector, precision_of
from focusdd_det.sources import Located, Root, locate

log = logging.getLogger("focusdd")

WORTH = 6  # sources for each one that is wanted, from which on a screening pays
_LEAST = 2000  # sources from which on it does: some batches are looked at in both precisions, and some are not full
_FEW_BATCHES = 8  # fewer are decoded by threads
_AHEAD = 1.1  # so much more of a ranking is looked at again than is known to be needed: fewer rounds


def screen_precision(config: SetConfig, method: Method, plan: Plan, device: str) -> str | None:
    """The precision of the first look; None: there is one look, in `config.precision`.

    `screen=auto` screens where it saves time: the machine is faster in low precision, and far more sources are there
    than are wanted.
    """
    fast = precision_of("auto", device) if config.screen == "auto" else config.screen
    # With other pixels a picture may have another entropy, and those that are passed over are not looked at again.
    other_entropy = config.decode == "full" and config.least_entropy > 0
    possible = config.precision == "fp32" and screens(method) and not other_entropy
    if config.screen in ("bf16", "fp16") and not possible:
        log.warning(
            "screen=%s does nothing here: it takes precision=fp32, a method whose order allows it, and not both "
            "decode=full and least_entropy; this is precision=%s, method=%s, decode=%s, least_entropy=%g",
            config.screen, config.precision, config.method, config.decode, config.least_entropy,
        )  # fmt: skip
    if not possible or fast in ("off", "fp32"):
        return None
    wanted = sum(group.ipc for group in plan.groups) * max(config.grid, *(config.grids or (1,))) ** 2
    worth = plan.sources >= max(_LEAST, WORTH * wanted)
    return fast if worth or config.screen != "auto" else None


def screens(method: Method) -> bool:
    """Whether what a method chooses can be told from a first look in low precision (methods.monotone)."""
    return method.needs_selector and is_monotone(method)


@dataclass
class Screen:
    """The second look at the sources of a build.

    Attributes:
        first, second: the ViT in low and in full precision.
        again: how many sources this process looked at again.
    """

    store: ScoreStore
    first: Looker
    second: Looker
    method: Method
    config: SetConfig
    roots: Mapping[str, Root]
    layouts: Layouts
    workers: int
    again: int = 0

    @property
    def _looks(self) -> str:
        """Which two looks are compared: the first, and the second where that has other pixels."""
        return self.first.sight if self.config.decode == "reduced" else f"{self.first.sight} {self.second.sight}"

    @property
    def _deviation(self) -> Deviation:
        return self.store.deviation(self._looks)

    @property
    def bound(self) -> tuple[float, float]:
        """How far a first look can be off, as far as it is known: (logit of p, share)."""
        seen = self._deviation
        return seen.logit, seen.share

    @classmethod
    def of(
        cls,
        store: ScoreStore,
        fast: Selector,
        selector: Selector,
        method: Method,
        columns: Mapping[str, Sequence[int]],
        config: SetConfig,
        plan: Plan,
        workers: int,
    ) -> Screen:
        """That of a plan's sources, which `fast` has looked at (looking.score_all)."""
        first = Looker(fast, method, columns, as_first(config), store)
        second = Looker(selector, method, columns, config, store)
        roots = {root.name: root for root in plan.roots}
        return cls(store, first, second, method, config, roots, layouts_of(config, method), workers)

    def blocks(self, group: Group) -> Iterator[Candidates]:
        """The sources of a class; those that were looked at once have the best p and score that they can."""
        first_look = FirstLook(self.first.signatures[group.name], self._deviation)
        return self.store.blocks(group.name, self.config.alpha, first_look=first_look)

    def rank(self, group: Group, reach: int = 0) -> Ranking:
        """Their ranking, of at least so many."""
        return rank(group, self.blocks(group), self.method, self.layouts, self.config, reach)

    def settle_all(self, groups: Sequence[Group], bar: Any) -> None:
        """Look again at what the composites of all classes need, as far as it can be told before the teacher looks; in
        rounds over the classes, so that the batches are full.

        Raises:
            DataError: more sources than `max_bad` allows cannot be read a second time, or their folder is gone.
        """
        self._learn(groups, bar)
        reach: dict[str, int] = {}
        while groups:
            ids: list[int] = []
            more = []
            for group in groups:
                wanted = group.ipc + math.ceil(group.ipc / 20)
                ranking, first = self._first(group, wanted, reach.get(group.name, 0))
                reach[group.name] = ranking.reach
                again = unsettled(ranking, first)
                if len(again):
                    ids += ranking.candidates.ids[again].tolist()
                    more.append(group)
            groups = more
            bar.total += len(ids)
            self.settle(ids, bar.update)

    def _first(self, group: Group, composites: int, reach: int) -> tuple[Ranking, list[Proposal]]:
        """The first composites of a class, fewer where the sources run out, and a ranking as deep as that takes."""
        ranking = self.rank(group, reach)
        while True:
            found = list(islice(ranking.proposals(), composites))
            if len(found) == composites or not ranking.depth:
                return ranking, found
            ranking = self.rank(group, ranking.deeper)

    def _learn(self, groups: Sequence[Group], bar: Any) -> None:
        """Look again at a batch from all classes where the first look comes from earlier builds, in which nothing was
        looked at twice: the deviation is learned before anything is left to it."""
        if self._deviation.sources >= self.config.batch:
            return
        each = -(-self.config.batch // len(groups))
        ids: list[int] = []
        for group in groups:
            once = (i for block in self.blocks(group) for i in block.ids[block.once].tolist())
            ids += islice(once, each)  # by content hash: any sources, not those with the best scores
        bar.total += len(ids)
        self.settle(ids, bar.update)

    def settle(self, ids: Sequence[int], progress: Callable[[int], object] = lambda _: None) -> None:
        """Look at sources again, rows of the store, and put what is found in the place of the first look.

        Raises:
            DataError: more of them than `max_bad` allows cannot be read, or their folder is gone.
            WeightsError: what the ViT says is not a number.
        """
        if not ids:
            return
        selector = self.second.selector
        assert selector is not None
        # To start decoding processes takes longer than some batches.
        few = len(ids) < _FEW_BATCHES * self.config.batch
        config = replace(self.config, loader="threads") if few else self.config
        judged = Judged(self.config.max_bad)
        rows: dict[tuple[str, str], tuple[int, Row]] = {}

        def sources() -> Iterator[Located]:
            for rowid in ids:
                row = self.store.row(rowid)
                rows[row.root, row.path] = (rowid, row)
                root = self.roots[row.root]
                yield locate(root, row.path, row.folder, row.group, row.offset, row.size, row.mtime_ns)

        def finish(seen: list[Seen]) -> None:
            self._put(seen[0], [rows.pop(place) for place in seen[0].places])
            progress(len(seen[0].rows))

        on_gpu = selector.device.type == "cuda"
        outcomes, ahead = outcomes_of(sources(), selector.view, self.method, config, self.workers, Known(), on_gpu)
        shape = self.second.shape(selector.view)
        with (
            Batches(shape, lambda *batch: [self.second(*batch)], finish, self.store, ahead, on_gpu) as waiting,
            contextlib.closing(outcomes),
        ):
            for located, outcome in outcomes:
                place = (located.source.root, located.source.path)
                if isinstance(outcome, Glance) and outcome.sha.hex() == rows[place][1].sha256:
                    judged.add(located.source, "")
                    waiting.add(located, outcome)
                    continue
                located.demand_folder()
                reason = outcome if isinstance(outcome, str) else "its content changed while the set was built"
                self.store.reject(rows.pop(place)[0], reason)
                judged.add(located.source, reason)
                progress(1)
        self.store.commit()

    def _put(self, seen: Seen, before: Sequence[tuple[int, Row]]) -> None:
        seen.demand_numbers()
        p, share = (np.array([getattr(row, name) for _, row in before], np.float64) for name in ("p", "share"))
        self.store.deviate(self._looks, deviation(p, seen.p, share, seen.share))
        self.store.put([], seen.name, seen.contents)
        for (rowid, _), row in zip(before, seen.rows, strict=True):
            self.store.settle(rowid, row)
        self.again += len(before)

    def summary(self) -> dict[str, float | int]:
        """What the screening came to, for the log of the build."""
        seen = self._deviation
        return {"looked_again": self.again, "looked_twice": seen.sources, "logit": seen.logit, "share": seen.share}


def unsettled(ranking: Ranking, taken: Iterable[Proposal]) -> NDArray[np.int64]:
    """Positions that must be looked at again before these composites of a class can be made: their sources, and all
    that the ranking puts before the last of them, which they were preferred to or which were passed over.

    No composite stands for the end of the ranking: the sources ran out. Empty where all were looked at in full; else
    some more than need be, for fewer rounds.
    """
    once = ranking.candidates.once
    if once is None or not once.any():
        return np.zeros(0, np.int64)
    composites = list(taken)
    if not composites or any(proposal.turn for proposal in composites):
        return np.flatnonzero(once)
    keys = _last(ranking.order, [key for proposal in composites for key in proposal.keys])
    ends = (
        (ranking.order, max(keys, ranking.reserved)),
        (ranking.backgrounds, _last(ranking.backgrounds, [each for p in composites for each in p.backgrounds])),
    )
    if not any(once[order[:end]].any() for order, end in ends):
        return np.zeros(0, np.int64)
    needed = np.unique(np.concatenate([order[: math.ceil(end * _AHEAD)] for order, end in ends]))
    return np.asarray(needed[once[needed]], np.int64)


def _last(order: Order, chosen: Sequence[int]) -> int:
    """How many of an order there are up to the last of the chosen."""
    return int(np.flatnonzero(np.isin(order, chosen)).max()) + 1 if chosen else 0
