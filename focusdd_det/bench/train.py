"""A training step by step: the student alone, its teacher alone, live, from stored targets, and Ultralytics' own
distillation; then epoch by epoch, loading included. Real trainers on drawn sets: a step is what their loop does with a
batch that is there, an epoch is all of the loop."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.engine import trainer as engine
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

from focusdd_det import detset
from focusdd_det.bench.epoch import WARMUP, Epoch, EpochTrainer, Extent, forget
from focusdd_det.bench.options import BenchOptions
from focusdd_det.bench.timing import Ratio, compare, ratio, together
from focusdd_det.checkpoints import resolve_weights, safe_checkpoint, safe_ultralytics
from focusdd_det.compose import encode_jpeg
from focusdd_det.demo.scenes import plan_many, render
from focusdd_det.demo.write import QUALITY, yolo_labels
from focusdd_det.errors import ConfigError, WeightsError
from focusdd_det.losses import ONE2MANY
from focusdd_det.progress import progress_bar
from focusdd_det.teacher import load_detector
from focusdd_det.trainer import FocusDDTrainer, add_stored_heads
from focusdd_det.training.precision import local_amp_check
from focusdd_det.training.store_targets import load_config, store_targets

FRESH = "yolo11n.yaml"  # the teacher where none is named
BATCHES = 2  # different ones, taken in turns
FLOOR, ABOVE = 0.01, 0.05  # fresh teachers are biased so that about this share of anchors is above the floor
LIVE_TARGET, STORED_TARGET = 1.05, 1.10  # DESIGN section 6
COMPOSITES, EPOCHS = 63 * 50, 100  # ImageNet-1K has pictures for 63 COCO classes; IPC 50, as the paper
STILL = 1e-6  # learning rate: the weights stay where they are, so that every round has the same work

PLAIN, TEACHER, LIVE, STORED, READ, DISTILL = "plain", "teacher", "live", "stored", "read", "distill"
MEANING = {
    PLAIN: "the student on the set's boxes",
    TEACHER: "the teacher's forward alone",
    LIVE: "boxes and KL, the teacher asked in the step",
    STORED: "boxes and KL, from stored soft targets; on a CPU, where training loads for itself, reading them is in it",
    READ: "stored soft targets of a batch alone, which on a GPU the loading processes read",
    DISTILL: "Ultralytics' distill_model, its own trainer",
}
OF_EPOCHS = (
    "an epoch: Ultralytics' own loop with the training's own loader, from reading the pictures to the optimizer's "
    "step, one for every batch; no validation, no checkpoint",
    f"{TEACHER}: the teacher's forward alone, over as many pictures",
)


def measure(options: BenchOptions, work: Path) -> dict[str, Any]:
    """Seconds of every case in every round, the ratios that have a target, and on a GPU the memory.

    Args:
        options: model, teacher, imgsz, batch, precision, device, rounds; of the epochs also quick and workers.
        work: an empty folder for the drawn sets, the stores and the runs; the caller deletes it.

    Returns:
        Plain values for bench.json; `table` prints them.

    Raises:
        ConfigError, WeightsError: a model, a teacher or a device that cannot be used.
    """
    with quiet():
        teacher = teacher_file(options, work)
        names = _names(teacher)
        steps = _measure_steps(options, work, names, teacher)
        epochs = _measure_epochs(options, work / "epochs", names, teacher)
    return {
        "model": Path(options.model).name,
        "teacher": Path(options.teacher or FRESH).name,
        "imgsz": options.imgsz,
        "batch": options.batch,
        **steps,
        "epochs": epochs,
    }


def _measure_steps(options: BenchOptions, work: Path, names: list[str], teacher: Path) -> dict[str, Any]:
    data = draw_set(work / "set", names, BATCHES * options.batch, options.imgsz)
    bench = _Bench(options, work, data, teacher)
    cases = bench.cases()
    with progress_bar((options.rounds + 1) * len(cases), "training steps") as bar:
        seconds = compare(cases, options.rounds, warmup=1, clock=options.seconds, tick=lambda _name: bar.update(1))
    memory = bench.memory(cases) if options.on_gpu else {}
    bench.close()
    return {"seconds": seconds, "ratios": _plain(ratios(seconds)), "peak_gpu_bytes": memory, "notes": bench.notes}


def _measure_epochs(options: BenchOptions, work: Path, names: list[str], teacher: Path) -> dict[str, Any]:
    extent = Extent.of(options)
    pictures = extent.batches * options.batch
    bench = _Bench(options, work, draw_set(work / "set", names, pictures, options.imgsz), teacher)
    cases = bench.epochs(extent)
    with progress_bar((extent.rounds + WARMUP) * len(cases), "training epochs", "epoch") as bar:
        seconds = compare(cases, extent.rounds, WARMUP, clock=options.seconds, tick=lambda _name: bar.update(1))
    bench.close()
    bench.notes += bench.behind()
    return {
        "pictures": pictures,
        "batches": extent.batches,
        "workers": bench.loading,
        "rounds": extent.rounds,
        "bytes_of_a_stored_epoch": bench.bytes_of_epoch,
        "seconds": seconds,
        "ms_a_picture": {name: float(np.median(times)) * 1e3 / pictures for name, times in seconds.items()},
        "ratios": _plain(epoch_ratios(seconds)),
        "notes": bench.notes,
    }


def ratios(seconds: Mapping[str, list[float]]) -> dict[str, Ratio]:
    """Those with a target, and what each precision gives; names as `fp32: live / (plain + teacher)`."""
    found = {}
    precisions = list(dict.fromkeys(name.partition(" ")[0] for name in seconds))
    for kind in precisions:
        of = {name.partition(" ")[2]: times for name, times in seconds.items() if name.partition(" ")[0] == kind}
        found[f"{kind}: live / (plain + teacher)"] = ratio(of[LIVE], together(of[PLAIN], of[TEACHER]))
        for other in (STORED, DISTILL, LIVE):
            if other in of:
                found[f"{kind}: {other} / plain"] = ratio(of[other], of[PLAIN])
        if DISTILL in of:
            found[f"{kind}: live / distill"] = ratio(of[LIVE], of[DISTILL])
    first = precisions[0]
    for kind in precisions[1:]:
        for case in (PLAIN, LIVE):
            found[f"{case}: {kind} / {first}"] = ratio(seconds[f"{kind} {case}"], seconds[f"{first} {case}"])
    return found


def epoch_ratios(seconds: Mapping[str, list[float]]) -> dict[str, Ratio]:
    """Those of `ratios`, of whole epochs, and what a store saves; names as `epoch, fp32: live / stored`."""
    found = ratios(seconds)
    for kind in [name.removesuffix(f" {STORED}") for name in seconds if name.endswith(f" {STORED}")]:
        found[f"{kind}: live / stored"] = ratio(seconds[f"{kind} {LIVE}"], seconds[f"{kind} {STORED}"])
    return {f"epoch, {name}": value for name, value in found.items()}


def _plain(found: Mapping[str, Ratio]) -> dict[str, dict[str, float]]:
    return {name: value._asdict() for name, value in found.items()}


def table(result: Mapping[str, Any]) -> str:
    """The result for people, in Markdown."""
    batch = result["batch"]
    lines = [
        f"Training step: {result['model']}, teacher {result['teacher']}, {result['imgsz']} px, batch {batch}",
        "",
        "| case | ms a step, median (10 % to 90 % of the rounds) | pictures a second | "
        f"hours for {COMPOSITES} composites x {EPOCHS} epochs |"
        + (" peak GPU GB |" if result["peak_gpu_bytes"] else ""),
        "|---|---|---|---|" + ("---|" if result["peak_gpu_bytes"] else ""),
    ]
    for name, times in result["seconds"].items():
        middle, low, high = np.quantile(times, (0.5, 0.1, 0.9))
        hours = math.ceil(COMPOSITES / batch) * EPOCHS * middle / 3600
        spread = f"{middle * 1e3:.0f} ({low * 1e3:.0f} to {high * 1e3:.0f})"
        row = f"| {name} | {spread} | {batch / middle:.1f} | {hours:.2f} |"
        if result["peak_gpu_bytes"]:
            row += f" {result['peak_gpu_bytes'][name] / 1e9:.2f} |"
        lines.append(row)
    lines += _ratio_table(result["ratios"])
    lines += ["", *(f"{name}: {meaning}" for name, meaning in MEANING.items()), *result["notes"]]
    return "\n".join([*lines, "", *_epoch_table(result["epochs"], batch)])


def _epoch_table(result: Mapping[str, Any], batch: int) -> list[str]:
    pictures, workers = result["pictures"], result["workers"]
    loaded = f"by {workers} processes" if workers else "by the training itself, workers=0"
    lines = [
        f"Training epoch: {pictures} pictures in {result['batches']} batches of {batch}, loaded {loaded}; "
        f"{result['rounds']} rounds of an epoch each",
        "",
        "| case | ms a picture, median (10 % to 90 % of the rounds) | pictures a second | "
        f"hours for {COMPOSITES} composites x {EPOCHS} epochs |",
        "|---|---|---|---|",
    ]
    for name, times in result["seconds"].items():
        middle, low, high = (float(q) / pictures for q in np.quantile(times, (0.5, 0.1, 0.9)))
        spread = f"{middle * 1e3:.1f} ({low * 1e3:.1f} to {high * 1e3:.1f})"
        lines.append(f"| {name} | {spread} | {1 / middle:.1f} | {COMPOSITES * EPOCHS * middle / 3600:.2f} |")
    lines += [*_ratio_table(result["ratios"]), "", *OF_EPOCHS]
    if size := result["bytes_of_a_stored_epoch"]:
        lines.append(
            f"{STORED}: each epoch uses its file ({size / pictures / 1e3:.1f} kB a picture) for the first time, hash "
            "included, and the system was asked to hold none of it in memory"
        )
    return [*lines, *result["notes"]]


def _ratio_table(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = ["", "| ratio, paired by round | median | 10 % to 90 % | target |", "|---|---|---|---|"]
    for name, value in found.items():
        target = ""
        if "(plain + teacher)" in name:
            target = f"<= {LIVE_TARGET:.2f}"
        elif name.endswith("stored / plain"):
            target = f"<= {STORED_TARGET:.2f}"
        lines.append(f"| {name} | {value['median']:.3f} | {value['low']:.3f} to {value['high']:.3f} | {target} |")
    return lines


# ---- what is timed ----


@dataclass(frozen=True)
class _Kind:
    """A precision: its name and the training's keys for it."""

    name: str
    keys: Mapping[str, Any]


