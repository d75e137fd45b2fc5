"""Attention maps of the sources of a finished set: its own selector, no other, looks at them once more."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from focusdd_det.config import suggest
from focusdd_det.detset import Cell, read_manifest
from focusdd_det.errors import ConfigError, VerifyError, WeightsError
from focusdd_det.methods import METHODS
from focusdd_det.scoring.decode import BadImage, decode
from focusdd_det.scoring.glance import least_side, view_pixels
from focusdd_det.selector import Selector, load_selector
from focusdd_det.sources import Located, Root, locate, stream
from focusdd_det.types import Crop, Image
from focusdd_det.windows import best_windows, view_of, window_side

log = logging.getLogger("focusdd")
_BATCH = 32  # sources that the ViT sees at once
_NEAR = 0.005  # shares nearer than this are the same, on another processor


@dataclass(frozen=True)
class SourceMap:
    """The attention map of one source.

    Attributes:
        levels: [g, g] uint8, 255 where the attention is largest.
        place: left, top, width and height of what the ViT saw, in px of the source.
    """

    levels: NDArray[np.uint8]
    place: tuple[float, float, float, float]


class SourceMaps:
    """Maps on demand. What could not be given is counted in `missed`, by reason; `other_share` counts the maps whose
    largest window holds another share of the attention than the manifest says."""

    def __init__(self, selector: Selector, roots: Mapping[str, Path], config: Mapping[str, Any]) -> None:
        self.selector = selector
        self.roots = roots
        self.geometry = str(config["geometry"])
        self.decode = str(config.get("decode", "reduced"))  # older sets do not have it
        self.max_pixels = int(config["max_pixels"])
        self.looks = METHODS[str(config["method"])].looks
        self.window = window_side(selector.grid, float(config["side_ratio"]))
        self.archived: dict[tuple[str, str], Located] = {}
        self.missed: Counter[str] = Counter()
        self.other_share = 0

    def find_archived(self, cells: Iterable[Cell]) -> None:
        """Look up where in their archives the sources of these cells begin, in one pass over each archive."""
        wanted: dict[tuple[str, str], set[str]] = defaultdict(set)
        for cell in cells:
            if (cell.root in self.roots and "!" in cell.path) or self._is_archive(cell.root):
                wanted[cell.root, cell.folder].add(cell.path)
        for name in sorted({root for root, _ in wanted}):
            folders = {folder for root, folder in wanted if root == name}
            for located in stream(Root(name, self.roots[name], dict.fromkeys(folders, ""))):
                if located.source.path in wanted[name, located.source.folder]:
                    self.archived[name, located.source.path] = located

    def of(self, cells: Sequence[Cell], pool: Executor) -> list[SourceMap | None]:
        """The maps of some cells' sources; None where there is none."""
        seen = pool.map(self._see, cells)
        maps: list[SourceMap | None] = []
        batch: list[tuple[int, Cell, Image]] = []
        for number, (cell, pixels) in enumerate(zip(cells, seen, strict=True)):
            maps.append(None)
            if isinstance(pixels, str):
                self.missed[pixels] += 1
            else:
                batch.append((number, cell, pixels))
            if len(batch) == _BATCH:
                self._look(batch, maps)
                batch = []
        if batch:
            self._look(batch, maps)
        return maps

    def _is_archive(self, root: str) -> bool:
        return root in self.roots and self.roots[root].is_file()

    def _see(self, cell: Cell) -> Image | str:
        """What the ViT was shown of a source, [view, view, 3]; a string says why not."""
        if cell.root not in self.roots:
            return f"the folder of `{cell.root}` was not given"
        try:
            if located := self.archived.get((cell.root, cell.path)):
                data = located.read()
            else:
                path = self.roots[cell.root] / cell.path
                data = locate(
                    Root(cell.root, self.roots[cell.root], {}), cell.path, cell.folder, "", None, path.stat().st_size, 0
                ).read()
            if hashlib.sha256(data).hexdigest() != cell.sha256:
                return "another picture lies at its place now"
            if not self.looks:
                picture = decode(data, least_side(self.selector.view, self.decode), self.max_pixels)[0]
                return view_pixels(picture, self.selector.view, self.geometry)
            picture = decode(data, None, self.max_pixels)[0]
            x, y, side = cell.crop or (0, 0, min(cell.width, cell.height))
            return view_pixels(picture[y : y + side, x : x + side], self.selector.view, "squash")
        except (OSError, BadImage, ValueError):
            return "its picture is not there, or cannot be read"

    def _look(self, batch: Sequence[tuple[int, Cell, Image]], maps: list[SourceMap | None]) -> None:
        pixels = np.zeros((_BATCH, self.selector.view, self.selector.view, 3), np.uint8)
        pixels[: len(batch)] = np.stack([picture for _, _, picture in batch])
        attention = self.selector(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())[1][: len(batch)]
        shares = best_windows(attention, self.window)[0]
        for (number, cell, _), table, share in zip(batch, attention, shares, strict=True):
            levels = (table / table.max().clamp_min(1e-12) * 255).round().to(torch.uint8).numpy()
            maps[number] = SourceMap(levels, self._place(cell))
            self.other_share += abs(float(share) - cell.share) > _NEAR

    def _place(self, cell: Cell) -> tuple[float, float, float, float]:
        if self.looks and cell.crop:
            crop = Crop(*cell.crop)
            return float(crop.x), float(crop.y), float(crop.side), float(crop.side)
        view = view_of(cell.width, cell.height, self.geometry)
        return view.offset_x, view.offset_y, view.extent_x, view.extent_y


