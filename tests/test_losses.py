"""The supervision terms: numbers worked by hand, and the properties that a divergence has."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from focusdd_det.losses import (
    Supervision,
    bernoulli_kl,
    bins_kl,
    decode_boxes,
    giou,
    paired_head,
    supervision_terms,
)

LOGITS = st.floats(-60, 60, allow_nan=False, width=32)


def head(seed: int, batch: int = 2, classes: int = 3, anchors: int = 5, reg_max: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "boxes": torch.randn(batch, 4 * reg_max, anchors, generator=generator),
        "scores": torch.randn(batch, classes, anchors, generator=generator) * 2,
    }


def terms(student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor], **more: float) -> Supervision:
    anchors = torch.full((2, student["scores"].shape[2]), 10.5)
    bins = {key: more.pop(key, 4) for key in ("student_reg_max", "teacher_reg_max")}
    return supervision_terms(student, teacher, anchors=anchors, **bins, **more)  # type: ignore[arg-type]


def test_class_kl_by_hand() -> None:
    # q = sigmoid(0) = 1/2 against p = sigmoid(ln 3) = 3/4: 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3)
    value = bernoulli_kl(torch.tensor([0.0]), torch.tensor([math.log(3)]))
    assert value.item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)


def test_class_kl_is_the_difference_of_two_cross_entropies() -> None:
    t, s = torch.randn(100), torch.randn(100)
    q = (t / 2).sigmoid()
    expected = F.binary_cross_entropy_with_logits(s / 2, q, reduction="none") - F.binary_cross_entropy_with_logits(
        t / 2, q, reduction="none"
    )
    assert torch.allclose(bernoulli_kl(t, s, temperature=2), expected, atol=1e-6)


def test_bins_kl_by_hand() -> None:
    # one side (1/2, 1/2) against (1/4, 3/4), three sides equal: a quarter of 1/2 ln 2 + 1/2 ln(2/3)
    teacher = torch.zeros(1, 8, 1)
    student = torch.zeros(1, 8, 1)
    student[0, 1, 0] = math.log(3)
    expected = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 4
    assert bins_kl(teacher, student, 2).item() == pytest.approx(expected, abs=1e-6)


def test_terms_by_hand() -> None:
    """Two anchors, one class: f = (0.8, 0.2), N = max(1, 1.0) = 1."""
    teacher = {"scores": torch.logit(torch.tensor([[[0.8, 0.2]]])), "boxes": torch.zeros(1, 8, 2)}
    student = {"scores": torch.zeros(1, 1, 2), "boxes": torch.zeros(1, 8, 2)}
    student["boxes"][0, 1, 0] = math.log(3)
    kl = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)  # the same at both anchors, by symmetry
    bins = {"student_reg_max": 2, "teacher_reg_max": 2}
    weighted = terms(student, teacher, **bins)
    assert weighted.cls.item() == pytest.approx(2 * 0.3 * kl, abs=1e-6)
    assert terms(student, teacher, beta=0, **bins).cls.item() == pytest.approx(2 * kl, abs=1e-6)
    assert weighted.box.item() == pytest.approx(0.8 * 0.5 * math.log(4 / 3) / 4, abs=1e-6)


def test_normaliser_is_at_least_one() -> None:
    teacher, student = head(1), head(2)
    teacher["scores"] = teacher["scores"] - 12  # almost no foreground: N stays 1
    plain = bernoulli_kl(teacher["scores"], student["scores"]).sum()
    assert torch.allclose(terms(student, teacher, beta=0).cls, plain)


@given(t=LOGITS, s=LOGITS, temperature=st.floats(0.25, 20))
@settings(max_examples=300, deadline=None)
def test_class_kl_is_never_negative_and_zero_at_equality(t: float, s: float, temperature: float) -> None:
    a, b = torch.tensor([t]), torch.tensor([s])
    assert bernoulli_kl(a, b, temperature).item() >= -1e-6
    assert bernoulli_kl(a, a, temperature).item() == 0
    near = torch.nextafter(a, b)
    assert -1e-6 <= bernoulli_kl(a, near, temperature).item() <= 1e-5


@given(st.lists(LOGITS, min_size=16, max_size=16), st.lists(LOGITS, min_size=16, max_size=16))
@settings(max_examples=100, deadline=None)
def test_bins_kl_is_never_negative_and_zero_at_equality(t: list[float], s: list[float]) -> None:
    a, b = torch.tensor(t).view(1, 16, 1), torch.tensor(s).view(1, 16, 1)
    assert bins_kl(a, b, 4).item() >= -1e-6
    assert bins_kl(a, a, 4).item() == 0


@pytest.mark.parametrize("reg_max", [4, 1])
def test_equal_outputs_give_zero(reg_max: int) -> None:
    same = head(0, reg_max=reg_max)
    same["boxes"] = same["boxes"].abs() + 0.1
    result = terms(same, same, student_reg_max=reg_max, teacher_reg_max=reg_max)
    assert result.cls.item() == 0
    assert result.box.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("reg_max", [4, 1])
def test_a_batch_of_two_equal_pictures_is_twice_one(reg_max: int) -> None:
    """The caller multiplies by B; N grows with the batch, so the terms themselves stay."""
    one, other = (head(seed, batch=1, anchors=40, reg_max=reg_max) for seed in (3, 4))
    bins = {"student_reg_max": reg_max, "teacher_reg_max": reg_max}
    single = terms(one, other, **bins)
    twice = terms(*({k: v.repeat(2, 1, 1) for k, v in h.items()} for h in (one, other)), **bins)
    assert torch.allclose(2 * twice.cls, 2 * single.cls)
    assert torch.allclose(2 * twice.box, 2 * single.box)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 200.0, 60000.0])
def test_half_precision_stays_finite(dtype: torch.dtype, size: float) -> None:
    teacher, student = head(5), head(6)
    teacher = {k: (v * size).clamp(-60000, 60000).to(dtype) for k, v in teacher.items()}
    student = {k: (v * size).clamp(-60000, 60000).to(dtype).requires_grad_() for k, v in student.items()}
    with torch.autocast("cpu", torch.bfloat16):
        result = terms(student, teacher, temperature=2.0)
    assert result.cls.dtype == result.box.dtype == torch.float32
    (result.cls + result.box).backward()
    for value in (result.cls, result.box, student["scores"].grad, student["boxes"].grad):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("reg_max", [4, 1])
def test_no_gradient_and_no_change_in_the_teacher(reg_max: int) -> None:
    teacher = {k: v.requires_grad_() for k, v in head(7, reg_max=reg_max).items()}
    before = {k: v.detach().clone() for k, v in teacher.items()}
    student = {k: v.requires_grad_() for k, v in head(8, reg_max=reg_max).items()}
    result = terms(student, teacher, student_reg_max=reg_max, teacher_reg_max=reg_max)
    (result.cls + result.box).backward()
    assert all(v.grad is None and torch.equal(v, before[k]) for k, v in teacher.items())
    assert all(v.grad is not None and v.grad.abs().sum() > 0 for v in student.values())


def test_weight_carries_no_gradient() -> None:
    """d/ds of w * KL with w constant is w * (sigmoid(s) - q)."""
    teacher, student = head(9, anchors=1, classes=1, batch=1), head(10, anchors=1, classes=1, batch=1)
    s = student["scores"].requires_grad_()
    terms({**student, "scores": s}, teacher).cls.backward()
    q, p = teacher["scores"].sigmoid(), s.detach().sigmoid()
    assert torch.allclose(s.grad, (p - q).abs() * (p - q), atol=1e-6)


def test_temperature_keeps_the_gradient_of_the_soft_limit() -> None:
    teacher, student = head(11), head(12)
    hot = terms(student, teacher, temperature=3.0, beta=0).cls
    total = teacher["scores"].sigmoid().amax(1).sum().clamp(min=1)
    expected = 9 * bernoulli_kl(teacher["scores"], student["scores"], 3.0).sum() / total
    assert torch.allclose(hot, expected)


def test_boxes_are_decoded_as_ultralytics_does() -> None:
    from ultralytics.utils.tal import dist2bbox

    anchors = torch.rand(2, 6) * 20
    distance = torch.rand(2, 4, 6) * 5
    expected = dist2bbox(distance, anchors[None], xywh=False, dim=1)
    assert torch.allclose(decode_boxes(distance, anchors, 1), expected)
    certain = torch.zeros(1, 4, 16, 1)
    for side, bin_ in enumerate((2, 3, 5, 7)):
        certain[0, side, bin_] = 100
    box = decode_boxes(certain.view(1, 64, 1), torch.tensor([[10.5], [20.5]]), 16)[0, :, 0]
    assert box.tolist() == pytest.approx([8.5, 17.5, 15.5, 27.5], abs=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),  # hull equals union
        ((0, 0, 1, 1), (2, 0, 3, 1), -1 / 3),  # apart: 0 - (3 - 2) / 3
        ((0, 0, 1, 1), (1, 1, 2, 2), -1 / 2),  # corners touch: 0 - (4 - 2) / 4
    ],
)
def test_giou_by_hand(a: tuple[float, ...], b: tuple[float, ...], expected: float) -> None:
    pair = [torch.tensor(box, dtype=torch.float32).view(1, 4, 1) for box in (a, b)]
    assert giou(*pair).item() == pytest.approx(expected, abs=1e-5)


def test_a_teacher_with_bins_teaches_a_student_without() -> None:
    teacher, student = head(13, reg_max=16), head(14, reg_max=1)
    result = terms(student, teacher, student_reg_max=1, teacher_reg_max=16)
    anchors = torch.full((2, 5), 10.5)
    per_anchor = 1 - giou(decode_boxes(teacher["boxes"], anchors, 16), decode_boxes(student["boxes"], anchors, 1))
    f = teacher["scores"].sigmoid().amax(1)
    assert torch.allclose(result.box, (f * per_anchor).sum() / f.sum().clamp(min=1))


def test_pairing_of_heads() -> None:
    single, many, one = head(0), head(1), head(2)
    double = {"one2many": many, "one2one": one}
    assert paired_head(single, "one2many") is paired_head(single, "one2one") is paired_head(single, None) is single
    assert paired_head(double, "one2many") is paired_head(double, None) is many
    assert paired_head(double, "one2one") is one


def test_classes_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        terms(head(0, classes=3), head(1, classes=4))


def test_boxes_without_equal_bins_take_anchors() -> None:
    student, teacher = head(0), head(1)
    assert supervision_terms(student, teacher, student_reg_max=4, teacher_reg_max=4).box > 0
    with pytest.raises(ValueError, match="boxes of 4 and 2 bins are decoded, which takes anchors"):
        supervision_terms(student, head(1, reg_max=2), student_reg_max=4, teacher_reg_max=2)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_the_class_term_and_its_gradient_are_those_of_the_formula(temperature: float, beta: float) -> None:
    teacher, student = (head(seed, batch=3, classes=4, anchors=6) for seed in (13, 14))
    ours, plain = (student["scores"].clone().mul_(5).requires_grad_() for _ in range(2))
    terms({**student, "scores": ours}, teacher, temperature=temperature, beta=beta).cls.backward()
    t = teacher["scores"]
    weight = (t.sigmoid() - plain.detach().sigmoid()).abs() ** beta
    total = t.sigmoid().amax(1).sum().clamp(min=1)
    expected = (weight * bernoulli_kl(t, plain, temperature)).sum() * temperature**2 / total
    expected.backward()
    value = terms({**student, "scores": ours.detach()}, teacher, temperature=temperature, beta=beta).cls
    assert torch.allclose(value, expected.detach(), rtol=1e-5)
    assert torch.allclose(ours.grad, plain.grad, rtol=1e-4, atol=1e-7)


def test_the_box_term_and_its_gradient_are_those_of_the_formula() -> None:
    teacher, student = (head(seed, batch=3, anchors=6) for seed in (15, 16))
    ours, plain = (student["boxes"].clone().requires_grad_() for _ in range(2))
    value = terms({**student, "boxes": ours}, teacher).box
    (3 * value).backward()
    f = teacher["scores"].sigmoid().amax(1)
    expected = (f * bins_kl(teacher["boxes"], plain, 4)).sum() / f.sum().clamp(min=1)
    (3 * expected).backward()
    assert torch.allclose(value, expected, rtol=1e-5)
    assert torch.allclose(ours.grad, plain.grad, rtol=1e-4, atol=1e-7)


def test_logits_beyond_what_an_exponential_holds_are_no_infinity() -> None:
    large = {"scores": torch.full((1, 1, 1), 500.0), "boxes": torch.zeros(1, 16, 1)}
    result = terms({**large, "scores": -large["scores"]}, large, beta=0)
    assert result.cls.item() == pytest.approx(500)
    assert terms(large, {**large, "scores": -large["scores"]}, beta=0).cls.item() == pytest.approx(500)


def formulas(student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor]) -> Supervision:
    """What the terms stand for, with autograd's own backward pass."""
    q = teacher["scores"].sigmoid()
    weight, f = (q - student["scores"].detach().sigmoid()).abs(), q.amax(1)
    cls = (weight * bernoulli_kl(teacher["scores"], student["scores"])).sum()
    return Supervision(cls, (f * bins_kl(teacher["boxes"], student["boxes"], 4)).sum())


