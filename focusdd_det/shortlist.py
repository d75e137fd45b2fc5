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
        The table, at most `depth` sources an order and a block long while it is made; and whether it holds all sources.
    """
    kept, whole = None, True
    for block in blocks:
        kept = block if kept is None else joined([kept, block])
        if len(kept) > depth:
            first = np.unique(np.concatenate([order[:depth] for order in orders(kept)]))
            whole = whole and len(first) == len(kept)
            kept = kept.at(first)  # by rising position, so in the order of the blocks
    assert kept is not None, "no block"
    return kept, whole
