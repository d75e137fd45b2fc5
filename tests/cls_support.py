"""Drawn class folders and tiny trainings that the tests of the classification trainer share."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from ultralytics.utils import callbacks

from focusdd_det.classify import nets
from focusdd_det.classify.trainer import FocusDDClassificationTrainer

CLASSES = ("bar", "disc", "square")
SIZE = 32
NET = "test_resnet"  # of timm; a few thousand weights


def write_folders(folder: Path, split: str, count: int, seed: int, size: int = 40) -> Path:
    """Class folders of drawn pictures."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(CLASSES):
        (folder / split / name).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(60, 200, (size, size, 3)).astype(np.uint8)
            colour = [int(v) for v in np.eye(3)[number] * 255]
            x, y = (int(v) for v in rng.integers(0, size // 2, 2))
            if name == "disc":
                cv2.circle(image, (x + size // 4, y + size // 4), size // 4, colour, -1)
            else:
                height = size // 2 if name == "square" else size // 6
                cv2.rectangle(image, (x, y), (x + size // 2, y + height), colour, -1)
            cv2.imwrite(str(folder / split / name / f"{i}.png"), image)
    return folder


def make_pictures(folder: Path) -> Path:
    """Class folders: 13 pictures to train on, 12 to measure on."""
    write_folders(folder, "train", 4, 0)
    write_folders(folder, "val", 4, 1)
    cv2.imwrite(str(folder / "train" / "disc" / "extra.png"), np.full((40, 50, 3), 90, np.uint8))
    return folder


def make_teacher(folder: Path) -> Path:
    """Spec of a tiny teacher with the classes in another order and one more."""
    torch.manual_seed(5)
    net = nets.make_net(NET, 4)
    net.module.get_classifier().weight.data.mul_(40)
    path = folder / "teacher.json"
    nets.save_spec(path, net, ("square", "other", "disc", "bar"), SIZE)
    return path


def options(tmp_path: Path, data: Path, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "model": NET,
        "data": str(data),
        "eval_data": str(data),
        "labels": "hard",
        "epochs": 3,
        "imgsz": SIZE,
        "batch": 4,
        "project": str(tmp_path / "runs"),
        "name": "run",
        "device": "cpu",
        "plots": False,
        "verbose": False,
    }
    if more.get("teacher") or more.get("store"):
        base["labels"] = None
    return {**base, **more}


def train(tmp_path: Path, data: Path, **more: Any) -> FocusDDClassificationTrainer:
    trainer = FocusDDClassificationTrainer(overrides=options(tmp_path, data, **more))
    trainer.train()
    return trainer


class Killed(Exception):
    """Stands for the process dying."""


def kill_in(epoch: int, event: str = "on_train_batch_end") -> dict[str, list[Any]]:
    def die(trainer: Any) -> None:
        if trainer.epoch == epoch:
            raise Killed

    return {**callbacks.get_default_callbacks(), event: [die]}


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "results.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "time"} for row in csv.DictReader(file)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(run: Path, column: str) -> list[float]:
    return [float(row[column]) for row in rows(run)]
