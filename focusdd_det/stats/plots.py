"""The statistics as pictures: sets laid over each other, a colour a set, COCO in grey. Numbers in, PNG bytes out."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from focusdd_det.stats.collect import Facts
from focusdd_det.stats.curves import Curves
from focusdd_det.stats.reference import Reference
from focusdd_det.stats.sizes import EDGES, size_shares

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # Okabe and Ito: safe for all eyes
GREY = "#8a8a8a"
MOST_CLASSES = 30  # bars of classes; the rest is named in the title
_STYLE = {
    "figure.facecolor": "white",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}
Panel = Callable[..., None]  # (ax, sets, reference, colours)


def figures(sets: Sequence[Facts], reference: Reference | None) -> dict[str, bytes]:
    """File name -> PNG, one a statistic that at least one of the sets has, and overview.png with all of them."""
    colours = {one.name: COLOURS[i % len(COLOURS)] for i, one in enumerate(sets)}  # the same in all pictures
    boxed = [one for one in sets if one.task == "detect" and len(one.sizes)]
    panels: dict[str, tuple[Panel, Sequence[Facts]]] = {}
    if boxed:
        panels["box_sizes"] = (box_sizes, boxed)
        panels["boxes_per_image"] = (boxes_per_image, boxed)
        panels["confidence"] = (confidence, boxed)
    noisy = [one for one in sets if np.isfinite(one.snr).any()]
    if noisy:
        panels["snr"] = (snr, noisy)
    panels["class_counts"] = (class_counts, sets)
    pngs = {}
    for name, (panel, members) in panels.items():
        height = _class_height(members) if name == "class_counts" else 3.8
        pngs[f"{name}.png"] = _png(
            1, 1, (6.2, height), [partial(panel, sets=members, reference=reference, colours=colours)]
        )
    several = [name for name in panels if name != "class_counts"]
    columns = min(2, len(several))
    if columns:
        rows = -(-len(several) // columns)
        cells = [
            partial(panels[name][0], sets=panels[name][1], reference=reference, colours=colours) for name in several
        ]
        pngs["overview.png"] = _png(rows, columns, (6.0 * columns, 3.6 * rows), cells)
    return pngs


def curves_png(runs: Sequence[Curves]) -> bytes:
    """Loss on the left, accuracy on the right (if any run measured it)."""
    drawn: list[Callable[[Any], None]] = [partial(loss_curves, runs=runs)]
    if any(run.score for run in runs):
        drawn.append(partial(score_curves, runs=runs))
    return _png(1, len(drawn), (5.6 * len(drawn), 3.8), drawn)


# --- a panel each


def box_sizes(ax: Any, sets: Sequence[Facts], reference: Reference | None, colours: Mapping[str, str]) -> None:
    """Shares of the boxes by sqrt(area) / side, on a logarithmic axis."""
    if reference is not None:
        ax.stairs(100 * reference.shares, EDGES, fill=True, color="#dddddd", label=_text(reference.name))
        ax.stairs(100 * reference.shares, EDGES, color=GREY, linewidth=1)
    for one, colour in _coloured(sets, colours):
        ax.stairs(100 * size_shares(one.sizes), EDGES, color=colour, linewidth=1.8, label=_text(one.name))
    ax.set_xscale("log")
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlim(EDGES[0], EDGES[-1])
    ax.set(title="Box sizes", xlabel="$\\sqrt{area}$ / side of the picture", ylabel="boxes, %")
    ax.legend(loc="upper left")


def boxes_per_image(ax: Any, sets: Sequence[Facts], reference: Reference | None, colours: Mapping[str, str]) -> None:
    """Shares of the images by their number of boxes; the last bar holds all above."""
    most = max(5, min(30, int(max(np.quantile(one.boxes_per_image, 0.99) for one in sets))))
    at = np.arange(most + 1)
    if reference is not None:
        known = np.repeat(np.arange(len(reference.boxes_per_image)), reference.boxes_per_image)
        edges = np.arange(most + 2) - 0.5
        ax.stairs(100 * _capped(known, most), edges, fill=True, color="#dddddd", label=_text(reference.name))
        ax.stairs(100 * _capped(known, most), edges, color=GREY, linewidth=1)
    for i, (one, colour) in enumerate(_coloured(sets, colours)):
        shares = 100 * _capped(one.boxes_per_image, most)
        ax.plot(
            at, shares, color=colour, marker="o", markersize=3.5, linewidth=1.8, label=_text(one.name), zorder=3 + i
        )
    step = -(-most // 10)
    ticks = [*range(0, most - step // 2, step), most]
    ax.set_xticks(ticks, [f"{tick}" if tick < most else f"{tick}+" for tick in ticks])
    ax.set(title="Boxes an image", xlabel="boxes", ylabel="images, %")
    ax.legend(loc="upper right")


def confidence(ax: Any, sets: Sequence[Facts], reference: Reference | None, colours: Mapping[str, str]) -> None:
    """Shares of the boxes by the teacher's confidence."""
    edges = np.linspace(0, 1, 21)
    for one, colour in _coloured(sets, colours):
        _steps(ax, one.confidence, edges, colour, f"{_text(one.name)}: mean {one.confidence.mean():.2f}")
    ax.set(title="How sure the teacher is of its boxes", xlabel="confidence", ylabel="boxes, %", xlim=(0, 1))
    _legend_above(ax)


