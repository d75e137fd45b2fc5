"""How many sources could not be used, and when that is too many."""

from __future__ import annotations

from collections import Counter

from focusdd_det.errors import DataError

NAMED = 10  # bad sources that a message lists
MIN_JUDGED = 50  # sources before the share of bad ones may stop a build before its end


class Judged:
    """Counts sources that were used and that could not be, and stops a build when too many could not."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.seen = 0
        self.bad = 0
        self.reasons: Counter[str] = Counter()
        self.named: list[str] = []

    def add(self, source: object, reason: str) -> None:
        """Count one source; an empty reason means that it can be used.

        Raises:
            DataError: the share of bad ones is above the limit, after the first `MIN_JUDGED`.
        """
        self.seen += 1
        if reason:
            self.bad += 1
            self.reasons[reason if len(self.reasons) < 100 else "others"] += 1
            if len(self.named) < NAMED:
                self.named.append(f"{source}: {reason}")
            if self.seen >= MIN_JUDGED:
                self.end()

    def end(self) -> None:
        """The same for all of them, however few.

        Raises:
            DataError: see `add`.
        """
        if self.bad > self.limit * self.seen:
            summary = "\n  ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common(10))
            listed = "\n  ".join(self.named)
            raise DataError(
                f"{self.bad} of the first {self.seen} sources cannot be used, more than max_bad={self.limit:g} allows:"
                f"\n  {summary}\nThe first of them:\n  {listed}\nCheck the source folders, or raise max_bad"
            )
