"""What was read of sets -> the numbers that are told of them, as plain values and as a Markdown table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from focusdd_det.stats.collect import Facts
from focusdd_det.stats.diversity import diversity
from focusdd_det.stats.duplicates import NEAR, near_pairs
from focusdd_det.stats.reference import Reference, percentiles
from focusdd_det.stats.sizes import EDGES, FILLED, coco_kinds, overlap, size_shares

Numbers = dict[str, Any]
_PAIRS_TOLD = 50  # pairs of near duplicates that stats.json names


def numbers(facts: Facts, reference: Reference | None) -> Numbers:
    """Everything that is told of a set; None stands for what cannot be told."""
    per_class = np.bincount(facts.classes, minlength=len(facts.names))
    pairs = near_pairs(facts.hashes, NEAR)
    snr = facts.snr[np.isfinite(facts.snr)]
    features = None if facts.features is None else diversity(facts.features, facts.classes)
    return {
        "name": facts.name,
        "task": facts.task,
        "method": facts.method,
        "complete_sha256": facts.complete,
        "images": len(facts.ids),
        "classes": len(facts.names),
        "classes_with_images": int((per_class > 0).sum()),
        "images_per_class": _counts(per_class, facts.names),
        "boxes": _boxes(facts, reference) if facts.task == "detect" else None,
        "snr_db": None if not len(snr) else {"mean": _r(snr.mean()), "percentiles": percentiles(snr)},
        "snr_without": len(facts.snr) - len(snr),
        "diversity": None
        if features is None
        else {
            "euclidean": _r(features.euclidean),
            "squared": _r(features.squared),
            "cosine": _r(features.cosine),
            "cosine_in_class": None if features.cosine_in_class is None else _r(features.cosine_in_class),
            "pairs": features.pairs,
        },
        "near_duplicates": {
            "bits": NEAR,
            "pairs": len(pairs),
            "images": len({i for a, b, _ in pairs for i in (a, b)}),
            "nearest": [[facts.ids[a], facts.ids[b], bits] for a, b, bits in pairs[:_PAIRS_TOLD]],
        },
        "cells": facts.cells,
        "cells_repeating_a_source": facts.repeated,
    }


def _boxes(facts: Facts, reference: Reference | None) -> Numbers:
    per_class = np.bincount(facts.box_classes, minlength=len(facts.names))
    shares = size_shares(facts.sizes)
    some = len(facts.sizes) > 0
    return {
        "count": len(facts.sizes),
        "classes_with_boxes": int((per_class > 0).sum()),
        "per_class": _counts(per_class, facts.names),
        "per_image": {"mean": _r(facts.boxes_per_image.mean()), "percentiles": percentiles(facts.boxes_per_image)},
        "images_without": int((facts.boxes_per_image == 0).sum()),
        "area_covered": _r(facts.covered.mean()),
        "cells_with_a_box": _r(facts.cells_boxed.mean()),
        "cells_filled_by_a_box": _r(facts.cells_filled.mean()),
        "relative_size": {"percentiles": percentiles(facts.sizes)} if some else None,
        "size_histogram": {"edges": [_r(v) for v in EDGES], "shares": [_r(v) for v in shares]},
        "small_medium_large": [_r(v) for v in coco_kinds(facts.areas)] if some else None,
        "sizes_in_common_with_reference": _r(overlap(shares, reference.shares)) if reference and some else None,
        "confidence": {"mean": _r(facts.confidence.mean()), "percentiles": percentiles(facts.confidence)}
        if some
        else None,
    }


def reference_numbers(reference: Reference) -> Numbers:
    """The reference, as it stands in stats.json."""
    return {
        "name": reference.name,
        "origin": reference.origin,
        "pictures": reference.pictures,
        "boxes": reference.boxes,
        "size_histogram": [_r(v) for v in reference.shares],
        "relative_size": {"percentiles": list(reference.sizes)},
        "small_medium_large": [_r(v) for v in reference.kinds],
        "boxes_per_image": [int(v) for v in reference.boxes_per_image],
    }


def _counts(counts: NDArray[np.int64], names: Sequence[str]) -> dict[str, int]:
    """Class -> count, classes without any left out."""
    return {name: int(count) for name, count in zip(names, counts, strict=True) if count}


def _r(value: float) -> float:
    return round(float(value), 4)


def table(sets: Sequence[Numbers], reference: Reference | None) -> str:
    """A Markdown table with a column a set, and one for the reference where sets have boxes."""
    boxed = any(one["boxes"] for one in sets)
    shown = reference if boxed else None
    heads = [one["name"] for one in sets] + ([shown.name] if shown else [])
    lines = ["| |" + "|".join(f" {_cell(head)} " for head in heads) + "|", "|---|" + "---|" * len(heads)]
    for label, of_set, of_reference, only_boxes in _ROWS:
        if only_boxes and not boxed:
            continue
        texts = [of_set(one) if not only_boxes or one["boxes"] else None for one in sets]
        beside = [of_reference(shown) if of_reference else None] if shown else []
        if all(text is None for text in texts):
            continue
        lines.append(f"| {label} |" + "|".join(f" {text or '-'} " for text in texts + beside) + "|")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "/")


def _span(counts: dict[str, int]) -> str | None:
    values = sorted(counts.values())
    return f"{values[0]} / {int(np.median(values))} / {values[-1]}" if values else None


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _kinds(values: Sequence[float] | None) -> str | None:
    return None if values is None else " / ".join(f"{100 * v:.0f}" for v in values) + " %"


def _sizes(values: Sequence[float]) -> str:
    return f"{values[2]:.3f} ({values[0]:.3f} to {values[4]:.3f})"


def _mean_and_span(entry: Numbers | None, digits: int) -> str | None:
    if entry is None:
        return None
    low, high = entry["percentiles"][0], entry["percentiles"][4]
    return f"{entry['mean']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _diversity(key: str) -> Callable[[Numbers], str | None]:
    return lambda one: (
        f"{one['diversity'][key]:.3f}" if one["diversity"] and one["diversity"][key] is not None else None
    )


def _sized(one: Numbers) -> str | None:
    return _sizes(one["boxes"]["relative_size"]["percentiles"]) if one["boxes"]["relative_size"] else None


# label, what it is of a set, what it is of the reference, whether only sets with boxes have it
_ROWS: tuple[tuple[str, Callable[[Numbers], str | None], Callable[[Reference], str | None] | None, bool], ...] = (
    ("task, method", lambda one: f"{one['task']}, {one['method']}", None, False),
    ("images", lambda one: str(one["images"]), lambda r: str(r.pictures), False),
    ("classes with images", lambda one: f"{one['classes_with_images']} of {one['classes']}", None, False),
    ("images a class: least / median / most", lambda one: _span(one["images_per_class"]), None, False),
    ("boxes", lambda one: str(one["boxes"]["count"]), lambda r: str(r.boxes), True),
    ("classes with boxes", lambda one: f"{one['boxes']['classes_with_boxes']} of {one['classes']}", None, True),
    ("boxes a class: least / median / most", lambda one: _span(one["boxes"]["per_class"]), None, True),
    (
        "boxes an image, mean",
        lambda one: f"{one['boxes']['per_image']['mean']:.2f}",
        lambda r: f"{r.mean_boxes:.2f}",
        True,
    ),
    (
        "images without a box",
        lambda one: str(one["boxes"]["images_without"]),
        lambda r: str(int(r.boxes_per_image[0])),
        True,
    ),
    ("box size / side: median (5 to 95 %)", _sized, lambda r: _sizes(r.sizes), True),
    (
        "small / medium / large (32, 96 px)",
        lambda one: _kinds(one["boxes"]["small_medium_large"]),
        lambda r: _kinds(r.kinds),
        True,
    ),
    (
        "sizes in common with the reference",
        lambda one: _percent(one["boxes"]["sizes_in_common_with_reference"]),
        lambda _: "100 %",
        True,
    ),
    ("area under boxes", lambda one: _percent(one["boxes"]["area_covered"]), None, True),
    ("cells with a box", lambda one: _percent(one["boxes"]["cells_with_a_box"]), None, True),
    (
        f"cells that one box fills (from {100 * FILLED:.0f} % on)",
        lambda one: _percent(one["boxes"]["cells_filled_by_a_box"]),
        None,
        True,
    ),
    (
        "teacher confidence: mean (5 to 95 %)",
        lambda one: _mean_and_span(one["boxes"]["confidence"], 2),
        None,
        True,
    ),
    ("SNR, dB: mean (5 to 95 %)", lambda one: _mean_and_span(one["snr_db"], 1), None, False),
    ("diversity, mean Euclidean distance", _diversity("euclidean"), None, False),
    ("diversity, mean cosine distance", _diversity("cosine"), None, False),
    ("the same within a class", _diversity("cosine_in_class"), None, False),
    (
        f"near duplicates, pairs (at most {NEAR} of 64 bits)",
        lambda one: str(one["near_duplicates"]["pairs"]),
        None,
        False,
    ),
    (
        "cells that show a source again",
        lambda one: f"{one['cells_repeating_a_source']} of {one['cells']}" if one["cells"] else None,
        None,
        False,
    ),
)
