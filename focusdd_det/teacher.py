"""The teacher: a frozen Ultralytics detector, loaded without running code from its file.

Two uses. `Detector.detect` finds boxes in pictures, the same whatever else is in the batch. `Detector.heads`
gives the raw head outputs that a student is supervised with.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.tal import make_anchors

from focusdd_det.checkpoints import resolve_weights, safe_checkpoint
from focusdd_det.devices import in_parts
from focusdd_det.disk import file_sha256
from focusdd_det.errors import ConfigError, WeightsError
from focusdd_det.labels import nms
from focusdd_det.losses import ONE2MANY, ONE2ONE, decode_boxes
from focusdd_det.types import Detections, Image

STRIDE = 32  # largest stride of every YOLO head that Ultralytics ships
LETTERBOX_GREY = 114  # what YOLO was trained to see beside a picture
DECIMALS = 4  # scores and boxes are rounded to 1e-4 before anything is decided


class Detector:
    """A frozen detector whose classes are the caller's, in the caller's order.

    Attributes:
        names: class names of channel 0, 1, ...
        sha256: of the checkpoint file.
        path: the checkpoint file.
        reg_max: bins per box side; 1 means the head predicts distances directly (YOLO26).
        end2end: whether it has a one-to-one head beside the usual one-to-many head.
        strides: pixels an anchor, level by level.
        device: where it runs.
    """

    def __init__(
        self,
        model: DetectionModel,
        path: Path,
        sha256: str,
        names: Sequence[str] | None,
        device: torch.device,
    ) -> None:
        own = tuple(str(model.names[i]) for i in range(len(model.names)))
        head = model.model[-1]
        self.path, self.sha256, self.device = path, sha256, device
        self.names = tuple(names) if names is not None else own
        self.reg_max = int(head.reg_max)
        self.end2end = getattr(head, "one2one_cv2", None) is not None
        if head.cv2 is None:
            raise WeightsError(f"{path} was saved fused, without its one-to-many head; pass the unfused checkpoint")
        if len(own) != head.nc:
            raise WeightsError(f"{path} has {head.nc} class channels but {len(own)} class names; it cannot be trusted")
        missing = [name for name in self.names if name not in own]
        if missing:
            raise WeightsError(
                f"the teacher {path} does not know {len(missing)} of the {len(self.names)} classes: "
                f"{', '.join(missing)}.\n  asked for: {', '.join(self.names)}\n  it knows: "
                f"{', '.join(own)}\nUse a teacher that was trained on these classes, or rename them to the "
                "teacher's names"
            )
        order = [own.index(name) for name in self.names]
        head.fuse = lambda: None  # of an end-to-end model it would drop one of the two heads
        model = model.fuse(verbose=False)
        del head.fuse
        self._model = model.eval().requires_grad_(False).to(device)
        self._dtype = torch.float32
        head.training = True  # it then gives its raw outputs alone: no decoding, no top-k
        self.strides: list[float] = [float(s) for s in head.stride]
        self._gather = None if order == list(range(len(own))) else torch.tensor(order, device=device)
        if any(abs(s - int(s)) > 0 for s in self.strides) or max(self.strides) > STRIDE:
            raise WeightsError(f"{path} has strides {self.strides}, expected whole numbers up to {STRIDE}")

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Detector:
        """Moved there; itself.

        Args:
            device: where it runs from now on.
            dtype: of its weights and of what `heads` gives. `detect` is meant for float32.
            channels_last: the layout of its weights.
        """
        self.device, self._dtype = device, dtype
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self._model = self._model.to(device, dtype, memory_format=layout)  # type: ignore[call-overload]
        self._gather = None if self._gather is None else self._gather.to(device)
        return self

    def drop_one2one(self) -> None:
        """For a student with a single head, which learns from the one-to-many head alone: the other is not asked."""
        head = self._model.model[-1]
        head.one2one_cv2 = head.one2one_cv3 = None
        self.end2end = False

    def __repr__(self) -> str:
        heads = "two heads" if self.end2end else "one head"
        return f"Detector({self.path.name}, {len(self.names)} classes, {heads}, reg_max={self.reg_max})"

    def _forward(self, x: Tensor) -> tuple[dict[str, Any], list[Tensor]]:
        raw = self._model(x.to(self._dtype))
        if self.end2end:
            features = raw[ONE2MANY]["feats"]
            return {kind: self._select(raw[kind]) for kind in (ONE2MANY, ONE2ONE)}, features
        return self._select(raw), raw["feats"]

    def _select(self, head: dict[str, Tensor]) -> dict[str, Tensor]:
        scores = head["scores"]
        return {"boxes": head["boxes"], "scores": scores if self._gather is None else scores[:, self._gather]}

    @torch.no_grad()
    def heads(self, x: Tensor) -> dict[str, Any]:
        """Raw head outputs before sigmoid and softmax, for supervision. No gradient, no wait for the device.

        Args:
            x: [B, 3, H, W] float in 0..1, RGB, H and W multiples of 32, on this detector's device.

        Returns:
            {"boxes": [B, 4 * reg_max, A], "scores": [B, nc, A]}, or with two heads {"one2many": that,
            "one2one": that}. Anchors run over strides 8, 16, 32, rows, columns.
        """
        half = self._dtype is not torch.float32  # already, so autocast has nothing to do
        with torch.autocast(self.device.type, enabled=False) if half else contextlib.nullcontext():
            return _joined([self._forward(some)[0] for some in in_parts(x)])

    @torch.no_grad()
    def detect(
        self,
        images: Sequence[Image],
        conf: float = 0.25,
        iou: float = 0.7,
        max_det: int = 300,
        batch: int = 8,
        imgsz: int = 640,
    ) -> list[Detections]:
        """Objects in pictures of one size; what is found in one does not depend on the others or their number.

        Every forward pass has `batch` pictures (one on a CPU), the last one padded with empty ones, and scores and
        boxes are rounded to 1e-4 before a threshold or NMS decides anything. NMS is per class, on the one-to-many
        head.

        Args:
            images: uint8 RGB [H, W, 3], all of one size. A square with a side that is a multiple of 32 goes
                in as it is; anything else is letterboxed to `imgsz` and its boxes are mapped back.
            conf: boxes with a score of at most this are dropped, in [0, 1].
            iou: boxes of one class that overlap a better one by more than this are dropped, in [0, 1].
            max_det: at most this many boxes a picture.
            batch: pictures per forward pass on a GPU.
            imgsz: side of the letterbox, a multiple of 32.

        Returns:
            One Detections a picture, best first; boxes in pixels of the picture, clipped to it.

        Raises:
            ConfigError: pictures of several sizes or wrong type, or options out of range.
            WeightsError: the teacher's outputs are not finite.
        """
        if not images:
            return []
        if batch < 1 or imgsz < STRIDE or imgsz % STRIDE or not (0 <= conf <= 1 and 0 <= iou <= 1) or max_det < 1:
            raise ConfigError(
                f"detect needs batch >= 1, imgsz a multiple of {STRIDE}, conf and iou in [0, 1], max_det >= "
                f"1; got batch={batch}, imgsz={imgsz}, conf={conf}, iou={iou}, max_det={max_det}"
            )
        shape = images[0].shape
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape != shape:
                raise ConfigError(
                    f"detect needs uint8 RGB pictures [H, W, 3] of one size, got {image.dtype} {image.shape} "
                    f"beside {shape}"
                )
        if self.device.type == "cpu":
            batch = 1  # the last digit can depend on a picture's place in a batch, and nothing is gained by batching
        found: list[Detections] = []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            found.extend(self._detect_batch(part, batch, conf, iou, max_det, imgsz))
        return found

    def _detect_batch(
        self, images: Sequence[Image], batch: int, conf: float, iou: float, max_det: int, imgsz: int
    ) -> list[Detections]:
        height, width = images[0].shape[:2]
        squares, scale, pad_x, pad_y = zip(*(_letterbox(image, imgsz) for image in images), strict=True)
        stack = np.zeros((batch, *squares[0].shape), np.uint8)
        stack[: len(squares)] = squares
        x = torch.from_numpy(stack).to(self.device).permute(0, 3, 1, 2).contiguous().float() / 255
        heads, features = self._forward(x)
        head = heads[ONE2MANY] if self.end2end else heads  # with NMS, as `yolo predict` does by default
        anchors, strides = make_anchors(features, torch.tensor(self.strides), 0.5)
        boxes = decode_boxes(head["boxes"], anchors.T.float(), self.reg_max) * strides.T.float()
        boxes_np = boxes[: len(images)].permute(0, 2, 1).cpu().numpy().astype(np.float64)
        scores_np = head["scores"][: len(images)].float().sigmoid().permute(0, 2, 1).cpu().numpy()
        if not (np.isfinite(boxes_np).all() and np.isfinite(scores_np).all()):
            raise WeightsError(
                f"the teacher {self.path} gives values that are not finite (NaN or infinity): its weights "
                "are damaged; copy or download it again"
            )
        offset = np.array([pad_x[0], pad_y[0], pad_x[0], pad_y[0]])
        limit = np.array([width, height, width, height], np.float64)
        found = []
        for b, s in zip(boxes_np, scores_np, strict=True):
            candidate = np.flatnonzero(s.max(1) > conf - 1e-3)  # before the rounding, with room for it
            rounded = np.round((b[candidate] - offset) / scale[0], DECIMALS)
            certain = np.round(s[candidate].astype(np.float64), DECIMALS)
            found.append(_select_boxes(rounded, certain, limit, conf, iou, max_det))
        return found


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the parts of a batch gave, as one batch's."""
    if len(parts) == 1:
        return parts[0]
    values = {key: [part[key] for part in parts] for key in parts[0]}
    return {key: _joined(each) if isinstance(each[0], dict) else torch.cat(each) for key, each in values.items()}


