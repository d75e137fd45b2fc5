"""A build beside its floor: where the time goes, the scoring phase against decoding alone plus the ViT alone, and
against the loop that one would write first."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage

from focusdd_det.bench.options import BenchOptions
from focusdd_det.bench.pictures import Bench, prepare
from focusdd_det.bench.timing import compare, ratio, together
from focusdd_det.build import build, columns_of
from focusdd_det.compose import assemble, cut, encode_jpeg, middle_square
from focusdd_det.devices import device_of
from focusdd_det.disk import write_atomic
from focusdd_det.layouts import Layout
from focusdd_det.methods import METHODS
from focusdd_det.plan import Group, Plan, layouts_of, make_plan
from focusdd_det.progress import progress_bar
from focusdd_det.ranking import rank
from focusdd_det.scoring.decode import BadImage, decode
from focusdd_det.scoring.decoding import MANY
from focusdd_det.scoring.glance import difference_hash, glance, view_pixels
from focusdd_det.scoring.looking import score_all
from focusdd_det.scoring.scores import ScoreStore
from focusdd_det.scoring.screening import WORTH, Screen
from focusdd_det.select import Candidates, joined, proposals
from focusdd_det.selector import Selector, in_precision, load_selector, precision_of
from focusdd_det.sources import Located
from focusdd_det.teacher import load_detector
from focusdd_det.types import Image
from focusdd_det.windows import best_windows, realism, window_side

FLOOR_TARGET, GPU_TARGET = 1.15, 1.25  # DESIGN section 6
LOOP_TARGET, GPU_LOOP_TARGET = 1.7, 3.0
METHOD = METHODS["focusdd"]
_SAMPLE = 512  # sources that the straightforward loop is timed with
_MANY = 20_000  # sources that are looked at beside a GPU
DECODE, LOOP = "decode alone", "straightforward loop (fp32)"
PLAIN = "timm's own forward, whole batches, fp32"


def measure(options: BenchOptions, work: Path) -> dict[str, Any]:
    """Stages, floors, the scoring phase, the straightforward loop, a whole build, and what they choose.

    Args:
        options: sources, selector, teacher, device, workers, rounds, quick.
        work: an empty folder; the caller deletes it.

    Returns:
        Plain values for bench.json; `table` prints them.
    """
    logging.getLogger("focusdd").setLevel(logging.WARNING)
    bench = prepare(options, work, 4, 12 if options.quick else 64, **({"batch": 16} if options.quick else {}))
    plan = make_plan(bench.config)
    device = device_of(bench.config.device)
    on_gpu = device != "cpu"
    # Decoding processes take a second to start, as much as a GPU takes for thousands of sources.
    most = 48 if options.quick else _MANY if on_gpu else _SAMPLE
    usable = (located for located in plan.stream() if not located.problem)
    sources = whole_batches(list(islice(usable, most)), bench.config.batch)
    auto = precision_of("auto", device)
    scenes = {p: _Scene(bench, plan, sources, p, work) for p in dict.fromkeys(("fp32", auto))}
    slow, fast = scenes["fp32"], scenes[auto]
    cases: dict[str, Callable[[], object]] = {DECODE: fast.decode_alone}
    for precision, scene in scenes.items():
        cases[f"ViT alone, {precision}"] = scene.vit_alone
        cases[f"scoring, {precision}"] = scene.score
    cases[PLAIN], cases[LOOP] = slow.plain_vit_alone, slow.loop
    screened = _Screened(bench, plan, sources, work, auto) if auto != "fp32" else None
    looks: dict[str, _Scene] = {f"{auto} then fp32": screened} if screened else {}
    every = "fp32 of every pixel"
    if auto == "fp32":
        looks[every] = _Scene(bench, plan, sources, "fp32", work, decode="full")
    else:
        looks[f"{auto} then {every}"] = _Screened(bench, plan, sources, work, auto, decode="full")
    for name, scene in looks.items():
        cases[f"scoring, {name}"] = scene.score
    seconds = compare(cases, options.rounds, 1, clock=options.seconds)
    seconds[LOOP] = [each * len(sources) / len(slow.sample) for each in seconds[LOOP]]
    ratios = {}
    for precision in scenes:
        decoding, seeing = seconds[DECODE], seconds[f"ViT alone, {precision}"]
        floor = list(map(max, decoding, seeing)) if on_gpu else together(decoding, seeing)
        name = f"scoring / {'the slower of decode and ViT' if on_gpu else '(decode + ViT)'}, {precision}"
        ratios[name] = ratio(seconds[f"scoring, {precision}"], floor)._asdict()
        ratios[f"{LOOP} / scoring, {precision}"] = ratio(seconds[LOOP], seconds[f"scoring, {precision}"])._asdict()
    ratios[f"ViT alone, fp32 / {PLAIN}"] = ratio(seconds["ViT alone, fp32"], seconds[PLAIN])._asdict()
    agreement = {}
    for name, scene in looks.items():
        ratios[f"{LOOP} / scoring, {name}"] = ratio(seconds[LOOP], seconds[f"scoring, {name}"])._asdict()
        agreement[name] = _agreement(slow.reference(), scene)
    slow.score()
    if screened:
        screened.summary["same"] = screened.same_as(slow)
    remembered = fast.remembered()
    stages = fast.stages()
    before = _fresh_peak() if on_gpu else 0
    whole = build(bench.config)
    return {
        "sources": len(sources),
        "selector": Path(bench.config.selector).name,
        "view": fast.selector.view,
        "batch": bench.config.batch,
        "workers": fast.workers,
        "on_gpu": on_gpu,
        "precision": auto,
        "stages_ms": stages,
        "seconds": seconds,
        "ratios": ratios,
        "remembered_ms": remembered,
        "agreement": {**{p: _agreement(slow.reference(), scene) for p, scene in scenes.items()}, **agreement},
        "screening": screened.summary if screened else None,
        "whole_build_seconds": whole.seconds,
        "whole_build": {"ipc": bench.config.ipc, "classes": len(plan.groups), "sources": plan.sources},
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() - before if on_gpu else 0,
        "notes": [*bench.notes, *_notes(len(sources), fast.workers, on_gpu)],
    }


def whole_batches(sources: Sequence[Located], batch: int) -> Sequence[Located]:
    """As many as fill batches: scoring pads the last one, the straightforward loop does not. All, if they fill none."""
    return sources[: len(sources) // batch * batch] or sources


def _notes(sources: int, workers: int, on_gpu: bool) -> list[str]:
    if not on_gpu:
        told = f"decoded by {workers} threads; loader=auto takes processes from {MANY} workers on"
        return [told] if workers >= MANY else []
    notes = ["the floor's decoding is done by threads, that of scoring by processes"]
    if sources < _MANY:
        notes.append(f"{sources} sources are few: processes that decode take a second to start; give sources=")
    return notes


def table(result: Mapping[str, Any]) -> str:
    """The result for people, in Markdown."""
    n = result["sources"]
    lines = [
        f"Build: {n} sources, {result['selector']} at {result['view']} px, batch {result['batch']}, "
        f"{result['workers']} workers",
        "",
        "| stage, alone (all but ViT and teacher in one thread) | ms |",
        "|---|---|",
        *(f"| {name} | {value:.2f} |" for name, value in result["stages_ms"].items()),
        "",
        "| case | ms a source, median (10 % to 90 % of the rounds) | sources a second |",
        "|---|---|---|",
    ]
    for name, times in result["seconds"].items():
        middle, low, high = np.quantile(times, (0.5, 0.1, 0.9)) / n * 1e3
        lines.append(f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {1e3 / middle:.0f} |")
    for name, value in result["remembered_ms"].items():
        lines.append(f"| scoring again, {name} | {value:.3f} | {1e3 / value:.0f} |")
    lines += ["", "| ratio, paired by round | median | 10 % to 90 % | target |", "|---|---|---|---|"]
    for name, value in result["ratios"].items():
        target = ""
        if name.startswith("scoring"):
            target = f"<= {GPU_TARGET if result['on_gpu'] else FLOOR_TARGET}"
        elif name.startswith(LOOP) and result["precision"] != "fp32" and name != f"{LOOP} / scoring, fp32":
            target = f">= {GPU_LOOP_TARGET if result['on_gpu'] else LOOP_TARGET}"
        lines.append(f"| {name} | {value['median']:.2f} | {value['low']:.2f} to {value['high']:.2f} | {target} |")
    lines += [
        "",
        "| against full decoding by Pillow, fp32 | share of chosen key sources that are the same | largest difference "
        "of p | among the chosen | of the attention share | same window |",
        "|---|---|---|---|---|---|",
    ]
    for name, value in result["agreement"].items():
        differences = " | ".join(f"{value[key]:.4f}" for key in ("p", "p_chosen", "share"))
        lines.append(f"| {name} | {value['chosen']:.3f} | {differences} | {value['window']:.3f} |")
    if seen := result["screening"]:
        lines += [
            "",
            f"Screening: {seen['wanted']} of {n} sources wanted, {seen['looked_again']} looked at again in fp32;",
            f"largest deviation: {seen['logit']:.3f} in logit(p), {seen['share']:.4f} in share;",
            f"{seen['same']:.0%} of its key sources are those of scoring in fp32",
        ]
    phases = ", ".join(f"{name} {value:.1f}" for name, value in result["whole_build_seconds"].items())
    whole = result["whole_build"]
    a_class = sum(result["whole_build_seconds"].values()) / max(1, whole["classes"])
    gpu = [f"Peak GPU memory: {result['peak_gpu_bytes'] / 1e9:.2f} GB"] if result["on_gpu"] else []
    built = (
        f"Seconds of a whole build (the default precision and screening; {whole['sources']} sources, "
        f"ipc {whole['ipc']}) by phase: {phases}; a class: {a_class:.2f}"
    )
    return "\n".join([*lines, "", built, *gpu, *result["notes"]])


# ---- what is timed ----


@dataclass
class _Scores:
    """What was seen of the sources, in order of their hashes."""

    sha: list[bytes]
    p: NDArray[np.float64]
    share: NDArray[np.float64]
    corner: list[tuple[int, int]]


class _Scene:
    """The sources and a ViT of one precision."""

    def __init__(
        self,
        bench: Bench,
        plan: Plan,
        sources: Sequence[Located],
        precision: str,
        work: Path,
        decode: Literal["reduced", "full"] = "reduced",
    ) -> None:
        self.config = replace(bench.config, precision=precision, decode=decode)  # type: ignore[arg-type]
        c = self.config
        self.selector: Selector = load_selector(
            c.selector, c.selector_weights, c.view, c.attention, precision, device_of(c.device)
        )
        self.plan, self.sources, self.work = plan, sources, work
        self.columns = columns_of(c, plan, self.selector)
        self.workers = c.workers or torch.get_num_threads()
        self.turn = 0
        view = self.selector.view
        rng = np.random.default_rng(0)
        self.pixels = torch.from_numpy(rng.integers(0, 256, (c.batch, 3, view, view)).astype(np.uint8))
        self._reference: _Scores | None = None
        backbone = copy.copy(self.selector.backbone)
        backbone.whole = True
        self.plain = replace(self.selector, backbone=backbone, at_a_time=c.batch)

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

    def remembered(self) -> dict[str, float]:
        """ms a source of a second build: of the same files, and of the same pictures under other names."""
        file = self.work / "remembered.sqlite"
        self._score(file, contents=True)
        moved = [replace(s, source=replace(s.source, root="elsewhere")) for s in self.sources]
        times = {"the same files": self._score(file, contents=True), "moved": self._score(file, moved, contents=True)}
        return {name: seconds / len(self.sources) * 1e3 for name, seconds in times.items()}

    def loop(self) -> None:
        """One process, Pillow decodes every pixel, plain batches through timm's own forward."""
        for _ in self._plainly(self.sample):
            pass

    @property
    def sample(self) -> Sequence[Located]:
        """What the straightforward loop is timed with: it takes as long for each."""
        return self.sources[:_SAMPLE]

    def _plainly(self, sources: Sequence[Located]) -> Iterator[tuple[list[Located], torch.Tensor, torch.Tensor]]:
        batch: list[Located] = []
        views: list[Image] = []
        for located in sources:
            picture = _pillow(located)
            if picture is None:
                continue
            batch.append(located)
            views.append(view_pixels(picture, self.selector.view, self.config.geometry))
            if len(batch) == self.config.batch:
                yield batch, *self.plain(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous())
                batch, views = [], []
        if batch:
            yield batch, *self.plain(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous())

    def reference(self) -> _Scores:
        """What the straightforward loop says of each source."""
        if self._reference is None:
            found = {}
            for batch, probabilities, attention in self._plainly(self.sources):
                shares, corners = best_windows(attention, window_side(self.selector.grid, self.config.side_ratio))
                for i, located in enumerate(batch):
                    own = list(self.columns[located.source.group])
                    p = probabilities[i, own].sum() if own else probabilities[i].max()
                    sha = hashlib.sha256(located.read()).digest()
                    row, column = corners[i].tolist()
                    found[sha] = (min(1.0, float(p)), float(shares[i]), (row, column))
            self._reference = _as_scores(found)
        return self._reference

    def scores(self) -> _Scores:
        """What the build's last scoring says."""
        store = ScoreStore(self._file())
        rows = store.db.execute("SELECT sha, p, share, win_row, win_col FROM source WHERE length(sha) = 32")
        found = {sha: (p, share, (row, column)) for sha, p, share, row, column in rows}
        store.close()
        return _as_scores(found)

    def candidates(self) -> dict[str, Candidates]:
        """The candidates of the build's last scoring by class."""
        store = ScoreStore(self._file())
        store.run -= 1  # those of the run that filled it
        found = {group.name: joined(store.blocks(group.name, self.config.alpha)) for group in self.plan.groups}
        store.close()
        return found

    def stages(self) -> dict[str, float]:
        """Milliseconds of each step in one thread, of a source, or of a composite where it says so."""
        c, view = self.config, self.selector.view
        sample = self.sources[: min(len(self.sources), 64)]
        timer = _Timer()
        data: dict[Located, bytes] = {}
        for located in sample:
            try:
                bytes_ = timer("read", located.read)
                decode(bytes_)
                picture = timer("decode for the view", decode, bytes_, view)[0]
            except (BadImage, OSError):
                continue
            data[located] = bytes_
            small = timer("resize", view_pixels, picture, view, c.geometry)
            timer("perceptual hash", difference_hash, small)
        for located in data:
            timer("all of it: read, sha256, decode, resize, hash", glance, located, view, METHOD, c)
        self.selector(self.pixels)
        for _ in range(2):
            timer("ViT", self.selector, self.pixels, parts=len(self.pixels))
        store = ScoreStore(self._file())
        store.run -= 1  # those of the run that filled it
        scored = Counter(located.source.group for located in self.sources)
        for group in (group for group in self.plan.groups if scored[group.name]):
            timer("selection", self._select, store, group, parts=scored[group.name])
        store.close()
        side = c.image_size // c.grid
        tiles = []
        for bytes_ in list(data.values())[:32]:
            picture = timer("full decode of a chosen one", decode, bytes_)[0]
            tiles.append(timer("cut", cut, picture, middle_square(picture.shape[1], picture.shape[0]), side, side))
        detector = load_detector(c.teacher, device_of(c.device), self.plan.class_map.names, False)
        for i in range(0, len(tiles) - 3, 4):
            picture = timer("compose, a composite", assemble, tiles[i : i + 4], 2)
            jpeg = timer("encode, a composite", encode_jpeg, picture, c.jpeg_quality)
            timer("teacher, a composite", detector.detect, [picture], c.conf, c.iou, c.max_det, 1)
            timer("write, a composite", write_atomic, self.work / "written.jpg", jpeg)
        return timer.means()

    def _select(self, store: ScoreStore, group: Group) -> list[Any]:
        """As the build does it: read, rank, choose."""
        blocks = store.blocks(group.name, self.config.alpha)
        ranking = rank(group, blocks, METHOD, layouts_of(self.config, METHOD), self.config)
        return list(islice(ranking.proposals(), self.config.ipc))

    def _choose(self, group: str, found: Candidates, ipc: int) -> list[Any]:
        order, backgrounds = METHOD.order(found, self.config, group), METHOD.backgrounds(found, self.config, group)
        stream = proposals(order, backgrounds, found.phash, lambda _: Layout(2, 3), self.config.near_duplicate)
        return [proposal for proposal, _ in zip(stream, range(ipc), strict=False)]


