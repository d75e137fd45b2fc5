"""FocusDDClassificationTrainer: Ultralytics' ClassificationTrainer for students of torchvision, timm and YOLO.

from focusdd_det.classify.trainer import FocusDDClassificationTrainer
FocusDDClassificationTrainer(overrides=dict(model="resnet18", data="sets/in10", teacher="resnet18",
    teacher_weights="resnet18.pth", eval_data="imagenet")).train()
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
from collections.abc import Mapping
from copy import copy, deepcopy
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import ultralytics
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from ultralytics.cfg import get_cfg, get_save_dir
from ultralytics.data.augment import classify_transforms
from ultralytics.models.yolo.classify import ClassificationTrainer, ClassificationValidator
from ultralytics.utils import DEFAULT_CFG, DEFAULT_CFG_DICT, LOGGER, RANK, colorstr
from ultralytics.utils.torch_utils import unwrap_model

from focusdd_det import __version__
from focusdd_det.classify import nets
from focusdd_det.classify.accuracy import accuracy
from focusdd_det.classify.classset import ClassSet, read_class_set
from focusdd_det.classify.options import Options, leaves_one_over, not_for_classifiers
from focusdd_det.classify.student import make_student
from focusdd_det.classify.subsets import Subsets, SubsetSampler, SubsetViews
from focusdd_det.classify.supervision import SOFT_KEY, SoftLabels
from focusdd_det.classify.views import EvalDataset, ViewDataset, ViewSettings
from focusdd_det.config import cfg_dir, read_yaml, without_keys
from focusdd_det.disk import write_atomic
from focusdd_det.errors import ConfigError, DataError, DiskError, FocusDDError, VerifyError, WeightsError
from focusdd_det.training import exact_resume
from focusdd_det.training.precision import bf16_on_cpu, class_scores, local_amp_check
from focusdd_det.training.replay import replay_loader
from focusdd_det.training.run_files import cut_results, find_last
from focusdd_det.training.run_guard import end_with_parent, guarded

if TYPE_CHECKING:
    from focusdd_det.classify.store import LogitStore
    from focusdd_det.classify.teacher import ClassTeacher

ORIGIN_KEY = "focusdd_origin"  # hashes of the set, the teacher and the store, kept in the run's arguments
OWN_KEYS = (*Options.keys(), ORIGIN_KEY)
SHIPPED = "train_cls.yaml"
STRIDE = 32
ON_TRAINING = "on the pictures it was trained on: not a measure of quality"
PREFIX = colorstr("focusdd: ")
MOVABLE = ("teacher", "teacher_weights", "store", "eval_data")  # own options that a resumed run may be given anew
CHANGEABLE = ("device", "workers", "plots", "save_period", "verbose", "val")  # Ultralytics' that it may
OF_THE_CALL = ("model", "data", "mode", "task", "resume", "pretrained", "save_dir", "cfg", "multi_scale")


class FocusDDClassificationTrainer(ClassificationTrainer):  # type: ignore[misc]
    """Trains a student on views of a distilled set (or of class folders), with soft labels or with the classes.

    Options of its own (see `Options` and cfg/train_cls.yaml) are given among Ultralytics' own; what is not given comes
    from that file. The teacher lives on the trainer and never enters the model or a checkpoint.

    Raises:
        ConfigError: wrong options.
        DataError, VerifyError: data that cannot be used, or a set or store that is not what it says.
        WeightsError: teacher, student or resume files missing, damaged, unsafe or not fitting.
    """

    start_epoch: int
    args: Any
    ema: Any
    model: Any
    metrics: Any
    options: Options
    origin: dict[str, str]
    train_set: ClassSet
    eval_set: ClassSet | None
    eval_is_training: bool
    loss_names: tuple[str, ...]
    best_fitness: float | None

    def __init__(
        self,
        cfg: Any = DEFAULT_CFG,
        overrides: dict[str, Any] | None = None,
        _callbacks: dict[str, Any] | None = None,
    ) -> None:
        end_with_parent()
        given = dict(overrides or {})
        self.own_given = {key: given.pop(key) for key in OWN_KEYS if key in given}
        cfg = without_keys(cfg, OWN_KEYS)
        if not given.get("resume"):
            recipe = {k: v for k, v in read_yaml(cfg_dir() / SHIPPED).items() if k in DEFAULT_CFG_DICT}
            given = {**recipe, **{key: value for key, value in given.items() if value is not None}}
            if type(given["batch"]) is int and given["batch"] > 0:
                given.setdefault("nbs", given["batch"])  # no accumulation, and weight_decay is what is written
        self.teacher: ClassTeacher | None = None
        self.store: LogitStore | None = None
        self._teacher_finite: Tensor | None = None  # whether all its outputs of this epoch are; on the device
        self._state: exact_resume.ResumeState | None = None
        self._best: dict[str, Any] | None = None  # the epoch with the highest top-1 so far
        self._is_best = False
        try:
            super().__init__(cfg, given, _callbacks)
        except (NotADirectoryError, FileExistsError, PermissionError) as error:
            raise DiskError(f"the run folder cannot be made: {error}; choose another place with project=") from error
        for key, value in {**dataclasses.asdict(self.options), ORIGIN_KEY: self.origin}.items():
            setattr(self.args, key, value)  # for DDP's workers and for resume; args.yaml is already written without

    # ---- arguments, before anything is written ----

    def check_resume(self, overrides: dict[str, Any]) -> None:
        """Every option, path and file, so that a mistake costs no run folder. Nothing is unpickled."""
        before: dict[str, Any] = {}
        self.resume = bool(self.args.resume)
        if self.resume:
            before = self._take_over(overrides)
        for key in OWN_KEYS:
            if hasattr(self.args, key):
                delattr(self.args, key)
        self.options = Options.of({**before, **self.own_given})
        self._check_arguments()
        run = Path(get_save_dir(self.args))
        self._read_data()
        for data in (self.train_set, self.eval_set):
            if data is not None and run.resolve().is_relative_to(data.folder.resolve()):
                raise ConfigError(f"the run folder {run} would lie inside {data.folder}; give project=<elsewhere>")
        self._prepare_labels()
        self._student = make_student(
            self.args.model,
            self.train_set.names,
            self.args.imgsz,
            weights=None if self.resume else self.options.weights,
            download=self.options.download,
            seed=self.args.seed,
        )
        stored = self.store.description["teacher"] if self.store else {}
        self.origin = {
            "set": self.train_set.sha256,
            "teacher": self.teacher.sha256 if self.teacher else str(stored.get("sha256", "")),
            "teacher_spec": self.teacher.spec if self.teacher else str(stored.get("spec", "")),
            "store": self.store.sha256 if self.store else "",
            "eval": self.eval_set.sha256 if self.eval_set else "",
        }
        if self.resume:
            self._check_origin(before.get(ORIGIN_KEY) or {})

    def _take_over(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the run that goes on; returns its own options."""
        last = find_last(self.args.resume)
        counters = exact_resume.load_counters(last.parent)
        if counters is None or "args" not in counters:
            raise WeightsError(
                f"{last.parent} holds no {exact_resume.TENSORS}, so there is nothing to resume: the run is finished, "
                "or was not made by this trainer. Start a new run from its weights with weights=<run>/weights/last.json"
            )
        began_with: dict[str, Any] = counters["args"]
        self.args = get_cfg(overrides={k: v for k, v in began_with.items() if k in DEFAULT_CFG_DICT})
        self.args.resume, self.args.save_dir = str(last), str(last.parent.parent)
        if overrides.get("data"):
            self.args.data = str(overrides["data"])
        ignored = []
        for key, value in overrides.items():
            if key in CHANGEABLE:
                setattr(self.args, key, value)
            elif key not in OF_THE_CALL and value != getattr(self.args, key, None):
                ignored.append(key)
        own = {key: began_with[key] for key in OWN_KEYS if key in began_with}
        ignored += [k for k, v in self.own_given.items() if k not in (*MOVABLE, ORIGIN_KEY) and v != own.get(k)]
        if ignored:
            raise ConfigError(
                f"a resumed run keeps {', '.join(sorted(ignored))} as it began; leave them out, or start a new run"
            )
        return own

    def _check_arguments(self) -> None:
        args = self.args
        problems = []
        if args.data is None:
            problems.append("data= is missing: expected a distilled set, or a folder of class folders")
        if isinstance(args.batch, bool) or not isinstance(args.batch, int) or args.batch < 1:
            problems.append(f"batch={args.batch!r}: expected a whole number from 1 on")
        if isinstance(args.imgsz, bool) or not isinstance(args.imgsz, int) or args.imgsz < 1 or args.imgsz % STRIDE:
            problems.append(f"imgsz={args.imgsz!r}: expected a multiple of {STRIDE}")
        elif args.batch == 1 and args.imgsz < 2 * STRIDE:
            problems.append("batch=1: BatchNorm needs two pictures at this imgsz")
        if isinstance(args.scale, (list, tuple)) or not 0 <= args.scale < 1:
            problems.append(f"scale={args.scale}: expected a number from 0 to below 1, the views are 1 - scale to 1")
        if not self.resume:  # a run that goes on keeps what it began with
            problems += not_for_classifiers(vars(args), DEFAULT_CFG_DICT)
        if problems:
            raise ConfigError("the arguments are not valid:\n  " + "\n  ".join(problems))
        args.close_mosaic = 0  # there is none, and closing it would draw the epoch's pictures again

    def _read_data(self) -> None:
        self.train_set = read_class_set(str(self.args.data), "train")
        wanted = self.args.classes
        if wanted is not None:
            indices = [wanted] if isinstance(wanted, int) else list(wanted)
            names = self.train_set.names
            if not indices or not all(type(i) is int and 0 <= i < len(names) for i in indices):
                raise ConfigError(f"classes={wanted}: expected indices from 0 to {len(names) - 1} of the set's classes")
            self.train_set = self.train_set.only([names[i] for i in indices])
        if len(self.train_set) < 2:
            raise DataError(f"{self.args.data} has {len(self.train_set)} pictures; expected at least two")
        self.eval_set, self.eval_is_training = None, False
        if self.options.eval_data:
            self.eval_set = read_class_set(self.options.eval_data, "val", self.train_set.names)
            self.eval_is_training = self.eval_set.place == self.train_set.place

    def _prepare_labels(self) -> None:
        options, size = self.options, int(self.args.imgsz)
        self.views = ViewSettings(
            size=size,
            scale=(round(1 - float(self.args.scale), 6), 1.0),
            flip=float(self.args.fliplr),
            cutmix=float(self.args.cutmix),
            seed=int(self.args.seed),
        )
        if options.labels == "store":
            from focusdd_det.classify.store import LogitStore

            self.store = LogitStore(Path(str(options.store)))
            self.store.check(self.train_set, size, options.pool)
            self._check_temperature(self.store)
            self.views = self.store.settings
        elif options.labels == "live":
            from focusdd_det.classify.teacher import load_classifier

            self.teacher = load_classifier(
                str(options.teacher),
                options.teacher_weights,
                self.train_set.names,
                size,
                precision="bf16" if options.precision == "bf16" else "fp32",
                download=options.download,
            )

    def _check_temperature(self, store: LogitStore) -> None:
        if store.topk and store.temperature != self.options.temperature:
            raise ConfigError(
                f"temperature={self.options.temperature}: the store keeps the top {store.topk} logits and the rest at "
                f"temperature {store.temperature}; give that, or make a store with all logits (topk=0)"
            )

    def _check_origin(self, began_with: Mapping[str, str]) -> None:
        what = {
            "set": (VerifyError, f"{self.args.data} holds other pictures than"),
            "store": (VerifyError, f"{self.options.store} is another store than"),
            "teacher": (WeightsError, f"the teacher {self.options.teacher} has other weights than"),
            "teacher_spec": (WeightsError, f"the teacher {self.options.teacher} is built otherwise than"),
            "eval": (VerifyError, f"{self.options.eval_data} holds other pictures than"),
        }
        for key, (kind, told) in what.items():
            if began_with.get(key, "") != self.origin[key]:
                raise kind(f"{told} what this run began with; put that back, or start a new run with this one")

    def get_dataset(self) -> dict[str, Any]:
        """What Ultralytics wants to know of the data; the pictures come from `get_dataloader`."""
        names = dict(enumerate(self.train_set.names))
        return {"train": str(self.train_set.folder), "val": "", "names": names, "nc": len(names), "channels": 3}

    # ---- data ----

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = -1, mode: str = "train") -> Any:
        """Training: views that depend on (seed, epoch, picture) alone. Validation: the middle of every picture."""
        world = max(self.world_size, 1)
        if mode != "train":
            return self._eval_loader(batch_size, max(rank, 0), world if rank >= 0 else 1)
        seed = int(self.args.seed)
        sampler = None
        if self.options.subset_ipc:
            subsets = Subsets(self.train_set.classes, self.options.subset_ipc, seed)
            dataset: ViewDataset = SubsetViews(self.train_set, self.views, subsets)
            sampler = SubsetSampler(subsets, seed, *((rank, world) if rank >= 0 else (0, 1)))
        else:
            dataset = ViewDataset(self.train_set, self.views, pool=self.options.pool, store=self.store)
        length = len(sampler) if sampler else math.ceil(len(dataset) / (world if rank >= 0 else 1))
        lonely = leaves_one_over(length, batch_size)
        if lonely:
            LOGGER.info(
                f"{PREFIX}{length} pictures in batches of {batch_size} leave one over, alone in a batch, which "
                "BatchNorm cannot use: each epoch leaves out one picture, another one every time"
            )
        return replay_loader(
            dataset,
            batch_size,
            self.args.workers,
            seed=seed,
            rank=rank,
            world=world,
            drop_last=lonely,
            pin_memory=self.device.type == "cuda",
            sampler=sampler,
        )

    def _eval_loader(self, batch_size: int, rank: int, world: int) -> DataLoader[Any]:
        model = unwrap_model(self.model)
        if not isinstance(model, nets.Classifier):
            model.transforms = classify_transforms(int(self.args.imgsz))  # for stock predictions from its checkpoint
        if self.eval_set is None:
            return DataLoader(NoPictures())
        dataset = EvalDataset(self.eval_set, int(self.args.imgsz))
        workers = int(self.args.workers)
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=range(rank, len(dataset), world),
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_unit_pixels,
        )

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """To the device, pixels to [0, 1]; then the teacher's logits on exactly the pictures that the student sees."""
        batch = {key: _moved(value, self.device) for key, value in batch.items()}
        batch["img"] = batch["img"].float().div_(255)
        if self._bf16_on_cpu:
            batch["img"] = batch["img"].contiguous(memory_format=torch.channels_last)
        if self.teacher is not None:
            logits = self.teacher(batch["img"])
            finite = torch.isfinite(logits).all()
            self._teacher_finite = finite if self._teacher_finite is None else self._teacher_finite & finite
            batch[SOFT_KEY] = {"logits": logits}
        return batch

    def get_validator(self) -> ClassificationValidator:
        """Stock, with arguments that stock Ultralytics knows; no pictures of predictions and no confusion matrix."""
        args = copy(self.args)
        for key in OWN_KEYS:
            if hasattr(args, key):
                delattr(args, key)
        args.plots = False
        return ClassificationValidator(self.test_loader, self.save_dir, args=args, _callbacks=self.callbacks)

    def plot_training_samples(self, batch: dict[str, Any], ni: int) -> None:
        """The first batch, once: a look at the views."""
        if ni == 0:
            shown = {"img": batch["img"].detach().float(), "cls": batch["cls"]}
            super().plot_training_samples(shown, ni)

    # ---- model ----

    def setup_model(self) -> None:
        """The student that was built when the arguments were checked, with its criterion."""
        model: Any = self._student
        options = self.options
        name = "ce" if options.labels == "hard" else "soft_ce"
        model.criterion = SoftLabels(float(options.temperature), name)
        self._bf16_on_cpu = self.device.type == "cpu" and options.precision == "bf16"
        if self._bf16_on_cpu:
            model.to(memory_format=torch.channels_last)
        if self.args.dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = float(self.args.dropout)
        model.requires_grad_(True)
        self.model = model

    def build_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Ultralytics' own; on a CPU too with torch's fused kernel, which reads and writes the weights once a step."""
        optimizer: torch.optim.Optimizer = super().build_optimizer(*args, **kwargs)
        if self.device.type == "cpu" and type(optimizer) in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
            for group in optimizer.param_groups:
                group["fused"] = True
        return optimizer

    def _setup_train(self) -> None:
        if self.device.type == "cuda" and self.options.precision != "auto":
            self.args.amp = False if self.options.precision == "fp32" else "bf16"
        if self.teacher is not None:
            self.teacher.module.to(self.device)
        with local_amp_check(class_scores, int(self.args.imgsz)):
            super()._setup_train()
        if self.teacher is not None and self.device.type == "cuda":  # in the precision of the student's forward
            from focusdd_det.classify.teacher import in_precision

            mixed = torch.bfloat16 if self.args.amp == "bf16" else torch.float16
            in_precision(self.teacher, mixed if self.amp else None, int(self.args.imgsz), self.device)
        if RANK in {-1, 0}:
            if self.store is not None:
                LOGGER.info(
                    f"{PREFIX}views (scale, fliplr, cutmix, seed) are those of {self.options.store}: {self.views}"
                )
            if self.eval_set is None:
                LOGGER.info(f"{PREFIX}eval_data=none: nothing is measured")
            if self.eval_is_training:
                LOGGER.warning(f"{PREFIX}eval_data is the training data: accuracy is measured {ON_TRAINING}")
            self._write_focusdd_yaml()

    def _write_focusdd_yaml(self) -> None:
        content = {
            **dataclasses.asdict(self.options),
            "sha256": self.origin,
            "views": json.loads(json.dumps(dataclasses.asdict(self.views))),
            "versions": {
                "focusdd_det": __version__,
                "ultralytics": ultralytics.__version__,
                "torch": str(torch.__version__),
            },
        }
        note = "# Options and versions of this run that args.yaml (stock Ultralytics) has no place for.\n"
        write_atomic(Path(self.save_dir) / "focusdd.yaml", (note + yaml.safe_dump(content, sort_keys=False)).encode())

    # ---- the loop ----

    def _do_train(self) -> None:
        """Ultralytics' loop; see run_guard for what ends it from outside."""
        bf16 = self.device.type == "cpu" and self.options.precision == "bf16"
        with guarded(self), bf16_on_cpu() if bf16 else contextlib.nullcontext():
            super()._do_train()

    def run_callbacks(self, event: str) -> None:
        """Ultralytics' hook; also where an epoch begins and ends."""
        if event == "on_train_epoch_start":
            if self.train_loader.iterator is None:
                self.train_loader.sampler.next_epoch = self.epoch
            if self._state is not None:
                exact_resume.restore_generators(self._state)
                self._state = None
        elif event == "on_train_epoch_end":
            self._check_teacher_outputs()
            self.metrics = dict.fromkeys(self.metrics, math.nan) if self.metrics else self.metrics
            self.fitness, self._is_best = None, False
        super().run_callbacks(event)

    def _check_teacher_outputs(self) -> None:
        """Asked once an epoch: asking after every batch would wait for the device."""
        finite, self._teacher_finite = self._teacher_finite, None
        if finite is not None and not bool(finite):
            raise WeightsError(
                f"the teacher {self.options.teacher} gave values that are not finite (NaN or infinity) in epoch "
                f"{self.epoch + 1}; nothing of that epoch is kept. Get its weights again, or train with amp=False"
            )

    def _handle_nan_recovery(self, epoch: int) -> bool:
        """Stops the run instead of going back to an earlier epoch: the same epoch would fail again."""
        values = [self.loss, *(self.tloss or {}).values()]
        if all(bool(torch.isfinite(torch.as_tensor(value)).all()) for value in values if value is not None):
            return False
        kept = exact_resume.load_counters(Path(self.wdir))
        after = f"the state after epoch {kept['epoch'] + 1} is kept" if kept else "no epoch is kept"
        raise FocusDDError(
            f"the loss is not a finite number in epoch {epoch + 1}; {after}. Start again with a smaller lr0 (now "
            f"{self.args.lr0}), some warmup_epochs, or without mixed precision (precision=fp32)"
        )

    def _due(self) -> bool:
        epoch = int(self.epoch) + 1
        return epoch % self.options.interval(self.epochs) == 0 or epoch >= self.epochs or bool(self.stop)

    def validate(self) -> tuple[dict[str, float] | None, float | None]:
        """Top-1 and top-5 on `eval_data`, every so many epochs; top-1 is the fitness."""
        if self.eval_set is None or not self._due():
            return self.metrics, None
        if self.world_size > 1:
            for buffer in self.ema.ema.buffers():
                torch.distributed.broadcast(buffer, src=0)
        metrics = self.validator(self)
        if metrics is None:
            return None, None
        metrics.pop("fitness", None)
        top1, top5 = (round(100 * float(v), 4) for v in (self.validator.metrics.top1, self.validator.metrics.top5))
        if self._best is None or top1 > self._best["top1"]:
            self._best = {"epoch": self.epoch + 1, "top1": top1, "top5": top5, "meaning": "selected on val"}
            self.best_fitness, self._is_best = top1, True
        return metrics, top1

    def label_loss_items(self, loss_items: dict[str, Any] | None = None, prefix: str = "train") -> Any:
        """Ultralytics' names; the loss on validation pictures is plain cross-entropy and called so."""
        if prefix != "val":
            return super().label_loss_items(loss_items, prefix)
        if loss_items is None:
            return ["val/ce"] if self.loss_names else []
        return dict(zip(["val/ce"], (round(float(value), 5) for value in loss_items.values()), strict=True))

    def save_metrics(self, metrics: dict[str, float]) -> None:
        """A row of results.csv; nan where an epoch was not measured, no columns where nothing ever is."""
        if self.eval_set is None:
            metrics = {k: v for k, v in metrics.items() if not k.startswith(("val/", "metrics/"))}
        super().save_metrics(metrics)

    # ---- checkpoints ----

    def save_model(self) -> bool:
        """Every so many epochs: weights for others (last, best), then what an exact resume needs."""
        period = int(self.args.save_period)
        periodic = period > 0 and self.epoch % period == 0
        if not self._due() and not periodic:
            return False
        if not all(bool(torch.isfinite(v).all()) for v in self.ema.ema.state_dict().values()):
            raise FocusDDError(
                f"the weights are not finite numbers after epoch {self.epoch + 1}; they are not saved. Start again "
                f"with a smaller lr0 (now {self.args.lr0})"
            )
        if periodic:
            self._write_weights(f"epoch{self.epoch}")
        if self._is_best:
            self._write_weights("best")
        self._write_weights("last")
        if not self.stop:
            self._save_state()
        return True

    def _write_weights(self, name: str) -> None:
        model = self.ema.ema
        if isinstance(model, nets.Classifier):
            nets.save_spec(Path(self.wdir) / name, model.as_net(), self.train_set.names, int(self.args.imgsz))
        write_atomic(Path(self.wdir) / f"{name}.pt", self._stock_checkpoint(model))

    def _stock_checkpoint(self, model: Any) -> bytes:
        """What Ultralytics leaves of a checkpoint at the end of a run: half precision, no optimizer."""
        criterion, model.criterion = model.criterion, None
        try:
            plain = deepcopy(model).half().to(memory_format=torch.contiguous_format).requires_grad_(False)
        finally:
            model.criterion = criterion
        buffer = io.BytesIO()
        torch.save(
            {
                "epoch": -1,
                "model": plain,
                "ema": None,
                "optimizer": None,
                "train_args": {key: value for key, value in vars(self.args).items() if key in DEFAULT_CFG_DICT},
                "train_metrics": {**(self.metrics or {}), "fitness": self.fitness},
                "train_results": self.read_results_csv(),
                "date": datetime.now().astimezone().isoformat(),
                "version": ultralytics.__version__,
                "license": "AGPL-3.0 (https://ultralytics.com/license)",
                "docs": "https://docs.ultralytics.com",
            },
            buffer,
        )
        return buffer.getvalue()

    def _save_state(self) -> None:
        counters = {
            "epoch": self.epoch,
            "args": {key: _plain(value) for key, value in vars(self.args).items()},
            "accumulate": self.accumulate,
            "ema_updates": self.ema.updates,
            "scaler": self.scaler.state_dict(),
            "best": self._best,
            "stopper": {
                "best_fitness": float(self.stopper.best_fitness),
                "best_epoch": self.stopper.best_epoch,
                "possible_stop": bool(self.stopper.possible_stop),
            },
        }
        model, average = unwrap_model(self.model), self._average()
        exact_resume.save(exact_resume.capture(model, average, self.optimizer, counters), Path(self.wdir))

    def _average(self) -> nn.Module:
        return self.ema.ema if self.options.ema else nn.Identity()

    def resume_training(self, ckpt: Any) -> None:
        """From resume.safetensors alone."""
        if not self.options.ema:
            self.ema = LiveWeights(self.model)
        if not self.resume:
            return
        state = exact_resume.load(Path(self.args.resume).parent)
        assert state is not None  # its counters were read when the arguments were checked
        exact_resume.restore(state, unwrap_model(self.model), self._average(), self.optimizer)
        self.start_epoch = state.epoch + 1
        self.ema.updates = state.counters["ema_updates"]
        if state.counters["scaler"]:
            self.scaler.load_state_dict(state.counters["scaler"])
        self._best = state.counters["best"]
        self.best_fitness = self._best["top1"] if self._best else None
        self.stopper.__dict__.update(state.counters["stopper"])
        self._state = state
        cut_results(self.csv, self.start_epoch)
        exact = self.accumulate == state.counters["accumulate"] == 1
        how = "exactly" if exact else "(not exactly the unbroken run, because nbs > batch accumulates gradients)"
        LOGGER.info(f"{PREFIX}resuming {how} after epoch {self.start_epoch}")

    # ---- the end ----

    def final_eval(self) -> None:
        """The accuracy of the last epoch's weights: the headline."""
        if RANK not in {-1, 0}:
            return
        result: dict[str, Any] = {
            "last": None,
            "best": self._best,
            "labels": self.options.labels,
            "stored_teacher": self.store.accuracy if self.store else None,
            "eval_data": self.options.eval_data,
            "imgsz": self.args.imgsz,
            "weights": "moving average (ema)" if self.options.ema else "as trained",
            "sha256": self.origin,
        }
        if self.eval_set is None:
            LOGGER.info(f"{PREFIX}eval_data=none: no accuracy was measured")
            result["note"] = "eval_data=none: nothing was measured"
        else:
            measured = accuracy(
                LogitsOf(self.ema.ema).eval(),
                self.eval_set,
                int(self.args.imgsz),
                batch=self.batch_size * 2,
                device=self.device,
                workers=int(self.args.workers),
            )
            meaning = ON_TRAINING if self.eval_is_training else "headline"
            result["last"] = {"epoch": self.epoch + 1, "meaning": meaning, **dataclasses.asdict(measured)}
            LOGGER.info(
                f"{PREFIX}last epoch ({self.epoch + 1}): top-1 {measured.top1:.2f} top-5 {measured.top5:.2f} on "
                f"{measured.n} pictures of {self.options.eval_data} ({meaning})"
            )
            if self._best is not None:
                LOGGER.info(
                    f"{PREFIX}best epoch ({self._best['epoch']}): top-1 {self._best['top1']:.2f} (selected on val)"
                )
        write_atomic(Path(self.save_dir) / "accuracy.json", (json.dumps(result, indent=1) + "\n").encode())
        exact_resume.remove(Path(self.wdir))

    def plot_metrics(self) -> None:
        """results.png: the losses and, where they were measured, the accuracies."""
        from focusdd_det.classify.curves import plot_curves

        plot_curves(Path(self.csv), Path(self.save_dir) / "results.png")
        self.on_plot(Path(self.save_dir) / "results.png")


