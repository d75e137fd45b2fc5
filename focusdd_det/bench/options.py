"""What the benchmark is asked for: cfg/bench.yaml and the command line, then what that means on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from focusdd_det import demo
from focusdd_det.devices import processors
from focusdd_det.errors import ConfigError

DEMO = Path(demo.__file__).parent
PARTS = ("build", "train", "scaling")
ON_CPU = ("fp32", "fp32+channels_last", "bf16", "bf16+channels_last")
ON_GPU = ("fp32", "fp16", "bf16")
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class BenchOptions:
    """The options of every part; cfg/bench.yaml says what each means. Nothing is left open here.

    Raises:
        ConfigError: all wrong values at once.
    """

    quick: bool
    rounds: int
    device: str
    workers: int
    out: Path
    sources: str | None
    selector: str
    selector_weights: str | None
    teacher: str | None
    model: str
    imgsz: int
    batch: int
    precision: tuple[str, ...]
    clock: str = "wall"

    def __post_init__(self) -> None:
        known = ON_GPU if self.on_gpu else ON_CPU
        checks = [
            (self.rounds >= 1, "rounds", "at least 1"),
            (self.workers >= 0, "workers", "at least 0"),
            (self.imgsz >= 32 and self.imgsz % 32 == 0, "imgsz", "a multiple of 32"),
            (self.batch >= 1, "batch", "at least 1"),
            (
                bool(self.precision) and set(self.precision) <= set(known),
                "precision",
                f"some of {', '.join(known)} on {'a GPU' if self.on_gpu else 'a CPU'}",
            ),
            (self.clock in CLOCKS, "clock", f"one of {', '.join(CLOCKS)}"),
            (self.clock == "wall" or not self.on_gpu, "clock", "wall on a GPU, where the processor hardly works"),
        ]
        problems = [f"{key}={getattr(self, key)!r}: expected {text}" for ok, key, text in checks if not ok]
        if problems:
            raise ConfigError("the options of the benchmark are not valid:\n  " + "\n  ".join(problems))

    @property
    def on_gpu(self) -> bool:
        """Whether it is the GPU that is measured."""
        return self.device != "cpu"

    @property
    def seconds(self) -> Callable[[], float]:
        """The clock, for `timing.compare`."""
        return CLOCKS[self.clock]


@dataclass(frozen=True)
class Request:
    """The keys of cfg/bench.yaml as they are given; None where the machine or `quick` decides."""

    parts: tuple[Literal["build", "train", "scaling"], ...]
    quick: bool
    out: str
    rounds: int | None
    device: str | None
    workers: int | None
    clock: Literal["wall", "cpu"]
    model: str | None
    teacher: str | None
    imgsz: int | None
    batch: int | None
    precision: tuple[str, ...]
    sources: str | None
    selector: str | None
    selector_weights: str | None

    def options(self, gpus: int, bf16: bool) -> BenchOptions:
        """Everything decided.

        Args:
            gpus: how many there are.
            bf16: whether the processor has bfloat16.
        """
        device = self.device if self.device is not None else ("0" if gpus else "cpu")
        gpu = device != "cpu"
        if gpu:
            device = device.removeprefix("cuda").removeprefix(":") or "0"
            if not device.isdecimal():
                raise ConfigError(f"device={self.device}: expected cpu or the number of one GPU")
        if gpu and not gpus:
            raise ConfigError(f"device={device}: torch sees no GPU here; give device=cpu")
        if gpu and int(device) >= gpus:
            raise ConfigError(f"device={device}: torch sees {gpus} here, numbered from 0")
        small = self.quick and not gpu
        usual = ("fp16",) if gpu else ("fp32", "bf16+channels_last") if bf16 else ("fp32",)
        selector, weights = self.selector, self.selector_weights
        if selector is None and small:
            selector, weights = str(DEMO / "vit_demo.json"), weights or str(DEMO / "vit_demo.safetensors")
        return BenchOptions(
            quick=self.quick,
            rounds=_or(self.rounds, 5 if self.quick else 20),
            device=device,
            workers=_or(self.workers, processors()),
            out=Path(self.out),
            sources=self.sources,
            selector=selector or "deit_small_patch16_224.fb_in1k",
            selector_weights=weights,
            teacher=self.teacher
            or (str(DEMO / "yolo_demo.pt") if small else "yolo11x.yaml" if gpu else "yolo11n.yaml"),
            model=self.model or (str(DEMO / "yolo11-demo.yaml") if small else "yolo11n.yaml"),
            imgsz=_or(self.imgsz, 128 if small else 640 if gpu else 192),
            batch=_or(self.batch, 8 if small else 16),
            precision=self.precision or usual,
            clock=self.clock,
        )


def _or(value: int | None, usual: int) -> int:
    return usual if value is None else value
