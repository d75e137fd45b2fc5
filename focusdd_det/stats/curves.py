"""Training loss and accuracy over the epochs (the paper's Fig. 9 a, b), from the results.csv of a run."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from focusdd_det.errors import DataError

# column -> what it is called; the first that a run has is its accuracy
SCORES = {
    "metrics/accuracy_top1": "Accuracy (top-1)",
    "metrics/mAP50-95(B)": "mAP50-95",
}
Points = tuple[tuple[int, float], ...]  # (epoch, value)


@dataclass(frozen=True)
class Curves:
    """One run.

    Attributes:
        name: the run folder's.
        losses: term -> (epoch, value), of the training.
        total: the terms' sum an epoch; terms of other runs may be others, so compare shapes, not heights.
        score_name, score: accuracy or mAP in [0, 1] as the run measured it, in the epochs in which it did.
    """

    name: str
    losses: dict[str, Points]
    total: Points
    score_name: str | None
    score: Points

    def plain(self) -> dict[str, object]:
        """As it stands in stats.json."""
        return {"name": self.name, "loss": self.total, "terms": self.losses, self.score_name or "accuracy": self.score}


def read_run(run: Path, name: str) -> Curves:
    """The curves of a run folder of `focusdd detect train` or `focusdd classify train`, or of plain Ultralytics.

    Raises:
        DataError: no results.csv there, or none of a training.
    """
    table = run if run.name == "results.csv" else run / "results.csv"
    try:
        with table.open(encoding="utf-8", newline="") as file:
            rows = [{str(k).strip(): v for k, v in row.items()} for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"run={run}: {error}; expected a run folder with results.csv, e.g. runs/detect/train"
        ) from error
    columns = [key for key in (rows[0] if rows else {}) if key.startswith("train/")]
    if not columns or "epoch" not in rows[0]:
        raise DataError(f"{table} holds no epoch of a training; expected the columns epoch and train/...")
    rows = list({row["epoch"]: row for row in rows}.values())  # a resumed run may have written its last epoch twice
    try:
        losses = {key.removeprefix("train/"): _points(rows, key) for key in columns}
        score = next((key for key in SCORES if key in rows[0]), None)
        total: dict[int, float] = {}
        for points in losses.values():
            for epoch, value in points:
                total[epoch] = total.get(epoch, 0.0) + value
        scored = _points([row for row in rows if _was_measured(row)], score) if score else ()
    except (TypeError, ValueError) as error:
        raise DataError(f"{table} is damaged ({error}); expected numbers in its columns") from error
    return Curves(name, losses, tuple(sorted(total.items())), SCORES[score] if score else None, scored)


def _was_measured(row: dict[str, str]) -> bool:
    """Whether an epoch was validated: Ultralytics writes zeros into the columns of one that was not."""
    return any(float(value) != 0 for key, value in row.items() if key.startswith(("metrics/", "val/")))


def _points(rows: list[dict[str, str]], key: str) -> Points:
    pairs = ((int(float(row["epoch"])), float(row[key])) for row in rows)
    return tuple((epoch, value) for epoch, value in pairs if math.isfinite(value))