def _kind(name: str, on_gpu: bool) -> _Kind:
    precision, _, layout = name.partition("+")
    if on_gpu:
        return _Kind(name, {"amp": {"fp32": False, "fp16": True, "bf16": "bf16"}[precision]})
    return _Kind(name, {"precision": precision, "channels_last": bool(layout)})


class _Bench:
    """The trainers, set up and ready for a step or for an epoch."""

    def __init__(self, options: BenchOptions, work: Path, data: Path, teacher: Path) -> None:
        self.options, self.work, self.data, self.teacher = options, work, data, teacher
        self.notes: list[str] = []
        self.loading, self.bytes_of_epoch = 0, 0  # processes that load; bytes of an epoch's file of the store
        self._epochs: dict[str, Epoch] = {}
        self._built: dict[str, int] = {}  # bytes on the GPU that setting a case up took
        self._trainers: list[Any] = []

    def _make_store(self, pool: int = 1, workers: int = 0) -> Path | None:
        options = self.options
        out = self.work / "targets"
        try:
            store_targets(
                load_config(
                    data=str(self.data), out=str(out), teacher=str(self.teacher), pool=pool, close_mosaic=0,
                    floor=FLOOR, imgsz=options.imgsz, batch=options.batch, workers=workers, device=options.device,
                )
            )  # fmt: skip
        except ConfigError as error:  # a teacher with two heads
            self.notes.append(f"stored: left out, {error}")
            return None
        return out

    def cases(self) -> dict[str, Callable[[], object]]:
        """Name -> one step."""
        options, kinds, store = self.options, self._kinds(), self._make_store()
        cases: dict[str, Callable[[], object]] = {}
        for kind in kinds:
            plain = self._ours(kind, PLAIN, supervision="labels")
            live = self._ours(kind, LIVE, teacher=str(self.teacher))
            batches = list(live.train_loader)[:BATCHES]
            cases[f"{kind.name} {PLAIN}"] = _Steps(plain, batches)
            cases[f"{kind.name} {TEACHER}"] = _Asking(live, batches)
            cases[f"{kind.name} {LIVE}"] = _Steps(live, batches)
            if store is not None:
                stored = self._ours(kind, STORED, targets=str(store))
                steps = _Steps if options.on_gpu else _StepsThatRead
                cases[f"{kind.name} {STORED}"] = steps(stored, list(stored.train_loader)[:BATCHES])
                if kind is kinds[0]:
                    cases[f"{kind.name} {READ}"] = _Reading(stored, cases[f"{kind.name} {STORED}"].batches)  # type: ignore[attr-defined]
        for kind in kinds:  # last: the stock loader leaves a cache of labels in the set
            if options.on_gpu or kind.keys == {"precision": "fp32", "channels_last": False}:
                stock = self._set_up(DetectionTrainer, kind, DISTILL, distill_model=str(self.teacher))
                cases[f"{kind.name} {DISTILL}"] = _Steps(stock, cases[f"{kind.name} {LIVE}"].batches)  # type: ignore[attr-defined]
        return cases

    def epochs(self, extent: Extent) -> dict[str, Callable[[], object]]:
        """Name -> one epoch, or the teacher's forward over as many pictures."""
        kinds = self._kinds()
        cases: dict[str, Callable[[], object]] = {}
        store: Path | None = None
        for kind in kinds:
            plain = self._epoch(kind, PLAIN, extent, supervision="labels")
            live = self._epoch(kind, LIVE, extent, teacher=str(self.teacher))
            cases[f"{kind.name} {PLAIN}"] = plain
            cases[f"{kind.name} {TEACHER}"] = _Asking(live.trainer, _some_batches(live.trainer), extent.batches)
            cases[f"{kind.name} {LIVE}"] = live
            if kind is kinds[0]:
                self.loading = plain.lead.loader.num_workers
                store = self._make_store(extent.pool(plain.lead.ahead), extent.workers)
            if store is not None:
                own = self.work / f"targets_{kind.name}"  # pages that another training has read are not the disk's
                shutil.copytree(store, own)
                cases[f"{kind.name} {STORED}"] = self._epoch(kind, STORED, extent, targets=str(own))
                sizes = [file.stat().st_size for file in own.glob("*.safetensors")]
                self.bytes_of_epoch = sum(sizes) // len(sizes)
                forget(own)
        return cases

    def _epoch(self, kind: _Kind, name: str, extent: Extent, **keys: Any) -> Epoch:
        once = {"nbs": self.options.batch}  # a step of the optimizer for every batch, so that all epochs have as many
        given = {"epochs": extent.pool(0), "workers": extent.workers, **once, **keys}
        made = Epoch(self._set_up(EpochTrainer, kind, name, **given))
        self._epochs[f"{kind.name} {name}"] = made
        return made

    def behind(self) -> list[str]:
        """Cases whose loading was not what an epoch takes."""
        late = [name for name, epoch in self._epochs.items() if not epoch.in_time]
        told = "not to be quoted: the processes that load did not get ahead again between two epochs"
        return [f"{told}: {', '.join(late)}"] if late else []

    def _kinds(self) -> list[_Kind]:
        return [_kind(name, self.options.on_gpu) for name in self.options.precision]

    def _ours(self, kind: _Kind, name: str, **keys: Any) -> Any:
        return self._set_up(FocusDDTrainer, kind, name, **keys)

    def _set_up(self, trainer: type[Any], kind: _Kind, name: str, **keys: Any) -> Any:
        options = self.options
        overrides = {
            "model": options.model, "data": str(self.data / "data.yaml"), "imgsz": options.imgsz,
            "batch": options.batch, "device": options.device, "workers": 0, "epochs": 1, "close_mosaic": 0,
            "optimizer": "SGD", "lr0": STILL, "warmup_epochs": 0, "project": str(self.work / "runs"),
            "name": f"{kind.name}_{name}", "plots": False, "verbose": False, "val": False, "augmentations": [],
            **kind.keys, **keys,
        }  # fmt: skip
        if trainer is DetectionTrainer:
            overrides = {key: value for key, value in overrides.items() if key not in ("precision", "channels_last")}
        before = _allocated()
        with safe_ultralytics(), local_amp_check():
            made = trainer(overrides=overrides)
            made._setup_train()
        made.epoch = 0
        made._model_train()
        self._built[f"{kind.name} {name}"] = _allocated() - before
        self._trainers.append(made)
        return made

    def memory(self, cases: Mapping[str, Callable[[], object]]) -> dict[str, int]:
        """Peak bytes on the GPU of each case as if it were alone: what its trainer holds, and what its step adds."""
        found = {}
        for name, case in cases.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            case()
            torch.cuda.synchronize()
            held = self._built[name.replace(f" {TEACHER}", f" {LIVE}").replace(f" {READ}", f" {STORED}")]
            found[name] = held + torch.cuda.max_memory_allocated() - before
        return found

    def close(self) -> None:
        """Stop the loaders."""
        for trainer in self._trainers:
            for loader in (trainer.train_loader, trainer.test_loader):
                if hasattr(loader, "close"):
                    loader.close()


