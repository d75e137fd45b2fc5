"""Looks at every source once and keeps what was seen in an SQLite file.

The file is what makes a build resumable in its longest phase, keeps memory flat, and lets a second build with another
ipc, alpha or seed do without the ViT.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from focusdd_det.compose import resize
from focusdd_det.config import BuildConfig
from focusdd_det.decode import BadImage, decode
from focusdd_det.errors import DataError, DiskError
from focusdd_det.select import Candidates
from focusdd_det.selector import Selector
from focusdd_det.sources import Located
from focusdd_det.types import Image
from focusdd_det.windows import best_windows, middle_square, realism, window_side

_VERSION = 1  # of the scoring itself: a change of what a score means must not meet old scores
_SCHEMA = """
CREATE TABLE IF NOT EXISTS source (
    root TEXT, path TEXT, folder TEXT, grp TEXT, sig TEXT, run INTEGER,
    offset INTEGER, size INTEGER, mtime INTEGER, sha BLOB, width INTEGER, height INTEGER,
    p REAL, share REAL, win_row INTEGER, win_col INTEGER, phash INTEGER, bad TEXT,
    PRIMARY KEY (root, path));
CREATE INDEX IF NOT EXISTS by_group ON source (run, grp);
"""
_MIN_JUDGED = 50  # sources before the share of bad ones may stop a build


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


@dataclass(frozen=True)
class _Glance:
    """A decoded source on its way to the ViT."""

    sha: bytes
    width: int
    height: int
    view: Image
    phash: int


class ScoreStore:
    """The SQLite file. Not for several threads; one build at a time (the build holds a lock)."""

    def __init__(self, path: Path) -> None:
        try:
            self.db = sqlite3.connect(path)
            self.db.executescript("PRAGMA journal_mode=DELETE; PRAGMA synchronous=NORMAL;" + _SCHEMA)
            self.run = int(self.db.execute("SELECT COALESCE(MAX(run), 0) + 1 FROM source").fetchone()[0])
        except sqlite3.DatabaseError as error:
            raise DiskError(
                f"{path} is not a score file of ours ({error}); remove it or give another `scores`"
            ) from error
        self.path = path

    def close(self) -> None:
        """Write what is pending and close."""
        self.db.commit()
        self.db.close()

    def known(self, located: Located, signature: str) -> bool:
        """Whether this very file was seen under the same signature; if so it counts as part of this run."""
        s = located.source
        cursor = self.db.execute(
            "UPDATE source SET run = ?, grp = ? WHERE root = ? AND path = ? AND sig = ? AND size = ? AND mtime = ?",
            (self.run, s.group, s.root, s.path, signature, located.size, located.mtime_ns),
        )
        return cursor.rowcount == 1

    def put(self, rows: Sequence[tuple[object, ...]]) -> None:
        """Insert or replace rows in the order of the schema."""
        try:
            self.db.executemany(f"INSERT OR REPLACE INTO source VALUES ({','.join('?' * 18)})", rows)
        except sqlite3.OperationalError as error:
            raise DiskError(
                f"cannot write {self.path}: {error}; free some space and run the same command again"
            ) from error

    def commit(self) -> None:
        """Make what was put durable."""
        try:
            self.db.commit()
        except sqlite3.OperationalError as error:
            raise DiskError(
                f"cannot write {self.path}: {error}; free some space and run the same command again"
            ) from error

    def candidates(self, group: str, alpha: float) -> Candidates:
        """The usable sources of a class in this run; of files with equal content one counts, by the least name."""
        cursor = self.db.execute(
            "SELECT rowid, sha, folder, p, share, phash, MIN(root || char(31) || path) FROM source "
            "WHERE run = ? AND grp = ? AND bad IS NULL GROUP BY sha ORDER BY sha",
            (self.run, group),
        )
        rows = cursor.fetchall()
        folders = {name: i for i, name in enumerate(sorted({row[2] for row in rows}))}
        p: NDArray[np.float64] = np.round(np.array([row[3] for row in rows], np.float64), 4).astype(np.float64)
        share = np.array([row[4] for row in rows], np.float64)
        return Candidates(
            ids=np.array([row[0] for row in rows], np.int64),
            sha=np.frombuffer(b"".join(row[1] for row in rows), np.uint8).reshape(len(rows), 32),
            folder=np.array([folders[row[2]] for row in rows], np.int32),
            p=p,
            score=realism(p, share, alpha),
            phash=np.array([row[5] for row in rows], np.int64).view(np.uint64),
        )

    def row(self, rowid: int) -> Row:
        """One source by its id."""
        values = self.db.execute(
            "SELECT root, path, folder, grp, offset, size, mtime, lower(hex(sha)), width, height, p, share, "
            "win_row, win_col FROM source WHERE rowid = ?",
            (rowid,),
        ).fetchone()
        return Row(**dict(zip(_ROW_FIELDS, values[:12], strict=True)), corner=(values[12], values[13]))

    def reject(self, rowid: int, reason: str) -> None:
        """Quarantine a source that was fine as a view but is not as a whole."""
        self.db.execute("UPDATE source SET bad = ? WHERE rowid = ?", (reason, rowid))
        self.commit()

    def quarantined(self) -> Iterator[tuple[str, str, str]]:
        """(root, path, reason) of the sources of this run that cannot be used, by name."""
        yield from self.db.execute(
            "SELECT root, path, bad FROM source WHERE run = ? AND bad IS NOT NULL ORDER BY root, path", (self.run,)
        )

    def counts(self) -> dict[str, tuple[int, int]]:
        """Class -> (usable sources, unusable ones) in this run."""
        return {
            group: (good, bad)
            for group, good, bad in self.db.execute(
                "SELECT grp, SUM(bad IS NULL), SUM(bad IS NOT NULL) FROM source WHERE run = ? GROUP BY grp", (self.run,)
            )
        }


def score_all(
    stream: Iterable[Located],
    store: ScoreStore,
    selector: Selector | None,
    columns: Mapping[str, Sequence[int]],
    config: BuildConfig,
    workers: int,
    progress: Callable[[int], object],
) -> None:
    """Look at every source of the stream that the store does not hold yet.

    Args:
        stream: sources, in any order.
        store: where the results go.
        selector: the ViT; None for methods that need none (then p and share are 0).
        columns: class -> outputs of the ViT that stand for it; empty: the largest probability counts.
        config: geometry, view and limits.
        workers: decoding threads.
        progress: called with the number of sources that are done.

    Raises:
        DataError: a larger share of the sources than `max_bad` cannot be decoded.
    """
    view = selector.view if selector else 64
    signatures = {group: signature(selector, indices, config) for group, indices in columns.items()}
    batch: list[tuple[Located, _Glance]] = []
    judged = [0, 0]  # seen, bad
    last_commit = time.monotonic()

    def flush() -> None:
        nonlocal last_commit
        if batch:
            store.put(_look(batch, selector, columns, signatures, store.run, config))
            progress(len(batch))
            batch.clear()
        if time.monotonic() - last_commit > 2.0:
            store.commit()
            last_commit = time.monotonic()

    def new_sources() -> Iterator[Located]:
        for located in stream:
            if store.known(located, signatures[located.source.group]):
                progress(1)
            else:
                yield located

    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        for located, outcome in _ahead(
            pool, new_sources(), lambda s: _glance(s, view, config), 4 * workers + config.batch
        ):
            judged[0] += 1
            if isinstance(outcome, str):
                judged[1] += 1
                store.put([_columns_of(located, signatures, store.run, None, 0.0, 0.0, (0, 0), outcome)])
                progress(1)
                _judge(judged[0], judged[1], config.max_bad, located.source, outcome)
                continue
            batch.append((located, outcome))
            if len(batch) == config.batch:
                flush()
    flush()
    store.commit()
    if judged[0] and judged[1] == judged[0] and config.max_bad < 1:
        raise DataError(f"none of the {judged[0]} sources can be decoded; the last reason: {outcome}")


def signature(selector: Selector | None, columns: Sequence[int], config: BuildConfig) -> str:
    """What a stored score depends on besides the picture; scores with another signature are computed anew."""
    content: list[object] = [_VERSION, config.geometry, config.max_pixels]
    if selector is not None:
        content += [selector.sha256, selector.view, selector.grid, selector.attention, selector.precision]
        content += [config.side_ratio, config.confidence, list(columns)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def difference_hash(picture: Image) -> int:
    """64-bit perceptual hash: is each cell of an 8 x 9 grey miniature brighter than its right neighbour?"""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    bits = (small[:, 1:] > small[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def view_pixels(picture: Image, view: int, geometry: str) -> Image:
    """What the ViT sees: the whole picture squashed, or its middle square, at view x view px."""
    if geometry == "crop":
        square = middle_square(picture.shape[1], picture.shape[0])
        picture = picture[square.y : square.y + square.side, square.x : square.x + square.side]
    return resize(picture, view, view)


def _glance(located: Located, view: int, config: BuildConfig) -> _Glance | str:
    """Read, hash, decode and shrink one source; a string is the reason why it cannot be used."""
    if located.problem:
        return located.problem
    try:
        data = located.read()
        picture, width, height = decode(data, view, config.max_pixels)
    except BadImage as error:
        return str(error)
    except OSError as error:
        return f"unreadable: {error.strerror or error}"
    pixels = view_pixels(picture, view, config.geometry)
    return _Glance(hashlib.sha256(data).digest(), width, height, pixels, difference_hash(pixels))


def _look(
    batch: Sequence[tuple[Located, _Glance]],
    selector: Selector | None,
    columns: Mapping[str, Sequence[int]],
    signatures: Mapping[str, str],
    run: int,
    config: BuildConfig,
) -> list[tuple[object, ...]]:
    """One batch through the ViT, at a fixed batch shape: a ViT at batch 1 and 32 differs in the seventh digit."""
    n = len(batch)
    p = np.zeros(n)
    share = np.zeros(n)
    corner: NDArray[np.int64] = np.zeros((n, 2), np.int64)
    if selector is not None:
        pixels = np.zeros((config.batch, selector.view, selector.view, 3), np.uint8)
        pixels[:n] = np.stack([glance.view for _, glance in batch])
        probabilities, attention = selector(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
        share_t, corner_t = best_windows(attention[:n], window_side(selector.grid, config.side_ratio))
        share, corner = share_t.double().numpy(), corner_t.numpy()
        table = probabilities[:n].double().numpy()
        for i, (located, _) in enumerate(batch):
            own = columns[located.source.group]
            p[i] = table[i].max() if config.confidence == "max" or not own else table[i, list(own)].sum()
    return [
        _columns_of(
            located,
            signatures,
            run,
            glance,
            float(min(p[i], 1.0)),
            float(share[i]),
            (int(corner[i, 0]), int(corner[i, 1])),
        )
        for i, (located, glance) in enumerate(batch)
    ]


def _columns_of(
    located: Located,
    signatures: Mapping[str, str],
    run: int,
    glance: _Glance | None,
    p: float,
    share: float,
    corner: tuple[int, int],
    bad: str | None = None,
) -> tuple[object, ...]:
    """A row in the order of the schema; `glance` is None for a source that cannot be used."""
    s = located.source
    sha, width, height, phash = (glance.sha, glance.width, glance.height, glance.phash) if glance else (b"", 0, 0, 0)
    signed = phash - (1 << 64) if phash >= 1 << 63 else phash  # SQLite's integers are signed
    where = (located.offset, located.size, located.mtime_ns)
    seen = (sha, width, height, p, share, *corner, signed, bad)
    return (s.root, s.path, s.folder, s.group, signatures[s.group], run, *where, *seen)


def _ahead(
    pool: ThreadPoolExecutor, items: Iterator[Located], work: Callable[[Located], _Glance | str], depth: int
) -> Iterator[tuple[Located, _Glance | str]]:
    """`work` of each item in threads, in order, never more than `depth` ahead of the consumer: memory stays flat."""
    pending: deque[tuple[Located, Future[_Glance | str]]] = deque()
    try:
        for item in islice(items, depth):
            pending.append((item, pool.submit(work, item)))
        while pending:
            item, future = pending.popleft()
            following = next(items, None)
            if following is not None:
                pending.append((following, pool.submit(work, following)))
            yield item, future.result()
    finally:
        for _, future in pending:
            future.cancel()


def _judge(seen: int, bad: int, limit: float, last: object, reason: str) -> None:
    if seen >= _MIN_JUDGED and bad > limit * seen:
        raise DataError(
            f"{bad} of the first {seen} sources cannot be decoded, more than max_bad={limit:g} allows; "
            f"the last one: {last}: {reason}. Check the source folders, or raise max_bad"
        )
