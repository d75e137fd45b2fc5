"""What the ViT said of each picture's content, whatever its name, folder or class: a table of the file of scores.

A source that was moved, renamed or copied, a class that is made of other folders, another `confidence`: none of them
costs a pass of the ViT. So that the confidence of any class can be told, the probabilities of all classes are kept, as
whole multiples of 1/65535: 2 KB a source for ImageNet's thousand, 2.6 GB for all of ImageNet-1K. Fewer do not do: of a
ViT trained with label smoothing the largest hundred leave out a tenth of the mass, and a class such as dog is the sum
of 118. The table is kept where the user asks for a file of scores that outlives the build (`scores=`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from focusdd_det.scoring.glance import Known

STEPS = 65535  # probabilities are whole multiples of 1/65535, whether they come from the ViT or from the table
_SCHEMA = """
CREATE TABLE IF NOT EXISTS content (
    look TEXT, sha BLOB, width INTEGER, height INTEGER, share REAL, win_row INTEGER, win_col INTEGER, phash INTEGER,
    probabilities BLOB, entropy REAL);
CREATE UNIQUE INDEX IF NOT EXISTS by_content ON content (look, sha);
"""


@dataclass(frozen=True)
class Content:
    """What was seen of one content.

    Attributes:
        sha: sha256 of the file.
        width, height: of the whole picture, px.
        share, corner: the best window's share of the attention, and its top left token.
        phash: difference hash.
        probabilities: [classes] uint16, in steps of 1/65535.
        entropy: of its grey levels, bits; None if it was seen before entropies were kept.
    """

    sha: bytes
    width: int
    height: int
    share: float
    corner: tuple[int, int]
    phash: int
    probabilities: NDArray[np.uint16]
    entropy: float | None


class Contents:
    """The table, in an open database; `enabled` false: nothing is kept and nothing found."""

    def __init__(self, db: sqlite3.Connection, enabled: bool, entropy: bool = False) -> None:
        """`entropy`: what has none, because it was seen before entropies were kept, is not found."""
        self.db = db
        self.enabled = enabled
        self.also = " AND entropy IS NOT NULL" if entropy else ""
        if enabled:
            db.executescript(_SCHEMA)
            if "entropy" not in {row[1] for row in db.execute("PRAGMA table_info(content)")}:
                db.execute("ALTER TABLE content ADD COLUMN entropy REAL")  # the youngest: an older file gets it, empty

    def known(self, looks: Sequence[str]) -> Known:
        """The contents that were seen in one of these ways."""
        if not self.enabled:
            return Known()
        heads = bytearray()
        for look in looks:
            query = f"SELECT substr(sha, 1, 8) FROM content WHERE look = ?{self.also}"
            for (head,) in self.db.execute(query, (look,)):
                heads += head
        return Known(bytes(heads))

    def get(self, look: str, sha: bytes) -> Content | None:
        """What was seen of a content; None if it was not, or if what is there is no row of ours."""
        if not self.enabled:
            return None
        row = self.db.execute(
            "SELECT sha, width, height, share, win_row, win_col, phash, probabilities, entropy FROM content "
            f"WHERE look = ? AND sha = ?{self.also}",
            (look, sha),
        ).fetchone()
        if row is None or not isinstance(row[7], bytes) or len(row[7]) % 2:
            return None
        of, width, height, share, win_row, win_col, phash, probabilities, entropy = row
        unsigned = phash & (1 << 64) - 1
        table = np.frombuffer(probabilities, np.uint16)
        return Content(of, width, height, share, (win_row, win_col), unsigned, table, entropy)

    def put(self, look: str, contents: Iterable[Content]) -> None:
        """Keep what was seen."""
        if self.enabled:
            self.db.executemany(
                "INSERT OR REPLACE INTO content VALUES (?,?,?,?,?,?,?,?,?,?)",
                (
                    (
                        *(look, c.sha, c.width, c.height, c.share, *c.corner, _signed(c.phash)),
                        *(c.probabilities.tobytes(), c.entropy),
                    )
                    for c in contents
                ),
            )


def steps(probabilities: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Probabilities as they are kept."""
    return np.rint(probabilities * STEPS).astype(np.uint16)


def confidence(table: NDArray[np.uint16], own: Sequence[int], how: str) -> NDArray[np.float64]:
    """p of each look from its probabilities: the sum over the class' own outputs, or the largest.

    Args:
        table: [looks, classes], as `steps` makes them.
        own: outputs that stand for the class; none: the largest counts.
        how: `true`, or `max`: the largest counts.

    Returns:
        [looks] in [0, 1].
    """
    largest = how == "max" or not own
    each = table.max(axis=1) if largest else table[:, list(own)].sum(axis=1, dtype=np.int64)
    return np.asarray(np.minimum(each / STEPS, 1.0), np.float64)


def _signed(value: int) -> int:
    """A 64-bit pattern as SQLite holds it."""
    return value - (1 << 64) if value >= 1 << 63 else value
