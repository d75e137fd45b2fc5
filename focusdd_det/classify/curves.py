"""results.png of a classifier's training."""

from __future__ import annotations

import csv
import math
from pathlib import Path


def plot_curves(table: Path, out: Path) -> None:
    """Losses, and accuracies where they were measured, over the epochs of a results.csv."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    panels = (("loss", ("train/", "val/")), ("accuracy", ("metrics/",)))
    shown = [(title, [k for k in rows[0] if k.startswith(starts)]) for title, starts in panels]
    shown = [(title, keys) for title, keys in shown if keys]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(5 * len(shown), 4), squeeze=False, tight_layout=True)
    for axis, (title, keys) in zip(axes[0], shown, strict=True):
        for key in keys:
            points = [(int(row["epoch"]), float(row[key])) for row in rows]
            points = [(x, y) for x, y in points if math.isfinite(y)]
            axis.plot(
                *zip(*points, strict=True) if points else ((), ()), marker="." if len(points) < 60 else "", label=key
            )
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.legend()
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
