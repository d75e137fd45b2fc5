"""Relabelling: draw every view of every epoch, ask the teacher once, keep what it says (as FKD does).

result = relabel(load_config(data="datasets/focusdd_cls", teacher="resnet18", teacher_weights="resnet18.pth",
                             eval_data="imagenet/val"))

A store is known by what its labels follow from (`_description`); the same config finds it, or goes on with it. Of a set
of ours that is every byte of its pictures, of plain class folders only the files' names and sizes: a picture that was
replaced by another one of as many bytes is not noticed.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from focusdd_det import disk, sealed
from focusdd_det.ahead import ahead
from focusdd_det.classify import store as logit_store
from focusdd_det.classify.accuracy import Accuracy, accuracy
from focusdd_det.classify.classset import ClassSet, read_class_set
from focusdd_det.classify.store import KIND, LogitStore, epoch_name
from focusdd_det.classify.teacher import ClassTeacher, load_classifier
from focusdd_det.classify.views import Row, ViewDataset, ViewSettings
from focusdd_det.commandline import command_config, spelled, wants_help
from focusdd_det.config import as_plain, describe, load
from focusdd_det.devices import device_of, processors
from focusdd_det.errors import ConfigError, VerifyError, WeightsError
from focusdd_det.progress import progress_bar
from focusdd_det.types import Image

log = logging.getLogger("focusdd")

LEAST_MASS = 0.90  # of softmax(t/T) that the top k must hold
PILOT = 256  # views, spread over epochs and pictures, that the mass is measured on before anything is labelled
NEAR_CHANCE = 0.1  # of the way from guessing to all right
MEASURED = ("accuracy", "mass")  # of store.json: known once the teacher was asked
PACKAGES = ("torch", "torchvision", "timm", "albumentations", "opencv-python", "pillow", "numpy")
NOT_MEASURED = "none"
TRAINED_AT = 224  # imgsz of cfg/train_cls.yaml

USAGE = """Store a teacher's logits for every view that a classifier will be trained on.

  python tools/relabel_cls.py data=datasets/focusdd_cls teacher=resnet18 teacher_weights=r18.pth eval_data=imagenet/val
  python tools/relabel_cls.py data=datasets/focusdd_cls teacher=my_teacher.json eval_data=my_val out=labels epochs=50
  python tools/relabel_cls.py data=datasets/focusdd_cls teacher=my_teacher.json eval_data=none --dry-run    its size

