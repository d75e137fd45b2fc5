"""A tiny workshop for builds that are interrupted: drawn sources, random models, builds in processes of their own."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml

from faults import child
from focusdd_det.build import build, load_config

NAMES = ("ball", "étoile bleue", "kite")  # a class name with a space and an accent goes through every format
FOLDERS = ("ball", "star", "kite")
PER_CLASS = 14
LIMIT = 60.0  # seconds after which a build counts as hanging

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["focusdd_det.build", "focusdd_det.cli"])


@dataclass(frozen=True)
class Workshop:
    """Where the sources, the map and the models of the tests lie."""

    top: Path

    @property
    def sources(self) -> Path:
        return self.top / "sources"

    def options(self, out: Path, **more: Any) -> dict[str, Any]:
        """Options of a build that takes a second; `more` wins."""
        base = {
            "sources": [str(self.sources)],
            "class_map": str(self.top / "map.yaml"),
            "selector": str(self.top / "vit.json"),
            "teacher": str(self.top / "teacher.pt"),
            "out": str(out),
            "method": "focusdd",
            "ipc": 3,
            "image_size": 64,
            "near_duplicate": 0,
            "conf": 0.05,
            "min_side": 1.0,
            "batch": 8,
            "teacher_batch": 2,
            "device": "cpu",
            "workers": 2,
            "threads": 1,
        }
        return {**base, **more}

    def build(self, out: Path, resume: bool = False, **more: Any) -> Path:
        """Build in this process."""
        build(load_config(**self.options(out, **more)), resume=resume)
        return out

    def argv(self, out: Path, **more: Any) -> list[str]:
        """The same as command-line tokens."""
        options = self.options(out, **more)
        return [f"{key}={json.dumps(v) if isinstance(v, (list, bool)) else v}" for key, v in options.items()]


def write_picture(path: Path, rng: np.random.Generator) -> None:
    """A small JPEG of coloured noise with a drawn thing in it."""
    height, width = (int(v) for v in rng.integers(40, 72, 2))
    picture = rng.integers(60, 200, (height, width, 3)).astype(np.uint8)
    colour = [int(v) for v in rng.integers(0, 256, 3)]
    cv2.circle(picture, (width // 2, height // 2), int(rng.integers(8, 18)), colour, -1)
    path.write_bytes(cv2.imencode(".jpg", picture)[1].tobytes())


def write_sources(top: Path, per_class: int = PER_CLASS, seed: int = 5) -> Path:
    rng = np.random.default_rng(seed)
    for folder in FOLDERS:
        (top / folder).mkdir(parents=True)
        for i in range(per_class):
            write_picture(top / folder / f"{i:02d}.JPEG", rng)
    return top


def write_map(path: Path) -> Path:
    content = {"names": list(NAMES), "folders": dict(zip(FOLDERS, NAMES, strict=True))}
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return path


def write_selector(folder: Path, seed: int = 1) -> Path:
    """A ViT of two blocks with random weights, as a .json and its .safetensors."""
    import timm
    from safetensors.torch import save_file

    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **kwargs)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "vit.safetensors")
    spec = {"arch": "vit_tiny_patch16_224", "kwargs": kwargs, "classes": list(FOLDERS), "weights": "vit.safetensors"}
    (folder / "vit.json").write_text(json.dumps(spec))
    return folder / "vit.json"


def write_teacher(path: Path, names: Sequence[str] = NAMES, seed: int = 0, **changes: Callable[[Any], None]) -> Path:
    """A checkpoint of five convolutions and YOLO11's head with random weights.

    Args:
        changes: `head=f` is called with the Detect head, `model=f` with the whole model, before it is saved.
    """
    from ultralytics.nn.tasks import DetectionModel

    strides = [[-1, 1, "Conv", [width, 3, 2]] for width in (8, 8, 16, 16, 16)]
    content = {"nc": len(names), "backbone": strides, "head": [[[2, 3, 4], 1, "Detect", ["nc"]]]}
    spec = path.parent / "yolo11n-tiny.yaml"
    spec.write_text(yaml.safe_dump(content))
    torch.manual_seed(seed)
    model = DetectionModel(str(spec), nc=len(names), verbose=False)
    spec.unlink()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
    for layers in model.model[-1].cv3:
        layers[-1].bias.data.uniform_(-1.5, 0.5)
        layers[-1].weight.data.mul_(20)
    model.names = dict(enumerate(names))
    if "head" in changes:
        changes["head"](model.model[-1])
    if "model" in changes:
        changes["model"](model)
    torch.save({"model": model.half(), "train_args": {}, "epoch": -1}, path)
    return path


def tree(folder: Path) -> dict[str, str]:
    """Path -> hash of every file and folder of a set, build.log.json apart: what must be equal byte for byte."""
    return {
        path.relative_to(folder).as_posix(): "folder"
        if path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.name != "build.log.json"
    }


@dataclass
class Run:
    """A build in a process of its own."""

    argv: list[str]
    logs: Path
    process: Any = field(repr=False)

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def wait(self) -> int:
        """Its exit code (minus the number of the signal that killed it); a build that hangs fails the test."""
        self.process.join(LIMIT)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"the build hung: {self.argv}\n{self.err}")
        return int(self.process.exitcode)

    @property
    def out(self) -> str:
        return (self.logs / "out").read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return (self.logs / "err").read_text(encoding="utf-8", errors="replace")


def start(argv: list[str], logs: Path, fault: child.Fault | None = None) -> Run:
    """`focusdd build ARGV` in a fresh process, with a fault waiting in it."""
    logs.mkdir(parents=True, exist_ok=True)
    for name in ("out", "err"):
        (logs / name).write_bytes(b"")
    process = context.Process(target=child.main, args=(argv, str(logs), fault or child.Fault()))
    process.start()
    return Run(argv, logs, process)


def until(condition: Callable[[], object], what: str, limit: float = LIMIT) -> None:
    """Wait for something another process does."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {limit:g} s in vain for {what}")
        time.sleep(0.002)


def temporary_files(folder: Path) -> list[str]:
    """What a build that ended must not leave behind."""
    names = (path.name for path in folder.rglob("*"))
    return [name for name in names if name.endswith((".tmp", "-journal", "-wal", "-shm"))]


def flip(path: Path, position: int | None = None) -> None:
    """Change one byte on disk, the middle one if none is named; size and time stay."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    position = len(data) // 2 if position is None else position
    data[position] ^= 0x04
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
