"""Whether a student can be trained in half precision: asked as it will be trained, not as it begins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from focusdd_det.classify.nets import make_net
from focusdd_det.training import precision
from focusdd_det.training.precision import amp_is_sound, class_scores, half_is_close


def test_a_deep_student_from_scratch_is_not_taken_for_one_that_overflows() -> None:
    torch.manual_seed(0)
    model = make_net("resnet101", 10).module
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():  # with the statistics that it begins with it does overflow
        assert model.eval().float()(torch.rand(2, 3, 96, 96)).abs().max() > 3e3
    assert half_is_close(model, class_scores, 64)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not amp_is_sound(model, class_scores, 64)  # on a CPU there is nothing to be gained


class _Loud(nn.Module):
    """Its outputs are beyond float16."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x).mean((2, 3)) + 3) * 1e3 @ (torch.eye(4) * 1e3)


def test_one_that_overflows_is_told() -> None:
    assert not half_is_close(_Loud(), class_scores, 32)


@pytest.mark.parametrize(("device", "close", "said"), [("cpu", True, 0), ("cuda:0", True, 0), ("cuda:0", False, 1)])
def test_only_a_gpu_is_said_to_be_unsound(
    device: str, close: bool, said: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device(device))]))
    monkeypatch.setattr(precision, "half_is_close", lambda *_: close)
    assert amp_is_sound(model) is (device != "cpu" and close)
    assert caplog.text.count("not sound on this GPU") == said
