"""The teacher beside the student: the order on two streams, and no wait for the device in the supervision of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_detector
from torch.utils._python_dispatch import TorchDispatchMode

from focusdd_det.losses import supervision_terms
from focusdd_det.teacher import load_detector
from focusdd_det.trainer import all_finite
from focusdd_det.training.aside import Aside, Begun
from focusdd_det.training.sparse_heads import sparse_supervision_terms, thin


def test_on_a_cpu_it_is_simply_done() -> None:
    aside = Aside(torch.device("cpu"))
    with aside.running():
        value = torch.ones(2)
    assert Begun(value, aside.join).take() is value


def test_order_on_two_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Stream:
        def __init__(self, device: Any, name: str = "second") -> None:
            self.device, self.name = device, name

        def wait_stream(self, other: Stream) -> None:
            done.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        done.append(f"in {stream.name}")
        yield
        done.append(f"out of {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, "usual"))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    aside = Aside(torch.device("cuda:0"))
    with aside.running():
        done.append("teacher")
    begun = Begun(1, aside.join)
    done.append("student")
    begun.take()
    assert done == [
        "second waits for usual",  # the pictures are there
        "in second",
        "teacher",
        "out of second",
        "student",
        "usual waits for second",  # the loss needs both
    ]


class NoWait(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: a value as a Python number, a shape that depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"):
            raise AssertionError(f"{name} waits for the device")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if any(index is not None and index.dtype is torch.bool for index in indices):
            raise AssertionError(f"{name} by a mask waits for the device")
        return func(*args, **(kwargs or {}))


def test_the_guard_sees_a_wait() -> None:
    with NoWait(), pytest.raises(AssertionError, match="waits for the device"):
        bool(torch.ones(1) > 0)
    with NoWait(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(3)[torch.ones(3) > 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_supervision_does_not_wait_for_the_device(tmp_path: Path, dtype: torch.dtype) -> None:
    teacher = load_detector(save_detector(tmp_path / "t.pt"))
    teacher.to(torch.device("cpu"), dtype)
    student = {"boxes": torch.randn(2, 64, 84, requires_grad=True), "scores": torch.randn(2, 3, 84, requires_grad=True)}
    stored = thin(teacher.heads(torch.rand(2, 3, 64, 64)), 0.3, 2)
    with NoWait():
        heads = teacher.heads(torch.rand(2, 3, 64, 64))
        all_finite(heads)
        live = supervision_terms(student, heads, student_reg_max=16, teacher_reg_max=16)
        read = sparse_supervision_terms(student, stored, reg_max=16)
        (live.cls + live.box + read.cls + read.box).backward()
    assert student["scores"].grad is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found(value: float) -> None:
    heads = {"boxes": torch.full((2, 4, 5), 60000.0, dtype=torch.float16), "scores": torch.zeros(2, 3, 5)}
    assert bool(all_finite(heads)), "their sum overflows float16, they do not"
    heads["scores"][1, 2, 3] = value
    assert not bool(all_finite(heads))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_and_the_streams_agree(tmp_path: Path) -> None:
    device = torch.device("cuda:0")
    teacher = load_detector(save_detector(tmp_path / "t.pt"))
    teacher.to(device, torch.float16, channels_last=True)
    aside, x = Aside(device), torch.rand(4, 3, 64, 64, device=device)
    expected = teacher.heads(x)["scores"].clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with aside.running():
            heads = teacher.heads(x)
            finite = all_finite(heads)
        found = Begun(heads, aside.join).take()["scores"] + 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(finite)
    assert torch.equal(found, expected)
