"""A distilled set (+ a teacher) -> a detector trained from scratch.

python tools/train_det.py model=yolo11n.yaml data=datasets/focusdd teacher=yolo11x.pt eval_data=datasets/coco.yaml
python tools/train_det.py resume=runs/detect/train/weights/last.pt
"""

from focusdd_det.cli import run_main
from focusdd_det.training.command import train

if __name__ == "__main__":
    raise SystemExit(run_main(train))