class _Steps:
    """Ultralytics' step on one batch after the other: to the device, forward, loss, backward, optimizer, EMA."""

    def __init__(self, trainer: Any, batches: list[dict[str, Any]]) -> None:
        self.trainer, self.batches, self._next = trainer, batches, 0

    def batch(self) -> dict[str, Any]:
        """The next one; a copy, because the training writes into it."""
        self._next = (self._next + 1) % len(self.batches)
        return dict(self.batches[self._next])

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """As in Ultralytics' loop."""
        trainer = self.trainer
        mixed = trainer.mixed_precision() if isinstance(trainer, FocusDDTrainer) else contextlib.nullcontext()
        dtype = torch.bfloat16 if trainer.args.amp == "bf16" else trainer.amp
        with mixed, engine.autocast(dtype, device=trainer.device.type):
            yield

    def __call__(self) -> None:
        trainer, batch = self.trainer, self.batch()
        with self.autocast():
            loss, _ = trainer.model(trainer.preprocess_batch(batch))
            trainer.loss = loss.sum()
        trainer.scaler.scale(trainer.loss).backward()
        trainer.optimizer_step()


class _StepsThatRead(_Steps):
    """The same, with stored targets that are read in the step."""

    def batch(self) -> dict[str, Any]:
        """The next one, read anew."""
        return add_stored_heads(self.trainer.targets, super().batch())


