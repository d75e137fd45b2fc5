"""The numbers of set statistics, against values that are known or computed the slow way."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_coco
from torch import Tensor, nn

from focusdd_det.errors import DataError
from focusdd_det.stats import diversity as div
from focusdd_det.stats.duplicates import near_pairs
from focusdd_det.stats.hessian import hessian_trace
from focusdd_det.stats.reference import SHIPPED, measure
from focusdd_det.stats.sizes import (
    EDGES,
    cells_filled,
    cells_with_a_box,
    coco_kinds,
    covered_area,
    overlap,
    size_shares,
)
from focusdd_det.stats.snr import noise_sigma, snr_db


def rows(*boxes: tuple[float, float, float, float]) -> np.ndarray:
    return np.array([(0, *box) for box in boxes], np.float64).reshape(len(boxes), 5)


@pytest.mark.parametrize(
    ("boxes", "share"),
    [
        ([], 0.0),
        ([(0.5, 0.5, 1, 1)], 1.0),
        ([(0.25, 0.5, 0.5, 1), (0.25, 0.5, 0.5, 1)], 0.5),  # the same place twice counts once
        ([(0.25, 0.25, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)], 0.25 + 0.25 - 0.0625),
        ([(0.1, 0.5, 0.4, 0.1)], 0.03),  # the part outside the picture does not count
    ],
)
def test_the_covered_area_is_that_of_the_union(boxes: list[tuple[float, float, float, float]], share: float) -> None:
    assert covered_area(rows(*boxes)) == pytest.approx(share)


def test_a_cell_holds_a_box_when_its_centre_lies_in_it() -> None:
    assert cells_with_a_box(rows((0.2, 0.2, 0.1, 0.1), (0.3, 0.3, 0.1, 0.1), (0.9, 0.1, 0.1, 0.1)), 2) == 2
    assert cells_with_a_box(rows((1.0, 1.0, 0.1, 0.1)), 2) == 1  # on the far border, still inside
    assert cells_with_a_box(rows(), 2) == 0


@pytest.mark.parametrize(
    ("boxes", "filled"),
    [
        ([], 0),
        ([(0.25, 0.25, 0.5, 0.5)], 1),
        ([(0.25, 0.25, 0.5, 0.5), (0.25, 0.25, 0.49, 0.49)], 1),  # two boxes fill one cell
        ([(0.25, 0.25, 0.5, 0.42)], 0),  # 84 %
        ([(0.25, 0.25, 0.5, 0.43), (0.75, 0.75, 0.5, 0.5)], 2),
        ([(0.5, 0.25, 1, 0.5)], 1),  # across the seam: the cell of its centre counts
        ([(0.5, 0.25, 0.5, 0.5)], 0),  # half of it lies in the other cell
        ([(0.25, 0.25, 0.25, 0.25), (0.25, 0.25, 0.5, 0.25)], 0),  # together is not one
    ],
)
def test_a_cell_is_filled_by_one_box(boxes: list[tuple[float, float, float, float]], filled: int) -> None:
    assert cells_filled(rows(*boxes), 2) == filled


def test_sizes_beyond_the_bins_count_to_the_outer_ones() -> None:
    shares = size_shares(np.array([0.001, 0.0101, 0.99, 1.0]))
    assert shares[0] == 0.5 and shares[-1] == 0.5 and shares.sum() == 1
    assert size_shares(np.zeros(0)).sum() == 0
    assert overlap(shares, shares) == 1 and overlap(shares, np.eye(24)[0]) == 0.5


def test_kinds_have_coco_s_borders() -> None:
    assert coco_kinds(np.array([32.0**2 - 1, 32.0**2, 96.0**2, 500.0**2])) == (0.25, 0.25, 0.5)


def test_the_reference_of_an_annotations_file_leaves_crowds_out(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", count=6, size=96)
    found = measure(tmp_path / "coco" / "annotations" / "instances_val.json")
    content = json.loads((tmp_path / "coco" / "annotations" / "instances_val.json").read_text())
    kept = [a for a in content["annotations"] if not a["iscrowd"]]
    assert found.boxes == len(kept) < len(content["annotations"])
    assert found.pictures == 6 and found.boxes_per_image.sum() == 6
    assert found.shares.sum() == pytest.approx(1)
    middle = np.median([math.sqrt(a["bbox"][2] * a["bbox"][3]) / 96 for a in kept])
    assert found.sizes[2] == pytest.approx(middle, abs=1e-4)


def test_a_reference_that_is_missing_is_an_error() -> None:
    with pytest.raises(DataError, match="not found"):
        measure("nowhere.json")


def test_the_shipped_reference_is_consistent_and_names_its_size() -> None:
    assert SHIPPED.shares.sum() == pytest.approx(1) and len(SHIPPED.shares) == len(EDGES) - 1
    assert SHIPPED.boxes_per_image.sum() == SHIPPED.pictures == 177
    assert (SHIPPED.boxes_per_image * np.arange(len(SHIPPED.boxes_per_image))).sum() == SHIPPED.boxes
    assert "177" in SHIPPED.name and "177 pictures of COCO val2017" in SHIPPED.origin


def test_the_shipped_reference_is_what_its_origin_gives(assets: Path) -> None:
    found = measure(assets / "data" / "coco_mini" / "annotations" / "instances_val2017.json")
    assert found.boxes == SHIPPED.boxes and np.allclose(found.shares, SHIPPED.shares)
    assert found.boxes_per_image.tolist() == SHIPPED.boxes_per_image.tolist()
    assert np.allclose(found.kinds, SHIPPED.kinds, atol=1e-4) and np.allclose(found.sizes, SHIPPED.sizes, atol=1e-4)


# --- signal to noise


@pytest.mark.parametrize("sigma", [2.0, 8.0])
def test_the_noise_that_was_added_is_found(sigma: float) -> None:
    rng = np.random.default_rng(0)
    ramp = np.linspace(60, 180, 200)[None] + np.linspace(0, 30, 150)[:, None]
    noisy = np.clip(np.rint(ramp + rng.normal(0, sigma, ramp.shape)), 0, 255).astype(np.uint8)
    assert noise_sigma(noisy) == pytest.approx(sigma, rel=0.05)
    assert snr_db(noisy) == pytest.approx(20 * math.log10(noisy.mean() / sigma), abs=0.5)


def test_slopes_and_seams_are_no_noise() -> None:
    seams = np.zeros((64, 64), np.uint8)
    seams[:, 32:] = 200
    assert noise_sigma(seams) == 0
    assert noise_sigma(np.tile(np.arange(64, dtype=np.uint8) * 2, (64, 1))) == 0


def test_a_picture_without_noise_has_no_ratio() -> None:
    assert snr_db(np.full((9, 9), 128, np.uint8)) is None
    with pytest.raises(ValueError, match="3 x 3"):
        snr_db(np.zeros((2, 9), np.uint8))


# --- diversity


def test_mean_distances_equal_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(div, "_BLOCK", 5)  # several blocks, the last one smaller
    rng = np.random.default_rng(1)
    features = (rng.normal(size=(13, 6)) + 40).astype(np.float32)  # far from 0: differences of large squares
    classes = np.array([0] * 6 + [1] * 6 + [2])
    pairs = [(a, b) for a in range(13) for b in range(a + 1, 13)]
    f = features.astype(np.float64)

    def cosine(a: int, b: int) -> float:
        return float(1 - f[a] @ f[b] / np.linalg.norm(f[a]) / np.linalg.norm(f[b]))

    found = div.diversity(features, classes)
    assert found is not None and found.pairs == len(pairs)
    assert found.euclidean == pytest.approx(np.mean([np.linalg.norm(f[a] - f[b]) for a, b in pairs]), rel=1e-6)
    assert found.squared == pytest.approx(np.mean([((f[a] - f[b]) ** 2).sum() for a, b in pairs]), rel=1e-6)
    assert found.cosine == pytest.approx(np.mean([cosine(a, b) for a, b in pairs]), rel=1e-4)
    within = [np.mean([cosine(a, b) for a, b in pairs if classes[a] == classes[b] == c]) for c in (0, 1)]
    assert found.cosine_in_class == pytest.approx(np.mean(within), rel=1e-4)


def test_one_picture_has_no_diversity_and_equal_ones_have_none_at_all() -> None:
    assert div.diversity(np.ones((1, 4), np.float32), np.zeros(1, np.int64)) is None
    same = div.diversity(np.ones((5, 4), np.float32), np.zeros(5, np.int64))
    assert same is not None and (same.euclidean, same.squared) == (0, 0) and abs(same.cosine) < 1e-12


# --- duplicates


def test_near_pairs_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("focusdd_det.stats.duplicates._ROWS", 4)  # buckets that are looked at in pieces
    rng = np.random.default_rng(2)
    values = [int(v) for v in rng.integers(0, 1 << 63, 60)]
    for value in values[:25]:  # neighbours at 1 to 10 bits, so that some are just in and some just out
        flips = rng.choice(64, int(rng.integers(1, 11)), replace=False)
        values.append(value ^ sum(1 << int(bit) for bit in flips))
    hashes = np.array(values, np.uint64)
    slow = {
        (i, j): bits
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if (bits := (values[i] ^ values[j]).bit_count()) <= 6
    }
    assert {(i, j): bits for i, j, bits in near_pairs(hashes)} == slow
    assert 5 < len(slow) < 25


def test_k_copies_are_k_minus_1_pairs() -> None:
    hashes = np.array([7, 1 << 40, 7, 7, (1 << 40) | 1], np.uint64)
    assert near_pairs(hashes, 1) == [(0, 2, 0), (2, 3, 0), (1, 4, 1)]
    assert near_pairs(hashes, 0) == [(0, 2, 0), (2, 3, 0)]
    assert near_pairs(np.zeros(0, np.uint64)) == []


# --- Hessian trace


def test_the_trace_of_a_diagonal_quadratic_is_exact_with_one_probe() -> None:
    diagonal = torch.tensor([3.0, -1.0, 5.0])
    x = torch.tensor([0.3, 2.0, -1.0], requires_grad=True)

    def loss(_: None) -> Tensor:
        return (diagonal * x * x).sum() / 2

    found = hessian_trace(loss, [(None, 1.0)], [x], probes=1)
    assert found.mean == pytest.approx(7) and found.standard_error is None and found.parameters == 3
    assert hessian_trace(loss, [(None, 0.25), (None, 0.5)], [x], probes=3).mean == pytest.approx(0.75 * 7)


def test_the_estimate_of_a_full_quadratic_is_right_within_its_error() -> None:
    torch.manual_seed(0)
    a = torch.randn(12, 12)
    a = a @ a.T
    x = torch.randn(12, requires_grad=True)

    found = hessian_trace(lambda _: x @ a @ x / 2, [(None, 1.0)], [x], probes=400)
    assert found.standard_error is not None and found.standard_error > 0
    assert abs(found.mean - float(a.trace())) < 4 * found.standard_error
    # Var[v^T A v] of random signs is 2 (|A|_F^2 - sum of squares of the diagonal)
    spread = math.sqrt(2 * float((a**2).sum() - (a.diagonal() ** 2).sum()) / 400)
    assert found.standard_error == pytest.approx(spread, rel=0.2)


def test_the_estimate_of_a_network_equals_autograd_s_hessian() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(10, 3), torch.randint(0, 3, (10,))
    names = [name for name, _ in net.named_parameters()]
    parameters = [p.detach().clone() for p in net.parameters()]

    def of_all(*values: Tensor) -> Tensor:
        logits = torch.func.functional_call(net, dict(zip(names, values, strict=True)), x)
        return nn.functional.cross_entropy(logits, y)

    blocks = torch.autograd.functional.hessian(of_all, tuple(parameters))
    exact = sum(float(blocks[i][i].reshape(p.numel(), p.numel()).trace()) for i, p in enumerate(parameters))

    def loss(part: slice) -> Tensor:
        return nn.functional.cross_entropy(net(x[part]), y[part])

    batches = [(slice(0, 4), 0.4), (slice(4, 10), 0.6)]
    found = hessian_trace(loss, batches, list(net.parameters()), probes=500, seed=3)
    assert found.standard_error is not None and abs(found.mean - exact) < 4 * found.standard_error
    assert found.standard_error < 0.1 * abs(exact)
    assert found.loss == pytest.approx(float(of_all(*parameters)), rel=1e-5)
    again = hessian_trace(loss, [(slice(0, 10), 1.0)], list(net.parameters()), probes=500, seed=3)
    assert np.allclose(again.probes, found.probes, rtol=1e-3, atol=1e-5)  # the same vectors in every batch
    assert all(p.grad is None for p in net.parameters())


def test_a_loss_without_curvature_has_trace_0() -> None:
    x, unused = torch.ones(4, requires_grad=True), torch.ones(2, requires_grad=True)
    assert hessian_trace(lambda _: x.sum(), [(None, 1.0)], [x, unused], probes=2).mean == 0
    with pytest.raises(ValueError, match="at least one probe"):
        hessian_trace(lambda _: x.sum(), [(None, 1.0)], [x], probes=0)


def test_fused_attention_can_be_differentiated_twice() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    found = hessian_trace(
        lambda _: nn.functional.scaled_dot_product_attention(q, q, q).square().sum(), [(None, 1.0)], [q], probes=2
    )
    assert math.isfinite(found.mean) and found.mean != 0


def test_opencv_s_filter_is_the_laplacian_of_the_text() -> None:
    picture = np.random.default_rng(3).integers(0, 255, (7, 8)).astype(np.uint8)
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    total = sum(
        abs(int((picture[y : y + 3, x : x + 3].astype(int) * kernel).sum())) for y in range(5) for x in range(6)
    )
    assert noise_sigma(picture) == pytest.approx(math.sqrt(math.pi / 2) / (6 * 6 * 5) * total)
