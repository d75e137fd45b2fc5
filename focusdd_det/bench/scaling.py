"""How the cost of a build grows with the number of sources, classes, IPC and workers, and whether its memory does."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from focusdd_det.bench.machine import peak_resident
from focusdd_det.bench.options import DEMO, BenchOptions
from focusdd_det.bench.pictures import draw_sources, prepare
from focusdd_det.build import build, columns_of
from focusdd_det.config import BuildConfig
from focusdd_det.devices import device_of, processors
from focusdd_det.errors import ConfigError
from focusdd_det.methods import METHODS
from focusdd_det.plan import make_plan
from focusdd_det.scoring.looking import score_all
from focusdd_det.scoring.scores import ScoreStore
from focusdd_det.selector import load_selector, token_grid

SMALL = (160, 120)  # px; what is measured is how the cost grows, not how large it is
TINY = (48, 36)  # px, for the memory: it is the number of sources that counts
COUNTS, QUICK_COUNTS = (1_000, 10_000, 100_000), (200, 2_000)  # sources of the builds whose memory is measured
MEMORY_TARGET = 1.5  # GiB beyond the models
_ROUNDS = 2  # of each point; the faster one counts, because whatever else the machine does only adds


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
    classes = _classes(options, work, [1, 2, 4] if quick else [1, 2, 4, 8, 16, 32])
    series = {
        "sources": _sources(options, work, [32, 64, 128] if quick else [125, 250, 500, 1000, 2000]),
        "classes": classes,
        "ipc": _ipc(options, work, [1, 2, 4] if quick else [1, 2, 4, 8, 16, 32]),
        "workers": _workers(options, work, _doubled(max(2, processors()))),
    }
    memory = _memory(options, work, QUICK_COUNTS if quick else COUNTS)
    result = {
        "series": series,
        "slopes": {name: slope(values["x"], values["seconds"]) for name, values in series.items()},
        "memory": memory,
        "growth": growth(memory),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    plot(result, options.out / "scaling.png")
    return result


def table(result: Mapping[str, Any]) -> str:
    """The result for people, in Markdown."""
    lines = ["| against | what | seconds at each | slope of the logarithms | expected |", "|---|---|---|---|---|"]
    for name, values in result["series"].items():
        points = ", ".join(f"{x}: {s:.2f}" for x, s in zip(values["x"], values["seconds"], strict=True))
        row = f"| {name} | {values['what']} | {points} | {result['slopes'][name]:.2f} | {values['expected']} |"
        lines.append(row)
    lines += ["", "| sources | peak memory, MiB | beyond the models, MiB |", "|---|---|---|"]
    for row in result["memory"]:
        lines.append(f"| {row['sources']:,} | {row['peak']:.0f} | {row['beyond']:.0f} |")
    if grown := result["growth"]:
        per = f"{grown['mib_per_1000']:.3f} MiB per 1,000 sources, {grown['bytes_a_source']:.0f} bytes a source"
        lines += ["", f"Growth from {grown['from']:,} to {grown['to']:,} sources: {per}."]
    return "\n".join([*lines, "", f"Target: flat, and below {MEMORY_TARGET * 1024:.0f} MiB beyond the models."])


def growth(memory: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How much peak memory a source costs, between the first and the last row of the memory's table; empty for one row.

    Returns:
        from, to: the two numbers of sources; mib_per_1000, bytes_a_source: the same growth in two units.
    """
    if len(memory) < 2:
        return {}
    first, last = memory[0], memory[-1]
    per = (last["beyond"] - first["beyond"]) / (last["sources"] - first["sources"])
    return {
        "from": first["sources"],
        "to": last["sources"],
        "mib_per_1000": per * 1000,
        "bytes_a_source": per * (1 << 20),
    }


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent k of y = c x^k that fits best, in logarithms.

    Raises:
        ValueError: fewer than two points, or values that are not above 0.
    """
    if len(x) < 2 or len(x) != len(y) or min(*x, *y) <= 0:
        raise ValueError(f"expected two or more points above 0, got {list(x)} and {list(y)}")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def plot(result: Mapping[str, Any], file: Path) -> None:
    """A log-log plot of each series with its slope, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    for panel, (name, values) in zip(panels, result["series"].items(), strict=True):
        panel.loglog(values["x"], values["seconds"], "o-")
        panel.set(xlabel=name, ylabel="seconds", title=f"{values['what']}: slope {result['slopes'][name]:.2f}")
        panel.set_xticks(values["x"], [str(x) for x in values["x"]])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.savefig(file, format="png", dpi=110)


# ---- the four ----


def _sources(options: BenchOptions, work: Path, counts: Sequence[int]) -> dict[str, Any]:
    config = _config(options, work / "sources", 1, counts[-1])
    seconds = [_fastest(lambda n=n: score(config, n)) for n in counts]  # type: ignore[misc]
    return {"x": list(counts), "seconds": seconds, "what": "looking at all sources", "expected": "1"}


def _workers(options: BenchOptions, work: Path, counts: Sequence[int]) -> dict[str, Any]:
    config = replace(_config(options, work / "workers", 2, 32 if options.quick else 200), method="random")
    seconds = [_fastest(lambda n=n: score(replace(config, workers=n), None)) for n in counts]  # type: ignore[misc]
    return {"x": list(counts), "seconds": seconds, "what": "decoding, no ViT", "expected": "-1 up to the cores"}


