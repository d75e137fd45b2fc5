"""Official COCO mAP of a checkpoint.

python tools/val_coco.py model=best.pt annotations=instances_val2017.json images=coco/images/val2017
python tools/val_coco.py model=best.pt data=coco.yaml set=datasets/focusdd
"""

from focusdd_det.cli import run_main
from focusdd_det.training.command import val_coco

if __name__ == "__main__":
    raise SystemExit(run_main(val_coco))
