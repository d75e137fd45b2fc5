"""Chosen sources -> labelled composites in the set: cut, compose, label, write.

A composite in which the teacher finds nothing is replaced by the next candidates, so what comes next depends on what
the teacher says. Each class is therefore a coroutine that yields pictures and is sent detections; several run at a
time, so that the teacher's batches are full even with one composite a class.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from focusdd_det import detset, disk
from focusdd_det.compose import assemble, cell_order, cut, encode_jpeg, letterbox, middle_square, resize
from focusdd_det.config import SetConfig
from focusdd_det.detset import Cell, Item
from focusdd_det.errors import DataError, FocusDDError, VerifyError
from focusdd_det.labelling import Labeller, Look
from focusdd_det.layouts import Layouts, cell_sizes
from focusdd_det.methods import Method
from focusdd_det.plan import Group, Plan, layouts_of
from focusdd_det.progress import progress_bar
from focusdd_det.ranking import Ranking, rank
from focusdd_det.scoring.bad_sources import Judged
from focusdd_det.scoring.decode import BadImage, decode
from focusdd_det.scoring.glance import UNREADABLE
from focusdd_det.scoring.scores import Row, ScoreStore
from focusdd_det.scoring.screening import Screen, unsettled
from focusdd_det.seeds import seed_of
from focusdd_det.select import Proposal
from focusdd_det.sources import Root, locate
from focusdd_det.types import Crop, Detections, Image
from focusdd_det.windows import view_of

log = logging.getLogger("focusdd")


@dataclass(frozen=True)
class Workbench:
    """All that composites are made with."""

    config: SetConfig
    plan: Plan
    method: Method
    store: ScoreStore
    token_grid: int  # side of the ViT's token grid, on which key windows are given
    labeller: Labeller
    folder: Path
    workers: int
    screen: Screen | None = None
    made: dict[str, list[Item]] = field(default_factory=dict)  # class -> its composites so far

    @property
    def roots(self) -> dict[str, Root]:
        return {root.name: root for root in self.plan.roots}

    @property
    def layouts(self) -> Layouts:
        return layouts_of(self.config, self.method)

    def rank(self, group: Group, reach: int = 0) -> Ranking:
        """The ranking of a class as it is known now, of at least so many sources."""
        if self.screen is not None:
            return self.screen.rank(group, reach)
        blocks = self.store.blocks(group.name, self.config.alpha, self.method.needs_features)
        return rank(group, blocks, self.method, self.layouts, self.config, reach)


@dataclass(frozen=True)
class _Draft:
    """A composite whose labels are still missing."""

    proposal: int
    seed: int
    cells: tuple[Cell, ...]
    jpeg: bytes
    looks: tuple[Look, ...]


class _BadSourceError(Exception):
    """A source that cannot be cut after all: its position in the candidates, and the reason."""

    def __init__(self, position: int, source: str, reason: str) -> None:
        super().__init__(reason)
        self.position = position
        self.source = source


_Class = Generator[list[Image], list[Detections], None]


def compose_all(bench: Workbench) -> list[Item]:
    """All composites of all classes; what the set in `bench.folder` holds already is taken from there.

    Returns:
        The composites in plan order: these and no others make the set.

    Raises:
        DataError: too many sources turn out to be unusable, or their folder is gone.
    """
    while True:
        trusted = bench.screen and bench.screen.bound
        items = _compose_all(bench)
        if bench.screen is None or bench.screen.bound == trusted:
            return items
        # A first look was further off than any before. What such a look can have hidden is chosen now, in every class.
        log.info(
            "a first look was further off than any before: the composites are chosen anew, those that stay are kept"
        )
        bench.made.clear()


def _compose_all(bench: Workbench) -> list[Item]:
    config = bench.config
    judged = Judged(config.max_bad)
    done = {(item.group, item.proposal): item for item in detset.read_manifest(bench.folder, tolerant=True)}
    waiting = iter(bench.plan.groups)
    active: list[tuple[Group, _Class, list[Image]]] = []
    with (
        ThreadPoolExecutor(bench.workers, thread_name_prefix="cut") as pool,
        progress_bar(bench.plan.composites, "composites") as bar,
    ):

        def advance(group: Group, work: _Class, answer: list[Detections] | None) -> None:
            with contextlib.suppress(StopIteration):
                active.append((group, work, next(work) if answer is None else work.send(answer)))

        while True:
            while sum(len(looks) for _, _, looks in active) < bench.labeller.in_flight:
                group = next(waiting, None)
                if group is None:
                    break
                advance(group, _one_class(bench, group, done, pool, bar, judged), None)
            if not active:
                break
            turn, active[:] = list(active), []
            found = bench.labeller.ask([look for _, _, looks in turn for look in looks])
            for group, work, looks in turn:
                answer, found = found[: len(looks)], found[len(looks) :]
                advance(group, work, answer)
    counts = bench.store.counts().values()
    good, bad = sum(count[0] for count in counts), sum(count[1] for count in counts)
    if bad > config.max_bad * (good + bad):
        raise DataError(
            f"{bad} of {good + bad} sources cannot be used, more than max_bad={config.max_bad:g} allows; "
            f"{'; '.join(judged.named)}. Check the source folders and run the same command again, or raise max_bad"
        )
    return [item for group in bench.plan.groups for item in bench.made.get(group.name, [])]


def _one_class(
    bench: Workbench,
    group: Group,
    done: dict[tuple[str, int], Item],
    pool: ThreadPoolExecutor,
    bar: Any,
    judged: Judged,
) -> _Class:
    """The composites of one class, in order, into `bench.made`."""
    made = bench.made.setdefault(group.name, [])
    ranking = bench.rank(group)
    stream = ranking.proposals()
    number = 0  # of the next proposal
    while len(made) < group.ipc:
        wanted = min(group.ipc - len(made), bench.labeller.in_flight)
        batch = list(islice(stream, wanted))
        if len(batch) < wanted and ranking.depth:
            ranking = bench.rank(group, ranking.deeper)
            stream = ranking.proposals(number)  # what came before is the same
            continue
        if bench.screen and len(again := unsettled(ranking, batch)):
            bench.screen.settle(ranking.candidates.ids[again].tolist())
            ranking = bench.rank(group, ranking.reach)
            stream = ranking.proposals(number)  # what came before was settled; if a bound grew, see compose_all
            continue
        if not batch:
            break
        try:
            drafts = _drafts(bench, group, batch, ranking.candidates.ids, done, pool)
        except _BadSourceError as error:
            ranking.banned[error.position] = True
            bench.store.reject(int(ranking.candidates.ids[error.position]), str(error))
            judged.add(error.source, str(error))
            stream = ranking.proposals(number)  # what came before did not use it, so it stays as it was
            continue
        number = batch[-1].number + 1
        looks = [look.pixels for draft in drafts if isinstance(draft, _Draft) for look in draft.looks]
        found = (yield looks) if looks else []
        for draft in drafts:
            if isinstance(draft, Item):
                if draft.index != len(made):
                    raise VerifyError(
                        f"{bench.folder}: {draft.id} was made as number {draft.index} and is number {len(made)} now; "
                        "the build was begun on a machine that computes differently. Begin anew with overwrite=true"
                    )
                made.append(draft)
                bar.update(1)
                continue
            for cell in draft.cells:
                judged.add(f"{cell.root}:{cell.path}", "")
            mine, found = found[: len(draft.looks)], found[len(draft.looks) :]
            item = _write(bench, group, draft, mine, len(made))
            if item is not None:
                made.append(item)
                bar.update(1)
    bar.total -= group.ipc - len(made)
    bar.refresh()


def _drafts(
    bench: Workbench,
    group: Group,
    batch: list[Proposal],
    ids: np.ndarray,
    done: dict[tuple[str, int], Item],
    pool: ThreadPoolExecutor,
) -> list[_Draft | Item]:
    """Pixels for each proposal, cut in threads; an Item where an earlier run has finished it."""
    jobs: list[Item | Future[_Draft]] = []
    for proposal in batch:
        positions = (*proposal.keys, *proposal.backgrounds)
        sources = [bench.store.row(int(ids[position])) for position in positions]
        seed = seed_of("composite", bench.config.seed, group.name, proposal.number)
        layout = bench.layouts.of(group.name, proposal.number)
        config = replace(bench.config, grid=layout.grid, n_key=layout.n_key)
        cells = tuple(
            _cell(bench, source, "key" if i < len(proposal.keys) else "background", config)
            for i, source in enumerate(sources)
        )
        turn = cell_order(seed, len(cells))
        cells, sources = tuple(cells[i] for i in turn), [sources[i] for i in turn]
        earlier = done.get((group.name, proposal.number))
        if earlier and _is_finished(bench, group, earlier, seed, cells):
            jobs.append(earlier)
        else:
            where = [positions[i] for i in turn]
            jobs.append(pool.submit(_draft, bench, proposal.number, seed, cells, sources, where))
    try:
        return [
            job if isinstance(job, Item) else _outcome(job, group, proposal)
            for job, proposal in zip(jobs, batch, strict=True)
        ]
    finally:
        for job in jobs:
            if not isinstance(job, Item):
                job.cancel()


def _outcome(job: Future[_Draft], group: Group, proposal: Proposal) -> _Draft:
    """What a thread made; a thread that died ends the build with the name of what it worked on."""
    try:
        return job.result()
    except (_BadSourceError, FocusDDError):
        raise
    except Exception as error:
        raise FocusDDError(
            f"composite {proposal.number} of {group.name} could not be cut ({type(error).__name__}: {error}); what is "
            "done is kept. Run the same command again; if it ends here again, this is a bug: please report it"
        ) from error


def _cell(bench: Workbench, source: Row, kind: str, config: SetConfig) -> Cell:
    """What one source contributes; `config` is that of the composite's own grid."""
    crop: Crop | None
    if kind == "key":
        view = view_of(source.width, source.height, config.geometry)
        crop = bench.method.crop(view, source.corner, bench.token_grid, config, source.sha256)
    else:
        crop = middle_square(source.width, source.height) if config.background == "crop" else None
    return Cell(
        kind=kind,
        root=source.root,
        path=source.path,
        folder=source.folder,
        sha256=source.sha256,
        width=source.width,
        height=source.height,
        crop=None if crop is None else (crop.x, crop.y, crop.side),
        p=round(source.p, 4),
        share=round(source.share, 4),
        confirmed=False,
    )