def snr(ax: Any, sets: Sequence[Facts], reference: Reference | None, colours: Mapping[str, str]) -> None:
    """Shares of the images by signal to noise."""
    values = [one.snr[np.isfinite(one.snr)] for one in sets]
    low, high = (float(f(np.concatenate(values))) for f in (np.min, np.max))
    bins = int(np.clip(2 * np.cbrt(max(map(len, values))), 8, 30))
    edges = np.linspace(np.floor(low), np.ceil(high) if high > np.floor(low) else low + 1, bins + 1)
    for (one, colour), known in zip(_coloured(sets, colours), values, strict=True):
        _steps(ax, known, edges, colour, f"{_text(one.name)}: mean {known.mean():.1f} dB")
    ax.set(title="Signal to noise (3 x 3 Laplacian)", xlabel="SNR, dB", ylabel="images, %")
    _legend_above(ax)


def class_counts(ax: Any, sets: Sequence[Facts], reference: Reference | None, colours: Mapping[str, str]) -> None:
    """Boxes (of classification sets: images) a class, most frequent first."""
    names, counts = _by_class(sets)
    shown = names[:MOST_CLASSES]
    thickness = 0.8 / len(sets)
    at = np.arange(len(shown))
    for i, (one, colour) in enumerate(_coloured(sets, colours)):
        values = [counts[i].get(name, 0) for name in shown]
        places = at + (i - (len(sets) - 1) / 2) * thickness
        bars = ax.barh(places, values, thickness * 0.92, color=colour, label=_text(one.name))
        ax.bar_label(bars, fontsize=6.5, padding=2, color="#666666")
    ax.set_yticks(at, [_text(name) for name in shown])
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    what = "Boxes" if all(one.task == "detect" for one in sets) else "Images"
    what = what if len({one.task for one in sets}) == 1 else "Boxes (of classification sets: images)"
    rest = f" ({len(shown)} most frequent of {len(names)})" if len(names) > len(shown) else ""
    ax.set(title=f"{what} a class{rest}", xlabel=what.lower())
    ax.margins(x=0.08)
    ax.legend(loc="lower right")