def _letterbox(image: Image, imgsz: int) -> tuple[Image, float, int, int]:
    """A square that the network takes (the picture itself if it is one), its scale, left and top padding."""
    height, width = image.shape[:2]
    if height == width and height % STRIDE == 0:
        return image, 1.0, 0, 0
    scale = imgsz / max(height, width)
    new_w, new_h = max(1, round(width * scale)), max(1, round(height * scale))
    resized = cv2.resize(image, (new_w, new_h), interpolation=cv2.INTER_LINEAR)
    left, top = (imgsz - new_w) // 2, (imgsz - new_h) // 2
    canvas = np.full((imgsz, imgsz, 3), LETTERBOX_GREY, np.uint8)
    canvas[top : top + new_h, left : left + new_w] = resized
    return canvas, scale, left, top


def _select_boxes(
    boxes: NDArray[np.float64],
    scores: NDArray[np.float64],
    limit: NDArray[np.float64],
    conf: float,
    iou: float,
    max_det: int,
) -> Detections:
    """Threshold, order, NMS per class, clip; takes rounded [n, 4] and [n, nc]."""
    classes = scores.argmax(1) if len(scores) else np.zeros(0, np.int64)
    best = scores.max(1) if len(scores) else np.zeros(0)
    clipped = np.clip(boxes, 0, limit)
    sides = clipped[:, 2:] - clipped[:, :2]
    usable = np.flatnonzero((best > conf) & (sides > 0).all(1))
    order = usable[np.argsort(-best[usable], kind="stable")]  # equal scores keep the order of the anchors
    order = order[nms(boxes[order], classes[order], iou)][:max_det]
    return Detections(
        clipped[order].astype(np.float32),
        classes[order].astype(np.int64),
        best[order].astype(np.float32),
        scores[order].astype(np.float32),
    )


def load_detector(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    names: Sequence[str] | None = None,
    download: bool = False,
) -> Detector:
    """A frozen teacher from a checkpoint of any Ultralytics detector.

    Args:
        path: checkpoint file, or an official name together with `download`.
        device: `cpu`, `cuda:0`, ...
        names: class names of the set; the teacher's channels are gathered by name, extra ones are dropped.
        download: allow Ultralytics to fetch a missing official checkpoint.

    Raises:
        WeightsError: see `resolve_weights`, `safe_checkpoint`; names the teacher lacks (both lists are
            printed); weights that give NaN.
    """
    file = resolve_weights(path, download)
    detector = Detector(safe_checkpoint(file), file, file_sha256(file), names, torch.device(device))
    probe = np.full((64, 64, 3), LETTERBOX_GREY, np.uint8)
    detector.detect([probe], batch=1)  # damaged weights are found here, not in the middle of a run
    return detector
