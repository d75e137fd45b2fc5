"""The KL terms on thinned heads: equal to the dense ones where nothing is left out, by hand where something is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from focusdd_det.losses import Supervision, bernoulli_kl, supervision_terms
from focusdd_det.training.sparse_heads import join, sparse_supervision_terms, thin

R = 4
Head = dict[str, Tensor]


def head(seed: int, batch: int = 3, classes: int = 5, anchors: int = 40, bias: float = -3.0) -> Head:
    generator = torch.Generator().manual_seed(seed)
    return {
        "boxes": torch.randn(batch, 4 * R, anchors, generator=generator),
        "scores": torch.randn(batch, classes, anchors, generator=generator) * 3 + bias,
    }


def dense(student: Head, teacher: Head, **more: float) -> Supervision:
    anchors = torch.zeros(2, student["scores"].shape[2])
    return supervision_terms(student, teacher, student_reg_max=R, teacher_reg_max=R, anchors=anchors, **more)


def sparse(student: Head, teacher: Head, floor: float, topk: int, **more: float) -> Supervision:
    return sparse_supervision_terms(student, thin(teacher, floor, topk), reg_max=R, **more)


def gradients(student: Head, terms: Supervision) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(terms.cls + terms.box, (student["scores"], student["boxes"]))  # type: ignore[return-value]


def learning(seed: int, **more: float) -> Head:
    return {key: value.requires_grad_() for key, value in head(seed, **more).items()}  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_with_nothing_left_out_it_is_the_dense_loss(temperature: float, beta: float) -> None:
    student, teacher = learning(0), head(1)
    how = {"temperature": temperature, "beta": beta}
    whole, thinned = dense(student, teacher, **how), sparse(student, teacher, 0, 0, **how)
    assert thinned.cls.item() == pytest.approx(whole.cls.item(), rel=1e-6)
    assert thinned.box.item() == pytest.approx(whole.box.item(), rel=1e-6)
    for mine, theirs in zip(gradients(student, thinned), gradients(student, whole), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-7)


def test_left_out_anchors_by_hand() -> None:
    """One class, f = (0.8, 0.2, 0.4), floor 1/2: the first is kept, the others have q = 0.3; N = 1.4."""
    teacher = {"scores": torch.logit(torch.tensor([[[0.8, 0.2, 0.4]]])), "boxes": torch.zeros(1, 8, 3)}
    student = {"scores": torch.zeros(1, 1, 3, requires_grad=True), "boxes": torch.zeros(1, 8, 3)}
    student["boxes"][0, 1, 0] = math.log(3)  # one side of the kept anchor has (1/4, 3/4) against (1/2, 1/2)
    student["boxes"][0, 1, 2] = 5.0  # of a left-out anchor: nobody knows what the teacher said
    result = sparse_supervision_terms(student, thin(teacher, 0.5, 0), reg_max=2)
    kl_8 = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    kl_3 = 0.3 * math.log(0.3 / 0.5) + 0.7 * math.log(0.7 / 0.5)
    assert result.cls.item() == pytest.approx((0.3 * kl_8 + 2 * 0.2 * kl_3) / 1.4, abs=1e-6)
    assert result.box.item() == pytest.approx(0.5 * math.log(4 / 3) / 4, abs=1e-6)  # the kept box for all of f
    result.cls.backward()
    expected = torch.tensor([0.3 * (0.5 - 0.8), 0.2 * (0.5 - 0.3), 0.2 * (0.5 - 0.3)]) / 1.4
    assert torch.allclose(student["scores"].grad.flatten(), expected, atol=1e-6)


def test_left_out_classes_by_hand() -> None:
    """Probabilities (0.2, 0.8, 0.4), one kept: the two others have q = 0.3 each."""
    teacher = {"scores": torch.logit(torch.tensor([0.2, 0.8, 0.4])).view(1, 3, 1), "boxes": torch.zeros(1, 16, 1)}
    student = {"scores": torch.zeros(1, 3, 1), "boxes": torch.zeros(1, 16, 1)}
    kl_8 = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    kl_3 = 0.3 * math.log(0.3 / 0.5) + 0.7 * math.log(0.7 / 0.5)
    result = sparse(student, teacher, 0.01, 1)
    assert result.cls.item() == pytest.approx(0.3 * kl_8 + 2 * 0.2 * kl_3, abs=1e-6)  # N = max(1, 0.8)
    thinned = thin(teacher, 0.01, 1)
    assert (thinned.classes.tolist(), thinned.total.item()) == ([[1]], pytest.approx(0.8))


def test_a_mean_keeps_the_sum_of_the_gradient() -> None:
    """Without the weight w, d/ds summed over what one number stands for is what it would be with all of them."""
    student, teacher = learning(2), head(3)
    (mine, _), (theirs, _) = (
        gradients(student, terms)
        for terms in (sparse(student, teacher, 0.6, 0, beta=0), dense(student, teacher, beta=0))
    )
    assert torch.allclose(mine.sum(2), theirs.sum(2), atol=1e-5)


@pytest.mark.parametrize("bias", [-8.0, -6.0])
def test_a_low_floor_changes_little(bias: float) -> None:
    student, teacher = learning(4, anchors=2000, bias=-5.0), head(5, anchors=2000, bias=bias)
    whole, thinned = dense(student, teacher), sparse(student, teacher, 0.01, 3)
    assert thinned.cls.item() == pytest.approx(whole.cls.item(), rel=0.01)
    assert thinned.box.item() == pytest.approx(whole.box.item(), rel=0.02)
    for mine, theirs in zip(gradients(student, thinned), gradients(student, whole), strict=True):
        assert F.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0) > 0.99
    assert len(thin(teacher, 0.01, 3).anchor) < 3 * 2000


def test_half_precision_and_autocast() -> None:
    student, teacher = learning(6), head(7)
    small = thin({key: value.half() for key, value in teacher.items()}, 0.05, 3)
    with torch.autocast("cpu", torch.bfloat16):
        result = sparse_supervision_terms(
            {key: value.half() for key, value in student.items()}, small, reg_max=R, temperature=1.0
        )
    assert result.cls.dtype == result.box.dtype == torch.float32
    exact = sparse(student, teacher, 0.05, 3)
    assert result.cls.item() == pytest.approx(exact.cls.item(), rel=5e-3)
    assert result.box.item() == pytest.approx(exact.box.item(), rel=5e-3)


def test_a_teacher_that_finds_nothing() -> None:
    student, teacher = learning(8), head(9, bias=-40.0)
    result = sparse(student, teacher, 0.01, 2)
    assert result.box.item() == 0
    expected = bernoulli_kl(torch.full_like(student["scores"], -30), student["scores"])
    weighted = expected * student["scores"].detach().sigmoid()
    assert result.cls.item() == pytest.approx(weighted.sum().item(), rel=1e-4)
    assert all(torch.isfinite(g).all() for g in gradients(student, result))


def test_equal_outputs_give_zero() -> None:
    same = head(10)
    result = sparse(same, same, 0, 0)
    assert result.cls.item() == 0
    assert result.box.item() == pytest.approx(0, abs=1e-6)


def test_pictures_one_by_one_are_the_batch() -> None:
    teacher, student = head(11), head(12)
    batch = thin(teacher, 0.3, 2)
    singles = [thin({key: value[b : b + 1] for key, value in teacher.items()}, 0.3, 2) for b in range(3)]
    for again in (join(singles), join(batch.split())):
        assert all(torch.allclose(getattr(again, name), value) for name, value in vars(batch).items())
    assert len({len(single.anchor) for single in singles}) > 1, "the pictures should differ in what is kept"
    mine, whole = sparse_supervision_terms(student, join(singles), reg_max=R), sparse(student, teacher, 0.3, 2)
    assert torch.allclose(torch.stack(mine), torch.stack(whole))


@pytest.mark.parametrize(("classes", "reg_max"), [(4, R), (5, 2 * R)])
def test_shapes_that_do_not_pair_are_refused(classes: int, reg_max: int) -> None:
    with pytest.raises(ValueError, match="must have the same"):
        sparse_supervision_terms(head(0, classes=classes), thin(head(1), 0.1, 2), reg_max=reg_max)
