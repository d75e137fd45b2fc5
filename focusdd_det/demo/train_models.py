"""Trains the two models that ship with the demo: a small ViT with a class token, and a small YOLO11.

Both learn from drawn pictures alone. About 25 minutes on two cores; the result is checked before it is written.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import timm
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from focusdd_det.demo.objects import CLASSES
from focusdd_det.demo.scenes import POOR, Picture, plan_many, plan_single, render, seeded
from focusdd_det.demo.write import encode_jpeg, write_val, yolo_labels
from focusdd_det.selector import ClassTokenRows

HERE = Path(__file__).resolve().parent
VIEW = 112  # px; with patches of 16 px the token grid is 7 x 7, as in the paper
ARCH = "vit_tiny_patch16_224"
KWARGS = {"img_size": VIEW, "patch_size": 16, "embed_dim": 96, "depth": 6, "num_heads": 4}
MEAN = STD = (0.5, 0.5, 0.5)
COMPOSITE = 256  # px; composites of 2 x 2 pictures, as the teacher will have to label them


def draw_single(index: int) -> Picture:
    """Training picture `index` of one object; one in six is poor, so that poor ones stay doubtful to the ViT."""
    key = f"train/single/{index}"
    rng = seeded(key, "kind")
    poor = POOR[int(rng.integers(len(POOR)))] if rng.random() < 1 / 6 else None
    return render(plan_single(key, CLASSES[index % len(CLASSES)], poor))


def draw_many(index: int) -> Picture:
    """Training picture `index` of several objects."""
    return render(plan_many(f"train/many/{index}"))


def draw_composite(singles: list[Picture], index: int) -> Picture:
    """A 2 x 2 grid of square cuts of single-object pictures, with the boxes of the objects that are left in them."""
    rng = seeded("train/composite", index)
    cell = COMPOSITE // 2
    image = np.zeros((COMPOSITE, COMPOSITE, 3), np.uint8)
    boxes, classes = [], []
    for position in range(4):
        picture = singles[int(rng.integers(len(singles)))]
        height, width = picture.image.shape[:2]
        side = int(min(height, width) * rng.uniform(0.6, 1))
        x, y = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        if len(picture.boxes) and rng.random() < 0.6:  # most cuts hold the object's centre
            cx, cy = (picture.boxes[0, :2] + picture.boxes[0, 2:]) / 2
            x = int(np.clip(cx - side * rng.uniform(0.2, 0.8), 0, width - side))
            y = int(np.clip(cy - side * rng.uniform(0.2, 0.8), 0, height - side))
        left, top = position % 2 * cell, position // 2 * cell
        cut = picture.image[y : y + side, x : x + side]
        shrink = cv2.INTER_AREA if side > cell else cv2.INTER_CUBIC
        image[top : top + cell, left : left + cell] = cv2.resize(cut, (cell, cell), interpolation=shrink)
        for box, cls in zip(picture.boxes, picture.classes, strict=True):
            inside = np.clip(box - [x, y, x, y], 0, side)
            kept = np.prod(inside[2:] - inside[:2]) / np.prod(box[2:] - box[:2])
            if kept >= 0.3 and (inside[2:] - inside[:2]).min() * cell / side >= 5:
                boxes.append(inside * cell / side + [left, top, left, top])
                classes.append(int(cls))
    count = len(boxes)
    return Picture(
        image,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(classes, np.int64),
        np.zeros(count, np.float32),
    )


def _squash(picture: Picture) -> tuple[Tensor, Tensor]:
    """The view [3, VIEW, VIEW] uint8 and the object's box in it in [-1, 1], or zeros if it cannot be seen."""
    height, width = picture.image.shape[:2]
    view = cv2.resize(picture.image, (VIEW, VIEW), interpolation=cv2.INTER_AREA)
    box = np.zeros(4, np.float32)
    if len(picture.boxes):
        box = picture.boxes[0] / np.array([width, height, width, height], np.float32) * 2 - 1
    return torch.from_numpy(view).permute(2, 0, 1), torch.from_numpy(box.astype(np.float32))


