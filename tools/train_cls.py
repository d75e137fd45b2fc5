"""A distilled classification set (+ soft labels or a teacher) -> a classifier trained from scratch.

python tools/train_cls.py model=resnet18 data=datasets/in10 store=datasets/in10_labels eval_data=imagenet/val
python tools/train_cls.py resume=runs/classify/train
"""

from focusdd_det.classify.train_cli import train
from focusdd_det.cli import run_main

if __name__ == "__main__":
    raise SystemExit(run_main(train))
