"""The table as a picture: lines over the key that is varied in numbers, bars otherwise."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from focusdd_det.experiment.grid import Arm, short
from focusdd_det.experiment.spec import Experiment
from focusdd_det.experiment.table import UNITS, Row, Table

WIDE = 20.0  # times the smallest value from which an axis is logarithmic


@dataclass(frozen=True)
class Line:
    """Arms that differ in the axis' key alone: (x, row), by x."""

    name: str
    points: tuple[tuple[float, Row], ...]


def lines_of(experiment: Experiment, table: Table) -> tuple[str, list[Line]] | None:
    """The axis' key and its lines; None where no key is varied over numbers."""
    for key in [experiment.x] if experiment.x else _numeric_keys(experiment.arms):
        groups: dict[tuple[tuple[str, str], ...], list[tuple[float, Row]]] = {}
        for arm, row in zip(experiment.arms, table.rows, strict=True):
            value = arm.overrides.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rest = tuple(sorted((k, str(v)) for k, v in arm.overrides.items() if k != key))
                groups.setdefault(rest, []).append((float(value), row))
        if not any(len(points) > 1 for points in groups.values()):
            continue
        varied = {k for rest in groups for k, _ in rest if len({dict(r).get(k) for r in groups}) > 1}
        return key, [
            Line(", ".join(_named(k, v) for k, v in rest if k in varied), tuple(sorted(points, key=lambda p: p[0])))
            for rest, points in groups.items()
        ]
    return None


def plot(experiment: Experiment, table: Table) -> bytes:
    """plot.png; an experiment without results gives empty axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    found = lines_of(experiment, table)
    if found is not None:
        key, lines = found
        for line in lines:
            points = [(x, row.summary) for x, row in line.points if row.summary]
            means, spread = [s.mean for _, s in points], [s.sd or 0.0 for _, s in points]
            axes.errorbar([x for x, _ in points], means, spread, marker="o", capsize=3, label=line.name or table.metric)
        told = [(x, row.paper) for line in lines for x, row in line.points if row.paper is not None]
        if told:
            axes.plot([x for x, _ in told], [v for _, v in told], "k*", markersize=10, label="paper (its own data)")
        every = [x for line in lines for x, _ in line.points]
        if min(every) > 0 and max(every) / min(every) >= WIDE:
            axes.set_xscale("log")
        axes.set_xticks(sorted(set(every)), [f"{x:g}" for x in sorted(set(every))])
        axes.set_xlabel(short(key))
        axes.legend(fontsize="small")
    else:
        rows = table.rows
        means = [row.summary.mean if row.summary else 0.0 for row in rows]
        spread = [(row.summary.sd or 0.0) if row.summary else 0.0 for row in rows]
        axes.bar(range(len(rows)), means, yerr=spread, capsize=4, color="#7aa6c2")
        for i, row in enumerate(rows):
            axes.plot([i] * len(row.seeds), list(row.seeds.values()), "k.", markersize=4)
            if row.paper is not None:
                axes.plot([i], [row.paper], "k*", markersize=10)
        axes.set_xticks(range(len(rows)), [row.arm for row in rows], rotation=30 if len(rows) > 4 else 0, ha="right"
                        if len(rows) > 4 else "center")  # fmt: skip
    axes.set_ylabel(f"{UNITS[table.metric]}, %")
    counts = sorted({len(row.seeds) for row in table.rows})
    axes.set_title(
        f"{table.title}\nmean and standard deviation, seeds: {', '.join(map(str, counts))}", fontsize="medium"
    )
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _numeric_keys(arms: Sequence[Arm]) -> list[str]:
    keys = dict.fromkeys(key for arm in arms for key in arm.overrides)
    found = []
    for key in keys:
        values = [arm.overrides[key] for arm in arms if key in arm.overrides]
        numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if len(numbers) == len(values) == len(arms) and len(set(numbers)) > 1:
            found.append(key)
    return found


def _named(key: str, value: str) -> str:
    return value if not value.replace(".", "").isdigit() else f"{short(key)}={value}"
