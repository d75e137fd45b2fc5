"""The teacher beside the student: the order on two streams, and no wait for the device in the supervision of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
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


def refused(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"{name} waits for the device")

    return refuse


class NoWait(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: a value as a Python number, a shape that depends on values, a copy
    for the CPU. What a tensor that is there already answers without any operation is refused by its name."""

    CALLS = ("cpu", "numpy", "tolist", "item", "__array__", "__bool__", "__int__", "__float__", "__index__")

    def __enter__(self) -> NoWait:
        self.patch, to = pytest.MonkeyPatch(), torch.Tensor.to
        for name in self.CALLS:
            self.patch.setattr(torch.Tensor, name, refused(name))
        moved = lambda x, *to_what, **how: (refused("to") if "cpu" in to_what else to)(x, *to_what, **how)  # noqa: E731
        self.patch.setattr(torch.Tensor, "to", moved)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"):
            refused(name)()
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if any(index is not None and index.dtype is torch.bool for index in indices):
            refused(f"{name} by a mask")()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        bool, int, float, range, np.asarray, torch.nonzero,
        lambda x: x.item(), lambda x: x.tolist(), lambda x: x.numpy(), lambda x: x.cpu(), lambda x: x.to("cpu"),
        lambda x: x[x > 0], lambda x: 1 if x > 0 else 0,
    ],
)  # fmt: skip
def test_the_guard_sees_a_wait(wait: Callable[[torch.Tensor], object]) -> None:
    x = torch.ones(1, dtype=torch.int64)
    wait(x)
    with NoWait(), pytest.raises(AssertionError, match="waits for the device"):
        wait(x)
    wait(x)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_supervision_asks_a_device_that_holds_no_values_for_none(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's `meta` stands for a GPU: like there, a batch is taken as a whole, and asking for a value is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # `meta` has none
    shapes = {"boxes": (2, 64, 84), "scores": (2, 3, 84)}
    student = {key: torch.zeros(shape, device="meta", requires_grad=True) for key, shape in shapes.items()}
    teacher = {key: torch.randn(shape, dtype=dtype) for key, shape in shapes.items()}
    stored = thin(teacher, 0.3, 2).half().to("meta")
    heads = {key: value.to("meta") for key, value in teacher.items()}
    with NoWait():
        all_finite(heads)
        live = supervision_terms(student, heads, student_reg_max=16, teacher_reg_max=16)
        read = sparse_supervision_terms(student, stored, reg_max=16)
        (live.cls + live.box + read.cls + read.box).backward()
    assert student["scores"].grad.device.type == "meta"


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
