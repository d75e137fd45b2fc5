"""Peak memory of whole builds against the number of sources, in how many folders they lie, and who decodes them.

Every build runs in a process of its own; what the same process takes with its models loaded alone is taken off.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from focusdd_det.bench.machine import children_peak, peak_resident
from focusdd_det.bench.options import DEMO, BenchOptions
from focusdd_det.bench.pictures import prepare_small
from focusdd_det.config import BuildConfig
from focusdd_det.devices import processors

TINY = (48, 36)  # px: it is the number of sources that counts
COUNTS, QUICK_COUNTS = (1_000, 10_000, 100_000), (200, 2_000)  # sources
CLASSES = 2  # as many sources as can be are ranked together
MANY_FOLDERS = 100
TARGET_GIB = 1.5  # beyond the models
_KEYS = (
    "sources", "class_map", "selector", "selector_weights", "teacher", "out", "method", "image_size", "batch", "empty",
    "near_duplicate", "max_bad", "device", "workers", "loader",
)  # fmt: skip
_WATCH = 0.02  # seconds between two looks at a build's decoding processes


class Case(NamedTuple):
    """A build: how many sources, in how many folders, and whether threads or processes decode."""

    sources: int
    folders: int
    loader: str


def cases(counts: Sequence[int]) -> list[Case]:
    """Few folders at every count, many at all but the least, processes at the second."""
    few = [Case(n, CLASSES, "threads") for n in counts]
    return [*few, *(Case(n, MANY_FOLDERS, "threads") for n in counts[1:]), Case(counts[1], CLASSES, "processes")]


def measure(options: BenchOptions, work: Path) -> list[dict[str, Any]]:
    """Rows of `sources, folders, loader, peak, beyond` (MiB) and `bytes_a_source`, what each source more costs since
    the row before in its series. With processes `peak` counts theirs, too; without a system that tells, that row is
    left out.

    The models are the demo's and the pictures tiny, so that 100,000 of them take minutes.

    Args:
        options: quick, device, workers.
        work: an empty folder.
    """
    options = replace(
        options,
        selector=str(DEMO / "vit_demo.json"),
        selector_weights=str(DEMO / "vit_demo.safetensors"),
        teacher=str(DEMO / "yolo_demo.pt"),
    )
    wanted = cases(QUICK_COUNTS if options.quick else COUNTS)
    drawn: dict[tuple[int, int], BuildConfig] = {}
    configs: list[BuildConfig] = []
    for n, folders, loader in wanted:
        if (n, folders) not in drawn:
            place = work / f"{n}-{folders}"
            drawn[n, folders] = prepare_small(options, place, folders, n // folders, TINY, shared=CLASSES)
        out = str(work / f"set-{len(configs)}")
        configs.append(replace(drawn[n, folders], loader=loader, out=out))  # type: ignore[arg-type]
    # Side by side: it is memory that is measured, and most of a process' time is its start.
    with ThreadPoolExecutor(min(2, processors())) as pool:
        begun = pool.submit(_peak_of, "models", configs[0])
        peaks = list(pool.map(lambda config: _peak_of("build", config), configs))
    models = begun.result() or 0.0
    rows = [
        {**case._asdict(), "peak": peak, "beyond": peak - models}
        for case, peak in zip(wanted, peaks, strict=True)
        if peak is not None
    ]
    return growth(rows)


def growth(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with `bytes_a_source`: how many bytes more each source takes since the row before in its series,
    None for the first."""
    before: dict[tuple[int, str], Mapping[str, Any]] = {}
    grown = []
    for row in rows:
        series = (row["folders"], row["loader"])
        last, per = before.get(series), None
        if last is not None:
            per = (row["beyond"] - last["beyond"]) * (1 << 20) / (row["sources"] - last["sources"])
        grown.append({**row, "bytes_a_source": per})
        before[series] = row
    return grown


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows for people, in Markdown."""
    lines = [
        "| sources | folders | decoded by | peak memory, MiB | beyond the models, MiB | bytes a source more |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        per = "" if row["bytes_a_source"] is None else f"{row['bytes_a_source']:.0f}"
        what = f"{row['sources']:,} | {row['folders']} | {row['loader']}"
        lines.append(f"| {what} | {row['peak']:.0f} | {row['beyond']:.0f} | {per} |")
    return [
        *lines,
        "",
        "Bytes a source more: since the row before with as many folders. The names of one folder are held together: "
        "what grows in few folders and not in many is those.",
        f"Target: flat, and below {TARGET_GIB * 1024:.0f} MiB beyond the models.",
    ]


# ---- one build


def _peak_of(what: str, config: BuildConfig) -> float | None:
    """Peak memory, MiB, of a process that does `what`, with that of the processes that decode for it; None where those
    cannot be seen."""
    job = {"what": what, "keys": {key: getattr(config, key) for key in _KEYS}}
    given, said, wrong = (Path(f"{config.out}-{what}.{name}") for name in ("json", "txt", "err"))
    given.write_text(json.dumps(job))
    with given.open() as stdin, said.open("w") as stdout, wrong.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import peak; peak()"],
            stdin=stdin, stdout=stdout, stderr=stderr,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
        children = _watched(process) if what == "build" and config.loader == "processes" else 0.0
        failed = process.wait()
    if failed:
        raise RuntimeError(f"the build for the memory failed: {wrong.read_text()[-2000:]}")
    return None if children is None else float(said.read_text().splitlines()[-1]) + children


def _watched(process: subprocess.Popen[bytes]) -> float | None:
    """The largest sum, MiB, of what a process' children have held, until it ends; None if nobody tells."""
    most: float | None = None
    while process.poll() is None:
        now = children_peak(process.pid)
        most = now if most is None else max(most, now or 0.0)
        time.sleep(_WATCH)
    return most


def peak() -> None:
    """Run by `_peak_of` in a process of its own: reads what to do from standard input, prints the peak in MiB."""
    import torch

    from focusdd_det.build import build, load_config
    from focusdd_det.devices import device_of
    from focusdd_det.plan import make_plan
    from focusdd_det.selector import load_selector, token_grid
    from focusdd_det.teacher import load_detector

    job = json.load(sys.stdin)
    logging.getLogger("focusdd").setLevel(logging.WARNING)
    config = load_config(ipc=4, **job["keys"])
    if job["what"] == "models":
        selector = load_selector(config.selector, config.selector_weights, device=device_of(config.device))
        selector(torch.zeros(config.batch, 3, selector.view, selector.view, dtype=torch.uint8))
        load_detector(config.teacher, device_of(config.device), make_plan(config).class_map.names, False)
        token_grid(config.selector, config.selector_weights, config.view)
    else:
        build(config)
    print(peak_resident())