def _draft(
    bench: Workbench, number: int, seed: int, cells: tuple[Cell, ...], sources: list[Row], positions: list[int]
) -> _Draft:
    """Read the sources again, in full this time, and put the composite together."""
    config, roots = bench.config, bench.roots
    grid = isqrt(len(cells))
    tiles, looks = [], []
    for cell, row, position, size in zip(cells, sources, positions, cell_sizes(config.image_size, grid), strict=True):
        picture = _read_whole(roots[row.root], row, position, config)
        if cell.crop is None:
            tiles.append(resize(letterbox(picture, max(size))[0], *size))
        else:
            tiles.append(cut(picture, Crop(*cell.crop), *size))
        looks += bench.labeller.look_at_source(picture)
    jpeg = encode_jpeg(assemble(tiles, grid), config.jpeg_quality)
    looks += bench.labeller.look_at_composite(jpeg)
    return _Draft(number, seed, cells, jpeg, tuple(looks))


def _read_whole(root: Root, row: Row, position: int, config: SetConfig) -> Image:
    located = locate(root, row.path, row.folder, row.group, row.offset, row.size, row.mtime_ns)
    try:
        located.demand_folder()
        data = located.read()
        if hashlib.sha256(data).hexdigest() != row.sha256:
            raise BadImage("its content changed while the set was built")
        picture, width, height = decode(data, None, config.max_pixels)
        if (width, height) != (row.width, row.height) or picture.shape[:2] != (height, width):
            raise BadImage(
                f"its size changed from {row.width} x {row.height} to {picture.shape[1]} x {picture.shape[0]}"
            )
    except BadImage as error:
        raise _BadSourceError(position, str(located.source), str(error)) from error
    except OSError as error:
        reason = f"{UNREADABLE}: {error.strerror or error}"
        raise _BadSourceError(position, str(located.source), reason) from error
    return picture


