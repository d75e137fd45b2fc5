"""A class' sources, ranked by the method, and the composites that this makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from focusdd_det.config import SetConfig
from focusdd_det.layouts import Layouts
from focusdd_det.methods import Method, check_order, is_monotone
from focusdd_det.plan import Group
from focusdd_det.select import Candidates, Order, Proposal, joined, proposals
from focusdd_det.shortlist import shortlist

_REUSE_LIMIT = 20  # proposals per composite wanted, before `short_class: reuse` gives a class up
_DEPTH = 1 << 10  # sources of a class that are ranked at least
_SPARE = 4  # times as many as the composites take: some are near duplicates, unusable, or make empty composites


@dataclass(frozen=True)
class Ranking:
    """How a method ranks the sources of a class.

    Attributes:
        order, backgrounds: positions in the candidates, first choice first.
        banned: [n] candidates that are not to be chosen; more may be added.
        depth: the orders end after so many, although there are more sources; 0: they are all there.
    """

    group: Group
    candidates: Candidates
    order: Order
    backgrounds: Order
    banned: NDArray[np.bool_]
    layouts: Layouts
    config: SetConfig
    depth: int = 0

    @property
    def reach(self) -> int:
        """So many sources are ranked."""
        return self.depth or len(self.candidates)

    @property
    def deeper(self) -> int:
        """So many are to be ranked where these were not enough."""
        return _SPARE * self.depth

    @property
    def reserved(self) -> int:
        """So many of `order` never become backgrounds."""
        return self.layouts.keys(self.group.name, self.group.ipc) if self.config.selection == "paper" else 0

    def proposals(self, start: int = 0) -> Iterator[Proposal]:
        """The composites from number `start` on, until the sources run out; with a `depth` only the orders did."""
        reuse = self.config.short_class == "reuse"
        every = proposals(
            self.order,
            self.backgrounds,
            self.candidates.phash,
            lambda number: self.layouts.of(self.group.name, number),
            self.config.near_duplicate,
            self.banned,
            self.reserved,
            reuse and not self.depth,
        )
        return islice(every, start, _REUSE_LIMIT * self.group.ipc if reuse else None)


def rank(
    group: Group, blocks: Iterable[Candidates], method: Method, layouts: Layouts, config: SetConfig, reach: int = 0
) -> Ranking:
    """The ranking of a class, as its method makes it.

    Args:
        blocks: its sources (scores.ScoreStore.blocks).
        reach: so many of them are ranked at least; unless the method compares them all, few more than the composites
            take.

    Raises:
        ConfigError: the method gives something that is no order.
    """

    def orders(candidates: Candidates) -> tuple[Order, Order]:
        n = len(candidates)
        order = check_order(method.order(candidates, config, group.name), n, config.method, "order")
        backgrounds = check_order(method.backgrounds(candidates, config, group.name), n, config.method, "backgrounds")
        return order, backgrounds

    depth = 0
    if is_monotone(method):
        depth = max(_DEPTH, _SPARE * layouts.sources(group.name, group.ipc), reach)
        candidates, whole = shortlist(blocks, orders, depth)
        depth = 0 if whole else depth
    else:
        candidates = joined(blocks)
    order, backgrounds = orders(candidates)
    if depth:
        order, backgrounds = order[:depth], backgrounds[:depth]
    slim = replace(candidates, features=None)  # classes that are in work together need not hold them
    return Ranking(group, slim, order, backgrounds, candidates.barred(config.least_entropy), layouts, config, depth)
