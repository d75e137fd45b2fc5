"""The student's losses against arithmetic by hand."""

from __future__ import annotations

import math

import pytest
import torch

from focusdd_det.classify.loss import mixed_cross_entropy, soft_cross_entropy, soft_cross_entropy_topk
from focusdd_det.classify.store import shares_by_k, top_k

LN2, LN3 = math.log(2), math.log(3)


def test_soft_cross_entropy_by_hand() -> None:
    # T = 2; teacher t/T = (ln 3, 0) -> p = (3/4, 1/4); student s/T = (0, 0) -> log q = -ln 2: the loss is ln 2.
    # second picture: teacher (0, 0) -> p = (1/2, 1/2); student s/T = (ln 3, 0) -> q = (3/4, 1/4):
    # -(ln(3/4) + ln(1/4)) / 2 = (2 ln 4 - ln 3) / 2 = 2 ln 2 - ln 3 / 2
    teacher = torch.tensor([[2 * LN3, 0.0], [0.0, 0.0]])
    student = torch.tensor([[0.0, 0.0], [2 * LN3, 0.0]])
    expected = (LN2 + 2 * LN2 - LN3 / 2) / 2
    assert soft_cross_entropy(student, teacher, 2.0).item() == pytest.approx(expected, abs=1e-6)


def test_equal_logits_give_the_entropy_and_no_gradient() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(4, 6) * 3
    student = teacher.clone().requires_grad_()
    loss = soft_cross_entropy(student, teacher, 20.0)
    p = (teacher / 20).softmax(dim=1)
    assert loss.item() == pytest.approx(-(p * p.log()).sum(dim=1).mean().item(), abs=1e-6)
    loss.backward()
    assert student.grad.abs().max() < 1e-7


def test_the_gradient_has_no_factor_of_temperature_squared() -> None:
    # d loss / d s = (q - p) / (T * B); at T = 4, B = 1, s = 0, t/T = (ln 3, 0): (1/2 - 3/4) / 4 = -1/16
    student = torch.zeros(1, 2, requires_grad=True)
    soft_cross_entropy(student, torch.tensor([[4 * LN3, 0.0]]), 4.0).backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-1 / 16, 1 / 16]]))


def test_float32_under_autocast() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(8, 100), torch.randn(8, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = soft_cross_entropy(student, teacher, 20.0)
    assert inside.dtype == torch.float32
    assert inside.item() == soft_cross_entropy(student, teacher, 20.0).item()


def test_topk_bucket_by_hand() -> None:
    # teacher t/T = (ln 4, ln 2, 0, 0) at T = 2, hence p = (4, 2, 1, 1) / 8
    # K = 1: p_0 = 1/2; rest = ln(2 + 1 + 1), hence p_rest = 1/2
    # student s/T = (ln 2, 0, 0, 0): q = (2, 1, 1, 1) / 5: q_rest = 3/5.
    # loss = -(ln(2/5) + ln(3/5)) / 2
    teacher = torch.tensor([[4 * LN2, 2 * LN2, 0.0, 0.0]])
    values, indices, rest = top_k(teacher, 1, 2.0)
    assert rest.item() == pytest.approx(math.log(4), abs=1e-6)
    student = torch.tensor([[2 * LN2, 0.0, 0.0, 0.0]])
    found = soft_cross_entropy_topk(student, values, indices, rest, 2.0)
    assert found.item() == pytest.approx(-(math.log(2 / 5) + math.log(3 / 5)) / 2, abs=1e-3)  # values are float16


def test_topk_is_the_whole_when_k_is_all() -> None:
    torch.manual_seed(1)
    teacher = (torch.randn(5, 7) * 4).half().float()  # float16 holds them exactly
    whole_student = torch.randn(5, 7, requires_grad=True)
    student = whole_student.detach().clone().requires_grad_()
    values, indices, rest = top_k(teacher, 7, 20.0)
    whole = soft_cross_entropy(whole_student, teacher, 20.0)
    bucket = soft_cross_entropy_topk(student, values, indices, rest, 20.0)
    torch.testing.assert_close(bucket, whole)
    whole.backward()
    bucket.backward()
    torch.testing.assert_close(student.grad, whole_student.grad, rtol=1e-4, atol=1e-7)


def test_topk_has_finite_gradients_and_pulls_towards_the_bucket() -> None:
    teacher = torch.tensor([[4 * LN2, 2 * LN2, 0.0, 0.0]])
    values, indices, rest = top_k(teacher, 1, 2.0)
    student = torch.zeros(1, 4, requires_grad=True)
    soft_cross_entropy_topk(student, values, indices, rest, 2.0).backward()
    # d / d s_0 = (q_0 - p_0) / T = (1/4 - 1/2) / 2 = -1/8; the others share +1/8 in proportion to their q
    torch.testing.assert_close(student.grad, torch.tensor([[-1 / 8, 1 / 24, 1 / 24, 1 / 24]]), rtol=1e-3, atol=1e-4)


def test_shares_by_hand() -> None:
    # softmax = (4, 2, 1, 1) / 8: the top 1, 2, 3, 4 hold 4/8, 6/8, 7/8, 1
    shares = shares_by_k(torch.tensor([[0.0, 4 * LN2, 0.0, 2 * LN2]]), 2.0)
    assert shares[0] == pytest.approx([0.5, 0.75, 0.875, 1.0])


def test_mixed_cross_entropy_by_hand() -> None:
    # q = (3/4, 1/4); share 0.8 of class 0, 0.2 of class 1: -(0.8 ln(3/4) + 0.2 ln(1/4))
    # second picture: share 1, class 1, the partner does not count: -ln(1/4)
    student = torch.tensor([[LN3, 0.0], [LN3, 0.0]])
    cls, partner = torch.tensor([0, 1]), torch.tensor([1, 0])
    found = mixed_cross_entropy(student, cls, partner, torch.tensor([0.8, 1.0]))
    expected = (-(0.8 * math.log(0.75) + 0.2 * math.log(0.25)) - math.log(0.25)) / 2
    assert found.item() == pytest.approx(expected, abs=1e-6)
