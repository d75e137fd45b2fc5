"""Results -> the table: mean, spread, each seed, paired differences, verdicts; as Markdown and JSON. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from focusdd_det.experiment.results import Failure, Result
from focusdd_det.experiment.spec import Experiment
from focusdd_det.experiment.statistics import (
    CONFIDENCE,
    LEAST_SEEDS,
    STANDARD_ERRORS,
    Difference,
    Summary,
    paired_difference,
    summary,
    verdict,
)

UNITS = {"covered": "mAP, covered classes", "all": "mAP, all classes", "top1": "top-1", "top5": "top-5"}
_SEVERAL = 3  # classes, from which on one of them ruling the mean is worth a word
RULE = (
    f"A ranking is claimed only when the paired difference exceeds {STANDARD_ERRORS:g} times its standard error, and "
    f"Student's t at {100 * CONFIDENCE:g} %, over at least {LEAST_SEEDS} seeds"
)


@dataclass(frozen=True)
class Row:
    """One arm.

    Attributes:
        arm: its name; baseline: the arm it is compared with, if any.
        seeds: seed -> value of the metric in percent.
        summary: of those; None where nothing is there yet.
        other: the same of the other metric, as mean.
        difference: to the baseline, paired by seed.
        verdict, reason: as `statistics.verdict`; empty for an arm that is compared with none.
        paper: the paper's number, if it is known.
        composites, iterations: fewest and most over the seeds.
    """

    arm: str
    baseline: str | None
    seeds: dict[int, float]
    summary: Summary | None
    other: Summary | None
    difference: Difference | None
    verdict: str
    reason: str
    paper: float | None
    composites: tuple[int, int] | None
    iterations: tuple[int, int] | None


@dataclass(frozen=True)
class Table:
    """All arms of an experiment.

    Attributes:
        metric, other_metric: of UNITS.
        classes: over which `covered` is averaged: those that the set of every arm covers; empty for other metrics.
        notes: what the reader must know.
    """

    name: str
    title: str
    about: str
    metric: str
    other_metric: str
    classes: tuple[str, ...]
    floor: float | None
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    failures: tuple[Failure, ...] = ()


def common_classes(found: Sequence[Result]) -> tuple[str, ...]:
    """Classes that the sets of all results cover and that the evaluation has ground truth of, in order."""
    if not found:
        return ()
    shared = set.intersection(*({c for c in result.covered if c in result.per_class} for result in found))
    return tuple(name for name in found[0].covered if name in shared)


def value_of(result: Result, metric: str, classes: Sequence[str]) -> float | None:
    """A metric of a result; `covered` is the mean AP of `classes`, so that all arms are averaged over the same."""
    if metric != "covered":
        return result.values.get(metric)
    if not classes:
        return None
    return sum(result.per_class[name] for name in classes) / len(classes)


def make_table(experiment: Experiment, found: Sequence[Result], failures: Sequence[Failure]) -> Table:
    """The table of what is there; arms without a result have empty rows."""
    detect = experiment.task == "detect"
    classes = common_classes(found) if detect else ()
    metric = experiment.metric
    other = {"covered": "all", "all": "covered", "top1": "top5", "top5": "top1"}[metric]
    values: dict[str, dict[str, dict[int, float]]] = {metric: {}, other: {}}
    for name in (metric, other):
        for result in found:
            value = value_of(result, name, classes)
            if value is not None:
                values[name].setdefault(result.arm, {})[result.seed] = value
    rows = []
    for arm in experiment.arms:
        baseline = experiment.baseline_of(arm)
        own = values[metric].get(arm.name, {})
        difference, word, reason = None, "", ""
        if baseline is not None and own:
            base = values[metric].get(baseline.name, {})
            difference = paired_difference(own, base)
            shared = set(own) & set(base)
            means = [sum(v[s] for s in shared) / len(shared) for v in (own, base) if shared]
            word, reason = verdict(difference, means, experiment.floor)
        mine = [result for result in found if result.arm == arm.name]
        rows.append(
            Row(
                arm.name,
                None if baseline is None else baseline.name,
                dict(sorted(own.items())),
                summary(list(own.values())),
                summary(list(values[other].get(arm.name, {}).values())),
                difference,
                word,
                reason,
                next((number.value for number in experiment.paper if number.fits(arm)), None),
                _range([result.composites for result in mine]),
                _range([result.iterations for result in mine]),
            )
        )
    return Table(
        experiment.name,
        experiment.title,
        experiment.about,
        metric,
        other,
        classes,
        experiment.floor,
        tuple(rows),
        (*_notes(experiment, found, rows), *_ruling_class(found, classes if metric == "covered" else ())),
        tuple(failures),
    )


def _notes(experiment: Experiment, found: Sequence[Result], rows: Sequence[Row]) -> list[str]:
    notes = []
    steps = [row.iterations for row in rows if row.iterations]
    asked = {experiment.iterations_of(arm) for arm in experiment.arms} - {None}
    if steps and len(asked) == 1:
        low, high = min(s[0] for s in steps), max(s[1] for s in steps)
        notes.append(
            f"{asked.pop()} iterations were asked for; whole epochs give {low}"
            + (f" to {high}" if high > low else "")
            + " (an iteration is a batch; the last one of an epoch may be smaller)."
        )
    versions = {tuple(sorted(result.versions.items())) for result in found}
    if len(versions) > 1:
        names = sorted({name for one in versions for name, _ in one if len({dict(v).get(name) for v in versions}) > 1})
        notes.append(
            f"The results were made with different versions of {', '.join(names)}: run the experiment again"
            + (" in a new `out`, as other code makes nothing again," if "code" in names else "")
            + " before any conclusion."
        )
    contents: dict[str, set[str]] = {}
    for path, content in ((path, content) for result in found for path, content in result.inputs.items()):
        contents.setdefault(path, set()).add(content)
    changed = [path for path, several in contents.items() if len(several) > 1]
    if changed:
        notes.append(
            f"The results were made of different contents of {', '.join(changed)}: run the experiment again before any "
            "conclusion."
        )
    missing = sum(len(experiment.seeds) - len(row.seeds) for row in rows)
    if missing:
        notes.append(f"{missing} of {len(rows) * len(experiment.seeds)} results are not there (yet).")
    return notes


def _ruling_class(found: Sequence[Result], classes: Sequence[str]) -> list[str]:
    """Says so where most of a mean over several classes is the AP of one, as it is for students that learned little."""
    total = {name: sum(result.per_class[name] for result in found) for name in classes}
    whole = sum(total.values())
    if len(classes) < _SEVERAL or not whole:
        return []
    name = max(total, key=total.__getitem__)
    if total[name] <= whole / 2:
        return []
    rest = (whole - total[name]) / (len(classes) - 1) / len(found)
    return [
        f"{100 * total[name] / whole:.0f} % of the mean over {len(classes)} classes is the AP of one, {name} (over all "
        f"results {total[name] / len(found):.1f}; the others {rest:.1f} in the mean): the table and its spread say "
        f"more of {name} than of the arms. Longer training, larger pictures or other classes would say more of them."
    ]


def _range(values: Sequence[int]) -> tuple[int, int] | None:
    return (min(values), max(values)) if values else None


# ---- text ----


def markdown(table: Table) -> str:
    """results.md."""
    paper = any(row.paper is not None for row in table.rows)
    compared = any(row.baseline is not None for row in table.rows)
    lines = [f"# {table.title}", ""]
    if table.about:
        lines += [table.about, ""]
    over = f" ({len(table.classes)} classes that the sets of all arms cover)" if table.classes else ""
    lines += [
        f"{UNITS[table.metric]}{over}, percent; mean ± sample standard deviation over the seeds, then each seed.",
        "",
    ]
    head = ["arm", "composites", "iterations", "seeds", UNITS[table.metric], "each seed", UNITS[table.other_metric]]
    head += ["minus the baseline ± SE", "verdict"] if compared else []
    head += ["paper"] if paper else []
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in table.rows:
        cells = [
            row.arm,
            _span(row.composites),
            _span(row.iterations),
            str(len(row.seeds)),
            _mean(row.summary),
            ", ".join(f"{value:.2f}" for value in row.seeds.values()) or "-",
            _mean(row.other),
        ]
        if compared:
            cells += _comparison(row)
        if paper:
            cells.append("-" if row.paper is None else f"{row.paper:g}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines.append("")
    if compared:
        floor = "" if table.floor is None else f" and both arms are above {table.floor:g} mAP"
        lines += [f"{RULE}{floor}; otherwise it is not resolved. Comparisons are not corrected for their number.", ""]
    if paper:
        lines += ["The paper's numbers are of its own data and recipe: full ImageNet-1K and COCO.", ""]
    for note in table.notes:
        lines += [note, ""]
    if table.failures:
        lines += ["## Failed", ""]
        for failure in table.failures:
            lines += [
                f"{failure.arm}, seed {failure.seed}: {failure.stage}, exit code {failure.exit_code}",
                "",
                *(f"    {line}" for line in failure.tail.splitlines()[-10:]),
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def as_json(table: Table) -> dict[str, Any]:
    """results.json: the same, as plain values."""
    content: dict[str, Any] = asdict(table)
    for row in content["rows"]:
        row["seeds"] = {str(seed): value for seed, value in row["seeds"].items()}
    content["rule"] = {
        "standard_errors": STANDARD_ERRORS,
        "confidence": CONFIDENCE,
        "least_seeds": LEAST_SEEDS,
        "floor": table.floor,
    }
    return content


def _comparison(row: Row) -> list[str]:
    if row.baseline is None:
        return ["(baseline)" if row.summary else "-", ""]
    if row.difference is None:
        return ["-", f"not resolved: {row.reason}" if row.summary else ""]
    error = "" if row.difference.se is None else f" ± {row.difference.se:.2f}"
    told = f"{row.difference.mean:+.2f}{error} ({row.baseline})"
    return [told, row.verdict + (f": {row.reason}" if row.reason else "")]


def _mean(found: Summary | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.2f}" + ("" if found.sd is None else f" ± {found.sd:.2f}")


def _span(found: tuple[int, int] | None) -> str:
    if found is None:
        return "-"
    return str(found[0]) if found[0] == found[1] else f"{found[0]} to {found[1]}"
