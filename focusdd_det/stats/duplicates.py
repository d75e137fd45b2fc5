"""Pictures that look the same, found without comparing all pairs. Arrays only."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

NEAR = 6  # bits of 64; the default of the build's near_duplicate
_BITS = 64
_ROWS = 1 << 11  # hashes of a bucket that are compared with all others of it at once


def near_pairs(hashes: NDArray[np.uint64], distance: int = NEAR) -> list[tuple[int, int, int]]:
    """All pairs whose hashes differ in at most `distance` bits.

    The 64 bits are cut into distance + 1 bands. Two hashes that differ in fewer bits than there are bands agree in one
    of them (pigeonhole), so only hashes with an equal band are compared.

    Args:
        hashes: [n].
        distance: 0 to 63.

    Returns:
        (i, j, bits that differ) with i < j, nearest first. Among pictures with one and the same hash only each with its
        next is named: k copies are k - 1 pairs.
    """
    if not 0 <= distance < _BITS:
        raise ValueError(f"expected a distance of 0 to {_BITS - 1} bits, got {distance}")
    values, first = np.unique(hashes, return_index=True)
    found = dict.fromkeys(_copies(hashes), 0)
    for low, high in _bands(distance + 1):
        band = (values >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            for a, b, bits in _within(values, bucket, distance):
                i, j = sorted((int(first[a]), int(first[b])))
                found[i, j] = bits
    return sorted(((i, j, bits) for (i, j), bits in found.items()), key=lambda pair: (pair[2], pair[0], pair[1]))


def _bands(count: int) -> list[tuple[int, int]]:
    """From and to (bits) of `count` bands that cover all 64, as equal as can be."""
    edges = [_BITS * i // count for i in range(count + 1)]
    return list(pairwise(edges))


def _copies(hashes: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    order = np.argsort(hashes, kind="stable")
    for a, b in pairwise(order):
        if hashes[a] == hashes[b]:
            yield int(a), int(b)


def _within(values: NDArray[np.uint64], bucket: NDArray[np.int64], distance: int) -> Iterator[tuple[int, int, int]]:
    """Near pairs of one bucket; a bucket of any size, in flat memory."""
    for start in range(0, len(bucket) - 1, _ROWS):
        rows = bucket[start : start + _ROWS]
        for column in range(start, len(bucket), _ROWS):
            others = bucket[column : column + _ROWS]
            bits = np.bitwise_count(values[rows][:, None] ^ values[others][None])
            near = bits <= distance
            if column == start:
                near = np.triu(near, 1)
            for a, b in np.argwhere(near):
                yield int(rows[a]), int(others[b]), int(bits[a, b])