def loss_curves(ax: Any, runs: Sequence[Curves]) -> None:
    """The training loss; of a single run every term of it too."""
    for run, colour in zip(runs, _colours(), strict=False):
        x, y = _xy(run.total)
        window = max(1, len(x) // 50)  # epochs of few steps jump: the line is a running mean, the jumps stay faint
        if window > 1:
            ax.plot(x, y, color=colour, linewidth=0.6, alpha=0.3)
        ax.plot(x, _running_mean(y, window), color=colour, linewidth=1.8, label=_text(run.name))
        if len(runs) == 1 and len(run.losses) > 1:
            for (term, points), other in zip(run.losses.items(), _colours()[1:], strict=False):
                ax.plot(*_xy(points), color=other, linewidth=1.1, label=term)
    sums = len(runs) > 1 and any(len(run.losses) > 1 for run in runs)
    ax.set(title="Training loss" + (" (sum of each run's terms)" if sums else ""), xlabel="epoch", ylabel="loss")
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper right")


def score_curves(ax: Any, runs: Sequence[Curves]) -> None:
    """What the runs measured on their val data, in percent."""
    for run, colour in zip(runs, _colours(), strict=False):
        if run.score:
            x, y = _xy(run.score)
            dots = {"marker": "o" if len(x) < 40 else "", "markersize": 4}
            ax.plot(
                x,
                [100 * v for v in y],
                color=colour,
                linewidth=1.8,
                label=f"{_text(run.name)}: {100 * y[-1]:.4g}",
                **dots,
            )
    names = sorted({run.score_name for run in runs if run.score and run.score_name})
    ax.set(title=f"{' and '.join(names)}, as the run measured it", xlabel="epoch", ylabel="%")
    ax.set_xlim(0, 1.03 * max(run.total[-1][0] for run in runs if run.total))
    ax.set_ylim(0, 115 * max(y for run in runs for _, y in run.score) or 1)
    ax.legend(loc="lower right")


# --- how they are drawn


def _png(rows: int, columns: int, size: tuple[float, float], panels: Sequence[Callable[[Any], None]]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in a script that the font lacks is no reason for pages of warnings
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for ax, panel in zip(axes.flat, panels, strict=False):
            panel(ax)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        pyplot.close(figure)
    return buffer.getvalue()


def _text(name: str) -> str:
    """A name that matplotlib takes for no formula, and shows in the legend also where it begins with _."""
    return ("\u200b" if name.startswith("_") else "") + name.replace("$", r"\$")


def _steps(ax: Any, values: NDArray[np.float64], edges: NDArray[np.float64], colour: str, label: str) -> None:
    shares = 100 * np.histogram(values, edges)[0] / max(len(values), 1)
    ax.stairs(shares, edges, color=colour, linewidth=1.8, label=label)
    ax.stairs(shares, edges, fill=True, color=colour, alpha=0.12)


def _legend_above(ax: Any) -> None:
    """A legend in the upper left, over the bars."""
    rows = len(ax.get_legend_handles_labels()[0])
    ax.set_ylim(0, ax.get_ylim()[1] * (1.05 + 0.08 * rows))
    ax.legend(loc="upper left")


def _running_mean(values: Sequence[float], window: int) -> NDArray[np.float64]:
    """The mean of each value and those before it, `window` of them where there are so many."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return np.asarray((total[end] - total[start]) / (end - start), np.float64)


def _capped(counts: NDArray[np.int64], most: int) -> NDArray[np.float64]:
    """Share of the pictures with 0, 1, ... most or more boxes."""
    return np.bincount(np.minimum(counts, most), minlength=most + 1) / max(len(counts), 1)


def _by_class(sets: Sequence[Facts]) -> tuple[list[str], list[dict[str, int]]]:
    """Names of the classes that any set has, most frequent first, and each set's counts."""
    counts = []
    for one in sets:
        found = np.bincount(one.box_classes if one.task == "detect" else one.classes, minlength=len(one.names))
        counts.append({name: int(count) for name, count in zip(one.names, found, strict=True) if count})
    total = {name: sum(one.get(name, 0) for one in counts) for one in counts for name in one}
    return sorted(total, key=lambda name: (-total[name], name)), counts


def _class_height(sets: Sequence[Facts]) -> float:
    bars = min(MOST_CLASSES, len(_by_class(sets)[0]))
    return 1.3 + bars * max(0.2, 0.11 * len(sets))


def _coloured(sets: Sequence[Facts], colours: Mapping[str, str]) -> list[tuple[Facts, str]]:
    return [(one, colours[one.name]) for one in sets]


def _colours() -> list[str]:
    return list(COLOURS) * 10


def _xy(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
