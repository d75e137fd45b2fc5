"""How fast a build and a training step are on this machine, beside their floor: ratios with spread, and bench.json.

python tools/bench.py --quick
python tools/bench.py parts=train model=yolo11n.yaml teacher=yolo11x.yaml imgsz=640 batch=16 device=0
"""

from focusdd_det.bench.command import bench_command
from focusdd_det.cli import run_main

if __name__ == "__main__":
    raise SystemExit(run_main(bench_command))