class _Reading(_StepsThatRead):
    """Stored targets alone."""

    def __call__(self) -> None:
        self.batch()


class _Asking(_Steps):
    """The teacher's forward on such pictures, on the device already; `times` batches a call."""

    def __init__(self, trainer: Any, batches: list[dict[str, Any]], times: int = 1) -> None:
        super().__init__(trainer, batches)
        self.images = [batch["img"].to(trainer.device).float() / 255 for batch in batches]
        self.times = times

    def __call__(self) -> None:
        for _ in range(self.times):
            self._next = (self._next + 1) % len(self.images)
            with self.autocast():
                self.trainer.teacher.heads(self.images[self._next])


def _some_batches(trainer: Any) -> list[dict[str, Any]]:
    """BATCHES of them from a training's data set; its loader is not touched."""
    dataset, size = trainer.train_loader.dataset, trainer.batch_size
    starts = range(0, BATCHES * size, size)
    return [dataset.collate_fn([dataset[0, start + place] for place in range(size)]) for start in starts]


# ---- what it is timed on ----


def draw_set(folder: Path, names: list[str], count: int, side: int) -> Path:
    """A distilled set of drawn pictures about as large as the training's, with the teacher's classes; its folder."""
    (folder / "images" / "train").mkdir(parents=True)
    for part in ("labels", "soft"):
        (folder / part / "train").mkdir(parents=True)
    lines = []
    for index in range(count):
        picture = render(plan_many(f"bench/{index}", (max(64, side * 3 // 4), max(64, side))))
        rows = [row.split(" ", 1) for row in yolo_labels(picture).splitlines()]
        labels = "".join(f"{int(number) % len(names)} {rest}\n" for number, rest in rows)
        files = {"images": encode_jpeg(picture.image, QUALITY), "labels": labels.encode(), "soft": b""}
        hashes = {part: hashlib.sha256(content).hexdigest() for part, content in files.items()}
        item = detset.Item(f"drawn-{index:05d}", names[0], 0, names[0], index, index, index, (), len(rows), hashes)
        for part, content in files.items():
            detset.part_path(folder, part, item).write_bytes(content)
        lines.append(item.line())
    (folder / "manifest.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "data.yaml").write_bytes(detset.data_yaml(names))
    (folder / "build.yaml").write_text("format: focusdd_det set\n", encoding="utf-8")
    (folder / "README.md").write_text("drawn for a benchmark\n", encoding="utf-8")
    (folder / "COMPLETE").write_bytes(detset.seal(folder))
    return folder


def teacher_file(options: BenchOptions, work: Path) -> Path:
    """The checkpoint that is asked: the one given, or fresh weights of the architecture given."""
    given = options.teacher or FRESH
    if Path(given).suffix not in (".yaml", ".yml"):
        return resolve_weights(given)
    return fresh_teacher(given, work / f"{Path(given).stem}-fresh.pt", options.imgsz)


def fresh_teacher(name: str, file: Path, side: int) -> Path:
    """A checkpoint with random weights, for times alone: it says noise, some of it above the store's floor.

    On another picture than the one it is biased with the share is another one (a quarter has been seen), so times from
    a store of such a teacher are on the safe side; give a trained one for those that count.

    Raises:
        WeightsError: no model can be built from this YAML.
    """
    torch.manual_seed(0)
    try:
        with safe_ultralytics():
            model = DetectionModel(name, verbose=False).eval()
    except Exception as error:  # a model's YAML reaches us as whatever the builder trips over
        raise WeightsError(
            f"teacher={name}: no model can be built from it ({type(error).__name__}: {error})"
        ) from error
    head: Any = model.model[-1]
    with torch.no_grad():
        raw = model(torch.rand(1, 3, side, side))[1]
        scores = raw.get(ONE2MANY, raw)["scores"].amax(1).flatten()
        shift = math.log(FLOOR / (1 - FLOOR)) - float(scores.quantile(1 - ABOVE))
        for branch in (head.cv3, getattr(head, "one2one_cv3", None) or []):
            for layers in branch:
                layers[-1].bias += shift
    model.names = {index: f"class {index}" for index in range(head.nc)}
    torch.save({"model": model.half(), "train_args": {}, "epoch": -1}, file)
    return file


def _names(teacher: Path) -> list[str]:
    names = safe_checkpoint(teacher).names
    load_detector(teacher)  # refused here, before anything is drawn
    return [str(names[index]) for index in range(len(names))]


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the stages say about themselves."""
    loggers = (LOGGER, logging.getLogger("focusdd"))
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