class _Screened(_Scene):
    """The sources and a ViT that looks first in low precision and then in full at what can be chosen: as many
    composites as the sources allow if there are to be WORTH of them for each one that is wanted."""

    def __init__(
        self,
        bench: Bench,
        plan: Plan,
        sources: Sequence[Located],
        work: Path,
        fast: str,
        decode: Literal["reduced", "full"] = "reduced",
    ) -> None:
        super().__init__(bench, plan, sources, "fp32", work, decode)
        there = Counter(located.source.group for located in sources)
        ipc = max(1, min(there.values(), default=0) // (WORTH * self.config.grid**2))
        self.config = replace(self.config, ipc=ipc)
        self.groups = [replace(group, ipc=ipc) for group in plan.groups if there[group.name]]
        self.fast = in_precision(self.selector, fast)
        self.bounds: dict[str, Candidates] = {}
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
            screen = Screen.of(store, self.fast, self.selector, METHOD, columns, c, self.plan, self.workers)
            with progress_bar(0, "looking again") as bar:
                screen.settle_all(self.groups, bar)
            self.bounds = {group.name: screen.rank(group).candidates for group in self.groups}
            self.summary = {**screen.summary(), "wanted": sum(g.ipc for g in self.groups) * c.grid**2}
        finally:
            store.close()

    def candidates(self) -> dict[str, Candidates]:
        """As the build ranks them: sources that were looked at once by the best that they can be worth."""
        return self.bounds

    def same_as(self, full: _Scene) -> float:
        """Share of the key sources that a scoring in full precision chooses as well."""
        same = total = 0
        theirs = full.candidates()
        for group, mine in self.bounds.items():
            chosen = [
                {found.sha[k].tobytes() for p in self._choose(group, found, self.config.ipc) for k in p.keys}
                for found in (mine, theirs[group])
            ]
            same += len(chosen[0] & chosen[1])
            total += len(chosen[1])
        return same / max(1, total)


class _Timer:
    """Collects times by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name: str, work: Callable[..., Any], *arguments: Any, parts: int = 1) -> Any:
        began = time.perf_counter()
        result = work(*arguments)
        self.seconds.setdefault(name, []).append((time.perf_counter() - began) / parts)
        return result

    def means(self) -> dict[str, float]:
        """Milliseconds; the median, because whatever else the machine does only adds."""
        return {name: float(np.median(times)) * 1e3 for name, times in self.seconds.items()}


def _decoded(located: Located, view: int) -> None:
    with contextlib.suppress(BadImage, OSError):
        decode(located.read(), view)


def _pillow(located: Located) -> Image | None:
    try:
        with PILImage.open(io.BytesIO(located.read())) as picture:
            return np.asarray(picture.convert("RGB"), np.uint8)
    except (OSError, SyntaxError, ValueError):
        return None


# ---- what is chosen ----


def _as_scores(found: Mapping[bytes, tuple[float, float, tuple[int, int]]]) -> _Scores:
    sha = sorted(found)
    p, share = (np.array([found[s][i] for s in sha], np.float64) for i in (0, 1))
    return _Scores(sha, p, share, [found[s][2] for s in sha])


def _agreement(reference: _Scores, scene: _Scene) -> dict[str, float]:
    """How far a scoring is from the straightforward loop, and whether it chooses the same key sources."""
    mine = scene.scores()
    place = {sha: i for i, sha in enumerate(reference.sha)}
    both = [(i, place[sha]) for i, sha in enumerate(mine.sha) if sha in place]
    a, b = (np.array(column, int) for column in zip(*both, strict=True))
    same = total = 0
    chosen: set[bytes] = set()
    for group, found in scene.candidates().items():
        there = [place.get(row.tobytes()) for row in found.sha]
        known = np.array([i is not None for i in there], bool)
        at = np.array([i or 0 for i in there], int)
        p = np.where(known, np.round(reference.p[at], 4), found.p)
        share = np.where(known, reference.share[at], 0)
        score = np.where(known, realism(p, share, scene.config.alpha), found.score)
        other = replace(found, p=p, score=score)
        mine_first = {k for proposal in scene._choose(group, found, scene.config.ipc) for k in proposal.keys}
        theirs_first = {k for proposal in scene._choose(group, other, scene.config.ipc) for k in proposal.keys}
        same += len(mine_first & theirs_first)
        total += len(theirs_first)
        chosen |= {found.sha[k].tobytes() for k in mine_first}
    off = np.abs(mine.p[a] - reference.p[b])
    return {
        "chosen": same / max(1, total),
        "p": float(off.max()),
        "p_chosen": float(max((d for d, i in zip(off, a, strict=True) if mine.sha[i] in chosen), default=0)),
        "share": float(np.abs(mine.share[a] - reference.share[b]).max()),
        "window": float(np.mean([mine.corner[i] == reference.corner[j] for i, j in both])),
    }


def _fresh_peak() -> int:
    """Bytes that the GPU holds already; its peak is counted from here."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
