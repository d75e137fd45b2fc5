"""The whole main job on drawn pictures, or on your own: FocusDD beside random crops, with COCO mAP.

python tools/demo.py
python tools/demo.py --source DIR --map MAP --teacher yolo11x.pt --selector NAME --val instances_val.json
"""

from focusdd_det.cli import run_main
from focusdd_det.demo.run import demo

if __name__ == "__main__":
    raise SystemExit(run_main(demo))
