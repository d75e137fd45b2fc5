"""Looks at every source once and keeps what was seen in an SQLite file.

The file is what makes a build resumable in its longest phase, keeps memory flat, and lets a second build with another
ipc, alpha or seed do without the ViT.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sqlite3
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from focusdd_det.compose import letterbox, resize
from focusdd_det.config import SetConfig
from focusdd_det.decode import BadImage, decode
from focusdd_det.errors import DataError, DiskError, FocusDDError
from focusdd_det.methods import REALISM_LEAST, Method
from focusdd_det.plugins import content_of
from focusdd_det.select import Candidates
from focusdd_det.selector import Selector
from focusdd_det.sources import Located
from focusdd_det.types import Crop, Image, round_half_up
from focusdd_det.window_judge import WindowJudge
from focusdd_det.windows import best_windows, least_windows, middle_square, realism, window_side

_VERSION = 1  # of the scoring itself: a change of what a score means must not meet old scores
_SCHEMA = """
CREATE TABLE IF NOT EXISTS source (
    root TEXT, path TEXT, folder TEXT, grp TEXT, sig TEXT, run INTEGER,
    offset INTEGER, size INTEGER, mtime INTEGER, sha BLOB, width INTEGER, height INTEGER,
    p REAL, share REAL, win_row INTEGER, win_col INTEGER, phash INTEGER, bad TEXT,
    feature BLOB, PRIMARY KEY (root, path));
