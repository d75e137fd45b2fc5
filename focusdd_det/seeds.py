"""Everything that is drawn comes from a hash of what it is drawn for, never from the order of execution."""

from __future__ import annotations

import hashlib


def seed_of(*parts: object) -> int:
    """A 64-bit integer from any parts; the same on every machine and in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def uniform(*parts: object) -> float:
    """A number in (0, 1), open at both ends, from any parts."""
    return ((seed_of(*parts) >> 11) + 0.5) / 2.0**53
