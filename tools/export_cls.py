"""CIFAR-100, Flowers-102, Food-101 or Tiny-ImageNet's validation pictures -> class folders.

python tools/export_cls.py dataset=food101 root=downloads split=train out=food101/train
"""

from focusdd_det.classify.export import export_command
from focusdd_det.cli import run_main

if __name__ == "__main__":
    raise SystemExit(run_main(export_command))
