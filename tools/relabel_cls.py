"""A classification set and a teacher -> stored logits for every view of every epoch.

python tools/relabel_cls.py data=datasets/focusdd_cls teacher=resnet18 teacher_weights=r18.pth eval_data=imagenet/val
"""

from focusdd_det.classify.relabel import relabel_command
from focusdd_det.cli import run_main

if __name__ == "__main__":
    raise SystemExit(run_main(relabel_command))
