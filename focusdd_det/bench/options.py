"""What the benchmark is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from focusdd_det.errors import ConfigError

PRECISIONS = ("fp32", "bf16", "bf16+channels_last", "fp32+channels_last")


@dataclass(frozen=True)
class BenchOptions:
    """The options of every part; `command.describe()` says what each means.

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

    def __post_init__(self) -> None:
        checks = [
            (self.rounds >= 1, "rounds", "at least 1"),
            (self.workers >= 0, "workers", "at least 0"),
            (self.imgsz >= 32 and self.imgsz % 32 == 0, "imgsz", "a multiple of 32"),
            (self.batch >= 1, "batch", "at least 1"),
            (
                bool(self.precision) and set(self.precision) <= set(PRECISIONS),
                "precision",
                f"some of {', '.join(PRECISIONS)}",
            ),
        ]
        problems = [f"{key}={getattr(self, key)!r}: expected {text}" for ok, key, text in checks if not ok]
        if problems:
            raise ConfigError("the options of the benchmark are not valid:\n  " + "\n  ".join(problems))

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"
