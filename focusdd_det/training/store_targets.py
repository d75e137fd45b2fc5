"""Ask a teacher once about every augmented view that a detector will be trained on, and keep what it says.

result = store_targets(load_config(data="datasets/focusdd", teacher="yolo11x.pt", pool=20))
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from ultralytics.cfg import get_cfg
from ultralytics.utils import DEFAULT_CFG_DICT

from focusdd_det import disk, sealed
from focusdd_det.commandline import command_config, spelled, wants_help
from focusdd_det.config import as_plain, describe, load
from focusdd_det.devices import processors
from focusdd_det.errors import ConfigError, DataError, WeightsError
from focusdd_det.progress import progress_bar
from focusdd_det.teacher import Detector, load_detector
from focusdd_det.training.arguments import check_stock, device_here
from focusdd_det.training.replay import Pool, ReplayDataset
from focusdd_det.training.sparse_heads import SparseHeads, thin
from focusdd_det.training.targets import (
    KIND,
    VIEWS,
    as_stored,
    bytes_of_anchor,
    bytes_of_view,
    closed_epochs,
    pool_files,
    tensors_of,
)
from focusdd_det.training.traindata import TrainData, check_count, load_yolo_data, resolve_data

log = logging.getLogger("focusdd")

PILOT = 32  # views that the size is estimated from
SPARE = 1.15  # on the estimate, when free disk is asked for
PACKAGES = ("torch", "ultralytics", "albumentations", "opencv-python", "numpy")
MEASURED = ("pilot",)  # of the description: found out on the way

USAGE = """Store a teacher's soft targets for the augmented views of a detection set, so that training needs no teacher.

  python tools/store_targets.py data=datasets/focusdd teacher=yolo11x.pt pool=20
  python tools/store_targets.py data=datasets/focusdd teacher=yolo11x.pt pool=20 --dry-run      how large it would be
  python tools/store_targets.py data=datasets/focusdd teacher=yolo11x.pt imgsz=320 seed=1 mosaic=0.5 hsv_h=0 out=soft
  python tools/train_det.py data=datasets/focusdd targets=datasets/focusdd_targets model=yolo11n.yaml epochs=100

Every key of the list below as `key=value` or `--key value`. The same command goes on where it was stopped.
--dry-run asks the teacher about a few views, prints the size and what is kept, and writes nothing.
"""


@dataclass(frozen=True)
class TargetsConfig:
    """What is asked for; cfg/store_targets.yaml says what each key means."""

    data: str | None
    out: str | None
    teacher: str | None
    pool: int
    close_mosaic: int
    imgsz: int
    seed: int
    mosaic: float
    mixup: float
    cutmix: float
    copy_paste: float
    copy_paste_mode: Literal["flip", "mixup"]
    degrees: float
    translate: float
    scale: float
    shear: float
    perspective: float
    flipud: float
    fliplr: float
    bgr: float
    hsv_h: float
    hsv_s: float
    hsv_v: float
    augmentations: tuple[Any, ...]
    floor: float
    topk: int
    batch: int
    workers: int
    device: str | None
    overwrite: bool
    download: bool

    def __post_init__(self) -> None:
        checks = [
            (bool(self.data), "data", "the folder of a distilled set"),
            (bool(self.teacher), "teacher", "a checkpoint, e.g. yolo11x.pt"),
            (self.pool >= 1, "pool", "at least 1 epoch of views"),
            (self.close_mosaic >= 0, "close_mosaic", "at least 0"),
            (self.imgsz >= 32 and self.imgsz % 32 == 0, "imgsz", "a multiple of 32"),
            (0 <= self.floor < 1, "floor", "a probability in [0, 1); 0 keeps all anchors"),
            (self.topk >= 0, "topk", "at least 0 (0 keeps all classes)"),
            (self.batch >= 1, "batch", "at least 1"),
            (self.workers >= 0, "workers", "at least 0"),
            (_plain(self.augmentations), "augmentations", "a list of Albumentations transforms as dicts"),
        ]
        problems = [f"{key}={getattr(self, key)!r}: expected {text}" for ok, key, text in checks if not ok]
        if problems:
            raise ConfigError("the configuration is not valid:\n  " + "\n  ".join(problems))
        check_stock({key: getattr(self, key) for key in VIEWS if key in DEFAULT_CFG_DICT}, "detect")

    @property
    def views(self) -> dict[str, Any]:
        """Everything that decides the pixels, by Ultralytics' names."""
        return {**{key: getattr(self, key) for key in VIEWS}, "augmentations": as_stored(self.augmentations)}

    @property
    def pools(self) -> Pool:
        """Epochs of views that are stored."""
        return Pool(self.pool, closed_epochs(self.pool, self.close_mosaic, self.views))


@dataclass(frozen=True)
class TargetsResult:
    """What was made: the store's folder and its bytes."""

    folder: Path
    size: int


def load_config(file: Path | None = None, **overrides: Any) -> TargetsConfig:
    """A TargetsConfig from cfg/store_targets.yaml, a file of your own and overrides, the later one winning."""
    return load(TargetsConfig, "store_targets.yaml", overrides, file, "the configuration of the soft targets")