def _augment(pixels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Zoom, shift, mirror, swap colour channels, change contrast; [B, 3, S, S] in [0, 1] and boxes in [-1, 1]."""
    count = len(pixels)
    zoom = torch.empty(count).uniform_(0.8, 1.15)
    shift = torch.empty(count, 2).uniform_(-0.2, 0.2)
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = zoom * mirror, zoom, shift
    grid = F.affine_grid(theta, [count, 3, VIEW, VIEW], align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    seen = boxes.abs().sum(1) > 0
    boxes = (boxes - shift.repeat(1, 2)) / zoom[:, None]
    x = boxes[:, [0, 2]] * mirror[:, None]
    boxes = torch.stack([x.amin(1), boxes[:, 1], x.amax(1), boxes[:, 3]], 1) * seen[:, None]
    order = torch.rand(count, 3).argsort(1)
    pixels = pixels.gather(1, order[:, :, None, None].expand_as(pixels))
    gain = torch.empty(count, 1, 1, 1).uniform_(0.7, 1.3)
    return (pixels - 0.5) * gain + 0.5 + torch.empty(count, 1, 1, 1).uniform_(-0.12, 0.12), boxes


def _tokens_in(boxes: Tensor, grid: int) -> Tensor:
    """[B, grid * grid] bool: tokens whose centre lies in the box."""
    centre = (torch.arange(grid) + 0.5) / grid * 2 - 1
    in_x = (centre > boxes[:, None, 0]) & (centre < boxes[:, None, 2])
    in_y = (centre > boxes[:, None, 1]) & (centre < boxes[:, None, 3])
    return (in_y[:, :, None] & in_x[:, None, :]).flatten(1)


def train_vit(singles: list[Picture], minutes: float, seed: int = 0) -> nn.Module:
    """Train the selector on single-object pictures.

    Beside the class, the patch tokens learn what they lie on, and the class token to look at the object: without that
    a ViT this small needs far more pictures before its attention means anything.

    Args:
        singles: picture i shows class i modulo the number of classes.
        minutes: training stops after this time; the learning rate falls to 0 over it.

    Returns:
        The ViT, in eval mode.
    """
    torch.manual_seed(seed)
    views, boxes = (torch.stack(parts) for parts in zip(*map(_squash, singles), strict=True))
    labels = torch.arange(len(singles)) % len(CLASSES)
    model = timm.create_model(ARCH, num_classes=len(CLASSES), **KWARGS)
    spot = nn.Linear(int(KWARGS["embed_dim"]), len(CLASSES) + 1)  # class or background of one token; not shipped
    parameters = [*model.parameters(), *spot.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    batch, start, step, peak = 64, time.monotonic(), 0, 1e-3
    while (done := (time.monotonic() - start) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * done))
        index = torch.randint(len(singles), (batch,))
        x, box = _augment(views[index].float() / 255, boxes[index])
        inside = _tokens_in(box, VIEW // 16)
        with ClassTokenRows(model) as attention:
            tokens = model.forward_features((x - 0.5) / 0.5)
        logits = model.forward_head(tokens)
        loss = F.cross_entropy(logits, labels[index], label_smoothing=0.05)
        on_object = torch.where(inside, labels[index][:, None], len(CLASSES))
        loss = loss + F.cross_entropy(spot(tokens[:, 1:]).transpose(1, 2), on_object)
        seen = inside.any(1)
        for row in attention.rows[len(attention.rows) // 4 :]:  # the blocks that LF-ViT's attention is made of
            mass = (row.mean(1) * inside).sum(1)[seen]
            loss = loss - 0.1 * mass.clamp_min(1e-4).log().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            hit = (logits.argmax(1) == labels[index]).float().mean().item()
            print(f"ViT step {step} ({done:.0%}): loss {loss.item():.3f}, batch accuracy {hit:.2f}", flush=True)
    return model.eval()  # type: ignore[no-any-return]


@torch.inference_mode()
def check_vit(model: nn.Module, count: int = 400) -> tuple[float, float]:
    """Top-1 on good pictures that were never trained on, and the share of the last block's attention on the box."""
    pictures = [render(plan_single(f"check/{i}", CLASSES[i % len(CLASSES)])) for i in range(count)]
    views, boxes = (torch.stack(parts) for parts in zip(*map(_squash, pictures), strict=True))
    with ClassTokenRows(model) as attention:
        logits = model((views.float() / 255 - 0.5) / 0.5)
    inside = _tokens_in(boxes, VIEW // 16)
    mass = (attention.rows[-1].mean(1) * inside).sum(1).mean().item()
    return (logits.argmax(1) == torch.arange(count) % len(CLASSES)).float().mean().item(), mass


def save_vit(model: nn.Module, folder: Path) -> None:
    """Write vit_demo.safetensors (fp16) and vit_demo.json, in the form that `selector=` reads."""
    state = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(state, str(folder / "vit_demo.safetensors"))
    spec = {
        "arch": ARCH,
        "kwargs": KWARGS,
        "classes": list(CLASSES),
        "weights": "vit_demo.safetensors",
        "mean": MEAN,
        "std": STD,
    }
    (folder / "vit_demo.json").write_text(json.dumps(spec, indent=2) + "\n", encoding="utf-8")


def _write_yolo(folder: Path, pictures: list[Picture]) -> None:
    for name in ("images/train", "labels/train"):
        (folder / name).mkdir(parents=True)
    for index, picture in enumerate(pictures):
        (folder / f"images/train/{index:05d}.jpg").write_bytes(encode_jpeg(picture.image))
        (folder / f"labels/train/{index:05d}.txt").write_text(yolo_labels(picture), encoding="utf-8")


def train_yolo(pictures: list[Picture], epochs: int, folder: Path) -> Path:
    """Train the teacher with stock Ultralytics.

    Args:
        pictures: scenes and composites with their boxes.
        epochs: passes over them.
        folder: an empty working folder.

    Returns:
        Ultralytics' own last.pt, in the working folder.
    """
    from ultralytics import YOLO

    _write_yolo(folder, pictures)
    write_val(folder, 120, seed="teacher")
    data = {"path": str(folder), "train": "images/train", "val": "images/val", "names": dict(enumerate(CLASSES))}
    (folder / "data.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    model = YOLO(str(HERE / "yolo11-demo.yaml"))
    model.train(
        data=str(folder / "data.yaml"),
        project=str(folder),
        name="run",
        epochs=epochs,
        imgsz=COMPOSITE,
        batch=16,
        nbs=16,
        optimizer="AdamW",
        lr0=2e-3,
        cos_lr=True,
        warmup_epochs=1,
        mosaic=0,
        scale=0.25,
        augmentations=[],
        val=False,
        plots=False,
        amp=False,
        cache="ram",
        workers=0,
        device="cpu",
        seed=0,
    )
    return folder / "run" / "weights" / "last.pt"


def strip(trained: Path, target: Path) -> None:
    """Write a trained checkpoint as a stock fp16 one: no optimizer, no EMA, no path of the machine it was made on."""
    from focusdd_det.teacher import safe_checkpoint

    model: Any = safe_checkpoint(trained).half()
    for parameter in model.parameters():
        parameter.requires_grad = False
    kept = {"task": "detect", "imgsz": COMPOSITE, "model": "yolo11-demo.yaml"}
    model.args = dict(kept)
    model.yaml = {**model.yaml, "yaml_file": "yolo11-demo.yaml"}
    model.pt_path = target.name
    model.criterion = None
    checkpoint = {
        "epoch": -1,
        "best_fitness": None,
        "model": model,
        "ema": None,
        "updates": None,
        "optimizer": None,
        "train_args": kept,
        "license": "AGPL-3.0",
    }
    torch.save(checkpoint, target)


def draw_pictures(singles: int, scenes: int, composites: int) -> tuple[list[Picture], list[Picture]]:
    """Training pictures: of one object each, and scenes with composites of the former."""
    with ProcessPoolExecutor() as pool:
        single = list(pool.map(draw_single, range(singles), chunksize=50))
        many = list(pool.map(draw_many, range(scenes), chunksize=50))
    return single, many + [draw_composite(single, i) for i in range(composites)]


def make_vit(out: Path, single: list[Picture], minutes: float) -> None:
    """Train, check and write the selector."""
    torch.set_num_threads(1)
    vit = train_vit(single, minutes)
    accuracy, mass = check_vit(vit)
    print(f"ViT: top-1 {accuracy:.3f} on unseen good pictures, attention on the object {mass:.2f}", flush=True)
    save_vit(vit, out)


def make_yolo(out: Path, pictures: list[Picture], epochs: int) -> None:
    """Train and write the teacher; Ultralytics validates it on unseen scenes at the end."""
    folder = Path(tempfile.mkdtemp(prefix="demo-teacher-"))
    try:
        strip(train_yolo(pictures, epochs, folder), out / "yolo_demo.pt")
    finally:
        shutil.rmtree(folder)


def main(
    out: Path = HERE,
    singles: int = 6000,
    scenes: int = 2000,
    composites: int = 800,
    minutes: float = 12,
    epochs: int = 10,
) -> None:
    """Draw the pictures, then train both models side by side, one core each, and write them to `out`."""
    single, pictures = draw_pictures(singles, scenes, composites)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for job in (pool.submit(make_vit, out, single, minutes), pool.submit(make_yolo, out, pictures, epochs)):
            job.result()
