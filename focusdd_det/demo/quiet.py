"""Ultralytics without a network and without a trace in the user's home: set before it is imported."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def keep_quiet(folder: Path) -> None:
    """Point Ultralytics, matplotlib and timm to `folder` for settings and caches, and switch their look-ups off.

    Only what the user has not set is set, but for a `YOLO_CONFIG_DIR` without a font: Ultralytics looks for one at
    every start and would download it there. In `folder` it gets the one that matplotlib brings.

    Args:
        folder: made if it is missing.
    """
    settings = folder / "settings"
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("MPLCONFIGDIR", str(settings / "matplotlib"))
    given = os.environ.get("YOLO_CONFIG_DIR")
    if given and (Path(given).expanduser() / "Ultralytics" / "Arial.ttf").exists():
        return
    os.environ["YOLO_CONFIG_DIR"] = str(settings)
    home = settings / "Ultralytics"
    if not (home / "Arial.ttf").exists():
        import matplotlib

        home.mkdir(parents=True, exist_ok=True)
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        shutil.copyfile(fonts / "DejaVuSans.ttf", home / "Arial.ttf")
