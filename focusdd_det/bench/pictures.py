"""Pictures, models and build options that a benchmark has without a network: drawn, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from focusdd_det.bench.options import BenchOptions
from focusdd_det.build import load_config
from focusdd_det.config import BuildConfig
from focusdd_det.errors import ConfigError
from focusdd_det.sources import Root, folder_names

SIZE = (500, 375)  # width and height of the usual ImageNet picture, px
LARGE = (2000, 1500)  # of one from a camera or a telephone
COMPOSITE, MOST_CLASSES = 640, 40


@dataclass(frozen=True)
class Bench:
    """What is built in a benchmark, and from what.

    Attributes:
        config: a detection build, `out` inside the benchmark's folder.
        notes: what a reader of the numbers must know.
    """

    config: BuildConfig
    notes: tuple[str, ...]


def draw_sources(top: Path, classes: int, each: int, size: tuple[int, int] = SIZE, kinds: int = 24) -> Path:
    """Class folders c00, c01 ... with pictures of blurred noise, as many bytes as photographs (90 KB at 500 x 375).

    `kinds` pictures are drawn; the files differ in a comment, so that each has a content of its own.
    """
    rng = np.random.default_rng(0)
    drawn = [_scene(rng, *size) for _ in range(min(kinds, classes * each))]
    for c in range(classes):
        folder = top / f"c{c:02d}"
        folder.mkdir(parents=True)
        for i in range(each):
            number = c * each + i
            comment = b"\xff\xfe\x00\x0a%08d" % number
            data = drawn[number % len(drawn)]
            (folder / f"{i:06d}.jpg").write_bytes(data[:2] + comment + data[2:])
    return top


def draw_large(count: int) -> list[bytes]:
    """JPEGs of LARGE, with as fine a texture as those of SIZE have; the same ones every time."""
    rng = np.random.default_rng(1)
    return [_scene(rng, *LARGE) for _ in range(count)]


def _scene(rng: np.random.Generator, width: int, height: int) -> bytes:
    picture = np.zeros((height, width, 3), np.float32)
    finest = ((2 * width // 5, 14.0),) if width > SIZE[0] else ()
    for cells, strength in ((4, 90.0), (16, 50.0), (64, 30.0), (200, 14.0), *finest):
        noise = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        picture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    pixels = np.clip(picture + 120, 0, 255).astype(np.uint8)
    return bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes())


def prepare(
    options: BenchOptions, work: Path, classes: int, each: int, shared: int | None = None, **more: Any
) -> Bench:
    """Sources, map and models for a build.

    Args:
        options: sources, selector, its weights, teacher, workers, device; what is not given is made.
        work: an empty folder.
        classes, each: what is drawn where no sources are given.
        shared: so many classes share the folders of the sources; None: one folder is one class.
        more: keys of cfg/build_det.yaml that win.
    """
    notes = []
    if options.sources:
        top = Path(options.sources)
    else:
        top = draw_sources(work / "sources", classes, each)
        notes.append(f"sources: {classes} x {each} drawn JPEGs of {SIZE[0]} x {SIZE[1]} px")
    selector, weights, told = _selector(options, work)
    teacher, names, told_too = _teacher(options, work)
    notes += [*told, *told_too]
    content = class_map(sorted(folder_names(Root("bench", top, {}))), names, shared)
    (work / "map.yaml").write_text(yaml.safe_dump(content))
    loader = {} if options.on_gpu else {"loader": "threads"}  # processes need a second to start; no clock counts them
    keys: dict[str, Any] = {
        "sources": [f"{top}::{work / 'map.yaml'}"],
        "class_map": str(work / "map.yaml"),
        "selector": selector,
        "selector_weights": weights,
        "teacher": str(teacher),
        "out": str(work / "set"),
        "method": "focusdd",
        "image_size": 256 if options.quick else COMPOSITE,
        "ipc": 2 if options.quick else 10,
        "empty": "keep",
        "max_bad": 1.0,
        "device": options.device,
        "workers": options.workers,
        **({} if options.sources else {"near_duplicate": 0}),  # few pictures are drawn, and files of each made
        **loader,
        **more,
    }
    return Bench(load_config(**keys), tuple(notes))


def prepare_small(
    options: BenchOptions, work: Path, classes: int, each: int, size: tuple[int, int], shared: int | None = None
) -> BuildConfig:
    """A build of drawn pictures of `size` px, in so many folders; `shared` as in `prepare`. `work` is made."""
    work.mkdir(parents=True)
    drawn = replace(options, sources=str(draw_sources(work / "pictures", classes, each, size)))
    batch = 16 if options.quick else 64
    return prepare(drawn, work, 0, 0, shared, image_size=128, batch=batch, near_duplicate=0).config


def class_map(folders: Sequence[str], names: Sequence[str], shared: int | None = None) -> dict[str, Any]:
    """A map as its YAML has it: a class for each folder, as far as the names go, or `shared` classes in turn."""
    if shared is None:
        used = list(zip(folders, names, strict=False))[:MOST_CLASSES]
        return {"names": [name for _, name in used], "folders": dict(used)}
    return {"names": list(names[:shared]), "folders": {f: names[i % shared] for i, f in enumerate(folders)}}


def _selector(options: BenchOptions, work: Path) -> tuple[str, str | None, list[str]]:
    """The ViT that was given; without its weights one of the same shape with random ones: as slow, not as wise.

    Raises:
        ConfigError: without weights, and no model of timm's.
    """
    name, weights = options.selector, options.selector_weights
    if weights or name.endswith(".json"):
        return name, weights, []
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    try:
        model = timm.create_model(name.split(".")[0], pretrained=False)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"selector={name}: without selector_weights= it must be a ViT of timm's, which gets random weights "
            f"({error})"
        ) from error
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    file = work / "selector.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    return name.split(".")[0], str(file), ["selector: random weights; its speed counts, not what it chooses"]


def _teacher(options: BenchOptions, work: Path) -> tuple[Path, list[str], list[str]]:
    """The detector's file and its class names; of an architecture (.yaml) one with random weights.

    Raises:
        WeightsError: it cannot be found, read or made.
    """
    from focusdd_det.bench.train import FRESH, teacher_file
    from focusdd_det.checkpoints import safe_checkpoint

    file = teacher_file(options, work)
    names = list(safe_checkpoint(file).names.values())
    given = Path(options.teacher or FRESH)
    return file, names, [f"teacher: {given.name} with random weights"] if given.suffix in (".yaml", ".yml") else []