def open_maps(
    folder: Path, identity: Mapping[str, Any], sources: Sequence[str], selector: str | None, weights: str | None
) -> SourceMaps:
    """Maps of a set's sources.

    Args:
        folder: the set.
        identity: the content of its build.yaml.
        sources: `name=path` of the folders or archives it was built from; a path alone if there was one.
        selector: as in the build; None: the name that build.yaml holds.
        weights: the selector's checkpoint; None: the one that a .json names.

    Raises:
        ConfigError: sources that the set was not built from, or a selector that cannot be found by its name.
        WeightsError: another selector than the set's, or one that cannot be loaded.
        VerifyError: build.yaml does not say how the sources were looked at.
    """
    wanted, config = identity.get("selector"), identity.get("config")
    if isinstance(config, dict) and isinstance(config.get("method"), str) and config["method"] not in METHODS:
        raise ConfigError(f"{folder}: its method `{config['method']}` is not known here: give plugins=PATH of its file")
    if not isinstance(config, dict) or config.get("method") not in METHODS or config.get("geometry") not in (
        "squash", "crop"
    ):  # fmt: skip
        raise VerifyError(f"{folder / 'build.yaml'} does not say how the sources were looked at; build the set anew")
    if not isinstance(wanted, dict):
        raise ConfigError(
            f"{folder}: its method `{config['method']}` looks at no attention, so there are no maps to show; "
            "leave sources= and selector_weights= out"
        )
    names = sorted({cell.root for item in read_manifest(folder) for cell in item.cells})
    roots = _roots(sources, names)
    name = selector or str(wanted.get("name"))
    if selector is None and name.endswith(".json"):
        raise ConfigError(f"the set's selector is a file of yours, {name}: give selector=PATH/{name}")
    if weights is None and not name.endswith(".json"):
        raise ConfigError(f"selector_weights= is missing: the checkpoint of {name} that the set was built with")
    try:
        view, attention, precision = int(wanted["view"]), str(config["attention"]), str(config["precision"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        vit = load_selector(name, weights, view, attention, precision, device)
        maps = SourceMaps(vit, roots, config)
    except (KeyError, TypeError, ValueError) as error:
        raise VerifyError(
            f"{folder / 'build.yaml'} does not say how the sources were looked at ({error}); build the set anew"
        ) from error
    for key, have in (("sha256", vit.sha256), ("spec", vit.spec)):
        if wanted.get(key) != have and (key in wanted or key == "sha256"):  # sets of the first version have no spec
            raise WeightsError(
                f"{weights or name} is not the selector of {folder}: {key} {have[:16]}..., but its build.yaml names "
                f"{wanted.get('name')} with {str(wanted.get(key))[:16]}...; give the checkpoint it was built with"
            )
    maps.find_archived(cell for item in read_manifest(folder) for cell in item.cells)
    return maps


def _roots(sources: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    """Name of a root -> where it lies now."""
    roots: dict[str, Path] = {}
    for entry in sources:
        name, equals, path = entry.partition("=")
        if not equals and len(names) == 1:
            name, path = names[0], entry
        elif not equals:
            raise ConfigError(f"sources={entry}: expected NAME=PATH; the set was built from {', '.join(names)}")
        if name not in names:
            raise ConfigError(
                f"sources: the set was not built from `{name}`{suggest(name, names)}; it names {', '.join(names)}"
            )
        if not Path(path).exists():
            raise ConfigError(f"sources: there is no {path}; expected where `{name}` lies")
        roots[name] = Path(path)
    missing = [name for name in names if name not in roots]
    if missing:
        log.warning("no sources= for %s: their cells will have no attention map", ", ".join(missing))
    return roots
