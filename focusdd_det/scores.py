"""Looks at every source once and keeps what was seen in an SQLite file.

The file is what makes a build resumable in its longest phase, keeps memory flat, and lets a second build with another
ipc, alpha or seed do without the ViT.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from focusdd_det.config import SetConfig
from focusdd_det.contents import STEPS, Content, Contents, steps
from focusdd_det.decoding import Task, choose, in_processes, in_threads
from focusdd_det.errors import DataError, DiskError
from focusdd_det.glance import UNREADABLE, Glance, Known, glance
from focusdd_det.methods import REALISM_LEAST, Method
from focusdd_det.plugins import content_of
from focusdd_det.select import Candidates
from focusdd_det.selector import Selector
from focusdd_det.sources import Located
from focusdd_det.window_judge import WindowJudge
from focusdd_det.windows import best_windows, least_windows, realism, window_side

_VERSION = 2  # of the scoring itself: a change of what a score means must not meet old scores
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
_BLOCK = 1 << 13  # sources whose realism scores are computed at a time
MIN_JUDGED = 50  # sources before the share of bad ones may stop a build before its end


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


class ScoreStore:
    """The SQLite file. Not for several threads; one build at a time (the build holds a lock)."""

    def __init__(self, path: Path, contents: bool = False) -> None:
        """`contents`: also keep what was seen by content, for other names, maps and folders (contents.py)."""
        self.path = path
        with self._told():
            self.db = sqlite3.connect(path)
            tables = {name for (name,) in self.db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if foreign := sorted(tables - {"source", "content"}):
                raise DiskError(f"{path} is a database of something else ({foreign[0]}); give another `scores`")
            # Exclusive: two builds that share a file of scores would count each other's sources as their own.
            self.db.executescript(
                "PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=DELETE; PRAGMA synchronous=NORMAL;" + _SCHEMA
            )
            self._add_columns()
            self.run = int(self.db.execute("SELECT COALESCE(MAX(run), 0) + 1 FROM source").fetchone()[0])
            self.contents = Contents(self.db, contents)

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

    def recall(self, located: Located, look: str, sha: bytes | None = None) -> Content | None:
        """What was seen of this content under whatever name, class and map.

        Args:
            look: how it was seen (`look_of`).
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

    def known_contents(self, look: str) -> Known:
        """The contents that `recall` finds; 8 bytes each."""
        with self._told():
            return self.contents.known(look)

    def put(self, rows: Sequence[tuple[object, ...]], look: str = "", contents: Sequence[Content] = ()) -> None:
        """Insert or replace rows in the order of the schema, and what was seen by content."""
        with self._told():
            self.contents.put(look, contents)
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
        # The arrays are those columns themselves: a copy of each would double what a large class takes.
        confidence, shares = np.frombuffer(p, np.float64), np.frombuffer(share, np.float64)
        score = np.empty(len(ids), np.int64)
        for start in range(0, len(ids), _BLOCK):
            part = slice(start, start + _BLOCK)
            score[part] = realism(confidence[part], shares[part], alpha)
        table = Candidates(
            ids=np.frombuffer(ids, np.int64),
            sha=np.frombuffer(sha, np.uint8).reshape(len(ids), 32),
            folder=np.frombuffer(folder, np.int32),
            p=confidence,
            score=score,
            phash=np.frombuffer(phash, np.uint64),
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
        workers: decoding threads or processes.
        progress: called with the number of sources that are done.
        judge: the detection teacher, for methods that rank windows by what it finds in them.

    Raises:
        DataError: a larger share of the sources than `max_bad` cannot be decoded, those of earlier runs included.
    """
    view = judge.side if judge else selector.view if selector else 64
    signatures = {group: signature(selector, method, own, config, judge, group) for group, own in columns.items()}
    look = look_of(selector, method, config)
    sources = max(1, config.batch // max(1, method.looks))  # a batch
    shape = (sources, max(1, method.looks), view, view, 3)
    on_gpu = selector is not None and selector.device.type == "cuda"
    batch: list[tuple[Located, Glance]] = []
    pixels = _blank(shape, on_gpu)
    ahead: Future[_Seen] | None = None  # a batch that is at the ViT, while the next one is filled
    judged = Judged(config.max_bad)
    last_commit = time.monotonic()

    def finish() -> None:
        nonlocal ahead, last_commit
        if ahead is not None:
            rows, contents = ahead.result()
            ahead = None
            store.put(rows, look, contents)
            progress(len(rows))
        if time.monotonic() - last_commit > 2.0:
            store.commit()
            last_commit = time.monotonic()

    def flush(vit: ThreadPoolExecutor) -> None:
        nonlocal ahead, batch, pixels
        if batch:
            keep = bool(look) and store.contents.enabled
            work = (batch, pixels, selector, columns, signatures, store.run, config, keep, method, judge)
            following = vit.submit(_look, *work)
            finish()
            ahead, batch, pixels = following, [], _blank(shape, on_gpu)

    def remembered(located: Located, content: Content) -> None:
        store.put([_row_of(located, signatures, store.run, content, columns, config)])
        progress(1)
        judged.add(located.source, "")

    def new_sources() -> Iterator[Located]:
        for located in stream:
            reason = store.known(located, signatures[located.source.group])
            if reason is not None:
                progress(1)
                judged.add(located.source, reason)
            elif (content := store.recall(located, look) if look else None) is not None:
                remembered(located, content)
            else:
                yield located

    known = store.known_contents(look) if look else Known()
    depth = 4 * workers + config.batch
    if choose(config.loader, workers, on_gpu, not method.looks and not method.needs_teacher) == "processes":
        outcomes = in_processes(new_sources(), Task(view, config, known), workers, depth)
    else:
        outcomes = in_threads(new_sources(), lambda s: glance(s, view, method, config, known), workers, depth)
    with ThreadPoolExecutor(1, thread_name_prefix="vit") as vit, contextlib.closing(outcomes):
        for located, outcome in outcomes:
            if isinstance(outcome, Glance) and not outcome.views:
                content = store.recall(located, look, outcome.sha)
                if content is not None:
                    remembered(located, content)
                    continue
                outcome = glance(located, view, method, config)  # another content with the same first 8 bytes
            if isinstance(outcome, str):
                store.put([_columns_of(located, signatures, store.run, None, 0.0, 0.0, (0, 0), outcome)])
                progress(1)
                judged.add(located.source, outcome)
                continue
            judged.add(located.source, "")
            for i, pixels_of_view in enumerate(outcome.views):
                pixels[len(batch), i] = pixels_of_view  # the only copy; a process' views are lent
            batch.append((located, replace(outcome, views=())))
            if len(batch) == sources:
                flush(vit)
        flush(vit)
        finish()
    store.commit()
    judged.end()


_Seen = tuple[list[tuple[object, ...]], list[Content]]  # rows of the sources, and what is kept by content


def _blank(shape: tuple[int, ...], pinned: bool) -> NDArray[np.uint8]:
    """Zeros for a batch of views; pinned, so that they reach a GPU without another copy and while it works."""
    return np.asarray(torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned).numpy())


def look_of(selector: Selector | None, method: Method, config: SetConfig) -> str:
    """What a remembered content depends on besides its bytes: the signature without what the class is made of. Empty
    where contents are not remembered: nothing is seen, of several looks the best for one class only, or more than the
    window with the most attention."""
    if selector is None or method.looks or method.needs_features or method.window != "most":
        return ""
    return "content " + signature(selector, method, (), replace(config, confidence="max"))


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


def _look(
    batch: Sequence[tuple[Located, Glance]],
    pixels: NDArray[np.uint8],
    selector: Selector | None,
    columns: Mapping[str, Sequence[int]],
    signatures: Mapping[str, str],
    run: int,
    config: SetConfig,
    keep: bool,
    method: Method,
    judge: WindowJudge | None = None,
) -> _Seen:
    """One batch through the ViT, at a fixed batch shape: a ViT at batch 1 and 32 differs in the seventh digit.

    Args:
        pixels: [sources, looks, view, view, 3], zeros behind the last source.
        keep: also return what is kept by content.

    Of several looks at one source the one with the largest p counts, the first of equals; `corner` then holds its
    number. With a `judge` the detection teacher looks in place of the ViT.
    """
    n = len(batch)
    p = np.zeros(n)
    share = np.zeros(n)
    corner: NDArray[np.int64] = np.zeros((n, 2), np.int64)
    features: NDArray[np.float16] | None = None
    contents: list[Content] = []
    if selector is not None:
        looks = pixels.shape[1]
        tensor = torch.from_numpy(pixels).flatten(0, 1).permute(0, 3, 1, 2)
        tensor = tensor if tensor.is_pinned() else tensor.contiguous()
        if method.needs_features:
            probabilities, attention, vectors = selector.with_features(tensor)
            features = vectors[: n * looks].numpy().astype(np.float16)
        else:
            probabilities, attention = selector(tensor)
        k = window_side(selector.grid, config.side_ratio)
        share_t, corner_t = best_windows(attention[: n * looks], k)
        if method.window == "least":
            corner_t = least_windows(attention[: n * looks], k)
        shares, corners = share_t.double().numpy(), corner_t.numpy()
        table = steps(probabilities[: n * looks].double().numpy())
        for i, (located, seen) in enumerate(batch):
            first = i * looks
            each = _confidence(table[first : first + looks], columns[located.source.group], config)
            best = int(np.round(each, 4).argmax())
            p[i], share[i] = each[best], shares[first + best]
            corner[i] = corners[first] if looks == 1 else (best, 0)
            if features is not None:
                features[i] = features[first + best]
            if keep:
                where = (int(corner[i, 0]), int(corner[i, 1]))
                what = (seen.sha, seen.width, seen.height, float(share[i]), where, seen.phash)
                contents.append(Content(*what, table[first]))
    elif judge is not None:
        sizes = [(seen.width, seen.height) for _, seen in batch]
        groups = [located.source.group for located, _ in batch]
        p, corner = judge([pixels[i, 0] for i in range(n)], sizes, groups)
    rows = [
        _columns_of(
            located,
            signatures,
            run,
            seen,
            float(p[i]),
            float(share[i]),
            (int(corner[i, 0]), int(corner[i, 1])),
            feature=None if features is None else features[i].tobytes(),
        )
        for i, (located, seen) in enumerate(batch)
    ]
    return rows, contents


def _confidence(table: NDArray[np.uint16], own: Sequence[int], config: SetConfig) -> NDArray[np.float64]:
    """p of each look from the probabilities of all classes, [looks, classes] in steps of 1/65535: the sum over the
    class' own outputs, or the largest."""
    largest = config.confidence == "max" or not own
    each = table.max(axis=1) if largest else table[:, list(own)].sum(axis=1, dtype=np.int64)
    return np.asarray(np.minimum(each / STEPS, 1.0), np.float64)


def _row_of(
    located: Located,
    signatures: Mapping[str, str],
    run: int,
    content: Content,
    columns: Mapping[str, Sequence[int]],
    config: SetConfig,
) -> tuple[object, ...]:
    """The row of a source whose content was seen before."""
    seen = Glance(content.sha, content.width, content.height, (), content.phash)
    p = float(_confidence(content.probabilities[None], columns[located.source.group], config)[0])
    return _columns_of(located, signatures, run, seen, p, content.share, content.corner)


def _columns_of(
    located: Located,
    signatures: Mapping[str, str],
    run: int,
    seen: Glance | None,
    p: float,
    share: float,
    corner: tuple[int, int],
    bad: str | None = None,
    feature: bytes | None = None,
) -> tuple[object, ...]:
    """A row in the order of the schema; `seen` is None for a source that cannot be used."""
    s = located.source
    sha, width, height, phash = (seen.sha, seen.width, seen.height, seen.phash) if seen else (b"", 0, 0, 0)
    signed = phash - (1 << 64) if phash >= 1 << 63 else phash  # SQLite's integers are signed
    where = (located.offset, located.size, located.mtime_ns)
    found = (sha, width, height, p, share, *corner, signed, bad, feature)
    return (s.root, s.path, s.folder, s.group, signatures[s.group], run, *where, *found)


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
