"""A set on disk -> the numbers that its statistics are made of. Every file is read once and held against its hash."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from focusdd_det import detset, disk
from focusdd_det.ahead import ahead
from focusdd_det.compose import resize
from focusdd_det.config import read_yaml
from focusdd_det.detset import Item
from focusdd_det.errors import DataError, VerifyError
from focusdd_det.labels import parse_rows
from focusdd_det.progress import progress_bar
from focusdd_det.scoring.decode import BadImage, decode
from focusdd_det.scoring.glance import difference_hash
from focusdd_det.selector import Selector
from focusdd_det.stats.features import pooled
from focusdd_det.stats.sizes import Doubles, cells_filled, cells_with_a_box, covered_area, relative_sizes
from focusdd_det.stats.snr import snr_db
from focusdd_det.types import Image

_BATCH = 32  # pictures that the ViT sees at once


@dataclass(frozen=True)
class Facts:
    """What was read of a set: arrays with an entry a picture [n] or a box [m], a few dozen bytes each.

    Attributes:
        name: of its column; folder: where it lies.
        task: detect or classify; method: that it was built with; names: of all classes.
        complete: sha256 of COMPLETE.
        ids: file names of the pictures, without extension.
        classes: [n] the class that a picture was made for.
        snr: [n] dB, nan where there is none.
        hashes: [n] difference hashes.
        cells, repeated: cells in all, and those whose source another cell shows already.
        features: [n, d], if a ViT looked.
        boxes_per_image, covered, cells_boxed, cells_filled: [n]; shares of the area under boxes, of all cells those
            with a box, and of all cells those that one box fills.
        box_classes, sizes, areas, confidence: [m]; size relative to the side, area in px.
            Of a classification set all of these are empty.
    """

    name: str
    folder: Path
    task: str
    method: str
    complete: str
    names: tuple[str, ...]
    ids: tuple[str, ...]
    classes: NDArray[np.int64]
    snr: Doubles
    hashes: NDArray[np.uint64]
    cells: int
    repeated: int
    features: NDArray[np.float32] | None
    boxes_per_image: NDArray[np.int64]
    covered: Doubles
    cells_boxed: Doubles
    cells_filled: Doubles
    box_classes: NDArray[np.int64]
    sizes: Doubles
    areas: Doubles
    confidence: Doubles


@dataclass(frozen=True)
class _Seen:
    """What was seen of one composite."""

    id: str
    class_index: int
    sources: tuple[str, ...]  # sha256 of each cell's
    snr: float
    hash: int
    side: int
    grid: int  # n of its n x n cells
    rows: Doubles  # [k, 5]
    confidence: Doubles  # [k]
    view: Image | None


def read_set(folder: Path, name: str, vit: Selector | None = None, workers: int = 2) -> Facts:
    """Look at every composite of a set.

    Args:
        folder: a finished set of this package.
        name: what it is called in tables.
        vit: gives the features that diversity is measured with.
        workers: threads that read and decode.

    Raises:
        DataError: no such set.
        VerifyError: a set that is unfinished or damaged, naming the file.
    """
    task = detset.task_of(folder)
    if task is None:
        hint = " (it is still being built)" if folder.name.endswith(disk.INCOMPLETE) else ""
        raise DataError(
            f"{folder}{hint} is no distilled set: expected a folder with the build.yaml of `focusdd build`, such as "
            "datasets/focusdd"
        )
    names = detset.read_data_yaml(folder)
    sealed = _sealed(folder)
    with (folder / "manifest.jsonl").open("rb") as file:
        total = sum(1 for _ in file)
    if not total:
        raise VerifyError(f"{folder}: its manifest lists no composite")
    seen: list[_Seen] = []
    features: list[NDArray[np.float32]] = []
    used: Counter[str] = Counter()
    with progress_bar(total, name) as bar:
        items = detset.read_manifest(folder)
        stream = ahead(items, lambda item: _look(folder, item, len(names), vit), workers, 4 * workers + _BATCH)
        for batch in _batches(stream, _BATCH):
            if vit is not None:
                features.append(pooled(vit, np.stack([one.view for one in batch if one.view is not None])))
            for one in batch:
                used.update(one.sources)
            seen += [replace(one, sources=(), view=None) for one in batch]
            bar.update(len(batch))
    boxed = [one for one in seen if task == "detect"]
    rows = np.concatenate([one.rows for one in boxed]) if boxed else np.zeros((0, 5))
    sides = np.repeat([float(one.side) for one in boxed], [len(one.rows) for one in boxed])
    sizes = relative_sizes(rows)
    return Facts(
        name=name,
        folder=folder,
        task=task,
        method=_method(folder),
        complete=sealed,
        names=tuple(names),
        ids=tuple(one.id for one in seen),
        classes=np.array([one.class_index for one in seen], np.int64),
        snr=np.array([one.snr for one in seen], np.float64),
        hashes=np.array([one.hash for one in seen], np.uint64),
        cells=used.total(),
        repeated=used.total() - len(used),
        features=np.concatenate(features) if features else None,
        boxes_per_image=np.array([len(one.rows) for one in boxed], np.int64),
        covered=np.array([covered_area(one.rows) for one in boxed], np.float64),
        cells_filled=np.array([cells_filled(one.rows, one.grid) / one.grid**2 for one in boxed], np.float64),
        cells_boxed=np.array([cells_with_a_box(one.rows, one.grid) / one.grid**2 for one in boxed], np.float64),
        box_classes=rows[:, 0].astype(np.int64),
        sizes=sizes,
        areas=(sizes * sides) ** 2,
        confidence=np.concatenate([one.confidence for one in boxed]) if boxed else np.zeros(0),
    )


def _look(folder: Path, item: Item, classes: int, vit: Selector | None) -> _Seen:
    path = detset.part_path(folder, "images", item)
    try:
        pixels = decode(_read(folder, item, "images"))[0]
    except BadImage as error:
        raise VerifyError(f"{path} cannot be used: {error}; `focusdd verify {folder}` says what is damaged") from error
    snr = snr_db(np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8))
    rows, confidence = np.zeros((0, 5)), np.zeros(0)
    if "labels" in item.sha256:
        try:
            rows = parse_rows(_read(folder, item, "labels").decode("utf-8"), classes)
        except ValueError as error:
            raise VerifyError(f"{detset.part_path(folder, 'labels', item)}: {error}") from error
        _read(folder, item, "soft")
        confidence = detset.read_soft(detset.part_path(folder, "soft", item))["conf"].astype(np.float64)
        if len(confidence) != len(rows):
            raise VerifyError(
                f"{detset.part_path(folder, 'soft', item)}: {len(confidence)} rows, the label file has {len(rows)}"
            )
    view = None if vit is None else resize(pixels, vit.view, vit.view)
    side = max(pixels.shape[:2])
    sources = tuple(cell.sha256 for cell in item.cells)
    noise = math.nan if snr is None else snr
    return _Seen(
        item.id,
        item.class_index,
        sources,
        noise,
        difference_hash(pixels),
        side,
        max(1, item.grid),
        rows,
        confidence,
        view,
    )


def _read(folder: Path, item: Item, part: str) -> bytes:
    path = detset.part_path(folder, part, item)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise VerifyError(f"{path}: {error.strerror}; the set is not whole: `focusdd verify {folder}`") from error
    if disk.sha256(data) != item.sha256[part]:
        raise VerifyError(f"{path}: not the bytes that the manifest names; `focusdd verify {folder}` says what differs")
    return data


def _sealed(folder: Path) -> str:
    """Hash of COMPLETE, after the manifest was held against it."""
    try:
        complete, manifest = ((folder / name).read_bytes() for name in ("COMPLETE", "manifest.jsonl"))
    except OSError as error:
        raise VerifyError(f"{folder} is not finished ({error}); run its build command again") from error
    if not detset.seals(folder, "manifest.jsonl", manifest):
        raise VerifyError(f"{folder / 'manifest.jsonl'}: not the bytes that COMPLETE names; `focusdd verify {folder}`")
    return disk.sha256(complete)


def _config(folder: Path) -> dict[str, Any]:
    config = read_yaml(folder / "build.yaml").get("config")
    return config if isinstance(config, dict) else {}


def _method(folder: Path) -> str:
    return str(_config(folder).get("method", "unknown"))


def _batches(stream: Iterator[_Seen], size: int) -> Iterator[list[_Seen]]:
    batch: list[_Seen] = []
    for one in stream:
        batch.append(one)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
