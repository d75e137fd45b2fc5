"""Which grids bring the boxes of a set nearest to the sizes of a reference set: `focusdd grids`.

The size of a box is sqrt(w * h) relative to the longer side of its picture: what a student sees after letterboxing,
before augmentation. In an n x n grid the boxes are 1/n as large as alone, and n^2 times as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from focusdd_det.errors import ConfigError, VerifyError

Sizes = NDArray[np.float64]
_LEVELS = (np.arange(200) + 0.5) / 200  # of the quantiles that are compared
_MOST = 4  # grids in a suggestion


@dataclass(frozen=True)
class Suggestion:
    """A value for `grids=`.

    Attributes:
        grids: grids of which each composite draws one.
        distance: mean difference of the quantiles of log2(size), in octaves: 1 means twice (or half) as large.
        sources: that a composite takes on average.
    """

    grids: tuple[int, ...]
    distance: float
    sources: float


def quantiles(sizes: Sizes, weights: Sizes) -> Sizes:
    """Weighted quantiles of log2(size) at 200 levels.

    Args:
        sizes: [n] in (0, 1]; weights: [n], at least 0, with a positive sum.
    """
    order = np.argsort(sizes, kind="stable")
    share = np.cumsum(weights[order])
    place = np.searchsorted(share / share[-1], _LEVELS)
    return np.asarray(np.log2(sizes[order][np.minimum(place, len(order) - 1)]))


def suggestions(in_cell: Sizes, reference: Sizes, grids: Sequence[int] = (1, 2, 3, 4)) -> list[Suggestion]:
    """All mixtures of up to four grids, nearest first (first-order Wasserstein distance of log2 sizes).

    Args:
        in_cell: [n] sizes of boxes relative to the cell they lie in.
        reference: [m] sizes relative to the picture.

    Raises:
        ValueError: one of them is empty.
    """
    if not len(in_cell) or not len(reference):
        raise ValueError("sizes need at least one box on either side")
    wanted = quantiles(reference, np.ones(len(reference)))
    found: dict[tuple[float, ...], Suggestion] = {}
    for count in range(1, _MOST + 1):
        for mix in combinations_with_replacement(grids, count):
            shares = tuple(mix.count(n) / count for n in grids)
            if shares in found:  # 2,2 is 2
                continue
            sizes = np.concatenate([in_cell / n for n in mix])
            weights = np.concatenate([np.full(len(in_cell), float(n * n)) for n in mix])
            distance = float(np.abs(quantiles(sizes, weights) - wanted).mean())
            found[shares] = Suggestion(mix, distance, sum(n * n for n in mix) / count)
    return sorted(found.values(), key=lambda s: (round(s.distance, 4), s.sources))


def sizes_in_cells(folder: Path) -> tuple[Sizes, Sizes]:
    """Sizes of all boxes of a detection set, relative to the composite and to their cell.

    Raises:
        VerifyError: it has no boxes, or is damaged.
    """
    from focusdd_det.detset import part_path, read_data_yaml, read_manifest
    from focusdd_det.labels import parse_rows

    names = read_data_yaml(folder)
    whole, cell = [], []
    for item in read_manifest(folder):
        if "labels" not in item.sha256:
            raise VerifyError(f"{folder} is a classification set: it has no boxes; give a detection set")
        try:
            table = parse_rows(part_path(folder, "labels", item).read_text(encoding="utf-8"), len(names))
        except (OSError, ValueError) as error:
            raise VerifyError(
                f"{folder}: {item.id}: {error}; `focusdd verify {folder}` says what is damaged"
            ) from error
        sizes = np.sqrt(table[:, 3] * table[:, 4])
        whole.append(sizes)
        cell.append(sizes * max(1, item.grid))
    if not sum(map(len, whole)):
        raise VerifyError(f"{folder}: no composite has a box")
    return np.concatenate(whole), np.concatenate(cell)


def grids_command(argv: Sequence[str]) -> int:
    """`focusdd grids SET reference=annotations.json`."""
    from focusdd_det.commandline import read_options, wants_help
    from focusdd_det.stats.reference import read_boxes

    if wants_help(argv):
        print(USAGE)
        return 0
    if not argv or "=" in argv[0] or argv[0].startswith("-"):
        raise ConfigError("grids: a set is needed first, as in `focusdd grids datasets/focusdd reference=val.json`")
    options = read_options("grids", argv[1:], {"reference": str}, needed=("reference",))
    folder = Path(argv[0])
    whole, cell = sizes_in_cells(folder)
    wanted = read_boxes(str(options["reference"])).sizes
    now = float(np.abs(quantiles(whole, np.ones(len(whole))) - quantiles(wanted, np.ones(len(wanted)))).mean())
    print(
        f"sizes of boxes, sqrt(w h) / longer side of the picture, at 10, 50 and 90 % of {len(whole)} and {len(wanted)}:"
    )
    for name, sizes in ((str(folder), whole), (str(options["reference"]), wanted)):
        print(
            "  " + "  ".join(f"{q:.3f}" for q in np.quantile(sizes, (0.1, 0.5, 0.9))) + f"  {name} ({len(sizes)} boxes)"
        )
    print(f"they are {now:.2f} octaves apart on average; with other grids, if each cell kept its boxes:")
    for s in suggestions(cell, wanted)[:5]:
        print(f"  grids={','.join(map(str, s.grids)):10} {s.distance:.2f} octaves, {s.sources:.1f} sources a composite")
    print("the teacher finds less in smaller cells: build with the first and look again")
    return 0


USAGE = """focusdd grids SET reference=annotations.json: which grids= bring the boxes nearest to the reference's sizes

  focusdd grids datasets/focusdd reference=coco/annotations/instances_val2017.json
  python tools/build_det_set.py --source imagenet/train --ipc 50 --grids 2,3,3 --out datasets/mixed"""
