"""A class' sources, ranked by the method, and the composites that this makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from focusdd_det.config import SetConfig
from focusdd_det.layouts import Layouts
from focusdd_det.methods import Method, check_order
from focusdd_det.plan import Group
from focusdd_det.select import Candidates, Order, Proposal, proposals

_REUSE_LIMIT = 20  # proposals per composite wanted, before `short_class: reuse` gives a class up


@dataclass(frozen=True)
class Ranking:
    """How a method ranks the sources of a class.

    Attributes:
        order, backgrounds: positions in the candidates, first choice first.
        banned: positions that turned out to be unusable; more may be added.
    """

    group: Group
    candidates: Candidates
    order: Order
    backgrounds: Order
    banned: set[int]
    layouts: Layouts
    config: SetConfig

    @property
    def reserved(self) -> int:
        """So many of `order` never become backgrounds."""
        return self.layouts.keys(self.group.name, self.group.ipc) if self.config.selection == "paper" else 0

    def proposals(self, start: int = 0) -> Iterator[Proposal]:
        """The composites from number `start` on, until the sources run out."""
        reuse = self.config.short_class == "reuse"
        every = proposals(
            self.order,
            self.backgrounds,
            self.candidates.phash,
            lambda number: self.layouts.of(self.group.name, number),
            self.config.near_duplicate,
            self.banned | self.candidates.blank(self.config.least_entropy),
            self.reserved,
            reuse,
        )
        return islice(every, start, _REUSE_LIMIT * self.group.ipc if reuse else None)


def rank(
    group: Group, candidates: Candidates, banned: set[int], method: Method, layouts: Layouts, config: SetConfig
) -> Ranking:
    """The ranking of a class, as its method makes it.

    Raises:
        ConfigError: the method gives something that is no order.
    """
    n = len(candidates)
    order = check_order(method.order(candidates, config, group.name), n, config.method, "order")
    backgrounds = check_order(method.backgrounds(candidates, config, group.name), n, config.method, "backgrounds")
    slim = replace(candidates, features=None)  # classes that are in work together need not hold them
    return Ranking(group, slim, order, backgrounds, banned, layouts, config)