Every key of the list below as `key=value` or `--key value`. The same command goes on where it was stopped.
--dry-run, --help.
"""


@dataclass(frozen=True)
class RelabelConfig:
    """What the relabelling is asked for; cfg/relabel_cls.yaml says what each key means."""

    data: str | None
    out: str | None
    teacher: str | None
    teacher_weights: str | None
    eval_data: str | None
    epochs: int
    size: int
    scale: tuple[float, ...]
    flip: float
    cutmix: float
    seed: int
    temperature: float
    topk: int
    batch: int
    workers: int
    device: str
    precision: Literal["fp32", "bf16", "fp16"]
    overwrite: bool
    download: bool

    def __post_init__(self) -> None:
        checks = [
            (bool(self.data), "data", "a classification set or class folders"),
            (bool(self.teacher), "teacher", "a torchvision or timm name, a .json, or a *-cls.pt"),
            (bool(self.eval_data), "eval_data", f"class folders to measure the teacher on, or {NOT_MEASURED}"),
            (self.epochs >= 1, "epochs", "at least 1"),
            (len(self.scale) == 2, "scale", "two numbers, as scale=[0.08,1.0]"),
            (self.temperature > 0, "temperature", "above 0"),
            (self.topk >= 0, "topk", "at least 0 (0 keeps all logits)"),
            (self.batch >= 1, "batch", "at least 1"),
            (self.workers >= 0, "workers", "at least 0 (0 chooses)"),
        ]
        problems = [f"{key}={getattr(self, key)!r}: expected {text}" for ok, key, text in checks if not ok]
        if problems:
            raise ConfigError("the configuration is not valid:\n  " + "\n  ".join(problems))

    @property
    def views(self) -> ViewSettings:
        """How the views are drawn."""
        first, last = self.scale
        return ViewSettings(self.size, (first, last), flip=self.flip, cutmix=self.cutmix, seed=self.seed)


@dataclass(frozen=True)
class RelabelResult:
    """What was made: the store's folder, its bytes, and the teacher's accuracy (None: not measured)."""

    folder: Path
    size: int
    accuracy: dict[str, Any] | None


def load_config(file: Path | None = None, **overrides: Any) -> RelabelConfig:
    """A RelabelConfig from cfg/relabel_cls.yaml, a file of your own and overrides, the later one winning."""
    return load(RelabelConfig, "relabel_cls.yaml", overrides, file, "the relabelling's configuration")


def relabel_command(argv: Sequence[str]) -> int:
    """`focusdd classify relabel`, tools/relabel_cls.py."""
    if wants_help(argv):
        print(USAGE + "\n" + describe("relabel_cls.yaml"))
        return 0
    config, flags = command_config(RelabelConfig, "relabel_cls.yaml", argv)
    if flags["dry_run"]:
        print(estimate(config, read_class_set(str(config.data), "train")))
        return 0
    result = relabel(config)
    print(f"{result.folder}: {config.epochs} epochs of views, {result.size / 1e6:.1f} MB")
    words = [f"data={config.data}", f"store={result.folder}", f"eval_data={config.eval_data}"]
    if config.size != TRAINED_AT:
        words.append(f"imgsz={config.size}")
    if config.topk:  # the rest was summed at it
        words.append(f"temperature={config.temperature}")
    print(f"next: {spelled('classify train', *words)}")
    return 0


def estimate(config: RelabelConfig, class_set: ClassSet) -> str:
    """What would be made, and how large it is."""
    pictures, classes = len(class_set), len(class_set.names)
    kept = f"the top {config.topk} of {classes}" if config.topk else f"all {classes}"
    size = config.epochs * logit_store.bytes_of_epoch(pictures, classes, config.topk)
    return (
        f"{pictures} pictures x {config.epochs} epochs = {pictures * config.epochs} views of {config.size} px, {kept} "
        f"logits each: {size / 1e6:.1f} MB at {_out(config, class_set)}"
    )


def relabel(config: RelabelConfig) -> RelabelResult:
    """Store the logits. One that was stopped goes on where it was when the same config is given again.

    Raises:
        ConfigError: a `topk` that keeps too little, another store at `out`.
        DataError, VerifyError: pictures that cannot be used; a set, or a store at `out`, that is damaged.
        WeightsError: a teacher that cannot be used; see `load_classifier`.
        DiskError: too little space, no permission, a folder that is not ours, or that another process writes.
    """
    started = time.monotonic()
    class_set = read_class_set(str(config.data), "train")
    log.info("%s", estimate(config, class_set))
    if config.topk > len(class_set.names):
        raise ConfigError(f"topk={config.topk}: there are only {len(class_set.names)} classes; topk=0 keeps all")
    out = _out(config, class_set)
    work = out.with_name(out.name + disk.INCOMPLETE)
    eval_set = None
    if config.eval_data != NOT_MEASURED:
        eval_set = read_class_set(str(config.eval_data), "val", class_set.names)
    for target in (out, work):
        disk.refuse_overlap(target, [class_set.folder, *([eval_set.folder] if eval_set else [])])
    device = device_of(config.device)
    teacher = load_classifier(
        str(config.teacher), config.teacher_weights, class_set.names, config.size, device, config.precision,
        config.download,
    )  # fmt: skip
    description = _description(config, class_set, eval_set, teacher, device)
    if sealed.is_there(out, description, MEASURED, config.overwrite, KIND):
        store = LogitStore(out)
        for epoch in range(store.pool):
            store.view(epoch, 0)
        log.info("%s is this store, complete and intact", out)
        return _result(out, store.accuracy)
    with sealed.working(out):
        old = sealed.begun(work, description, MEASURED, config.overwrite, KIND)
        writer = sealed.Writer(work, [epoch_name(epoch) for epoch in range(config.epochs)], KIND)
        missing = [epoch for epoch, name in enumerate(writer.names) if name not in writer.done]
        per_epoch = logit_store.bytes_of_epoch(len(class_set), len(class_set.names), config.topk)
        need = int(len(missing) * (per_epoch + 1000) * 1.02) + 100_000
        sealed.require_space(work, need, "choose another `out`, fewer `epochs` or a `topk`")
        if old:
            log.info("going on in %s: %d of %d epochs are there", work, config.epochs - len(missing), config.epochs)
            description |= {key: old[key] for key in MEASURED}
        if missing:
            job = _Job(config, class_set, teacher, device)
            if not old:
                description |= {"accuracy": _measure(job, eval_set), "mass": job.mass()}
            writer.begin(description)
            with progress_bar(len(missing) * len(class_set), "labelling views") as bar:
                for epoch, tensors in job.label(missing, bar.update):
                    writer.add(epoch_name(epoch), tensors)
        else:
            writer.begin(description)
        writer.finish(_log(config, device, time.monotonic() - started))
    sealed.publish(work, out, config.overwrite, KIND)
    return _result(out, description["accuracy"])


# --- before the work


def _out(config: RelabelConfig, class_set: ClassSet) -> Path:
    folder = class_set.folder.resolve()
    out = Path(config.out) if config.out else folder.with_name(folder.name + "_labels")
    if out.is_symlink() or out.name in ("", ".."):
        out = out.resolve()
    if not out.name:
        raise ConfigError(f"out={config.out!r}: expected the path of a new folder")
    return out


def _description(
    config: RelabelConfig, class_set: ClassSet, eval_set: ClassSet | None, teacher: ClassTeacher, device: str
) -> dict[str, Any]:
    """What the labels follow from; `accuracy` and `mass` are added once they are measured.

    Views follow from it to the last bit. So do logits on the same machine; another number of torch's threads, or
    another model of processor or GPU, may change their last digits. The log says what it was.
    """
    views = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config.views).items()}
    return {
        "format": KIND.format,
        "set": {"sha256": class_set.sha256, "names": list(class_set.names), "n": len(class_set)},
        "teacher": {
            "name": Path(teacher.name).name,
            "sha256": teacher.sha256,
            "spec": teacher.spec,
            "classes": list(teacher.classes),
            "batch": config.batch,
            "precision": config.precision,
            "device": torch.device(device).type,
        },
        "measured_on": eval_set.sha256 if eval_set else None,
        "views": views,
        "temperature": config.temperature,
        "topk": config.topk,
        "pool": config.epochs,
        "dtype": "float16",
        "versions": {name: version(name) for name in PACKAGES},
    }


def _measure(job: _Job, eval_set: ClassSet | None) -> dict[str, Any] | None:
    if eval_set is None:
        log.info("the teacher's accuracy is not measured (eval_data=none)")
        return None
    with progress_bar(len(eval_set), "measuring the teacher") as bar:
        found: Accuracy = accuracy(
            job.teacher, eval_set, job.config.size, job.config.batch, job.device, job.workers, bar.update
        )
    log.info("the teacher's top-1 is %.2f %%, top-5 %.2f %%, on %d pictures", found.top1, found.top5, found.n)
    chance = 100.0 / len(eval_set.names)
    if found.top1 < chance + NEAR_CHANCE * (100.0 - chance):
        log.warning("that is near chance: are these its weights, and are the folders named as its classes?")
    return {"top1": round(found.top1, 4), "top5": round(found.top5, 4), "n": found.n}


# --- the work


class _Job:
    """Batches of views for the teacher.

    Batch b is always the views b * B ... b * B + B - 1 of the flat sequence (epoch 0 whole, epoch 1 whole, ...), the
    last one padded, so that a view has the same neighbours whatever was done before.
    """

    def __init__(self, config: RelabelConfig, class_set: ClassSet, teacher: ClassTeacher, device: str) -> None:
        self.config, self.class_set, self.teacher, self.device = config, class_set, teacher, device
        self.workers = config.workers or processors()
        self.views = ViewDataset(class_set, config.views)
        self.total = config.epochs * len(class_set)
        shape = (config.batch, config.size, config.size, 3)
        self._pixels = torch.zeros(shape, dtype=torch.uint8, pin_memory=device.startswith("cuda"))

    def mass(self) -> dict[str, float] | None:
        """The share of softmax(t/T) in the top k, `mean` and `least`, of views from all classes and epochs; None
        without `topk`.

        Raises:
            ConfigError: below 90 % on average; it names a k that would do.
        """
        topk, temperature, batch = self.config.topk, self.config.temperature, self.config.batch
        if not topk:
            return None
        places = _pilot(self.config.epochs, len(self.class_set))
        chunks = [places[first : first + batch] for first in range(0, len(places), batch)]
        logits = torch.cat([logits for _, logits in self._ask(chunks)])
        shares = logit_store.shares_by_k(logits, temperature)
        means = shares.mean(axis=0)
        mean, least = round(float(means[topk - 1]), 4), round(float(shares[:, topk - 1].min()), 4)
        if mean < LEAST_MASS:
            enough = int(np.searchsorted(means, LEAST_MASS) + 1)
            raise ConfigError(
                f"topk={topk}: at temperature {temperature:g} the top {topk} of {logits.shape[1]} classes hold only "
                f"{100 * mean:.1f} % of the teacher's softmax ({100 * least:.1f} % in the flattest of {len(places)} "
                f"views), and at least {100 * LEAST_MASS:.0f} % must be kept; "
                f"topk={min(enough, logits.shape[1])} would do, or topk=0 keeps all"
            )
        log.info("the top %d hold %.1f %% of the softmax, at least %.1f %%", topk, 100 * mean, 100 * least)
        return {"mean": mean, "least": least}

    def label(
        self, epochs: Sequence[int], progress: Callable[[int], object]
    ) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """The tensors of each of these epochs, in order; no more than two epochs are in memory.

        Raises:
            WeightsError: logits that are not finite in float16.
        """
        n, batch = len(self.class_set), self.config.batch
        wanted = set(epochs)
        needed = sorted({b for e in wanted for b in range(e * n // batch, ((e + 1) * n - 1) // batch + 1)})
        parts: dict[str, NDArray[Any]] = {}
        batches = [range(b * batch, min((b + 1) * batch, self.total)) for b in needed]
        for numbers, (rows, logits) in zip(batches, self._ask(batches), strict=True):
            first, tensors = numbers[0], self._tensors(rows, logits)
            at = 0
            while at < len(rows):
                epoch, place = divmod(first + at, n)
                count = min(n - place, len(rows) - at)
                if epoch in wanted:
                    if not parts:
                        parts = {k: np.empty((n, *v.shape[1:]), v.dtype) for k, v in tensors.items()}
                    for key, value in tensors.items():
                        parts[key][place : place + count] = value[at : at + count]
                    progress(count)
                    if place + count == n:
                        yield epoch, parts
                        parts = {}
                at += count

    def _tensors(self, rows: Sequence[Row], logits: Tensor) -> dict[str, NDArray[Any]]:
        half = logits.half()
        if not bool(torch.isfinite(half).all()):
            raise WeightsError(
                f"the teacher {self.teacher.name} gives logits that are not finite, or beyond float16 (65504): its "
                "weights are damaged, or it does not fit these pictures"
            )
        views = np.stack(rows)
        if not self.config.topk:
            return {"views": views, "logits": half.numpy()}
        values, indices, rest = logit_store.top_k(logits, self.config.topk, self.config.temperature)
        return {"views": views, "values": values.numpy(), "indices": indices.numpy(), "rest": rest.numpy()}

    def _ask(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[list[Row], Tensor]]:
        """For each batch of positions in the flat sequence the rows, and the teacher's logits [len(rows), C] float32 on
        the CPU."""

        def look(position: int) -> tuple[Row, Image]:
            epoch, index = divmod(position, len(self.class_set))
            return self.views.drawn(epoch, index)

        flat = (position for batch in batches for position in batch)
        stream = ahead(flat, look, self.workers, 2 * self.config.batch + 4 * self.workers)
        for batch in batches:
            rows: list[Row] = []
            pixels = self._pixels.numpy()
            for slot in range(len(batch)):
                row, pixels[slot] = next(stream)
                rows.append(row)
            pixels[len(rows) :] = 0
            x = self._pixels.to(self.device, non_blocking=True).permute(0, 3, 1, 2).contiguous().float().div_(255)
            yield rows, self.teacher(x)[: len(rows)].cpu()


def _pilot(epochs: int, pictures: int) -> list[int]:
    """Positions in the flat sequence, spread over all pictures and, whatever the numbers, over all epochs."""
    if epochs * pictures <= PILOT:
        return list(range(epochs * pictures))
    golden = (5**0.5 - 1) / 2
    return [int(i * golden % 1 * epochs) * pictures + i * pictures // PILOT for i in range(PILOT)]


# --- after the work


def _log(config: RelabelConfig, device: str, seconds: float) -> dict[str, Any]:
    return {
        "command": sys.argv,
        "settings": as_plain(config),
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "device": device},
        "torch_threads": torch.get_num_threads(),
        "seconds": round(seconds, 2),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _result(out: Path, accuracy: dict[str, Any] | None) -> RelabelResult:
    try:
        size = sum(path.stat().st_size for path in out.iterdir())
    except OSError as error:
        raise VerifyError(f"cannot read {out}: {error.strerror}") from error
    return RelabelResult(out, size, accuracy)
