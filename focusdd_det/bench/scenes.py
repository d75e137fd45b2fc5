"""Sources and a ViT of one precision: what of a build is timed with them, and what it chooses."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from focusdd_det.bench.agreement import Look
from focusdd_det.bench.definition import Composite, Patch
from focusdd_det.bench.loop import loop, plain
from focusdd_det.bench.pictures import Bench
from focusdd_det.build import columns_of
from focusdd_det.devices import device_of
from focusdd_det.layouts import Layouts
from focusdd_det.methods import METHODS
from focusdd_det.plan import Group, Plan, layouts_of
from focusdd_det.progress import progress_bar
from focusdd_det.ranking import Ranking, rank
from focusdd_det.scoring.decode import BadImage, decode
from focusdd_det.scoring.looking import score_all
from focusdd_det.scoring.scores import ScoreStore
from focusdd_det.scoring.screening import WORTH, Screen
from focusdd_det.selector import Selector, in_precision, load_selector
from focusdd_det.sources import Located

METHOD = METHODS["focusdd"]
SAMPLE = 512  # sources that the straightforward loop is timed with

Decode = Literal["reduced", "full"]
Ranker = Callable[[Group, int], Ranking]  # a class, and how many of it are ranked at least


class Scene:
    """The sources and a ViT that looks once.

    Attributes:
        groups: the classes, with the number of composites that is wanted of each.
        turn: how often they were scored; each time into a file of its own, of which the last one counts.
    """

    def __init__(
        self,
        bench: Bench,
        plan: Plan,
        sources: Sequence[Located],
        precision: str,
        work: Path,
        decode: Decode = "reduced",
    ) -> None:
        self.config = replace(bench.config, precision=precision, decode=decode)  # type: ignore[arg-type]
        c = self.config
        self.selector: Selector = load_selector(
            c.selector, c.selector_weights, c.view, c.attention, precision, device_of(c.device)
        )
        self.plain = plain(self.selector, c.batch)
        self.plan, self.sources, self.work = plan, sources, work
        self.groups: Sequence[Group] = plan.groups
        self.columns = columns_of(c, plan, self.selector)
        self.workers = c.workers or torch.get_num_threads()
        self.turn = 0
        view = self.selector.view
        rng = np.random.default_rng(0)
        self.pixels = torch.from_numpy(rng.integers(0, 256, (c.batch, 3, view, view)).astype(np.uint8))

    @property
    def layouts(self) -> Layouts:
        """How its composites are laid out."""
        return layouts_of(self.config, METHOD)

    # ---- what is timed

    def decode_alone(self) -> None:
        """Reading and reduced-size decoding, by all workers, nothing else."""
        with ThreadPoolExecutor(self.workers) as pool:
            for _ in pool.map(lambda s: _decoded(s, self.selector.view), self.sources):
                pass

    def vit_alone(self) -> None:
        """As many full batches as the sources make."""
        self._batches(self.selector)

    def plain_vit_alone(self) -> None:
        """The same through timm's own forward, whole batches at once."""
        self._batches(self.plain)

    def _batches(self, selector: Selector) -> None:
        for _ in range(math.ceil(len(self.sources) / self.config.batch)):
            selector(self.pixels)

    def score(self) -> None:
        """The build's own phase, from files to rows."""
        self.turn += 1
        self._score(self._file())

    def loop(self) -> None:
        """The straightforward loop over `sample`."""
        for _ in loop(self.sample, self.plain, self.config):
            pass

    @property
    def sample(self) -> Sequence[Located]:
        """What the straightforward loop is timed with: it takes as long for each."""
        return self.sources[:SAMPLE]

    def remembered(self) -> dict[str, float]:
        """ms a source of a second build: of the same files, and of the same pictures under other names."""
        file = self.work / "remembered.sqlite"
        self._score(file, contents=True)
        moved = [replace(s, source=replace(s.source, root="elsewhere")) for s in self.sources]
        times = {"the same files": self._score(file, contents=True), "moved": self._score(file, moved, contents=True)}
        return {name: seconds / len(self.sources) * 1e3 for name, seconds in times.items()}

    def _file(self) -> Path:
        return self.work / f"scores-{self.config.precision}-{self.config.decode}-{self.turn}.sqlite"

    def _score(self, file: Path, sources: Sequence[Located] | None = None, contents: bool = False) -> float:
        store = ScoreStore(file, contents=contents)
        began = time.perf_counter()
        try:
            score_all(
                self.sources if sources is None else sources,
                store, self.selector, METHOD, self.columns, self.config, self.workers, lambda _: None,
            )  # fmt: skip
        finally:
            store.close()
        return time.perf_counter() - began

    # ---- what it says and chooses

    @contextlib.contextmanager
    def scored(self) -> Iterator[ScoreStore]:
        """The file of the last scoring, opened as by the run that filled it."""
        store = ScoreStore(self._file())
        store.run -= 1
        try:
            yield store
        finally:
            store.close()

    def looks(self) -> dict[tuple[str, bytes], Look]:
        """What the last scoring says of every source that could be read."""
        with self.scored() as store:
            rows = store.db.execute(
                "SELECT grp, sha, p, share, win_row, win_col FROM source WHERE length(sha) = 32"
            ).fetchall()
        return {(group, sha): Look(p, share, (row, column)) for group, sha, p, share, row, column in rows}

    def choice(self, groups: Sequence[Group] | None = None) -> dict[str, list[Composite]]:
        """The composites that a build makes of the last scoring, by class; `groups`: another number of each."""
        with self.scored() as store:
            ranker = self.ranker(store)
            return {group.name: _composites(group, ranker, store) for group in groups or self.groups}

    def ranker(self, store: ScoreStore) -> Ranker:
        """How the build ranks a class."""
        return lambda group, reach: rank(
            group, store.blocks(group.name, self.config.alpha), METHOD, self.layouts, self.config, reach
        )


