"""A build beside its floor: where the time goes, the scoring phase against decoding alone plus the ViT alone, and
against the loop that one would write first; whether it chooses what the definition says; what the times mean."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from focusdd_det.bench.agreement import differences, looks_of, same_choice, sources_of
from focusdd_det.bench.definition import Choice, Seen, choose
from focusdd_det.bench.extrapolate import extrapolated, told
from focusdd_det.bench.loop import seen_by_class
from focusdd_det.bench.options import BenchOptions
from focusdd_det.bench.pictures import Bench, prepare
from focusdd_det.bench.scenes import SAMPLE, Scene, Screened
from focusdd_det.bench.stages import FULL, REDUCED, large_decodes, stages
from focusdd_det.bench.timing import Ratio, compare, ratio, together
from focusdd_det.build import BuildResult, build
from focusdd_det.devices import device_of
from focusdd_det.plan import Plan, make_plan
from focusdd_det.scoring.decoding import MANY
from focusdd_det.selector import precision_of
from focusdd_det.sources import Located

FLOOR_TARGET, GPU_TARGET = 1.15, 1.25  # DESIGN section 6
LOOP_TARGET, GPU_LOOP_TARGET = 1.7, 3.0
_MANY = 20_000  # sources that are looked at beside a GPU
DECODE, LOOP = "decode alone", "straightforward loop (fp32)"
PLAIN = "timm's own forward, whole batches, fp32"
EVERY = "fp32 of every pixel"


def measure(options: BenchOptions, work: Path) -> dict[str, Any]:
    """Stages, floors, the scoring phase, the straightforward loop, a whole build, what they choose, what it means.

    Args:
        options: sources, selector, teacher, device, workers, rounds, quick.
        work: an empty folder; the caller deletes it.

    Returns:
        Plain values for bench.json; `table` prints them.
    """
    logging.getLogger("focusdd").setLevel(logging.WARNING)
    bench = prepare(options, work, 4, 12 if options.quick else 64, **({"batch": 16} if options.quick else {}))
    plan = make_plan(bench.config)
    on_gpu = device_of(bench.config.device) != "cpu"
    sources = _some_sources(plan, options.quick, on_gpu, bench.config.batch)
    scenes = _Scenes.of(bench, plan, sources, work)
    slow, view = scenes.slow, scenes.slow.selector.view
    seconds = compare(scenes.cases(), options.rounds, 1, clock=options.seconds)
    seconds[LOOP] = [each * len(sources) / len(slow.sample) for each in seconds[LOOP]]
    large = large_decodes(view, options)
    found = ratios(seconds, list(scenes.once), list(scenes.others), on_gpu)
    found[f"{FULL} / {REDUCED}"] = ratio(large[FULL], large[REDUCED])
    whole, peak = _build(bench, plan, work, on_gpu)
    meanings = extrapolated(seconds, len(sources), whole.seconds["compose"], whole.composites)
    return {
        "sources": len(sources),
        "selector": Path(bench.config.selector).name,
        "view": view,
        "batch": bench.config.batch,
        "image_size": bench.config.image_size,
        "workers": slow.workers,
        "on_gpu": on_gpu,
        "precision": scenes.auto,
        "stages_ms": {**stages(scenes.fast), **{name: float(np.median(t)) * 1e3 for name, t in large.items()}},
        "seconds": seconds,
        "large_seconds": large,
        "ratios": {name: value._asdict() for name, value in found.items()},
        "remembered_ms": scenes.fast.remembered(),
        "agreement": _agreements(scenes, sources),
        "screening": scenes.screening(),
        "whole_build_seconds": whole.seconds,
        "whole_build": _of_build(whole, plan, bench.config.ipc),
        "extrapolated": {name: value._asdict() for name, value in meanings.items()},
        "peak_gpu_bytes": peak,
        "notes": [*bench.notes, *_notes(len(sources), slow.workers, on_gpu)],
    }


def ratios(
    seconds: Mapping[str, Sequence[float]], precisions: Sequence[str], others: Sequence[str], on_gpu: bool
) -> dict[str, Ratio]:
    """Those with a target, and what else is compared, paired by round.

    Args:
        seconds: case -> of all sources, in every round.
        precisions: of the scenes that look once: each has the cases `ViT alone, ...` and `scoring, ...`.
        others: names of further scenes, which have the latter.
        on_gpu: the floor is then the slower of decoding and the ViT, not their sum.
    """
    found = {}
    for precision in precisions:
        decoding, seeing = seconds[DECODE], seconds[f"ViT alone, {precision}"]
        floor = list(map(max, decoding, seeing)) if on_gpu else together(decoding, seeing)
        name = f"scoring / {'the slower of decode and ViT' if on_gpu else '(decode + ViT)'}, {precision}"
        found[name] = ratio(seconds[f"scoring, {precision}"], floor)
        found[f"{LOOP} / scoring, {precision}"] = ratio(seconds[LOOP], seconds[f"scoring, {precision}"])
    found[f"ViT alone, fp32 / {PLAIN}"] = ratio(seconds["ViT alone, fp32"], seconds[PLAIN])
    for name in others:
        found[f"{LOOP} / scoring, {name}"] = ratio(seconds[LOOP], seconds[f"scoring, {name}"])
    return found


# ---- what is measured


@dataclass(frozen=True)
class _Scenes:
    """The ways to look at the sources that are compared.

    Attributes:
        auto: the precision that the machine is fastest in.
        once: precision -> a ViT that looks once at pictures of reduced size; fp32 first.
        others: name -> with a second look, or at every pixel.
    """

    auto: str
    once: Mapping[str, Scene]
    others: Mapping[str, Scene]

    @classmethod
    def of(cls, bench: Bench, plan: Plan, sources: Sequence[Located], work: Path) -> _Scenes:
        """Those that differ on this machine."""
        auto = precision_of("auto", device_of(bench.config.device))
        once: dict[str, Scene] = {p: Scene(bench, plan, sources, p, work) for p in dict.fromkeys(("fp32", auto))}
        if auto == "fp32":
            return cls(auto, once, {EVERY: Scene(bench, plan, sources, "fp32", work, decode="full")})
        others = {
            f"{auto} then fp32": Screened(bench, plan, sources, work, auto),
            f"{auto} then {EVERY}": Screened(bench, plan, sources, work, auto, decode="full"),
        }
        return cls(auto, once, others)

    @property
    def slow(self) -> Scene:
        """In full precision."""
        return self.once["fp32"]

    @property
    def fast(self) -> Scene:
        """In the precision that the machine is fastest in."""
        return self.once[self.auto]

    def cases(self) -> dict[str, Callable[[], object]]:
        """Name -> what is timed."""
        cases: dict[str, Callable[[], object]] = {DECODE: self.fast.decode_alone}
        for precision, scene in self.once.items():
            cases[f"ViT alone, {precision}"] = scene.vit_alone
            cases[f"scoring, {precision}"] = scene.score
        cases[PLAIN], cases[LOOP] = self.slow.plain_vit_alone, self.slow.loop
        return {**cases, **{f"scoring, {name}": scene.score for name, scene in self.others.items()}}

    def screening(self) -> dict[str, float] | None:
        """What the screening came to, with the share of its composites that full precision for all makes as well."""
        scene = next((each for each in self.others.values() if isinstance(each, Screened)), None)
        if scene is None:
            return None
        same = same_choice(scene.choice(), self.slow.choice(scene.groups))
        return {**scene.summary, "same": same["composites"]}


def _some_sources(plan: Plan, quick: bool, on_gpu: bool, batch: int) -> Sequence[Located]:
    # Decoding processes take a second to start, as much as a GPU takes for thousands of sources.
    most = 48 if quick else _MANY if on_gpu else SAMPLE
    usable = (located for located in plan.stream() if not located.problem)
    return whole_batches(list(islice(usable, most)), batch)


def whole_batches(sources: Sequence[Located], batch: int) -> Sequence[Located]:
    """As many as fill batches: scoring pads the last one, the straightforward loop does not. All, if they fill none."""
    return sources[: len(sources) // batch * batch] or sources


def _agreements(scenes: _Scenes, sources: Sequence[Located]) -> dict[str, dict[str, float]]:
    slow = scenes.slow
    seen = seen_by_class(sources, slow.plain, slow.columns, slow.config)
    return {name: agreement(scene, seen) for name, scene in {**scenes.once, **scenes.others}.items()}


def agreement(scene: Scene, seen: Mapping[str, Sequence[Seen]]) -> dict[str, float]:
    """How far a build's scoring and choice are from what the definition makes of `seen`; see agreement.py."""
    mine = scene.choice()
    theirs: Choice = {g.name: choose(seen.get(g.name, ()), g, scene.config, scene.layouts) for g in scene.groups}
    return {**same_choice(mine, theirs), **differences(scene.looks(), looks_of(seen), sources_of(mine))}


