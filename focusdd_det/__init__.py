"""FocusDD for object detection: the smallest training set that still trains a good detector.

class folders -> ViT scores every picture -> best windows + a few whole pictures -> 2x2 composites
              -> teacher YOLO labels them -> student YOLO trained from scratch with KL -> COCO mAP
"""

from __future__ import annotations

import os

# This package declares everything it needs; Ultralytics must not run pip in the middle of somebody's training.
os.environ.setdefault("YOLO_AUTOINSTALL", "false")

from focusdd_det._torchvision_cpu import ensure_torchvision

ensure_torchvision()  # before timm and ultralytics, which both import torchvision

__version__ = "0.1.0"
