"""Ultralytics without a network and without a trace in the user's home: set before it is imported."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def keep_quiet(folder: Path) -> None:
    """Point Ultralytics, matplotlib and timm to `folder` for settings and caches, and switch their look-ups off.

    Only what the user has not set is set, and nothing is written where the user's settings are. Ultralytics looks for a
    font at every start and would download it; in `folder` it gets the one that matplotlib brings.

    Args:
        folder: made if it is missing.
    """
    settings = folder / "settings"
    own = "YOLO_CONFIG_DIR" not in os.environ
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("MPLCONFIGDIR", str(settings / "matplotlib"))
    os.environ.setdefault("YOLO_CONFIG_DIR", str(settings))
    home = settings / "Ultralytics"
    if own and not (home / "Arial.ttf").exists():
        import matplotlib

        home.mkdir(parents=True, exist_ok=True)
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        shutil.copyfile(fonts / "DejaVuSans.ttf", home / "Arial.ttf")
