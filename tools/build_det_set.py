"""Photographs in class folders -> a distilled, labelled detection set.

python tools/build_det_set.py --source imagenet/train --ipc 50
"""

from focusdd_det.cli import build_command, run_main

if __name__ == "__main__":
    raise SystemExit(run_main(build_command))
