"""Ultralytics' own feature distillation (`distill_model=`) on a distilled set, as the arm to compare with.

The trainer, the loss, the data order and the augmentation are stock. What differs from `yolo train` is only what must:
no label cache (a pickle) is left in the set, nothing is downloaded, checkpoints are read without running code, and
nothing is validated on the training composites. On a CPU, `precision` and `channels_last` mean what they mean for the
arms beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG, LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from focusdd_det.checkpoints import safe_ultralytics
from focusdd_det.config import read_yaml, suggest
from focusdd_det.errors import ConfigError
from focusdd_det.training.arguments import check_stock
from focusdd_det.training.clean_data import CleanDataset
from focusdd_det.training.precision import bf16_on_cpu, check_precision, local_amp_check
from focusdd_det.training.run_files import WholePath, checkpoint_argument, model_argument, strip
from focusdd_det.training.start import start_argument, start_backbone
from focusdd_det.training.supervision import PRECISIONS, Options
from focusdd_det.training.traindata import check_count, load_yolo_data, resolve_data

LEFT_OUT = (*Options.keys(), "val")  # keys of ours, which stock Ultralytics does not know


def stock_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """A training's keys -> those of stock Ultralytics with `distill_model`: same optimizer, seed and augmentation.

    Raises:
        ConfigError: no teacher.
    """
    if not values.get("teacher"):
        raise ConfigError("supervision=distill_model needs teacher=<checkpoint>, e.g. teacher=yolo11x.pt")
    stock = {key: value for key, value in values.items() if key not in LEFT_OUT}
    return {"augmentations": [], **stock, "distill_model": str(values["teacher"]), "val": False}


def check_distill(values: dict[str, Any]) -> None:
    """ConfigError where the arguments cannot be used."""
    stock = stock_arguments(values)
    check_stock(stock, "detect")
    precision = values.get("precision", "fp32")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision!r}: expected fp32 or bf16{suggest(str(precision), PRECISIONS)}")
    check_precision(precision, stock.get("device"), stock.get("amp", True))
    if values.get("backbone"):
        _on_one_device(stock.get("device"))


def _on_one_device(device: Any) -> None:
    """The processes of several GPUs are given arguments that stock Ultralytics knows, and no others."""
    several = len(device) > 1 if isinstance(device, (list, tuple)) else "," in str(device)
    if several:
        raise ConfigError(
            f"supervision=distill_model takes backbone= on one device alone; device={device}, give device=0"
        )


class StockDistillation(DetectionTrainer):  # type: ignore[misc]
    """Ultralytics' trainer, kept from writing into the set and from measuring on it."""

    def __init__(
        self,
        cfg: Any = DEFAULT_CFG,
        overrides: dict[str, Any] | None = None,
        _callbacks: dict[str, Any] | None = None,
        *,
        precision: str = "fp32",
        backbone: str | None = None,
    ) -> None:
        """As Ultralytics builds its trainers, also in the processes of several GPUs."""
        self.precision = precision
        self.backbone = backbone
        overrides = dict(overrides or {})
        self.source = resolve_data(overrides["data"])
        overrides = {**overrides, "data": str(self.source.yaml), "task": "detect"}
        overrides["model"] = model_argument(overrides["model"], False)
        overrides["distill_model"] = checkpoint_argument(overrides["distill_model"], False)
        if backbone:
            _on_one_device(overrides.get("device"))
            self.backbone = start_argument({**overrides, "backbone": backbone}, False)
        with safe_ultralytics():
            super().__init__(cfg, overrides, _callbacks)
        self.wdir: Path = WholePath(self.save_dir / "weights")
        self.last, self.best = self.wdir / "last.pt", self.wdir / "best.pt"

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> DetectionModel:
        """Stock, then the start of the backbone, if one is given."""
        model = super().get_model(cfg, weights, verbose)
        if self.backbone and not self.resume:
            start_backbone(model, Path(self.backbone), self.args.freeze)
        return model

    def get_dataset(self) -> dict[str, Any]:
        """The set's description."""
        return load_yolo_data(self.source.yaml, "train")

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> CleanDataset:
        """Stock, without a label cache."""
        stride = max(int(unwrap_model(self.model).stride.max()), 32)
        dataset = CleanDataset(
            img_path=img_path,
            imgsz=self.args.imgsz,
            batch_size=batch,
            augment=mode == "train",
            hyp=self.args,
            rect=self.args.rect if mode == "train" else True,
            cache=self.args.cache or None,
            single_cls=self.args.single_cls or False,
            stride=stride,
            pad=0.0 if mode == "train" else 0.5,
            task="detect",
            classes=self.args.classes,
            data=self.data,
            fraction=self.args.fraction if mode == "train" else 1.0,
        )
        if mode == "train" and self.source.folder is not None and self.args.fraction == 1.0:
            check_count(dataset, self.source)
        return dataset

    def _setup_train(self) -> None:
        asked, on_cpu = self.args.channels_last, self.device.type == "cpu"
        if on_cpu:
            self.args.channels_last = None  # Ultralytics would say that it ignores it here
        with safe_ultralytics(), local_amp_check():
            super()._setup_train()
        self.args.channels_last = asked
        if on_cpu and asked:  # student and teacher
            self.model.to(memory_format=torch.channels_last)

    def _do_train(self) -> None:
        bf16 = self.precision == "bf16" and self.device.type == "cpu"
        with bf16_on_cpu() if bf16 else contextlib.nullcontext():
            super()._do_train()

    def validate(self) -> tuple[dict[str, float], float | None]:
        """Nothing: the only val split is the set itself."""
        return self.metrics or {}, None

    def final_eval(self) -> None:
        """Only strip the checkpoints: the evaluation is a stage of its own."""
        for file in (self.last, self.best):
            if Path(file).is_file():
                strip(Path(file), None)


def distill_command(argv: Sequence[str]) -> int:
    """Train from the YAML file with the training's keys."""
    values = read_yaml(Path(argv[0]))
    trainer = StockDistillation(
        overrides=stock_arguments(values), precision=values.get("precision", "fp32"), backbone=values.get("backbone")
    )
    trainer.train()
    LOGGER.info(f"run folder: {trainer.save_dir}")
    return 0
