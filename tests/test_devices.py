"""One name for a device everywhere, and processors that this process may use."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from focusdd_det import devices
from focusdd_det.devices import device_of, has_bfloat16, processors, whole_float32
from focusdd_det.errors import ConfigError
from focusdd_det.selector import precision_of
from focusdd_det.training.precision import warn_if_slow


@pytest.mark.parametrize(
    ("name", "device"), [("cpu", "cpu"), ("0", "cuda:0"), ("12", "cuda:12"), ("cuda", "cuda"), ("cuda:1", "cuda:1")]
)
def test_a_device_is_named_as_torch_does_or_as_yolo_does(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "zeros", lambda _, device: asked.append(device))
    assert device_of(name) == device
    assert asked == [device]


@pytest.mark.parametrize("there", [False, True])
def test_auto_takes_a_gpu_if_there_is_one(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert device_of("auto") == ("cuda" if there else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "99", "", "0,1"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device={name}: .*expected auto"):
        device_of(name)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a system on which a process can be bound")
def test_only_processors_that_may_be_used_count() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert processors() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert processors() == len(before)


@pytest.mark.parametrize(
    ("told", "there"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", True),
        ("flags\t\t: fpu avx2 amx_tile amx_bf16", True),
        ("flags\t\t: fpu avx512f avx512bw avx512dq avx512vl amx_tile avx_ne_convert", False),  # emulated, or converted
        ("Features\t: fp asimd i8mm bf16 dgh", True),  # ARM
        ("Features\t: fp asimd asimdhp sve", False),
    ],
)
def test_a_processor_with_bfloat16_is_known_to_all(
    told: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: bf16\n{told}\nbugs\t\t: bf16\n")
    monkeypatch.setattr(devices, "_CPUINFO", tmp_path / "cpuinfo")
    assert has_bfloat16() is there
    assert precision_of("auto", "cpu") == ("bf16" if there else "fp32")
    warn_if_slow()
    assert ("no bfloat16 instructions" in caplog.text) is not there


@pytest.mark.parametrize("there", [True, False, None])
def test_without_a_cpuinfo_torch_is_asked(there: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_CPUINFO", tmp_path / "nowhere")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: there, raising=False)
    if there is None:  # of a torch that does not say
        monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert has_bfloat16() is bool(there)


@pytest.mark.parametrize(("kind", "dtype", "inside"), [("cuda", torch.float32, False), ("cuda", torch.float16, True)])
def test_a_gpu_rounds_no_scores_in_float32(kind: str, dtype: torch.dtype, inside: bool) -> None:
    """torch's convolutions would use TF32; what was set before comes back."""
    x: Any = SimpleNamespace(device=SimpleNamespace(type=kind), dtype=dtype)
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        with whole_float32(x):
            assert torch.backends.cudnn.allow_tf32 is inside
        assert torch.backends.cudnn.allow_tf32 is True
    finally:
        torch.backends.cudnn.allow_tf32 = before
