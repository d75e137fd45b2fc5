"""Each step of a build alone, in one thread (ViT and teacher in all); and what decoding at reduced size gains."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np

from focusdd_det.bench.options import BenchOptions
from focusdd_det.bench.pictures import LARGE, draw_large
from focusdd_det.bench.scenes import METHOD, Scene
from focusdd_det.bench.timing import compare
from focusdd_det.compose import assemble, cut, encode_jpeg, middle_square
from focusdd_det.devices import device_of
from focusdd_det.disk import write_atomic
from focusdd_det.plan import Group
from focusdd_det.ranking import rank
from focusdd_det.scoring.decode import BadImage, decode
from focusdd_det.scoring.glance import difference_hash, glance, view_pixels
from focusdd_det.scoring.scores import ScoreStore
from focusdd_det.sources import Located
from focusdd_det.teacher import load_detector

_SIZE = f"{LARGE[0]} x {LARGE[1]} px"
REDUCED, FULL = f"decode for the view, {_SIZE}", f"full decode, {_SIZE}"


def stages(scene: Scene) -> dict[str, float]:
    """Milliseconds of each step, of a source, or of a composite where it says so; the scene has been scored."""
    c, view = scene.config, scene.selector.view
    timer = _Timer()
    data = _sources(scene, timer)
    for located in data:
        timer("all of it: read, sha256, decode, resize, hash", glance, located, view, METHOD, c)
    scene.selector(scene.pixels)
    for _ in range(2):
        timer("ViT", scene.selector, scene.pixels, parts=len(scene.pixels))
    scored = Counter(located.source.group for located in scene.sources)
    with scene.scored() as store:
        for group in (group for group in scene.groups if scored[group.name]):
            timer("selection", _select, scene, store, group, parts=scored[group.name])
    side = c.image_size // c.grid
    tiles = []
    for bytes_ in list(data.values())[:32]:
        picture = timer("full decode of a chosen one", decode, bytes_)[0]
        tiles.append(timer("cut", cut, picture, middle_square(picture.shape[1], picture.shape[0]), side, side))
    detector = load_detector(c.teacher, device_of(c.device), scene.plan.class_map.names, False)
    for i in range(0, len(tiles) - 3, 4):
        picture = timer("compose, a composite", assemble, tiles[i : i + 4], 2)
        jpeg = timer("encode, a composite", encode_jpeg, picture, c.jpeg_quality)
        timer("teacher, a composite", detector.detect, [picture], c.conf, c.iou, c.max_det, 1)
        timer("write, a composite", write_atomic, scene.work / "written.jpg", jpeg)
    return timer.means()


def large_decodes(view: int, options: BenchOptions) -> dict[str, list[float]]:
    """Seconds a picture, in every round, of drawn JPEGs of LARGE decoded for a view of so many px, and in full."""
    pictures = draw_large(2 if options.quick else 4)

    def all_of(least: int | None) -> None:
        for data in pictures:
            decode(data, least)

    cases: dict[str, Callable[[], object]] = {REDUCED: lambda: all_of(view), FULL: lambda: all_of(None)}
    seconds = compare(cases, options.rounds, 1, clock=options.seconds)
    return {name: [each / len(pictures) for each in times] for name, times in seconds.items()}


def _sources(scene: Scene, timer: _Timer) -> dict[Located, bytes]:
    """Some sources that can be read, with their bytes; their steps are timed on the way."""
    data: dict[Located, bytes] = {}
    for located in scene.sources[:64]:
        try:
            bytes_ = timer("read", located.read)
            decode(bytes_)
            picture = timer("decode for the view", decode, bytes_, scene.selector.view)[0]
        except (BadImage, OSError):
            continue
        data[located] = bytes_
        small = timer("resize", view_pixels, picture, scene.selector.view, scene.config.geometry)
        timer("perceptual hash", difference_hash, small)
    return data


def _select(scene: Scene, store: ScoreStore, group: Group) -> list[Any]:
    """As the build does it: read, rank, choose."""
    blocks = store.blocks(group.name, scene.config.alpha)
    return list(islice(rank(group, blocks, METHOD, scene.layouts, scene.config).proposals(), scene.config.ipc))


class _Timer:
    """Collects times by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name: str, work: Callable[..., Any], *arguments: Any, parts: int = 1) -> Any:
        began = time.perf_counter()
        result = work(*arguments)
        self.seconds.setdefault(name, []).append((time.perf_counter() - began) / parts)
        return result

    def means(self) -> dict[str, float]:
        """Milliseconds; the median, because whatever else the machine does only adds."""
        return {name: float(np.median(times)) * 1e3 for name, times in self.seconds.items()}
