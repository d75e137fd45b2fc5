"""What only a GPU does: pinned batches, a first look in float16, a training step and stored targets there.

tests/test_aside.py has the second stream.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_targets import first_losses, student, whole  # noqa: F401

from focusdd_det import demo
from focusdd_det.build import build, load_config
from focusdd_det.demo.objects import CLASSES
from focusdd_det.demo.write import write_sources
from focusdd_det.detset import read_manifest
from focusdd_det.scoring import looking
from focusdd_det.training.sparse_heads import thin

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = "cuda:0"


def test_a_screened_build_chooses_what_a_cpu_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sources(tmp_path / "sources", 30)
    (tmp_path / "map.yaml").write_text(yaml.safe_dump({"names": list(CLASSES)}))
    shipped = Path(demo.__file__).parent
    looks: set[tuple[str, bool]] = set()
    real = looking.Looker.__call__

    def noted(self: Any, batch: Any, pixels: Any) -> Any:
        looks.add((self.selector.precision, torch.from_numpy(pixels).is_pinned()))
        return real(self, batch, pixels)

    def chosen(device: str, **more: Any) -> list[str]:
        config = load_config(
            sources=[str(tmp_path / "sources")], class_map=str(tmp_path / "map.yaml"), out=str(tmp_path / device),
            selector=str(shipped / "vit_demo.json"), teacher=str(shipped / "yolo_demo.pt"), device=device, ipc=2,
            method="focusdd", image_size=192, batch=32, threads=1, **more,
        )  # fmt: skip
        return [cell.path for item in read_manifest(build(config).folder) for cell in item.cells]

    expected = chosen("cpu", screen="off")
    assert len(expected) == len(set(expected)) == 4 * 2 * len(CLASSES)
    monkeypatch.setattr(looking.Looker, "__call__", noted)
    assert chosen(GPU, screen="fp16") == expected
    assert looks == {("fp16", True), ("fp32", True)}


@pytest.mark.parametrize(("amp", "tolerance"), [(False, 5e-3), (True, 3e-2)])
@pytest.mark.parametrize("kind", ["teacher", "targets"])
def test_a_step_has_the_loss_that_it_has_on_a_cpu(
    kind: str, amp: bool, tolerance: float, whole: Path, drawn_set: Path, teacher_file: Path, tmp_path: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    given = {kind: str({"teacher": teacher_file, "targets": whole}[kind]), "epochs": 1}
    cpu = first_losses(student(tmp_path, drawn_set, name="cpu", **given))
    precisions: list[tuple[bool, torch.dtype | None]] = []

    def noted(trainer: Any) -> None:
        precisions.append((trainer.amp, trainer.teacher._dtype if trainer.teacher else None))

    gpu = first_losses(student(tmp_path, drawn_set, name="gpu", device=GPU, amp=amp, **given), noted)
    half = torch.float16 if amp else torch.float32
    assert precisions == [(amp, half if kind == "teacher" else None)]
    assert min(cpu[0]) > 0
    assert gpu[0] == pytest.approx(cpu[0], rel=tolerance, abs=1e-3)


@pytest.mark.parametrize("bias", [0.0, -40.0])  # with the latter nothing is kept
def test_stored_heads_go_there_and_back(bias: float) -> None:
    heads = thin({"boxes": torch.randn(2, 64, 84), "scores": torch.randn(2, 3, 84) + bias}, 0.6, 2).half()
    pinned = heads.pin_memory()
    assert all(value.is_pinned() for value in vars(pinned).values() if value.numel())
    assert pinned.pin_memory().total.data_ptr() == pinned.total.data_ptr()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = pinned.to(GPU)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for moved in (there, heads.to(GPU)):
        for name, value in vars(heads).items():
            found = getattr(moved, name)
            assert found.device == torch.device(GPU)
            assert found.dtype == value.dtype
            assert torch.equal(getattr(moved.to("cpu"), name), value)