def _write(bench: Workbench, group: Group, draft: _Draft, found: list[Detections], index: int) -> Item | None:
    """Label a draft and write it; None if there is nothing to learn from it and it is to be replaced."""
    label = bench.labeller.label(draft.looks, draft.cells, group.class_index, found)
    if label is None:
        return None
    parts = {"images": draft.jpeg, **label.parts}
    item = Item(
        id=_item_id(group, index),
        class_name=group.class_name,
        class_index=group.class_index,
        group=group.name,
        index=index,
        proposal=draft.proposal,
        seed=draft.seed,
        cells=label.cells,
        boxes=label.boxes,
        sha256={part: disk.sha256(data) for part, data in parts.items()},
    )
    for part, data in parts.items():
        detset.write_part(bench.folder, part, item, data)
    detset.append(bench.folder, item)
    return item


def _item_id(group: Group, index: int) -> str:
    """File name of a composite: plain ASCII, short, and different for any two classes or folders."""
    slug = re.sub(r"[^a-z0-9]+", "-", group.name.lower()).strip("-")[:60]
    if group.name not in (slug, group.class_name):  # several folders of one class may have one slug
        slug += "-" + hashlib.sha256(group.name.encode()).hexdigest()[:8]
    return f"{group.class_index:03d}_{slug}_{index:05d}"


def _is_finished(bench: Workbench, group: Group, item: Item, seed: int, cells: tuple[Cell, ...]) -> bool:
    """Whether an item of an earlier run is made of these very cells, is what its line says and its files are whole."""
    plain = tuple(replace(cell, confirmed=False) for cell in item.cells)
    whose = (item.id, item.class_name, item.class_index)
    due = (_item_id(group, item.index), group.class_name, group.class_index)
    if item.seed != seed or plain != cells or whose != due or not detset.intact(bench.folder, item):
        return False
    return bench.labeller.sound(bench.folder, item)