def _build(bench: Bench, plan: Plan, work: Path, on_gpu: bool) -> tuple[BuildResult, int]:
    """A whole build, and the bytes of a GPU that it took at most. One composite is made before it: the first time that
    a teacher looks takes longer, and what is told here is told of thousands."""
    first = (plan.groups[0].class_name,)
    build(replace(bench.config, out=str(work / "warm"), classes=first, ipc=1))
    before = _fresh_peak() if on_gpu else 0
    whole = build(bench.config)
    return whole, torch.cuda.max_memory_allocated() - before if on_gpu else 0


def _of_build(whole: BuildResult, plan: Plan, ipc: int) -> dict[str, int]:
    return {"ipc": ipc, "classes": len(plan.groups), "sources": plan.sources, "composites": whole.composites}


def _fresh_peak() -> int:
    """Bytes that the GPU holds already; its peak is counted from here."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _notes(sources: int, workers: int, on_gpu: bool) -> list[str]:
    if not on_gpu:
        many = f"decoded by {workers} threads; loader=auto takes processes from {MANY} workers on"
        return [many] if workers >= MANY else []
    notes = ["the floor's decoding is done by threads, that of scoring by processes"]
    if sources < _MANY:
        notes.append(f"{sources} sources are few: processes that decode take a second to start; give sources=")
    return notes


# ---- the tables


def table(result: Mapping[str, Any]) -> str:
    """The result for people, in Markdown."""
    head = (
        f"Build: {result['sources']} sources, {result['selector']} at {result['view']} px, batch {result['batch']}, "
        f"{result['workers']} workers"
    )
    parts = [[head], _stage_table(result), _case_table(result), _ratio_table(result), _agreement_table(result)]
    parts += [_screening(result), [_whole_build(result)], _meaning(result), result["notes"]]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _stage_table(result: Mapping[str, Any]) -> list[str]:
    rows = [f"| {name} | {value:.2f} |" for name, value in result["stages_ms"].items()]
    return ["| stage, alone (all but ViT and teacher in one thread) | ms |", "|---|---|", *rows]


def _case_table(result: Mapping[str, Any]) -> list[str]:
    lines = ["| case | ms a source, median (10 % to 90 % of the rounds) | sources a second |", "|---|---|---|"]
    for name, times in result["seconds"].items():
        middle, low, high = np.quantile(times, (0.5, 0.1, 0.9)) / result["sources"] * 1e3
        lines.append(f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {1e3 / middle:.0f} |")
    again = result["remembered_ms"].items()
    return [*lines, *(f"| scoring again, {name} | {value:.3f} | {1e3 / value:.0f} |" for name, value in again)]


def _ratio_table(result: Mapping[str, Any]) -> list[str]:
    lines = ["| ratio, paired by round | median | 10 % to 90 % | target |", "|---|---|---|---|"]
    for name, value in result["ratios"].items():
        target = ""
        if name.startswith("scoring"):
            target = f"<= {GPU_TARGET if result['on_gpu'] else FLOOR_TARGET}"
        elif name.startswith(LOOP) and result["precision"] != "fp32" and name != f"{LOOP} / scoring, fp32":
            target = f">= {GPU_LOOP_TARGET if result['on_gpu'] else LOOP_TARGET}"
        lines.append(f"| {name} | {value['median']:.2f} | {value['low']:.2f} to {value['high']:.2f} | {target} |")
    return lines


def _agreement_table(result: Mapping[str, Any]) -> list[str]:
    lines = [
        "Against full decoding by Pillow in fp32 and the definition's own choice:",
        "",
        "| scoring | key sources that are the same | with their windows | backgrounds | whole composites, in order | "
        "of | largest difference of p | among the chosen | of the attention share | same window, all sources "
        "| read by one alone |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, value in result["agreement"].items():
        same = " | ".join(f"{value[key]:.3f}" for key in ("chosen", "windows", "backgrounds", "composites"))
        far = " | ".join(f"{value[key]:.4f}" for key in ("p", "p_chosen", "share"))
        lines.append(f"| {name} | {same} | {value['of']} | {far} | {value['window']:.3f} | {value['alone']} |")
    return lines


def _screening(result: Mapping[str, Any]) -> list[str]:
    if not (seen := result["screening"]):
        return []
    wanted, again = seen["wanted"], seen["looked_again"]
    return [
        f"Screening: {wanted} of {result['sources']} sources wanted, {again} looked at again in fp32;",
        f"largest deviation: {seen['logit']:.3f} in logit(p), {seen['share']:.4f} in share;",
        f"{seen['same']:.0%} of its composites are those of scoring in fp32",
    ]


def _whole_build(result: Mapping[str, Any]) -> str:
    seconds, whole = result["whole_build_seconds"], result["whole_build"]
    phases = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    a_class = sum(seconds.values()) / max(1, whole["classes"])
    return (
        f"Seconds of a whole build (the default precision and screening; {whole['sources']} sources, "
        f"ipc {whole['ipc']}) by phase: {phases}; a class: {a_class:.2f}"
    )


def _meaning(result: Mapping[str, Any]) -> list[str]:
    peak = result["peak_gpu_bytes"] / 1e9 if result["on_gpu"] else None
    return told(result["extrapolated"], result["image_size"], peak)