def store_command(argv: Sequence[str]) -> int:
    """`focusdd detect targets`, tools/store_targets.py."""
    if wants_help(argv):
        print(USAGE + "\n" + describe("store_targets.yaml"))
        return 0
    config, flags = command_config(TargetsConfig, "store_targets.yaml", argv)
    if flags["dry_run"]:
        job = _Job(config)
        print(job.estimate(job.pilot()))
        return 0
    result = store_targets(config)
    print(f"{result.folder}: {config.pools.mixed} + {config.pools.closed} epochs of views, {result.size / 1e6:.1f} MB")
    print(f"next: {training(config, result.folder)}")
    return 0


def training(config: TargetsConfig, folder: Path) -> str:
    """The command that trains on a store."""
    usual = load(TargetsConfig, "store_targets.yaml", {"data": "-", "teacher": "-"})
    names = [name for name in (*VIEWS, "close_mosaic") if getattr(config, name) != getattr(usual, name)]
    given = [f"{name}={as_plain(config)[name]}" for name in names]
    words = ["model=yolo11n.yaml", f"data={config.data}", f"targets={folder}", "epochs=100"]
    return spelled("detect train", *words, *given)


def store_targets(config: TargetsConfig) -> TargetsResult:
    """Make the store. One that was stopped goes on where it was when the same config is given again.

    Raises:
        ConfigError: a teacher with two heads, another store at `out`.
        DataError, VerifyError: a set that cannot be used, or a store at `out` that is damaged.
        WeightsError: a teacher that cannot be used; see `load_detector`.
        DiskError: too little space, no permission, a folder that is not ours, or that another process writes.
    """
    started = time.monotonic()
    job = _Job(config)
    out = job.out()
    description = job.description()
    if sealed.is_there(out, description, MEASURED, config.overwrite, KIND):
        sealed.check_whole(out, KIND)
        log.info("%s is this store, complete and intact", out)
        return TargetsResult(out, _size(out))
    with sealed.working(out) as work:
        old = sealed.begun(work, description, MEASURED, config.overwrite, KIND)
        description["pilot"] = old["pilot"] if old else job.pilot()
        log.info("%s", job.estimate(description["pilot"]))
        writer = sealed.Writer(work, pool_files(config.pools), KIND)
        missing = writer.missing()
        need = int(len(missing) * job.bytes_of_epoch(description["pilot"]) * SPARE) + 1_000_000
        sealed.require_space(work, need, "choose another `out`, a smaller `pool` or a higher `floor`")
        if old:
            log.info("going on in %s: %d of %d epochs are there", work, len(writer.done), len(writer.names))
        writer.begin(description)
        with progress_bar(len(missing) * len(job.dataset), "soft targets") as bar:
            for name in writer.names:  # mixed ones first: closing mosaic cannot be undone
                if name in missing:
                    kind, number = name.removesuffix(".safetensors").split("_")
                    writer.add(name, job.epoch(kind == "closed", int(number), bar.update))
        writer.finish(_log(config, job.device, time.monotonic() - started))
    sealed.publish(work, out, config.overwrite, KIND)
    return TargetsResult(out, _size(out))


# ---- the work


