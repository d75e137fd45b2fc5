"""`focusdd bench`, tools/bench.py: command line -> parts -> tables and bench.json."""

from __future__ import annotations

import importlib
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from focusdd_det.bench.options import PARTS, Request
from focusdd_det.bench.quoting import busy, wide
from focusdd_det.commandline import parse_tokens, wants_help
from focusdd_det.config import describe, load
from focusdd_det.demo.quiet import keep_quiet
from focusdd_det.devices import has_bfloat16
from focusdd_det.disk import write_atomic
from focusdd_det.errors import DiskError

SHIPPED = "bench.yaml"
USAGE = """Measure a build and a training step beside their floor, in one run, and print ratios with their spread.

  python tools/bench.py --quick                                        everything, small, in some 80 s
  python tools/bench.py parts=train model=yolo11n.yaml teacher=yolo11x.yaml imgsz=320 batch=8
  python tools/bench.py parts=train teacher=weights/yolo11x.pt precision=fp32,bf16,bf16+channels_last
  python tools/bench.py device=0 parts=train imgsz=640 batch=64 precision=fp16,bf16 teacher=yolo11x.yaml
  python tools/bench.py parts=build,scaling sources=imagenet/train selector_weights=weights/deit_small.safetensors

Cases of a part run in turns, round by round, and a ratio is that of two times of one round: its median, and the
10 % and 90 % quantiles over the rounds. Notes say what should not be quoted: the machine was busy, or a ratio's spread
is wide. Everything is made in a temporary folder; bench.json and plots are kept.
Every key of the list below as `key=value` or `--key value`.
"""


def bench_command(argv: Sequence[str]) -> int:
    """Run the parts, print their tables, write `<out>/bench.json`.

    Raises:
        ConfigError: unknown keys (with suggestions) or wrong values.
        FocusDDError: as the parts.
    """
    if wants_help(argv):
        print(USAGE + "\n" + describe(SHIPPED))
        return 0
    hints = get_type_hints(Request)
    request = load(Request, SHIPPED, parse_tokens(argv, hints, {"part": "parts"}), section="the command")
    with tempfile.TemporaryDirectory(prefix="focusdd-bench-") as folder:
        work = Path(folder)
        keep_quiet(work)
        import torch
        from ultralytics.utils.torch_utils import unset_deterministic

        from focusdd_det.bench.machine import described, machine

        options = request.options(torch.cuda.device_count(), has_bfloat16())
        if options.on_gpu:
            torch.cuda.set_device(int(options.device))  # what peak memory is asked of
        facts = machine(options.device)
        print(described(facts))
        not_to_quote = busy(facts["load_at_start"], facts["processors"])
        _note(not_to_quote)
        results: dict[str, Any] = {}
        content = {"command": list(argv), "machine": facts, "options": _plain(options), "parts": results}
        kept = options.out / "bench.json"
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"out={options.out} cannot be made: {error.strerror}; choose another folder") from error
        threads = torch.get_num_threads()
        for part in (name for name in PARTS if name in request.parts):
            module = part_module(part)
            place = work / part
            place.mkdir()
            torch.set_num_threads(threads)  # Ultralytics' trainers change it, and what is deterministic
            unset_deterministic()
            began = time.monotonic()
            results[part] = module.measure(options, place)
            results[part]["took_seconds"] = round(time.monotonic() - began, 1)
            results[part]["torch_threads"] = torch.get_num_threads()  # at its end
            spread = wide(results[part])
            results[part]["not_to_quote"] = [*not_to_quote, *spread]
            print(f"\n{module.table(results[part])}\n\ntorch threads: {results[part]['torch_threads']}", flush=True)
            _note(spread)
            write_atomic(kept, (json.dumps(content, indent=1) + "\n").encode())
    if results:
        print(f"\n{kept}")
    return 0


def _note(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", flush=True)


def part_module(name: str) -> ModuleType:
    """The module of a part, which has `measure(options, work) -> dict` and `table(dict) -> str`."""
    return importlib.import_module(f"{__package__}.{name}")


def _plain(options: Any) -> dict[str, Any]:
    """Options as they may be shown to others: of a path its name."""
    paths = ("model", "teacher", "selector", "selector_weights", "sources", "out")
    return {key: Path(value).name if key in paths and value else value for key, value in vars(options).items()}
