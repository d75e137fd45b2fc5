"""Class-incremental learning: a student trained from scratch on the classes seen so far, step by step.

python tools/continual_cls.py steps=5 labels=hard data=datasets/focusdd_cls eval_data=imagenet/val
"""

from focusdd_det.classify.continual import continual_command
from focusdd_det.cli import run_main

if __name__ == "__main__":
    raise SystemExit(run_main(continual_command))
