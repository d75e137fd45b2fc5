"""Photographs in class folders -> a distilled classification set.

python tools/build_cls_set.py --source imagenet/train --ipc 10
"""

from focusdd_det.cli import build_cls_command, run_main

if __name__ == "__main__":
    raise SystemExit(run_main(build_cls_command))