CREATE INDEX IF NOT EXISTS by_group ON source (run, grp);
"""
_COLUMNS = (
    "root", "path", "folder", "grp", "sig", "run", "offset", "size", "mtime", "sha", "width", "height",
    "p", "share", "win_row", "win_col", "phash", "bad", "feature",
)  # fmt: skip
MIN_JUDGED = 50  # sources before the share of bad ones may stop a build before its end
UNREADABLE = "unreadable"  # how the reason begins when the file system refused; it is tried again by the next run


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
    views: tuple[Image, ...]  # the whole source, or the crops that the method looks at
    phash: int


class ScoreStore:
    """The SQLite file. Not for several threads; one build at a time (the build holds a lock)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._told():
            self.db = sqlite3.connect(path)
            tables = [name for (name,) in self.db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            if tables not in ([], ["source"]):
                raise DiskError(f"{path} is a database of something else ({tables[0]}); give another `scores`")
            # Exclusive: two builds that share a file of scores would count each other's sources as their own.
            self.db.executescript(
                "PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=DELETE; PRAGMA synchronous=NORMAL;" + _SCHEMA
            )
            self._add_columns()
            self.run = int(self.db.execute("SELECT COALESCE(MAX(run), 0) + 1 FROM source").fetchone()[0])

    def _add_columns(self) -> None:
        """`feature` is younger than the other columns: an older file gets it, empty."""
        there = tuple(row[1] for row in self.db.execute("PRAGMA table_info(source)"))
        if there == _COLUMNS[:-1]:
            self.db.execute("ALTER TABLE source ADD COLUMN feature BLOB")
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

    def known(self, located: Located, signature: str) -> str | None:
        """What was found when this very file was seen under the same signature; it then counts as part of this run.

        Returns:
            None: it was not seen, or could not be read, which may be over. Empty: usable. Else why it is not.
        """
        s = located.source
        with self._told():
            found = self.db.execute(
                "UPDATE source SET run = ?, grp = ? WHERE root = ? AND path = ? AND sig = ? AND size = ? AND mtime = ? "
                f"AND (bad IS NULL OR bad NOT LIKE '{UNREADABLE}%') RETURNING COALESCE(bad, '')",
                (self.run, s.group, s.root, s.path, signature, located.size, located.mtime_ns),
            ).fetchone()
        return None if found is None else str(found[0])

    def put(self, rows: Sequence[tuple[object, ...]]) -> None:
        """Insert or replace rows in the order of the schema."""
        with self._told():
            self.db.executemany(f"INSERT OR REPLACE INTO source VALUES ({','.join('?' * len(_COLUMNS))})", rows)

    def commit(self) -> None:
        """Make what was put durable."""
        with self._told():
            self.db.commit()

    def candidates(self, group: str, alpha: float, features: bool = False) -> tuple[Candidates, set[int]]:
        """The sources of a class in this run; of files with equal content one counts, by the least name.

        Args:
            features: also read the ViT's features: 2 d bytes a source of the class.

        Returns:
            The candidates; and the positions of those that could be looked at but turned out to be unusable later.
            They keep their place, so that a build that goes on ranks as the one did that found out.
        """
        # Typed columns, filled row by row: the rows of a large class never lie in memory as Python tuples.
        ids, phash, folder = array("q"), array("q"), array("i")
        p, share = array("d"), array("d")
        sha, vectors = bytearray(), bytearray()
        names: dict[str, int] = {}
        unusable: set[int] = set()
        with self._told():
            for row in self.db.execute(
                "SELECT rowid, sha, folder, p, share, phash, bad, MIN(root || char(31) || path)"
                f"{', feature' if features else ''} FROM source "
                "WHERE run = ? AND grp = ? AND length(sha) = 32 GROUP BY sha ORDER BY sha",
                (self.run, group),
            ):
                if row[6] is not None:
                    unusable.add(len(ids))
                ids.append(row[0])
                sha += row[1]
                folder.append(names.setdefault(row[2], len(names)))
                p.append(round(row[3], 4))
                share.append(row[4])
                phash.append(row[5])
                if features:
                    vectors += row[8] or b""
        confidence = np.array(p, np.float64)
        table = Candidates(
            ids=np.array(ids, np.int64),
            sha=np.frombuffer(bytes(sha), np.uint8).reshape(len(ids), 32),
            folder=np.array(folder, np.int32),
            p=confidence,
            score=realism(confidence, np.array(share, np.float64), alpha),
            phash=np.array(phash, np.int64).view(np.uint64),
            features=self._vectors(vectors, len(ids)) if features else None,
        )
        return table, unusable

    def _vectors(self, data: bytearray, count: int) -> NDArray[np.float16]:
        """[count, d] float16, never NaN."""
        values = np.frombuffer(memoryview(data)[: len(data) // 2 * 2], np.float16)
        if (count and (not len(values) or len(values) % count)) or not np.isfinite(values).all():
            raise DiskError(f"{self.path} is damaged: its features are not one vector a source; remove it")
        return values.reshape(count, -1) if count else values.reshape(0, 1)

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
    method: Method,
    columns: Mapping[str, Sequence[int]],
    config: SetConfig,
    workers: int,
    progress: Callable[[int], object],
    judge: WindowJudge | None = None,
) -> None:
    """Look at every source of the stream that the store does not hold yet.

    Args:
        stream: sources, in any order.
        store: where the results go.
        selector: the ViT; None for methods that need none (then p and share are 0).
        method: says whether the ViT is shown a source as a whole, or crops of it.
        columns: class -> outputs of the ViT that stand for it; empty: the largest probability counts.
        config: geometry, view and limits.
        workers: decoding threads.
        progress: called with the number of sources that are done.
        judge: the detection teacher, for methods that rank windows by what it finds in them.

    Raises:
        DataError: a larger share of the sources than `max_bad` cannot be decoded, those of earlier runs included.
    """
    view = judge.side if judge else selector.view if selector else 64
    signatures = {group: signature(selector, method, own, config, judge, group) for group, own in columns.items()}
    sources = max(1, config.batch // max(1, method.looks))  # a batch
    batch: list[tuple[Located, _Glance]] = []
    judged = Judged(config.max_bad)
    last_commit = time.monotonic()

    def flush() -> None:
        nonlocal last_commit
        if batch:
            size = max(1, method.looks) * sources
            store.put(_look(batch, selector, columns, signatures, store.run, config, size, method, judge))
            progress(len(batch))
            batch.clear()
        if time.monotonic() - last_commit > 2.0:
            store.commit()
            last_commit = time.monotonic()

    def new_sources() -> Iterator[Located]:
        for located in stream:
            reason = store.known(located, signatures[located.source.group])
            if reason is None:
                yield located
            else:
                progress(1)
                judged.add(located.source, reason)

    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        for located, outcome in _ahead(
            pool, new_sources(), lambda s: _glance(s, view, method, config), 4 * workers + config.batch
        ):
            if isinstance(outcome, str):
                store.put([_columns_of(located, signatures, store.run, None, 0.0, 0.0, (0, 0), outcome)])
                progress(1)
                judged.add(located.source, outcome)
                continue
            judged.add(located.source, "")
            batch.append((located, outcome))
            if len(batch) == sources:
                flush()
    flush()
    store.commit()
    judged.end()


def signature(
    selector: Selector | None,
    method: Method,
    columns: Sequence[int],
    config: SetConfig,
    judge: WindowJudge | None = None,
    group: str = "",
) -> str:
    """What a stored score depends on besides the picture; scores with another signature are computed anew."""
    content: list[object] = [_VERSION, config.geometry, config.max_pixels]
    if selector is not None:
        content += [
            selector.sha256,
            selector.spec,
            selector.view,
            selector.grid,
            selector.attention,
            selector.precision,
        ]
        content += [config.side_ratio, config.confidence, list(columns)]
    if method.looks:
        content += [method.looks, REALISM_LEAST, config.seed, *content_of(method)]
    if method.window != "most":
        content.append(method.window)
    if method.needs_features:
        content.append("features")
    if judge is not None:
        content += [*judge.depends_on(group), *content_of(method)]
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


def _glance(located: Located, view: int, method: Method, config: SetConfig) -> _Glance | str:
    """Read, hash, decode and shrink one source; a string is the reason why it cannot be used."""
    if located.problem:
        return located.problem
    try:
        data = located.read()
        least = math.ceil(view / math.sqrt(REALISM_LEAST)) if method.looks else view  # the smallest crop fills a view
        picture, width, height = decode(data, least, config.max_pixels)
    except BadImage as error:
        return str(error)
    except OSError as error:
        return f"{UNREADABLE}: {error.strerror or error}"
    except MemoryError:
        return "too large for the memory"
    pixels = view_pixels(picture, view, config.geometry)
    digest = hashlib.sha256(data)
    crops = method.look_crops(width, height, digest.hexdigest(), config)
    views = tuple(_crop_pixels(picture, width, crop, view) for crop in crops) or (pixels,)
    if method.needs_teacher:
        views = (letterbox(picture, view)[0],)
    return _Glance(digest.digest(), width, height, views, difference_hash(pixels))


def _crop_pixels(picture: Image, width: int, crop: Crop, view: int) -> Image:
    """A square of a source, from its picture that may have been decoded at reduced size, at view x view px."""
    scale = picture.shape[1] / width
    side = max(1, min(round_half_up(crop.side * scale), *picture.shape[:2]))
    x = min(round_half_up(crop.x * scale), picture.shape[1] - side)
    y = min(round_half_up(crop.y * scale), picture.shape[0] - side)
    return resize(picture[y : y + side, x : x + side], view, view)


def _look(
    batch: Sequence[tuple[Located, _Glance]],
    selector: Selector | None,
    columns: Mapping[str, Sequence[int]],
    signatures: Mapping[str, str],
    run: int,
    config: SetConfig,
    size: int,
    method: Method,
    judge: WindowJudge | None = None,
) -> list[tuple[object, ...]]:
    """One batch through the ViT, at a fixed batch shape: a ViT at batch 1 and 32 differs in the seventh digit.

    Of several looks at one source the one with the largest p counts, the first of equals; `corner` then holds its
    number. With a `judge` the detection teacher looks in place of the ViT.
    """
    n = len(batch)
    p = np.zeros(n)
    share = np.zeros(n)
    corner: NDArray[np.int64] = np.zeros((n, 2), np.int64)
    features: NDArray[np.float16] | None = None
    if selector is not None:
        views = [view for _, glance in batch for view in glance.views]
        pixels = np.zeros((size, selector.view, selector.view, 3), np.uint8)
        pixels[: len(views)] = np.stack(views)
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        if method.needs_features:
            probabilities, attention, vectors = selector.with_features(tensor)
            features = vectors[: len(views)].numpy().astype(np.float16)
        else:
            probabilities, attention = selector(tensor)
        k = window_side(selector.grid, config.side_ratio)
        share_t, corner_t = best_windows(attention[: len(views)], k)
        if method.window == "least":
            corner_t = least_windows(attention[: len(views)], k)
        shares, corners = share_t.double().numpy(), corner_t.numpy()
        table = probabilities[: len(views)].double().numpy()
        first = 0
        for i, (located, glance) in enumerate(batch):
            own = columns[located.source.group]
            rows = table[first : first + len(glance.views)]
            each = rows.max(axis=1) if config.confidence == "max" or not own else rows[:, list(own)].sum(axis=1)
            best = int(np.round(each, 4).argmax())
            p[i], share[i] = each[best], shares[first + best]
            corner[i] = corners[first] if len(rows) == 1 else (best, 0)
            if features is not None:
                features[i] = features[first + best]
            first += len(rows)
    elif judge is not None:
        sizes = [(glance.width, glance.height) for _, glance in batch]
        groups = [located.source.group for located, _ in batch]
        p, corner = judge([glance.views[0] for _, glance in batch], sizes, groups)
    return [
        _columns_of(
            located,
            signatures,
            run,
            glance,
            float(min(p[i], 1.0)),
            float(share[i]),
            (int(corner[i, 0]), int(corner[i, 1])),
            feature=None if features is None else features[i].tobytes(),
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
    feature: bytes | None = None,
) -> tuple[object, ...]:
    """A row in the order of the schema; `glance` is None for a source that cannot be used."""
    s = located.source
    sha, width, height, phash = (glance.sha, glance.width, glance.height, glance.phash) if glance else (b"", 0, 0, 0)
    signed = phash - (1 << 64) if phash >= 1 << 63 else phash  # SQLite's integers are signed
    where = (located.offset, located.size, located.mtime_ns)
    seen = (sha, width, height, p, share, *corner, signed, bad, feature)
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
            try:
                outcome = future.result()
            except Exception as error:
                raise FocusDDError(
                    f"{item.source} could not be looked at ({type(error).__name__}: {error}); what is done is kept. "
                    "Run the same command again; if it ends here again, this is a bug: please report it"
                ) from error
            yield item, outcome
    finally:
        for _, future in pending:
            future.cancel()


class Judged:
    """Counts sources that were used and that could not be, and stops a build when too many could not."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.seen = 0
        self.bad = 0
        self.reasons: Counter[str] = Counter()
        self.last = ""

    def add(self, source: object, reason: str) -> None:
        """Count one source; an empty reason means that it can be used.

        Raises:
            DataError: the share of bad ones is above the limit, after the first `MIN_JUDGED`.
        """
        self.seen += 1
        if reason:
            self.bad += 1
            self.reasons[reason if len(self.reasons) < 100 else "others"] += 1
            self.last = f"{source}: {reason}"
            if self.seen >= MIN_JUDGED:
                self.end()

    def end(self) -> None:
        """The same for all of them, however few.

        Raises:
            DataError: see `add`.
        """
        if self.bad > self.limit * self.seen:
            summary = "\n  ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common(10))
            raise DataError(
                f"{self.bad} of the first {self.seen} sources cannot be used, more than max_bad={self.limit:g} allows:"
                f"\n  {summary}\nThe last one: {self.last}. Check the source folders, or raise max_bad"
            )
