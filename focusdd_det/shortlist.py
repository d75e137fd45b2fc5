"""Of a class' sources those that can come to the front, kept while they stream by: memory does not grow with them.

A source that comes behind the first `depth` of some, in every order that counts, comes behind the first `depth` of all
as well: others can only move it back (methods.monotone says of which orders this holds).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from focusdd_det.select import Candidates, Order, joined


def shortlist(
    blocks: Iterable[Candidates], orders: Callable[[Candidates], Sequence[Order]], depth: int
) -> tuple[Candidates, bool]:
    """The sources among which the first `depth` of each order are those of all sources.

    Args:
        blocks: the sources of a class, at least one block.
        orders: positions in a table of candidates, first choice first, in each order that counts.
        depth: at least 1.

    Returns:
        At most `depth` sources an order (while the list is made, twice that, `depth` and a block), in the order of the
        blocks; and whether these are all sources.
    """
    kept: list[Candidates] = []
    size = last = 0
    whole = True

    def shorten() -> None:
        nonlocal size, last, whole
        kept[:] = [joined(kept)]
        if size > depth:
            first = np.unique(np.concatenate([order[:depth] for order in orders(kept[0])]))
            whole = whole and len(first) == size
            kept[:] = [kept[0].at(first)]
        size = last = len(kept[0])

    for block in blocks:
        kept.append(block)
        size += len(block)
        if size >= 2 * last + depth:  # seldom enough that each source is ranked a few times on average
            shorten()
    shorten()
    return kept[0], whole