class _Job:
    """The set's views in order, and the teacher that is asked about them.

    A batch holds views of one epoch in the order of the pictures, the last one padded with grey, so that a view's
    neighbours are the same whatever was done before.
    """

    def __init__(self, config: TargetsConfig) -> None:
        self.config = config
        self.source: TrainData = resolve_data(config.data)
        if self.source.folder is None:
            raise DataError(f"data={config.data} is not a distilled set, which is told from another by its manifest")
        data = load_yolo_data(self.source.yaml, "train")
        self.names = [str(data["names"][i]) for i in range(len(data["names"]))]
        for target in (self.out(), self.out().with_name(self.out().name + disk.INCOMPLETE)):
            disk.refuse_overlap(target, [self.source.folder])
        self.device = device_here(config.device)
        self.teacher: Detector = load_detector(str(config.teacher), self.device, self.names, config.download)
        if self.teacher.end2end or self.teacher.reg_max == 1:
            raise ConfigError(
                f"{config.teacher} has two heads or no box bins; soft targets are stored of teachers with one head and "
                "bins, as YOLO11 and YOLOv8 have. Ask this one in the training, with teacher="
            )
        self.hyp = get_cfg(overrides={key: value for key, value in config.views.items() if key in DEFAULT_CFG_DICT})
        self.hyp.augmentations = list(config.augmentations)
        self.dataset = ReplayDataset(
            img_path=data["train"], imgsz=config.imgsz, batch_size=config.batch, augment=True, hyp=self.hyp, data=data,
            task="detect", seed=config.seed, pool=config.pools,
        )  # fmt: skip
        check_count(self.dataset, self.source)

    def out(self) -> Path:
        """Where the store goes."""
        folder = Path(self.source.folder or ".").resolve()
        out = Path(self.config.out) if self.config.out else folder.with_name(folder.name + "_targets")
        out = out.resolve() if out.is_symlink() or out.name in ("", "..") else out
        if not out.name:
            raise ConfigError(f"out={self.config.out!r}: expected the path of a new folder")
        return out

    @property
    def topk(self) -> int:
        return min(self.config.topk or len(self.names), len(self.names))

    def description(self) -> dict[str, Any]:
        """Everything that decides the bytes."""
        return {
            "format": KIND.format,
            "set": {"sha256": self.source.manifest_sha256, "names": self.names, "n": len(self.dataset)},
            "teacher": {
                "name": self.teacher.path.name,
                "sha256": self.teacher.sha256,
                "reg_max": self.teacher.reg_max,
                "strides": self.teacher.strides,
                "batch": self.config.batch,
            },
            "views": self.config.views,
            "pool": self.config.pools._asdict(),
            "floor": self.config.floor,
            "topk": self.topk,
            "versions": {name: version(name) for name in PACKAGES},
        }

    def pilot(self) -> dict[str, Any]:
        """What is kept of the first views: anchors a view, and their share of the sum of f."""
        heads = [head for head, _ in self._asked(0, min(PILOT, len(self.dataset)), workers=0)]
        views = sum(len(head.total) for head in heads)
        anchors = sum(len(head.anchor) for head in heads)
        kept = sum(float(head.values[:, 0].float().sigmoid().sum()) for head in heads)
        total = sum(float(head.total.sum()) for head in heads)
        return {"views": views, "anchors": round(anchors / views, 1), "share": round(kept / max(total, 1e-9), 4)}

    def bytes_of_epoch(self, pilot: dict[str, Any]) -> float:
        """Size of an epoch's file, by the pilot."""
        anchors = pilot["anchors"] * bytes_of_anchor(self.topk, self.teacher.reg_max)
        return float(len(self.dataset) * (anchors + bytes_of_view(len(self.names))) + 1000)

    def estimate(self, pilot: dict[str, Any]) -> str:
        """What will be made, and how large it is."""
        pool, pictures = self.config.pools, len(self.dataset)
        epoch = self.bytes_of_epoch(pilot)
        return (
            f"{pictures} pictures x ({pool.mixed} + {pool.closed} epochs, the latter without mosaic) = "
            f"{pictures * sum(pool)} views of {self.config.imgsz} px: about {epoch * sum(pool) / 1e6:.1f} MB at "
            f"{self.out()}\nfloor {self.config.floor:g} keeps {pilot['anchors']:g} anchors a view, with "
            f"{100 * pilot['share']:.1f} % of the sum of f ({pilot['views']} views measured); "
            f"{self.topk} of {len(self.names)} classes each"
        )

    def epoch(self, closed: bool, epoch: int, progress: Any) -> dict[str, NDArray[Any]]:
        """The tensors of an epoch's file.

        Raises:
            WeightsError: outputs that are not finite in float16.
        """
        if closed and not self.dataset.closed:
            self.dataset.close_mosaic(copy(self.hyp))
        heads: list[SparseHeads] = []
        looks: list[Tensor] = []
        for head, seen in self._asked(epoch, len(self.dataset), self.config.workers):
            heads.append(head)
            looks.extend(seen)
            progress(len(seen))
        tensors = tensors_of(heads, looks)
        if not all(np.isfinite(tensors[key]).all() for key in ("values", "boxes", "rest", "background", "total")):
            raise WeightsError(
                f"the teacher {self.teacher.path} gives outputs that are not finite, or beyond float16 (65504): its "
                "weights are damaged, or it does not fit these pictures"
            )
        return tensors

    def _asked(self, epoch: int, count: int, workers: int) -> Iterator[tuple[SparseHeads, Sequence[Tensor]]]:
        """The teacher's thinned head on each batch of the first views of an epoch, and the views' looks."""
        size = self.config.batch
        batches = [[(epoch, i) for i in range(at, min(at + size, count))] for at in range(0, count, size)]
        loader: Any = DataLoader(
            self.dataset,  # type: ignore[arg-type]
            batch_sampler=batches,
            num_workers=min(workers, processors(), len(batches)) if len(batches) > 1 else 0,
            collate_fn=self.dataset.collate_fn,
        )
        for batch in loader:
            images = batch["img"]
            padded = torch.full((size, *images.shape[1:]), 114, dtype=torch.uint8)
            padded[: len(images)] = images
            dense = self.teacher.heads(padded.to(self.device).float() / 255)
            thinned = thin({k: v[: len(images)] for k, v in dense.items()}, self.config.floor, self.topk)
            yield thinned.half().to("cpu"), batch["look"]


def _plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _log(config: TargetsConfig, device: torch.device, seconds: float) -> dict[str, Any]:
    return {
        "command": sys.argv,
        "settings": as_plain(config),
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "device": str(device)},
        "torch_threads": torch.get_num_threads(),
        "seconds": round(seconds, 2),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
