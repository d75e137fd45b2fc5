"""Decoding alone, by threads and by processes, against the number of workers; how long processes take to start is told
apart. Always by the clock on the wall: a process' own clock does not count other processes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from focusdd_det.bench.options import BenchOptions
from focusdd_det.bench.pictures import SIZE, prepare_small
from focusdd_det.bench.timing import in_turns, ratio
from focusdd_det.config import BuildConfig
from focusdd_det.devices import device_of, processors
from focusdd_det.methods import METHODS
from focusdd_det.plan import make_plan
from focusdd_det.scoring.batches import outcomes_of
from focusdd_det.scoring.glance import Known
from focusdd_det.selector import load_selector
from focusdd_det.sources import Located

LOADERS = ("threads", "processes")


class Decoding(NamedTuple):
    """Seconds until every worker had answered once, and of the sources that were counted, which came later."""

    start: float
    seconds: float


def measure(options: BenchOptions, work: Path, rounds: int) -> dict[str, Any]:
    """Decoding for the ViT's view, no ViT.

    Args:
        options: selector, device, quick.
        work: the folder to draw pictures in.
        rounds: all loaders and numbers of workers take turns in each.

    Returns:
        series: `workers (threads)` and `workers (processes)` as scaling.py has them; start: seconds that processes take
        to start, [rounds][numbers of workers]; ratios: processes / threads at each number of workers.
    """
    numbers = doubled(max(2, processors()))
    counted = max(128 if options.quick else 256, 64 * numbers[-1])
    skipped = before_counting(numbers[-1], 16 if options.quick else 64)
    config = prepare_small(options, work, 2, (skipped + counted) // 2, SIZE)
    sources = list(make_plan(config).stream())
    view = _view(config)
    points = [(loader, workers) for loader in LOADERS for workers in numbers]
    runs = [partial(decoded, sources, replace(config, loader=at[0]), view, at[1], skipped) for at in points]  # type: ignore[arg-type]
    said = in_turns(runs, rounds)
    place = {point: i for i, point in enumerate(points)}
    seconds = {point: [each[i].seconds for each in said] for point, i in place.items()}
    what = f"decoding {counted} pictures of {SIZE[0]} x {SIZE[1]} px for a view of {view} px, no ViT"
    return {
        "series": {
            f"workers ({loader})": {
                "x": numbers,
                "rounds": [list(turn) for turn in zip(*(seconds[loader, n] for n in numbers), strict=True)],
                "what": what,
                "expected": "-1 up to the cores",
            }
            for loader in LOADERS
        },
        "start": [[each[place["processes", n]].start for n in numbers] for each in said],
        "ratios": {
            f"decoding by processes / by threads, {n} workers": ratio(
                seconds["processes", n], seconds["threads", n]
            )._asdict()
            for n in numbers
        },
    }


def decoded(sources: Sequence[Located], config: BuildConfig, view: int, workers: int, skipped: int) -> Decoding:
    """Look at all sources as a build does; what comes after the first `skipped` is counted."""
    on_gpu = device_of(config.device) != "cpu"
    began = time.perf_counter()
    outcomes, _ = outcomes_of(iter(sources), view, METHODS[config.method], config, workers, Known(), on_gpu)
    with contextlib.closing(outcomes):
        return spans(began, [time.perf_counter() for _ in outcomes], workers, skipped)


def spans(began: float, arrived: Sequence[float], workers: int, skipped: int) -> Decoding:
    """From when each source arrived: the first ones are dealt out one to a worker."""
    return Decoding(arrived[workers - 1] - began, arrived[-1] - arrived[skipped - 1])


def before_counting(workers: int, batch: int) -> int:
    """Sources after which all workers have been equally busy: twice what is decoded ahead, in whole batches, because
    threads decode batch by batch."""
    return math.ceil(2 * (4 * workers + batch) / batch) * batch


def doubled(most: int) -> list[int]:
    """1, 2, 4 ... up to `most`."""
    return [2**i for i in range(int(math.log2(most)) + 1)]


def table(
    found: Sequence[Sequence[float]], numbers: Sequence[int], ratios: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """Start and ratios for people; arguments as `measure` returns them."""
    starts = np.median(np.array(found), axis=0)
    each = ", ".join(f"{n}: {s:.2f}" for n, s in zip(numbers, starts, strict=True))
    lines = [f"Decoding processes take some seconds to start, which are not in these times; by number of them: {each}."]
    for name, value in ratios.items():
        lines.append(f"{name}: {value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})")
    return lines


def _view(config: BuildConfig) -> int:
    c = config
    return load_selector(c.selector, c.selector_weights, c.view, c.attention, "fp32", device_of(c.device)).view