def _classes(options: BenchOptions, work: Path, counts: Sequence[int]) -> dict[str, Any]:
    config = _config(options, work / "classes", counts[-1], 24)
    names = make_plan(config).class_map.names
    counts = [n for n in counts if n <= len(names)]
    if len(counts) < 2:
        raise ConfigError(f"teacher={options.teacher} knows one class; parts=scaling takes one with two or more")
    chosen = [replace(config, classes=tuple(names[:n]), ipc=2) for n in counts]
    return {"x": list(counts), "seconds": _builds(chosen), "what": "a whole build, 24 sources a class", "expected": "1"}


def _ipc(options: BenchOptions, work: Path, counts: Sequence[int]) -> dict[str, Any]:
    config = _config(options, work / "ipc", 1, 5 * counts[-1])
    chosen = [replace(config, ipc=n) for n in counts]
    phase = _builds(chosen, "compose")
    return {"x": list(counts), "seconds": phase, "what": "composing one class", "expected": "1"}


def _config(options: BenchOptions, work: Path, classes: int, each: int, size: tuple[int, int] = SMALL) -> BuildConfig:
    """A build of small drawn pictures."""
    work.mkdir(parents=True)
    top = draw_sources(work / "pictures", classes, each, size)
    small = replace(options, sources=str(top))
    return prepare(small, work, 0, 0, image_size=128, batch=16 if options.quick else 64).config


def score(config: BuildConfig, count: int | None) -> float:
    """Seconds of looking at the first `count` sources, into a file of scores that is thrown away."""
    plan = make_plan(config)
    method = METHODS[config.method]
    selector = None
    if method.needs_selector:
        selector = load_selector(
            config.selector, config.selector_weights, config.view, config.attention, "fp32", device_of(config.device)
        )
    file = Path(config.out).with_name("throwaway.sqlite")
    file.unlink(missing_ok=True)
    sources = list(plan.stream())[:count]
    store = ScoreStore(file)
    began = time.perf_counter()
    columns = columns_of(config, plan, selector)
    score_all(sources, store, selector, method, columns, config, config.workers or 1, lambda _: None)
    seconds = time.perf_counter() - began
    store.close()
    return seconds


def _fastest(run: Callable[[], float]) -> float:
    return min(run() for _ in range(_ROUNDS))


def _builds(configs: Sequence[BuildConfig], phase: str = "") -> list[float]:
    """Seconds of whole builds, or of one of their phases."""
    found = []
    for number, config in enumerate(configs):
        times = []
        for turn in range(_ROUNDS):
            config = replace(config, out=f"{Path(config.out).parent}/set{number}-{turn}")
            began = time.perf_counter()
            result = build(config)
            times.append(result.seconds[phase] if phase else time.perf_counter() - began)
        found.append(min(times))
    return found


def _doubled(most: int) -> list[int]:
    return [2**i for i in range(int(math.log2(most)) + 1)]


# ---- memory ----


def _memory(options: BenchOptions, work: Path, counts: Sequence[int]) -> list[dict[str, float]]:
    """Peak memory of a whole build at each number of sources, in a process of its own, and of the same process with its
    models loaded and nothing built.

    The models are the demo's and the pictures tiny, so that 100,000 of them take minutes; they lie in two classes, so
    that as many as can be are ranked together.
    """
    options = replace(
        options,
        selector=str(DEMO / "vit_demo.json"),
        selector_weights=str(DEMO / "vit_demo.safetensors"),
        teacher=str(DEMO / "yolo_demo.pt"),
    )
    rows = []
    for n in counts:
        config = _config(options, work / f"memory{n}", 2, n // 2, TINY)
        peaks = {}
        for what in ("models", "build"):
            job = json.dumps({"what": what, "keys": {key: getattr(config, key) for key in _KEYS}})
            done = subprocess.run(
                [sys.executable, "-c", "from focusdd_det.bench.scaling import peak; peak()"],
                input=job, capture_output=True, text=True, check=False,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"the build for the memory at {n} sources failed: {done.stderr[-2000:]}")
            peaks[what] = float(done.stdout.splitlines()[-1])
        rows.append({"sources": n, "peak": peaks["build"], "beyond": peaks["build"] - peaks["models"]})
    return rows


_KEYS = (
    "sources", "class_map", "selector", "selector_weights", "teacher", "out", "method", "image_size", "batch", "empty",
    "near_duplicate", "max_bad", "device", "workers", "loader",
)  # fmt: skip


def peak() -> None:
    """Run by `_memory` in a process of its own: reads what to do from standard input, prints the peak in MiB."""
    from focusdd_det.build import load_config
    from focusdd_det.teacher import load_detector

    job = json.load(sys.stdin)
    logging.getLogger("focusdd").setLevel(logging.WARNING)
    config = load_config(ipc=4, **job["keys"])
    if job["what"] == "models":
        import torch

        selector = load_selector(config.selector, config.selector_weights, device=device_of(config.device))
        selector(torch.zeros(config.batch, 3, selector.view, selector.view, dtype=torch.uint8))
        load_detector(config.teacher, device_of(config.device), make_plan(config).class_map.names, False)
        token_grid(config.selector, config.selector_weights, config.view)
    else:
        build(config)
    print(peak_resident())
