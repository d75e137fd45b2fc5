"""How the cost of a build grows with the number of sources, classes, IPC and workers, and whether its memory does."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from focusdd_det.bench import decoders, memory
from focusdd_det.bench.options import BenchOptions
from focusdd_det.bench.pictures import prepare_small
from focusdd_det.bench.timing import in_turns
from focusdd_det.build import build, columns_of
from focusdd_det.config import BuildConfig
from focusdd_det.devices import device_of
from focusdd_det.errors import ConfigError
from focusdd_det.methods import METHODS
from focusdd_det.plan import make_plan
from focusdd_det.scoring.looking import score_all
from focusdd_det.scoring.scores import ScoreStore
from focusdd_det.selector import load_selector

SMALL = (160, 120)  # px; what is measured is how the cost grows, not how large it is
ROUNDS, QUICK_ROUNDS = 3, 2


def measure(options: BenchOptions, work: Path) -> dict[str, Any]:
    """Seconds against each of the four, the slopes of their logarithms, and how peak memory grows with the sources.

    Args:
        options: selector, teacher, device, workers, quick; sources are always drawn here.
        work: an empty folder; the caller deletes it. The plot goes to `options.out`.

    Returns:
        Plain values for bench.json; `table` prints them.
    """
    logging.getLogger("focusdd").setLevel(logging.WARNING)
    options = replace(options, sources=None)
    quick = options.quick
    rounds = QUICK_ROUNDS if quick else ROUNDS
    decoding = decoders.measure(options, work / "workers", rounds)
    series = {
        "sources": _sources(options, work, [32, 64, 128] if quick else [125, 250, 500, 1000, 2000], rounds),
        "classes": _classes(options, work, [1, 2, 4] if quick else [1, 2, 4, 8, 16, 32], rounds),
        "ipc": _ipc(options, work, [1, 2, 4] if quick else [1, 2, 4, 8, 16, 32], rounds),
        **decoding["series"],
    }
    result = {
        "series": series,
        "slopes": {name: slopes(values["x"], values["rounds"]) for name, values in series.items()},
        "start_of_processes": decoding["start"],
        "ratios": decoding["ratios"],
        "memory": memory.measure(options, work / "memory"),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    plot(result, options.out / "scaling.png")
    return result


def slopes(x: Sequence[float], rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    """`slope` of every round: the median, and the least and the largest.

    Args:
        rounds: [rounds][points] seconds.
    """
    found = [slope(x, seconds) for seconds in rounds]
    return {"median": float(np.median(found)), "low": min(found), "high": max(found)}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent k of y = c x^k that fits best, in logarithms.

    Raises:
        ValueError: fewer than two points, or values that are not above 0.
    """
    if len(x) < 2 or len(x) != len(y) or min(*x, *y) <= 0:
        raise ValueError(f"expected two or more points above 0, got {list(x)} and {list(y)}")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def table(result: Mapping[str, Any]) -> str:
    """The result for people, in Markdown."""
    lines = [
        "| against | what | seconds at each, median of the rounds | slope of the logarithms (least to largest of the "
        "rounds) | expected |",
        "|---|---|---|---|---|",
    ]
    for name, values in result["series"].items():
        points = ", ".join(f"{x}: {s:.2f}" for x, s in zip(values["x"], medians(values["rounds"]), strict=True))
        row = f"| {name} | {values['what']} | {points} | {_spread(result['slopes'][name])} | {values['expected']} |"
        lines.append(row)
    if starts := result["start_of_processes"]:
        lines += ["", *decoders.table(starts, result["series"]["workers (processes)"]["x"], result["ratios"])]
    return "\n".join([*lines, "", *memory.table(result["memory"])])


def medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    """[points], from [rounds][points]."""
    return [float(value) for value in np.median(np.array(rounds), axis=0)]


def _spread(slopes: Mapping[str, float]) -> str:
    return f"{slopes['median']:.2f} ({slopes['low']:.2f} to {slopes['high']:.2f})"


def plot(result: Mapping[str, Any], file: Path) -> None:
    """A log-log plot of each series, every round a line, with its slope, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    panels = figure.subplots(2, math.ceil(len(result["series"]) / 2)).ravel()
    for panel, (name, values) in zip(panels, result["series"].items(), strict=False):
        for seconds in values["rounds"]:
            panel.loglog(values["x"], seconds, "o-", color="tab:blue", alpha=0.4)
        slope_of = _spread(result["slopes"][name])
        panel.set(xlabel=name, ylabel="seconds", title=f"{values['what'].split(' for ')[0]}:\nslope {slope_of}")
        panel.set_xticks(values["x"], [str(x) for x in values["x"]])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in panels[len(result["series"]) :]:
        panel.set_axis_off()
    figure.savefig(file, format="png", dpi=110)


# ---- the series


def _sources(options: BenchOptions, work: Path, counts: Sequence[int], rounds: int) -> dict[str, Any]:
    config = prepare_small(options, work / "sources", 1, counts[-1], SMALL)
    looks = [partial(score, config, count) for count in counts]
    return _series(counts, looks, rounds, "looking at all sources")


def _classes(options: BenchOptions, work: Path, counts: Sequence[int], rounds: int) -> dict[str, Any]:
    config = prepare_small(options, work / "classes", counts[-1], 24, SMALL)
    names = make_plan(config).class_map.names
    counts = [n for n in counts if n <= len(names)]
    if len(counts) < 2:
        raise ConfigError(f"teacher={options.teacher} knows one class; parts=scaling takes one with two or more")
    chosen = [replace(config, classes=tuple(names[:n]), ipc=2) for n in counts]
    return _series(counts, _builds(chosen), rounds, "a whole build, 24 sources a class")


def _ipc(options: BenchOptions, work: Path, counts: Sequence[int], rounds: int) -> dict[str, Any]:
    config = prepare_small(options, work / "ipc", 1, 5 * counts[-1], SMALL)
    chosen = [replace(config, ipc=n) for n in counts]
    return _series(counts, _builds(chosen, "compose"), rounds, "composing one class")


def _series(x: Sequence[int], points: Sequence[Callable[[], float]], rounds: int, what: str) -> dict[str, Any]:
    """Each point measures itself; before they are counted the first one is run to warm up."""
    points[0]()
    return {"x": list(x), "rounds": in_turns(points, rounds), "what": what, "expected": "1"}


def score(config: BuildConfig, count: int) -> float:
    """Seconds of looking at the first `count` sources, into a file of scores that is thrown away."""
    plan = make_plan(config)
    c = config
    selector = load_selector(c.selector, c.selector_weights, c.view, c.attention, "fp32", device_of(c.device))
    file = Path(config.out).with_name("throwaway.sqlite")
    file.unlink(missing_ok=True)
    sources = list(plan.stream())[:count]
    columns = columns_of(config, plan, selector)
    store = ScoreStore(file)
    began = time.perf_counter()
    score_all(sources, store, selector, METHODS[c.method], columns, c, c.workers or 1, lambda _: None)
    seconds = time.perf_counter() - began
    store.close()
    return seconds


def _builds(configs: Sequence[BuildConfig], phase: str = "") -> list[Callable[[], float]]:
    """Whole builds, each time into another folder, that tell their seconds, or those of one of their phases."""
    numbers = itertools.count()

    def run(config: BuildConfig) -> float:
        config = replace(config, out=f"{Path(config.out).parent}/set{next(numbers)}")
        began = time.perf_counter()
        result = build(config)
        return result.seconds[phase] if phase else time.perf_counter() - began

    return [partial(run, config) for config in configs]
