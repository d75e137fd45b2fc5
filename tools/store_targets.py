"""A distilled set and a teacher -> stored soft targets for every augmented view, to train without the teacher.

python tools/store_targets.py data=datasets/focusdd teacher=yolo11x.pt pool=20
python tools/store_targets.py data=datasets/focusdd teacher=yolo11x.pt pool=20 --dry-run
"""

from focusdd_det.cli import run_main
from focusdd_det.training.store_targets import store_command

if __name__ == "__main__":
    raise SystemExit(run_main(store_command))