class Screened(Scene):
    """The sources and a ViT that looks first in low precision and then in full at what can be chosen: as many
    composites as the sources allow if there are to be WORTH of them for each one that is wanted."""

    def __init__(
        self,
        bench: Bench,
        plan: Plan,
        sources: Sequence[Located],
        work: Path,
        fast: str,
        decode: Decode = "reduced",
    ) -> None:
        super().__init__(bench, plan, sources, "fp32", work, decode)
        there = Counter(located.source.group for located in sources)
        ipc = max(1, min(there.values(), default=0) // (WORTH * self.config.grid**2))
        self.config = replace(self.config, ipc=ipc)
        self.groups = [replace(group, ipc=ipc) for group in plan.groups if there[group.name]]
        self.fast = in_precision(self.selector, fast)
        self.summary: dict[str, float] = {}

    def _file(self) -> Path:
        return self.work / f"screened-{self.config.decode}-{self.turn}.sqlite"

    def score(self) -> None:
        """Both looks."""
        self.turn += 1
        store = ScoreStore(self._file())
        c, columns = self.config, self.columns
        try:
            score_all(
                self.sources, store, self.selector, METHOD, columns, c, self.workers, lambda _: None, fast=self.fast
            )
            screen = self._screen(store)
            with progress_bar(0, "looking again") as bar:
                screen.settle_all(self.groups, bar)
            self.summary = {**screen.summary(), "wanted": sum(g.ipc for g in self.groups) * c.grid**2}
        finally:
            store.close()

    def ranker(self, store: ScoreStore) -> Ranker:
        """As the build does it: sources that were looked at once by the best that they can be worth."""
        return self._screen(store).rank

    def _screen(self, store: ScoreStore) -> Screen:
        columns, config = self.columns, self.config
        return Screen.of(store, self.fast, self.selector, METHOD, columns, config, self.plan, self.workers)


def _composites(group: Group, ranker: Ranker, store: ScoreStore) -> list[Composite]:
    """The first composites of a class; the ranking is made as deep as they take, as the build does it."""
    ranking = ranker(group, 0)
    while len(found := list(islice(ranking.proposals(), group.ipc))) < group.ipc and ranking.depth:
        ranking = ranker(group, ranking.deeper)
    candidates = ranking.candidates

    def sha(position: int) -> bytes:
        return bytes(candidates.sha[position])

    def patch(position: int) -> Patch:
        return Patch(sha(position), store.row(int(candidates.ids[position])).corner)

    return [Composite(tuple(map(patch, p.keys)), tuple(map(sha, p.backgrounds))) for p in found]


def _decoded(located: Located, view: int) -> None:
    with contextlib.suppress(BadImage, OSError):
        decode(located.read(), view)
