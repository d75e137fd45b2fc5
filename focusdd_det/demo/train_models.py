"""Trains the two models that ship with the demo: a small ViT with a class token, and a small YOLO11.

Both learn from drawn pictures alone, side by side, in about a quarter of an hour of processor time each.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
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

from focusdd_det.backbones.rows import ClassTokenRows
from focusdd_det.compose import encode_jpeg
from focusdd_det.demo.objects import CLASSES
from focusdd_det.demo.scenes import POOR, Picture, plan_many, plan_single, render, seeded
from focusdd_det.demo.write import QUALITY, write_val, yolo_labels

HERE = Path(__file__).resolve().parent
VIEW = 56  # px; with patches of 8 px the token grid is 7 x 7, as in the paper
STORED = 112  # px; pictures are kept at twice the view, so that a close-up of them is still sharp
ARCH = "vit_tiny_patch16_224"
KWARGS = {"img_size": VIEW, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
GRID = VIEW // 8
MEAN = STD = (0.5, 0.5, 0.5)
COMPOSITE = 192  # px; composites of 2 x 2 pictures, as the teacher will have to label them


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


def _squash(picture: Picture, side: int) -> tuple[Tensor, Tensor]:
    """The picture as [3, side, side] uint8 and the object's box in it in [-1, 1], or zeros if it is hidden."""
    height, width = picture.image.shape[:2]
    view = cv2.resize(picture.image, (side, side), interpolation=cv2.INTER_AREA)
    box = np.zeros(4, np.float32)
    if len(picture.boxes):
        box = picture.boxes[0] / np.array([width, height, width, height], np.float32) * 2 - 1
    return torch.from_numpy(view).permute(2, 0, 1), torch.from_numpy(box.astype(np.float32))


def _augment(pixels: Tensor, boxes: Tensor, progress: float) -> tuple[Tensor, Tensor]:
    """A random view of each picture, and where the object is in it.

    Training goes from close-ups of the object to whole pictures: a ViT this small hardly learns from whole pictures
    alone. Then shifts, mirroring, other colours and contrast.

    Args:
        pixels: [B, 3, STORED, STORED] in [0, 1].
        boxes: [B, 4] in [-1, 1], zeros where there is none.
        progress: share of the training that is done, 0 to 1.

    Returns:
        [B, 3, VIEW, VIEW] and the boxes in the new view.
    """
    count = len(pixels)
    seen = boxes.abs().sum(1, keepdim=True) > 0
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True) / 2
    wide = torch.rand(count, 1) ** (0.3 + 2 * (1 - progress) ** 2)  # towards 0: close-up, 1: whole picture
    wide = torch.where(seen & (torch.rand(count, 1) > progress**2), wide, 1.0)
    zoom = (half * 1.25).clamp(0.15, 1) * (1 - wide) + wide * torch.empty(count, 1).uniform_(0.85, 1.1)
    shift = centre * (1 - wide) + torch.empty(count, 2).uniform_(-0.2, 0.2) * zoom
    zoom = zoom[:, 0]
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = zoom * mirror, zoom, shift
    grid = F.affine_grid(theta, [count, 3, VIEW, VIEW], align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    boxes = (boxes - shift.repeat(1, 2)) / zoom[:, None]
    x = boxes[:, [0, 2]] * mirror[:, None]
    boxes = torch.stack([x.amin(1), boxes[:, 1], x.amax(1), boxes[:, 3]], 1) * seen
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


def train_vit(singles: list[Picture], steps: int) -> nn.Module:
    """Train the selector on single-object pictures.

    Beside the class, the patch tokens learn what they lie on, and the class token to look at the object: without that
    a ViT this small needs far more pictures before its attention means anything.

    Args:
        singles: picture i shows class i modulo the number of classes.
        steps: batches of 64; the learning rate falls to 0 over them.

    Returns:
        The ViT, in eval mode.
    """
    torch.manual_seed(0)
    views, boxes = (torch.stack(parts) for parts in zip(*(_squash(p, STORED) for p in singles), strict=True))
    labels, unseen = torch.arange(len(singles)) % len(CLASSES), unseen_views(200)
    model = timm.create_model(ARCH, num_classes=len(CLASSES), **KWARGS)
    spot = nn.Linear(int(KWARGS["embed_dim"]), len(CLASSES) + 1)  # class or background of one token; not shipped
    parameters = [*model.parameters(), *spot.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    for step in range(steps):
        done = step / steps
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * done))
        index = torch.randint(len(singles), (64,))
        x, box = _augment(views[index].float() / 255, boxes[index], done)
        inside = _tokens_in(box, GRID)
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
        if step % 500 == 499:
            accuracy, share = check_vit(model, *unseen)
            print(f"ViT step {step + 1} of {steps}: top-1 {accuracy:.2f}, on the object {share:.2f}", flush=True)
    return model.eval()  # type: ignore[no-any-return]


def unseen_views(count: int) -> tuple[Tensor, Tensor]:
    """Good pictures that are never trained on, picture i of class i modulo the number of classes, and their boxes."""
    pictures = [render(plan_single(f"check/{i}", CLASSES[i % len(CLASSES)])) for i in range(count)]
    views, boxes = zip(*(_squash(picture, VIEW) for picture in pictures), strict=True)
    return torch.stack(views), torch.stack(boxes)


@torch.inference_mode()
def check_vit(model: nn.Module, views: Tensor, boxes: Tensor) -> tuple[float, float]:
    """Top-1, and the share of the last block's attention that is on the object."""
    with ClassTokenRows(model) as attention:
        logits = model((views.float() / 255 - 0.5) / 0.5)
    share = (attention.rows[-1].mean(1) * _tokens_in(boxes, GRID)).sum(1).mean()
    hits = logits.argmax(1) == torch.arange(len(views)) % len(CLASSES)
    return hits.float().mean().item(), share.item()


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
        (folder / f"images/train/{index:05d}.jpg").write_bytes(encode_jpeg(picture.image, QUALITY))
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
    from focusdd_det.checkpoints import safe_checkpoint

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


def make_vit(out: Path, single: list[Picture], steps: int) -> None:
    """Train, check and write the selector."""
    torch.set_num_threads(1)
    vit = train_vit(single, steps)
    accuracy, share = check_vit(vit, *unseen_views(400))
    print(f"ViT: top-1 {accuracy:.3f} on unseen good pictures, attention on the object {share:.2f}", flush=True)
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
    composites: int = 1000,
    steps: int = 3500,
    epochs: int = 9,
) -> None:
    """Draw the pictures, then train both models side by side, one core each, and write them to `out`."""
    single, pictures = draw_pictures(singles, scenes, composites)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for job in (pool.submit(make_vit, out, single, steps), pool.submit(make_yolo, out, pictures, epochs)):
            job.result()
