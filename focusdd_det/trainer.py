"""FocusDDTrainer: Ultralytics' DetectionTrainer with a teacher, an evaluation split of its own, and exact resume.

from ultralytics import YOLO
from focusdd_det.trainer import FocusDDTrainer
YOLO("yolo11n.yaml").train(trainer=FocusDDTrainer, data="sets/coco50", teacher="yolo11x.pt", epochs=100)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import ultralytics
import yaml
from ultralytics.cfg import get_save_dir
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG, LOCAL_RANK, LOGGER, RANK, WINDOWS, colorstr
from ultralytics.utils.torch_utils import torch_distributed_zero_first, unwrap_model

from focusdd_det import __version__, coco_eval
from focusdd_det.checkpoints import resolve_weights, safe_ultralytics
from focusdd_det.config import without_keys
from focusdd_det.devices import processors
from focusdd_det.disk import file_sha256, write_atomic
from focusdd_det.errors import ConfigError, DataError, DiskError, VerifyError, WeightsError
from focusdd_det.teacher import Detector, load_detector
from focusdd_det.training import exact_resume
from focusdd_det.training.aside import Aside, Begun
from focusdd_det.training.clean_data import CleanDataset
from focusdd_det.training.precision import bf16_on_cpu, check_precision, local_amp_check, warn_if_slow
from focusdd_det.training.replay import Pool, ReplayDataset, replay_loader, rewind
from focusdd_det.training.run_files import (
    WholePath,
    checkpoint_argument,
    cut_results,
    find_last,
    model_argument,
    resumable_args,
    strip,
    student_head,
)
from focusdd_det.training.run_guard import end_with_parent, guarded
from focusdd_det.training.start import start_argument, start_backbone
from focusdd_det.training.supervision import TEACHER_KEY, Options, build_criterion, refuse_unsupported
from focusdd_det.training.targets import VIEWS, TargetStore, as_stored
from focusdd_det.training.traindata import check_count, load_yolo_data, rename_classes, resolve_data, resolved_yaml

ORIGIN_KEY = "focusdd_origin"  # hashes of the set, the teacher, its stored targets; kept in the checkpoint
MOVABLE = ("teacher", "targets", "eval_data", "eval_annotations", "download", ORIGIN_KEY)  # of a run that is resumed
NO_ANNOTATIONS = "none"  # value of eval_annotations: no COCO mAP, whatever lies beside the pictures
OWN_KEYS = (*Options.keys(), ORIGIN_KEY)
OPTIMIZER = "SGD"  # of the official YOLO11 recipe; Ultralytics' `auto` changes optimizer with the number of iterations
PREFIX = colorstr("focusdd: ")
ON_COMPOSITES = "on training composites: not a measure of quality, so not validated and no mAP is quoted"


class FocusDDTrainer(DetectionTrainer):  # type: ignore[misc]
    """Trains a student on a distilled set, supervised by its boxes, by a teacher's raw outputs, or by both.

    Options of its own (see `Options` and cfg/train_det.yaml) are given among Ultralytics' own. The teacher lives on the
    trainer and never enters the model or a checkpoint.

    Raises:
        ConfigError: wrong options, or `distill_model` together with this trainer.
        DataError, VerifyError: data that cannot be used, or a set that is not what its manifest says.
        WeightsError: teacher, model or resume files missing, damaged, unsafe or not fitting.
    """

    loss_names: tuple[str, ...]
    start_epoch: int

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
            if given.get("optimizer") is None:
                given["optimizer"] = OPTIMIZER
            given.setdefault("augmentations", [])
        given["task"] = "detect"
        self.teacher: Detector | None = None
        self.targets: TargetStore | None = None
        self.pool: Pool | None = None  # of views, with stored targets
        self._teacher_finite: torch.Tensor | None = None  # whether all its outputs of this epoch are; on the device
        self._state: exact_resume.ResumeState | None = None
        self._last_step = -1  # number of the batch after which the optimizer stepped last, counted from epoch 0
        self._resumed_step: int | None = None
        self._nominal: int | None = None
        self._batch = -1
        try:
            with safe_ultralytics():
                super().__init__(cfg, given, _callbacks)
        except (NotADirectoryError, FileExistsError, PermissionError) as error:
            raise DiskError(f"the run folder cannot be made: {error}; choose another place with project=") from error
        self.wdir: Path = WholePath(self.save_dir / "weights")
        self.last, self.best = self.wdir / "last.pt", self.wdir / "best.pt"
        for key, value in {**dataclasses.asdict(self.options), ORIGIN_KEY: self.origin}.items():
            setattr(self.args, key, value)  # for DDP's workers and for resume; args.yaml is already written without

    # ---- arguments, before anything is written ----

    def check_resume(self, overrides: dict[str, Any]) -> None:
        """Ultralytics' check, then every option and path, so that a mistake costs no run folder."""
        resumed: dict[str, Any] = {}
        if self.args.resume:
            last = find_last(self.args.resume)
            resumed = resumable_args(last)
            self.args.resume = str(last)
        super().check_resume(overrides)
        if resumed and not overrides.get("save_dir") and last.parent.name == "weights":
            self.args.save_dir = str(last.parent.parent)  # a run that was moved or copied goes on where it is
        for key in OWN_KEYS:
            if hasattr(self.args, key):
                delattr(self.args, key)
        before = {key: resumed[key] for key in OWN_KEYS if key in resumed}
        _refuse_changes(before, self.own_given)
        self.options = Options.of({**before, **self.own_given})
        refuse_unsupported(vars(self.args), self.options)
        check_precision(self.options.precision, self.args.device, self.args.amp)
        self.source = resolve_data(self.args.data)
        self.args.data = str(self.source.yaml)
        run = Path(get_save_dir(self.args))
        if self.source.folder is not None and run.resolve().is_relative_to(self.source.folder.resolve()):
            raise ConfigError(
                f"the run folder {run} would lie inside the set {self.source.folder}; give project=<elsewhere>"
            )
        self._described = self._describe_data()
        self.args.model = model_argument(self.args.model, self.options.download)
        if isinstance(self.args.pretrained, (str, Path)) and not resumed:
            self.args.pretrained = checkpoint_argument(str(self.args.pretrained), self.options.download)
        started = ""
        if self.options.backbone and not resumed:
            file = start_argument({**vars(self.args), "backbone": self.options.backbone}, self.options.download)
            self.options = dataclasses.replace(self.options, backbone=file)
            started = file_sha256(Path(file))
        self._load_teacher(bool(resumed))
        self._open_targets(bool(resumed))
        self.origin = {"set": self.source.manifest_sha256, "teacher": self._teacher_sha256}
        if self.targets is not None:
            self.origin["targets"] = self.targets.sha256
        began_with = before.get(ORIGIN_KEY) or {}
        if started := began_with.get("backbone", started):
            self.origin["backbone"] = started
        if resumed:
            self._check_origin(began_with)

    def _load_teacher(self, resuming: bool) -> None:
        self._teacher_sha256 = ""
        if not self.options.uses_teacher:
            return
        try:
            names = self._described["names"]
            file = resolve_weights(str(self.options.teacher), self.options.download)
            self.teacher = load_detector(file, "cpu", [str(names[i]) for i in range(len(names))])
        except WeightsError as error:
            if not resuming:
                raise
            raise WeightsError(
                f"the run that is resumed was taught by {self.options.teacher}, which cannot be used now: {error}\n"
                "Put the file back, or give its new place with teacher=<path>"
            ) from error
        self._teacher_sha256 = self.teacher.sha256

    def _open_targets(self, resuming: bool) -> None:
        if not self.options.uses_targets:
            return
        try:
            self.targets = store = TargetStore(str(self.options.targets))
        except VerifyError as error:
            if not resuming:
                raise
            raise VerifyError(
                f"the run that is resumed was taught from {self.options.targets}, which cannot be used now: {error}\n"
                "Put the folder back, or give its new place with targets=<folder>"
            ) from error
        args, names = self.args, self._described["names"]
        whole = {"multi_scale": 0.0, "rect": False, "fraction": 1.0, "classes": None}
        if wrong := [key for key, usual in whole.items() if getattr(args, key) != usual]:
            raise ConfigError(
                f"{', '.join(wrong)} would give other views than the stored ones; leave them out, or ask the "
                "teacher in the training with teacher="
            )
        if self.options.kl_temperature != 1 and not store.exact:
            raise ConfigError(
                f"kl_temperature={self.options.kl_temperature}: what {store.folder} leaves out is summed up at "
                "temperature 1; give that, use teacher=, or make a store with floor=0 topk=0"
            )
        folder = self.source.folder or self.source.yaml.parent
        described = [str(names[i]) for i in range(len(names))]
        store.check_set(folder, self.source.manifest_sha256, self.source.count, described)
        asked = {key: getattr(args, key, None) for key in VIEWS}
        asked["augmentations"] = as_stored(asked["augmentations"])
        self.pool = store.check_views(asked, int(args.epochs), int(args.close_mosaic), self.options.targets_pool)
        store.check_student(*student_head(str(args.model)), str(args.model))

    def _check_origin(self, began_with: Mapping[str, str]) -> None:
        if began_with.get("set", self.origin["set"]) != self.origin["set"]:
            raise VerifyError(
                f"{self.source.yaml.parent} holds another set than the one this run began with (manifest.jsonl "
                f"{self.origin['set'][:12] or 'missing'} instead of {began_with['set'][:12] or 'none'}); put the set "
                "back, or start a new run on this one"
            )
        if began_with.get("teacher", self.origin["teacher"]) != self.origin["teacher"]:
            raise WeightsError(
                f"{self.options.teacher} is another file than the teacher this run began with; put it back, or start a "
                "new run with this one"
            )
        if began_with.get("targets") != self.origin.get("targets"):
            raise VerifyError(
                f"targets={self.options.targets} are other ones than this run began with; put those back, or start a "
                "new run"
            )

    def get_dataset(self) -> dict[str, Any]:
        """The set's description for Ultralytics; its val split is that of `eval_data`, or the set's own."""
        return self._described

    def _describe_data(self) -> dict[str, Any]:
        data = load_yolo_data(self.source.yaml, "train")
        if self.args.single_cls:
            data["names"], data["nc"] = {0: "item"}, 1
        self.eval_source: dict[str, Any] | None = None
        self.annotations: Path | None = None
        if self.options.eval_data:
            self.eval_source = load_yolo_data(resolve_data(self.options.eval_data).yaml, "val")
            data["val"] = self.eval_source["val"]
            shared = set(self.eval_source["names"].values()) & set(data["names"].values())
            if not shared and not self.args.single_cls:
                raise DataError(
                    f"eval_data={self.options.eval_data} shares no class name with the training data.\n"
                    f"  training: {', '.join(data['names'].values())}\n"
                    f"  evaluation: {', '.join(self.eval_source['names'].values())}"
                )
            if self.source.folder is not None and self.eval_source["val"] == data["train"]:
                LOGGER.warning(f"{PREFIX}eval_data is the training set: its mAP is no measure of quality")
            self.annotations = self._find_annotations(data)
        else:
            self.args.val = False
        return data

    def _find_annotations(self, data: dict[str, Any]) -> Path | None:
        assert self.eval_source is not None
        given = self.options.eval_annotations
        if given == NO_ANNOTATIONS or self.args.single_cls:
            LOGGER.info(f"{PREFIX}no COCO mAP ({'single_cls' if self.args.single_cls else 'eval_annotations=none'})")
            return None
        found = Path(given) if given else coco_eval.usual_annotations(self.eval_source)
        if found is None:
            LOGGER.warning(
                f"{PREFIX}no annotations JSON beside eval_data={self.options.eval_data}: no COCO mAP will be quoted. "
                "Give one with eval_annotations=, or make one with `focusdd annotations`"
            )
            return None
        truth = coco_eval.load_annotations(found)
        coco_eval.class_map([str(n) for n in data["names"].values()], truth)  # fail now, not after the training
        coco_eval.match_images(truth, coco_eval.list_images(data["val"]), subset=False)
        return found

    # ---- data ----

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> CleanDataset:
        """Training: replayable and checked against the manifest. Validation: by class name, nothing written."""
        stride = max(int(unwrap_model(self.model).stride.max()), 32)
        train = mode == "train"
        data = self.data if train or self.eval_source is None else self.eval_source
        renamed = not train and self.eval_source is not None and not self.args.single_cls
        common = {
            "img_path": img_path,
            "imgsz": self.args.imgsz,
            "batch_size": batch,
            "augment": train,
            "hyp": self.args,
            "rect": self.args.rect or not train,
            "cache": (self.args.cache or None) if train or self.eval_source is not None else None,
            "single_cls": self.args.single_cls or False,
            "stride": stride,
            "pad": 0.0 if train else 0.5,
            "prefix": colorstr(f"{mode}: "),
            "task": "detect",
            "classes": self.args.classes if train or not renamed else None,  # numbers of the training's classes
            "data": data,
            "fraction": self.args.fraction if train else 1.0,
        }
        if not train:
            dataset = CleanDataset(**common)
            if renamed:
                rename_classes(dataset, data["names"], self.data["names"])
                dataset.update_labels(self.args.classes)
            return dataset
        dataset = ReplayDataset(**common, seed=self.args.seed, pool=self.pool)
        if self.source.folder is not None and self.args.fraction == 1.0:
            check_count(dataset, self.source)
        return dataset

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """Training batches depend on (seed, epoch) alone; validation is Ultralytics' own loader."""
        if mode != "train":
            return super().get_dataloader(dataset_path, batch_size, rank, mode)
        with torch_distributed_zero_first(rank):
            dataset = self.build_dataset(dataset_path, mode, batch_size)
        assert isinstance(dataset, ReplayDataset)
        return replay_loader(
            dataset,
            batch_size,
            min(self.args.workers, processors()),
            seed=self.args.seed,
            shuffle=not (dataset.rect and bool((dataset.batch_shapes != dataset.batch_shapes[0]).any())),
            rank=rank,
            world=max(self.world_size, 1),
            drop_last=bool(self.args.compile),
            pin_memory=self.device.type == "cuda",
            then=partial(add_stored_heads, self.targets) if self.targets else None,
        )

    def get_validator(self) -> DetectionValidator:
        """With arguments that stock Ultralytics knows."""
        args = copy(self.args)
        for key in OWN_KEYS:
            delattr(args, key)
        return _Validator(self.test_loader, save_dir=self.save_dir, args=args, _callbacks=self.callbacks)

    # ---- model, teacher, criterion ----

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> DetectionModel:
        """Ultralytics' own, then the start of the backbone, if one is given."""
        model = super().get_model(cfg, weights, verbose)
        if self.options.backbone and not self.resume:
            if weights is not None:
                raise ConfigError(
                    f"backbone={self.options.backbone}: the model has weights already; give one as its .yaml makes it"
                )
            start_backbone(model, Path(self.options.backbone), self.args.freeze)
        return model

    def set_model_attributes(self) -> None:
        """Ultralytics' own; also where the layout of the student's weights on a CPU is decided."""
        super().set_model_attributes()
        if self._channels_last:
            self.model.to(memory_format=torch.channels_last)

    def _setup_train(self) -> None:
        self._aside = Aside(self.device)
        asked, on_cpu = self.args.channels_last, self.device.type == "cpu"
        usual = self.device.type == "cuda" and not WINDOWS  # as Ultralytics has it for the student
        channels_last = usual if asked is None else bool(asked)
        self._channels_last = on_cpu and channels_last
        if on_cpu:
            self.args.channels_last = None  # Ultralytics would say that it ignores it here
        if self.args.batch < 1 and self.teacher is not None and not on_cpu:
            LOGGER.warning(
                f"{PREFIX}batch={self.args.batch}: Ultralytics chooses the size without counting the teacher; give one "
                "if the memory runs out"
            )
        with safe_ultralytics(), local_amp_check():
            super()._setup_train()
        self.args.channels_last = asked
        if self._bf16_on_cpu:
            warn_if_slow()
        model = unwrap_model(self.model)
        head = model.model[-1]
        if self.teacher is not None:
            if getattr(head, "one2one_cv2", None) is None:
                self.teacher.drop_one2one()
            self.teacher.to(self.device, self._teacher_dtype(), channels_last)
        reg_max = self.teacher.reg_max if self.teacher else int(head.reg_max)  # stored targets have the student's
        model.criterion = build_criterion(model, self.options, reg_max)
        if self.start_epoch and hasattr(model.criterion, "updates"):  # the schedule of YOLO26's two heads
            model.criterion.updates = self.start_epoch - 1
            model.criterion.update()
        if self.eval_source is None:
            LOGGER.info(f"{PREFIX}no eval_data: the only val split is the set's own. {ON_COMPOSITES}")
        if RANK in {-1, 0}:
            self._write_focusdd_yaml()

    def _write_focusdd_yaml(self) -> None:
        content = {
            **dataclasses.asdict(self.options),
            "teacher_sha256": self.targets.teacher_sha256 if self.targets else self._teacher_sha256,
            "targets_sha256": self.targets.sha256 if self.targets else "",
            "set_manifest_sha256": self.source.manifest_sha256,
            "backbone_sha256": self.origin.get("backbone", ""),
            "annotations": str(self.annotations) if self.annotations else None,
            "versions": {
                "focusdd_det": __version__,
                "ultralytics": ultralytics.__version__,
                "torch": str(torch.__version__),
            },
        }
        note = "# Options and versions of this run that args.yaml (stock Ultralytics) has no place for.\n"
        text = note + yaml.safe_dump(content, sort_keys=False)
        write_atomic(Path(self.save_dir) / "focusdd.yaml", text.encode())

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ultralytics' own, then the teacher's heads, asked or stored, on the very pictures that the student sees."""
        batch = super().preprocess_batch(batch)
        if self.teacher is not None:
            with self._aside.running():
                heads = self.teacher.heads(batch["img"])
                finite = all_finite(heads)
                self._teacher_finite = finite if self._teacher_finite is None else self._teacher_finite & finite
            batch[TEACHER_KEY] = Begun(heads, self._aside.join)
        elif self.targets is not None:
            batch[TEACHER_KEY] = batch[TEACHER_KEY].to(self.device)
        if self._resumed_step is not None:
            # Ultralytics counts accumulated batches from -1 after a resume; shift its threshold to the true count.
            self._nominal = self.accumulate
            self.accumulate += self._resumed_step + 1
        return batch

    def _check_teacher_outputs(self) -> None:
        """Asked once an epoch: asking after every batch would wait for the device."""
        finite, self._teacher_finite = self._teacher_finite, None
        if finite is not None and not bool(finite):
            raise WeightsError(
                f"the teacher {self.options.teacher} gave values that are not finite (NaN or infinity) on pictures of "
                f"epoch {self.epoch + 1}; nothing of that epoch is kept. Its weights are damaged or overflow: get the "
                "checkpoint again, or train with amp=False"
            )

    def _do_train(self) -> None:
        """Ultralytics' loop; see run_guard for what ends it from outside."""
        with guarded(self), self.mixed_precision():
            super()._do_train()

    def mixed_precision(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the autocast of Ultralytics' step is that of `precision`."""
        return bf16_on_cpu() if self._bf16_on_cpu else contextlib.nullcontext()

    @property
    def _bf16_on_cpu(self) -> bool:
        return self.device.type == "cpu" and self.options.precision == "bf16"

    def _teacher_dtype(self) -> torch.dtype:
        """The teacher's forward in the precision of the student's."""
        if self._bf16_on_cpu or (self.amp and self.args.amp == "bf16"):
            return torch.bfloat16
        return torch.float16 if self.amp else torch.float32

    # ---- exact resume ----

    def run_callbacks(self, event: str) -> None:
        """Ultralytics' hook; also where the position inside an epoch is followed."""
        if event == "on_train_epoch_start":
            self._batch = -1
            if self.train_loader.iterator is None:
                self.train_loader.sampler.next_epoch = self.epoch
            if self._state is not None:
                self._continue_from(self._state)
                self._state = None
            elif self.epoch == self.start_epoch == 0 and RANK in {-1, 0}:
                self._save_state(-1)  # so that a kill while the first epoch is saved costs nothing but that epoch
        elif event == "on_train_epoch_end":
            self._check_teacher_outputs()
        elif event == "on_train_batch_start":
            self._batch += 1
            if self._nominal is not None:
                self.accumulate, self._nominal = self._nominal, None
        super().run_callbacks(event)

    def optimizer_step(self) -> None:
        """Ultralytics' own; remembers when."""
        super().optimizer_step()
        self._last_step = self._batch + len(self.train_loader) * self.epoch
        if self._nominal is not None:
            self.accumulate, self._nominal = self._nominal, None
        self._resumed_step = None

    def _close_dataloader_mosaic(self) -> None:
        super()._close_dataloader_mosaic()
        rewind(self.train_loader, self.epoch)

    def _build_train_pipeline(self) -> None:
        super()._build_train_pipeline()
        self._forget_accumulation()

    def _handle_nan_recovery(self, epoch: int) -> bool:
        with safe_ultralytics():
            recovering = bool(super()._handle_nan_recovery(epoch))
        if recovering:
            self._forget_accumulation()
            rewind(self.train_loader, epoch)
        return recovering

    def _forget_accumulation(self) -> None:
        self._last_step, self._resumed_step, self._nominal = -1, None, None

    def save_model(self) -> bool:
        """Stock last.pt and best.pt, each replaced whole; then what an exact resume needs beside them."""
        saved = bool(super().save_model())
        if saved and not self.stop:
            self._save_state(self.epoch)
        return saved

    def _save_state(self, epoch: int) -> None:
        counters = {
            "epoch": epoch,
            "batches": len(self.train_loader),
            "batch_size": self.batch_size,
            "seed": self.args.seed,
            "last_step": self._last_step,
            "ema_updates": self.ema.updates,
            "scaler": self.scaler.state_dict(),
            "best_fitness": _plain(self.best_fitness),
            "stopper": {
                "best_fitness": _plain(self.stopper.best_fitness),
                "best_epoch": self.stopper.best_epoch,
                "possible_stop": bool(self.stopper.possible_stop),
            },
            ORIGIN_KEY: self.origin,
        }
        state = exact_resume.capture(unwrap_model(self.model), self.ema.ema, self.optimizer, counters)
        exact_resume.save(state, Path(self.wdir))

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """From resume.safetensors if it belongs to this last.pt; else as Ultralytics does, saying so."""
        if ckpt is None or not self.resume:
            return
        state = exact_resume.load(Path(self.args.resume).parent)
        epoch = int(ckpt.get("epoch", -1))
        # last.pt is written first, so after a kill between the two it is one epoch ahead; that epoch is run again.
        if state is None or state.epoch not in (epoch, epoch - 1) or state.counters[ORIGIN_KEY] != self.origin:
            LOGGER.warning(
                f"{PREFIX}no matching {exact_resume.TENSORS} beside {self.args.resume}: resuming as Ultralytics "
                "does, from half-precision weights. The result will not be exactly that of an unbroken run"
            )
            if epoch + 1 >= self.epochs:
                raise WeightsError(
                    f"{self.args.resume} has all {self.epochs} epochs, so there is nothing to resume; validate it with "
                    f"tools/val_coco.py, or start a new run from it with model={self.args.resume}"
                )
            super().resume_training(ckpt)
            cut_results(self.csv, self.start_epoch)
            return
        super().resume_training({**ckpt, "epoch": max(state.epoch, 0)})  # it refuses to resume before the first epoch
        self.start_epoch = state.epoch + 1
        exact_resume.restore(state, unwrap_model(self.model), self.ema.ema, self.optimizer)
        self.ema.updates = state.counters["ema_updates"]
        if state.counters["scaler"]:
            self.scaler.load_state_dict(state.counters["scaler"])
        self.best_fitness = state.counters["best_fitness"]
        self.stopper.__dict__.update(state.counters["stopper"])
        self._state = state
        cut_results(self.csv, self.start_epoch)
        LOGGER.info(f"{PREFIX}resuming exactly after epoch {self.start_epoch}")

    def _continue_from(self, state: exact_resume.ResumeState) -> None:
        exact_resume.restore_generators(state)
        if state.counters["batches"] == len(self.train_loader):
            exact_resume.restore_gradients(state, unwrap_model(self.model))
            self._last_step = self._resumed_step = int(state.counters["last_step"])
        else:
            LOGGER.warning(f"{PREFIX}another batch size than before: not exactly the unbroken run")

    # ---- validation and the end ----

    def validate(self) -> tuple[dict[str, float], float | None]:
        """Ultralytics' own on `eval_data`; without it nothing is measured on the training composites."""
        if self.eval_source is None:
            LOGGER.info(f"{PREFIX}val = images/train, {ON_COMPOSITES}")
            return self.metrics or {}, None
        metrics, fitness = super().validate()
        return metrics, fitness

    def progress_string(self) -> str:
        """Ultralytics' header, with the KL names short enough for its columns."""
        names: tuple[str, ...] = self.loss_names
        self.loss_names = tuple(n.removesuffix("_loss") if n.startswith("kl_") else n for n in names)
        try:
            return str(super().progress_string())
        finally:
            self.loss_names = names

    def save_metrics(self, metrics: dict[str, float]) -> None:
        """A row of results.csv; columns that nothing measured are left out."""
        if self.eval_source is None:
            metrics = {k: v for k, v in metrics.items() if not k.startswith(("val/", "metrics/"))}
        super().save_metrics(metrics)

    def final_eval(self) -> None:
        """Strip the checkpoints, validate best.pt on `eval_data`, and quote the official COCO mAP of last.pt."""
        with torch_distributed_zero_first(LOCAL_RANK):
            if RANK in {-1, 0} and Path(self.last).is_file():
                results = strip(self.last, None).get("train_results")
                if Path(self.best).is_file():
                    strip(self.best, {"train_results": results})
        if self.eval_source is not None and Path(self.best).is_file():
            LOGGER.info(f"\nValidating {self.best} with Ultralytics' own mAP (selected on this very split)...")
            self.validator.args.plots = self.args.plots
            self.validator.args.compile = False
            with safe_ultralytics(), resolved_yaml(self.data) as file:
                self.validator.args.data = str(file)  # it reads class names there, and finds paths by its own rules
                self.metrics = self.validator(model=Path(self.best))
            self.metrics.pop("fitness", None)
            self.epoch += 1
            self.run_callbacks("on_fit_epoch_end")
            self.epoch -= 1
        if RANK in {-1, 0}:
            self._coco_eval()
            exact_resume.remove(Path(self.wdir))

    def _coco_eval(self) -> None:
        if self.annotations is None:
            if self.eval_source is not None:
                LOGGER.info(f"{PREFIX}no annotations JSON for eval_data, so no COCO mAP; give eval_annotations=")
            return
        covered = coco_eval.known_of(self.source.covered, self.annotations)
        runs = {"last": "headline", "best": "selected on val"}
        results = {}
        for name, meaning in runs.items():
            file = Path(self.wdir) / f"{name}.pt"
            if file.is_file():
                result = coco_eval.evaluate(
                    file,
                    self.annotations,
                    self.data["val"],
                    imgsz=self.args.imgsz,
                    batch=max(1, 2 * self.batch_size // max(self.world_size, 1)),
                    device=str(self.device),
                    covered=covered or None,
                )
                results[name] = {"meaning": meaning, **result.as_dict()}
                LOGGER.info(f"{PREFIX}{name}.pt ({meaning})\n{result.table(per_class=False)}")
        coco_eval.write_json(results, Path(self.save_dir) / "coco_eval.json")


class _Validator(DetectionValidator):  # type: ignore[misc]
    """Ultralytics', without the COCO evaluation that it starts by itself where the val split is COCO's val2017.txt: it
    numbers the classes by their position among COCO's 80. `_coco_eval` is the one that is quoted."""

    def init_metrics(self, model: torch.nn.Module) -> None:
        asked = self.args.save_json
        super().init_metrics(model)
        self.args.save_json = asked


def _refuse_changes(before: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """A run that goes on may find its files elsewhere, and nothing else of our options may be another.

    Raises:
        ConfigError: naming what is.
    """
    if not before:
        return
    usual = {field.name: field.default for field in dataclasses.fields(Options)}  # of an option that came later
    other = [
        key for key, value in given.items() if key not in MOVABLE and value != before.get(key, usual.get(key, value))
    ]
    other += [key for key in ("eval_data",) if given.get(key) and not before.get(key)]
    if other:
        raise ConfigError(
            f"a resumed run keeps {', '.join(other)} as it began; leave that out, or start a new run (model=<last.pt>)"
        )


def add_stored_heads(targets: TargetStore, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with what the teacher said about its views; done where its pictures are loaded.

    Raises:
        VerifyError: as `TargetStore.heads`.
    """
    return {**batch, TEACHER_KEY: targets.heads(batch["view"], batch["look"])}


def all_finite(heads: Mapping[str, Any]) -> torch.Tensor:
    """Whether no output of a teacher is NaN or infinite; a tensor, so that nothing waits for the device."""
    flags = [
        all_finite(v) if isinstance(v, Mapping) else torch.isfinite(v.sum(dtype=torch.float32)) for v in heads.values()
    ]
    return torch.stack(flags).all()


def _plain(value: Any) -> float | None:
    return None if value is None else float(value)