def kept(how: Any, student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Every tensor of more than one element that is kept for the backward pass."""
    found: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):
        sum(how({key: value.clone().requires_grad_() for key, value in student.items()}, teacher)).backward()
    return [tensor for tensor in found if tensor.numel() > 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_of_each_term_one_tensor_is_kept_for_the_backward_pass(dtype: torch.dtype) -> None:
    student = head(1, anchors=50)
    teacher = {key: value.to(dtype) for key, value in head(2, anchors=50).items()}
    ours = kept(terms, student, teacher)
    assert sorted(tensor.shape for tensor in ours) == sorted(value.shape for value in student.values())
    assert {tensor.dtype for tensor in ours} == {torch.float32}
    autograds = [tensor.numel() for tensor in kept(formulas, student, teacher)]
    assert autograds.count(student["scores"].numel()) >= 6
    assert autograds.count(student["boxes"].numel()) >= 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nothing_of_the_teacher_is_kept_for_the_backward_pass(dtype: type) -> None:
    student = {key: value.requires_grad_() for key, value in head(1).items()}
    arrays = [value.numpy().astype(dtype) for value in head(2).values()]
    alive = [weakref.ref(array) for array in arrays]  # for as long as any tensor that shares their memory
    result = terms(student, dict(zip(("boxes", "scores"), map(torch.from_numpy, arrays), strict=True)))
    del arrays
    assert all(array() is None for array in alive)
    sum(result).backward()
    assert all(value.grad.abs().sum() > 0 for value in student.values())


@given(st.lists(LOGITS, min_size=4, max_size=4), st.lists(LOGITS, min_size=4, max_size=4))
@settings(max_examples=100, deadline=None)
def test_the_class_term_is_never_negative_and_zero_at_equality(t: list[float], s: list[float]) -> None:
    a, b = ({"boxes": torch.zeros(1, 16, 1), "scores": torch.tensor(v).view(1, 4, 1)} for v in (t, s))
    assert terms(b, a, beta=0).cls.item() >= -4e-6
    assert terms(a, a, beta=0).cls.item() == 0
