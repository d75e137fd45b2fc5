"""Tiny classification sets, class folders and teachers, made on the spot."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import torch

from focusdd_det import detset
from focusdd_det.classify.nets import Net, make_net, save_spec

CLASSES = ("n03", "n01", "n02")  # not sorted: an order that is guessed comes out wrong


def picture(rng: np.random.Generator, width: int, height: int, colour: int) -> np.ndarray:
    image = rng.integers(0, 120, (height, width, 3)).astype(np.uint8)
    image[height // 4 : height // 2, width // 4 : width // 2, colour % 3] = 250
    return image


def jpeg(image: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())


def write_class_set(folder: Path, count: int = 7, size: int = 32, names: tuple[str, ...] = CLASSES) -> Path:
    """A classification set of drawn pictures, complete as a build would leave it."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        name = names[i % len(names)]
        data = jpeg(picture(rng, size, size, i % len(names)))
        hashes = {"images": hashlib.sha256(data).hexdigest()}
        item = detset.Item(f"{i:03d}_{name}_{i:05d}", name, i % len(names), name, i, i, i, (), 0, hashes)
        path = detset.part_path(folder, "images", item)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        lines.append(item.line())
    (folder / "manifest.jsonl").write_text("".join(lines))
    (folder / "build.yaml").write_text("format: focusdd_det set\ntask: classify\n")
    (folder / "data.yaml").write_bytes(detset.data_yaml(names, "classify"))
    (folder / "README.md").write_text("a set for tests\n")
    (folder / "COMPLETE").write_bytes(detset.seal(folder))
    return folder


def write_class_folders(folder: Path, names: tuple[str, ...] = CLASSES, each: int = 2, seed: int = 1) -> Path:
    """<folder>/<class>/*.jpg with pictures of several sizes."""
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            image = picture(rng, 40 + 3 * i, 36 + 2 * i, CLASSES.index(name) if name in CLASSES else 0)
            (folder / name / f"p{i}.jpg").write_bytes(jpeg(image))
    return folder


def tiny_net(classes: int, seed: int = 0) -> Net:
    """A convolutional network of timm's own test models whose logits differ from picture to picture."""
    torch.manual_seed(seed)
    net = make_net("test_efficientnet", classes)
    for module in net.module.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    net.module.classifier.weight.data.mul_(20)
    net.module.eval()
    return net


def write_teacher(path: Path, names: tuple[str, ...] = CLASSES, seed: int = 0) -> Path:
    """A teacher's .json and weights."""
    save_spec(path, tiny_net(len(names), seed), names, 32)
    return path.with_suffix(".json")


def write_shuffled_teacher(path: Path, teacher: Net, names: tuple[str, ...], order: list[int]) -> Path:
    """The same teacher with its outputs in another order, and the classes named accordingly."""
    for tensor in (teacher.module.classifier.weight, teacher.module.classifier.bias):
        tensor.data = tensor.data[order].clone()
    save_spec(path, teacher, [names[i] for i in order], 32)
    return path.with_suffix(".json")