class _CheckedError(Exception):
    """All checks were passed; no error, but the way out of Ultralytics' constructor."""

    def __init__(self, trainer: FocusDDClassificationTrainer) -> None:
        super().__init__()
        self.trainer = trainer


class _CheckOnly(FocusDDClassificationTrainer):
    """Stops where Ultralytics would make the run folder."""

    def check_resume(self, overrides: dict[str, Any]) -> None:
        super().check_resume(overrides)
        raise _CheckedError(self)


def checked(overrides: Mapping[str, Any]) -> FocusDDClassificationTrainer:
    """A trainer that has checked its arguments, data, labels and student, and has written nothing.

    Raises:
        FocusDDError: as the trainer.
    """
    try:
        return _CheckOnly(overrides=dict(overrides))
    except _CheckedError as passed:
        return passed.trainer


class LiveWeights:
    """Stands where Ultralytics keeps a moving average, and is the model itself."""

    def __init__(self, model: nn.Module) -> None:
        self.ema = unwrap_model(model)
        self.updates = 0
        self.enabled = False

    def update(self, model: nn.Module) -> None:
        """Nothing to average."""

    def update_attr(self, model: nn.Module, include: Any = (), exclude: Any = ()) -> None:
        """Nothing to copy."""


class NoPictures(Dataset[Any]):
    """The evaluation data of a run that measures nothing."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise IndexError(index)


class LogitsOf(nn.Module):
    """Only the logits of a classifier; Ultralytics' own gives probabilities beside them in eval mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1] -> [B, C]."""
        output = self.model(x)
        logits: Tensor = output[-1] if isinstance(output, (list, tuple)) else output
        return logits


def _unit_pixels(samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = torch.utils.data.default_collate(samples)
    batch["img"] = batch["img"].float().div_(255)
    return batch


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=device.type == "cuda")
    if isinstance(value, dict):
        return {key: _moved(inner, device) for key, inner in value.items()}
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
