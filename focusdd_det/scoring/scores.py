"""The file of scores: what was seen of every source, in SQLite.

The file is what makes a build resumable in its longest phase, keeps memory flat, and lets a second build with another
ipc, alpha or seed do without the ViT.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from focusdd_det.errors import DiskError
from focusdd_det.scoring.contents import Content, Contents
from focusdd_det.scoring.deviations import Deviation, optimistic
from focusdd_det.scoring.glance import UNREADABLE, Known
from focusdd_det.select import Candidates
from focusdd_det.sources import Located
from focusdd_det.windows import realism

_SCHEMA = """
CREATE TABLE IF NOT EXISTS source (
    root TEXT, path TEXT, folder TEXT, grp TEXT, sig TEXT, run INTEGER,
    offset INTEGER, size INTEGER, mtime INTEGER, sha BLOB, width INTEGER, height INTEGER,
    p REAL, share REAL, win_row INTEGER, win_col INTEGER, phash INTEGER, bad TEXT,
    feature BLOB, entropy REAL, PRIMARY KEY (root, path));
CREATE INDEX IF NOT EXISTS by_group ON source (run, grp);
CREATE TABLE IF NOT EXISTS deviation (look TEXT PRIMARY KEY, logit REAL, share REAL, sources INTEGER);
"""
_COLUMNS = (
    "root", "path", "folder", "grp", "sig", "run", "offset", "size", "mtime", "sha", "width", "height",
    "p", "share", "win_row", "win_col", "phash", "bad", "feature", "entropy",
)  # fmt: skip
_SEEN = ("sig", "p", "share", "win_row", "win_col", "phash", "entropy")  # what depends on how a source is looked at
BLOCK = 1 << 12  # sources of a class that are read at a time


@dataclass(frozen=True)
class Row:
    """One source of the store, with what was seen of it."""

    root: str
    path: str
    folder: str
    group: str
    offset: int | None
    size: int
    mtime_ns: int
    sha256: str
    width: int
    height: int
    p: float
    share: float
    corner: tuple[int, int]


_ROW_FIELDS = tuple(field.name for field in fields(Row))[:-1]


class FirstLook(NamedTuple):
    """Of a screening.

    Attributes:
        signature: of the rows of a class that were looked at once.
        deviation: how far such a look can be off.
    """

    signature: str
    deviation: Deviation


class ScoreStore:
    """The SQLite file. Not for several threads; one build at a time (the build holds a lock)."""

    def __init__(self, path: Path, contents: bool = False, entropy: bool = False) -> None:
        """`contents`: also keep what was seen by content, for other names, maps and folders (contents.py).
        `entropy`: a source without one, because it was seen before entropies were kept, is looked at anew."""
        self.path = path
        self.entropy = entropy
        with self._told():
            self.db = sqlite3.connect(path)
            tables = {name for (name,) in self.db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if foreign := sorted(tables - {"source", "content", "deviation"}):
                raise DiskError(f"{path} is a database of something else ({foreign[0]}); give another `scores`")
            # Exclusive: two builds that share a file of scores would count each other's sources as their own.
            self.db.executescript(
                "PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=DELETE; PRAGMA synchronous=NORMAL;" + _SCHEMA
            )
            self._add_columns()
            self.run = int(self.db.execute("SELECT COALESCE(MAX(run), 0) + 1 FROM source").fetchone()[0])
            self.contents = Contents(self.db, contents, entropy)

    def _add_columns(self) -> None:
        """`feature` and then `entropy` are younger than the other columns: an older file gets them, empty."""
        there = tuple(row[1] for row in self.db.execute("PRAGMA table_info(source)"))
        if there == _COLUMNS[:-2]:
            self.db.execute("ALTER TABLE source ADD COLUMN feature BLOB")
        if there in (_COLUMNS[:-2], _COLUMNS[:-1]):
            self.db.execute("ALTER TABLE source ADD COLUMN entropy REAL")
        elif there != _COLUMNS:
            raise DiskError(
                f"{self.path} has a table of sources with other columns than ours ({', '.join(there)[:200]}); give "
                "another `scores`"
            )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """SQLite's errors as ours."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise DiskError(
                    f"{self.path} is being used by another build; wait for it or give another `scores`"
                ) from error
            raise DiskError(
                f"cannot write {self.path}: {error}; free some space or fix the path, then run the same command again: "
                "it goes on where it stopped"
            ) from error
        except sqlite3.DatabaseError as error:
            raise DiskError(
                f"{self.path} is damaged or not a score file of ours ({error}); remove it (the sources are looked at "
                "anew) or give another `scores`"
            ) from error

    def close(self) -> None:
        """Write what is pending and close."""
        try:
            self.commit()
        finally:
            self.db.close()

    def known(self, located: Located, signatures: Sequence[str]) -> str | None:
        """What was found when this very file was seen under one of these signatures; it is then part of this run.

        Returns:
            None: it was not seen, or could not be read, which may be over. Empty: usable. Else why it is not.
        """
        s = located.source
        with self._told():
            found = self.db.execute(
                "UPDATE source SET run = ?, grp = ? WHERE root = ? AND path = ? AND size = ? AND mtime = ? "
                f"AND sig IN ({','.join('?' * len(signatures))}) "
                f"AND (bad IS NULL OR bad NOT LIKE '{UNREADABLE}%') "
                "AND (bad IS NOT NULL OR entropy IS NOT NULL OR NOT ?) RETURNING COALESCE(bad, '')",
                (self.run, s.group, s.root, s.path, located.size, located.mtime_ns, *signatures, self.entropy),
            ).fetchone()
        return None if found is None else str(found[0])

    def recall(self, located: Located, look: str, sha: bytes | None = None) -> Content | None:
        """What was seen of this content under whatever name, class and map.

        Args:
            look: how it was seen (looking.Looker.name).
            sha: its hash; None: that of this very file, if it was read before.
        """
        if not self.contents.enabled:
            return None
        s = located.source
        with self._told():
            if sha is None:
                found = self.db.execute(
                    "SELECT sha FROM source WHERE root = ? AND path = ? AND size = ? AND mtime = ? AND bad IS NULL",
                    (s.root, s.path, located.size, located.mtime_ns),
                ).fetchone()
                sha = None if found is None else found[0]
            return None if sha is None else self.contents.get(look, sha)

    def known_contents(self, looks: Sequence[str]) -> Known:
        """The contents that `recall` finds; 8 bytes each."""
        with self._told():
            return self.contents.known(looks)

    def put(self, rows: Sequence[tuple[object, ...]], look: str = "", contents: Sequence[Content] = ()) -> None:
        """Insert or replace rows in the order of the schema, and what was seen by content."""
        with self._told():
            self.contents.put(look, contents)
            self.db.executemany(f"INSERT OR REPLACE INTO source VALUES ({','.join('?' * len(_COLUMNS))})", rows)

    def settle(self, rowid: int, seen: Sequence[object]) -> None:
        """Put what a second look found, in the order of the schema, in the place of what the first one did."""
        with self._told():
            self.db.execute(
                f"UPDATE source SET {', '.join(f'{name} = ?' for name in _SEEN)} WHERE rowid = ?",
                (*(seen[_COLUMNS.index(name)] for name in _SEEN), rowid),
            )

    def deviation(self, look: str) -> Deviation:
        """How far first looks of a screening were from second ones so far; `look`: Looker.sight of the first."""
        with self._told():
            found = self.db.execute("SELECT logit, share, sources FROM deviation WHERE look = ?", (look,)).fetchone()
        return Deviation(*found) if found else Deviation()

    def deviate(self, look: str, more: Deviation) -> None:
        """Remember that some sources were looked at twice."""
        both = self.deviation(look).joined(more)
        with self._told():
            self.db.execute(
                "INSERT OR REPLACE INTO deviation VALUES (?,?,?,?)", (look, both.logit, both.share, both.sources)
            )

    def commit(self) -> None:
        """Make what was put durable."""
        with self._told():
            self.db.commit()

    def blocks(
        self, group: str, alpha: float, features: bool = False, first_look: FirstLook | None = None
    ) -> Iterator[Candidates]:
        """The sources of a class in this run, by rising sha256, some thousand at a time and at least one block.

        Of files with equal content one counts, by the least name.

        Args:
            features: also read the ViT's features: 2 d bytes a source of the class.
            first_look: of a screening; sources that were not looked at again get the best p and share that they can
                have.
        """
        folders: dict[str, int] = {}
        width = None
        with self._told():
            found = self.db.execute(
                "SELECT rowid, sha, folder, p, share, phash, bad, MIN(root || char(31) || path), sig, entropy"
                f"{', feature' if features else ''} FROM source "
                "WHERE run = ? AND grp = ? AND length(sha) = 32 GROUP BY sha ORDER BY sha",
                (self.run, group),
            )
            rows = found.fetchmany(BLOCK)
            while True:
                block = self._block(rows, folders, alpha, features, first_look)
                width = block.features.shape[1] if width is None and block.features is not None else width
                if block.features is not None and block.features.shape[1] != width:
                    raise self._damaged_features()
                yield block
                if not (rows := found.fetchmany(BLOCK)):
                    return

    def _block(
        self,
        rows: Sequence[tuple[Any, ...]],
        folders: dict[str, int],
        alpha: float,
        features: bool,
        first_look: FirstLook | None,
    ) -> Candidates:
        ids, sha, folder, p, share, phash, bad, _, signature, entropy, *vectors = (
            zip(*rows, strict=True) if rows else ([()] * 11)
        )
        confidence, shares = np.array([round(each, 4) for each in p], np.float64), np.array(share, np.float64)
        unusable = np.array([reason is not None for reason in bad], np.bool_)
        once = None
        if first_look is not None:
            once = ~unusable & np.array([each == first_look.signature for each in signature], np.bool_)
            for own, most in zip(
                (confidence, shares), optimistic(confidence, shares, first_look.deviation), strict=True
            ):
                np.copyto(own, most, where=once)
        return Candidates(
            ids=np.array(ids, np.int64),
            sha=np.frombuffer(b"".join(sha), np.uint8).reshape(len(ids), 32),
            folder=np.array([folders.setdefault(name, len(folders)) for name in folder], np.int32),
            p=confidence,
            score=realism(confidence, shares, alpha),
            phash=np.array(phash, np.int64).view(np.uint64),
            once=once,
            features=self._vectors(b"".join(each or b"" for each in vectors[0]), len(ids)) if features else None,
            entropy=np.array([np.nan if each is None else each for each in entropy], np.float64),
            unusable=unusable,
        )

    def _vectors(self, data: bytes, count: int) -> NDArray[np.float16]:
        """[count, d] float16, never NaN."""
        values = np.frombuffer(data[: len(data) // 2 * 2], np.float16)
        if (count and (not len(values) or len(values) % count)) or not np.isfinite(values).all():
            raise self._damaged_features()
        return values.reshape(count, -1) if count else values.reshape(0, 1)

    def _damaged_features(self) -> DiskError:
        return DiskError(f"{self.path} is damaged: its features are not one vector a source; remove it")

    def row(self, rowid: int) -> Row:
        """One source by its id."""
        with self._told():
            values = self.db.execute(
                "SELECT root, path, folder, grp, offset, size, mtime, lower(hex(sha)), width, height, p, share, "
                "win_row, win_col FROM source WHERE rowid = ?",
                (rowid,),
            ).fetchone()
        return Row(**dict(zip(_ROW_FIELDS, values[:12], strict=True)), corner=(values[12], values[13]))

    def reject(self, rowid: int, reason: str) -> None:
        """Quarantine a source that was fine as a view but is not as a whole."""
        with self._told():
            self.db.execute("UPDATE source SET bad = ? WHERE rowid = ?", (reason, rowid))
        self.commit()

    def quarantined(self) -> Iterator[tuple[str, str, str]]:
        """(root, path, reason) of the sources of this run that cannot be used, by name."""
        yield from self.db.execute(
            "SELECT root, path, bad FROM source WHERE run = ? AND bad IS NOT NULL ORDER BY root, path", (self.run,)
        )

    def repeats(self) -> list[tuple[str, int]]:
        """(one of the paths, files) for each content that this run met under several names, by path."""
        return [
            (str(path), int(count))
            for path, count in self.db.execute(
                "SELECT MIN(path), COUNT(*) FROM source WHERE run = ? AND length(sha) = 32 GROUP BY sha "
                "HAVING COUNT(*) > 1 ORDER BY 1",
                (self.run,),
            )
        ]

    def passed_over(self, least_entropy: float) -> dict[str, int]:
        """Class -> usable sources of this run whose grey levels have less entropy, where there are some, by name."""
        return dict(
            self.db.execute(
                "SELECT grp, COUNT(*) FROM source WHERE run = ? AND bad IS NULL AND entropy < ? "
                "GROUP BY grp ORDER BY grp",
                (self.run, least_entropy),
            )
        )

    def counts(self) -> dict[str, tuple[int, int]]:
        """Class -> (usable sources, unusable ones) in this run."""
        return {
            group: (good, bad)
            for group, good, bad in self.db.execute(
                "SELECT grp, SUM(bad IS NULL), SUM(bad IS NOT NULL) FROM source WHERE run = ? GROUP BY grp", (self.run,)
            )
        }
