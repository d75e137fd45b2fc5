"""Folders that are whole or say that they are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from focusdd_det import sealed
from focusdd_det.errors import DiskError
from focusdd_det.targets import KIND

DESCRIBED = {"format": KIND.format}


def make(out: Path, seconds: float) -> list[str]:
    """Make a folder as a command does that took so long; the files that it had to write."""
    with sealed.working(out) as work:
        sealed.begun(work, DESCRIBED, (), False, KIND)
        writer = sealed.Writer(work, DESCRIBED, ["mixed_00000.safetensors"])
        missing = writer.missing()
        for name in missing:
            writer.add(name, {"total": np.zeros(2, np.float32)})
        writer.finish({"seconds": seconds})
    sealed.publish(work, out, False, KIND)
    return missing


def test_a_folder_that_only_has_to_be_renamed_keeps_the_log_of_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def refused(self: Path, target: Path) -> Path:
        if target == tmp_path / "out":
            raise PermissionError(13, "Permission denied")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refused)
        with pytest.raises(DiskError, match=r"complete in .* cannot be renamed(.|\n)*same command again"):
            make(tmp_path / "out", 9999)
    assert make(tmp_path / "out", 0.1) == []
    assert json.loads((tmp_path / "out" / sealed.LOG).read_text()) == {"seconds": 9999}
