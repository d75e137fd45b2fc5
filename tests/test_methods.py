"""Methods as pure functions: orders and windows against arithmetic by hand."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch

from focusdd_det.backbones.timm_vit import TimmViT
from focusdd_det.build import load_class_config, load_config
from focusdd_det.config import cfg_dir
from focusdd_det.errors import ConfigError, WeightsError
from focusdd_det.methods import METHODS, Base, by_clusters, by_herding, check_order, coresets, register, window_scores
from focusdd_det.plan import method_of
from focusdd_det.scoring.window_judge import WindowJudge, on_source
from focusdd_det.select import Candidates
from focusdd_det.selector import Selector
from focusdd_det.types import Crop, Detections
from focusdd_det.windows import best_windows, least_windows, view_of

NAMES = ("focusdd", "random", "whole", "herding", "kmeans", "realism", "min_as", "random_as", "ranked_crops", "teacher")


def candidates(features: np.ndarray, sha: np.ndarray | None = None) -> Candidates:
    n = len(features)
    if sha is None:
        sha = np.stack([np.frombuffer(hashlib.sha256(str(i).encode()).digest(), np.uint8) for i in range(n)])
    zero = np.zeros(n)
    return Candidates(
        np.arange(n), sha, zero.astype(np.int32), zero, zero.astype(np.int64), zero.astype(np.uint64),
        features.astype(np.float16),
    )  # fmt: skip


def unit(rng: np.random.Generator, n: int, d: int = 8) -> np.ndarray:
    x = rng.normal(size=(n, d)) + 0.5
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


# --- the list


def test_every_method_is_there_and_named_where_a_user_looks() -> None:
    ours = [name for name, method in METHODS.items() if type(method).__module__.startswith("focusdd_det.methods")]
    assert tuple(ours) == NAMES  # other tests add methods of users
    for file in ("build_det.yaml", "build_cls.yaml"):
        text = (cfg_dir() / file).read_text()
        about = text[text.index("\nmethod:") : text.index("\nplugins:")]
        named = [name for name in NAMES if f" {name}" in about.replace("|", " ").replace("(", " ")]
        assert set(NAMES) - set(named) == ({"teacher"} if file == "build_cls.yaml" else set())


@pytest.mark.parametrize("name", NAMES)
def test_all_take_the_shipped_configuration(name: str) -> None:
    config = load_config(method=name, sources=["x"])
    method = method_of(config)
    whole = name in ("whole", "herding", "kmeans")
    assert method.adapt(config).grid == (1 if whole else 2)
    assert method.growable == (name != "kmeans")


def test_a_classifier_s_build_has_no_detection_teacher() -> None:
    with pytest.raises(ConfigError, match=r"method=teacher .*use method=realism .*or method=focusdd"):
        method_of(load_class_config(method="teacher", sources=["x"]))


def test_clusters_depend_on_the_ipc_so_they_cannot_be_grown() -> None:
    with pytest.raises(ConfigError, match=r"grow_from: method=kmeans chooses other sources for another ipc"):
        method_of(load_config(method="kmeans", sources=["x"], grow_from="smaller"))
    config = load_config(method="kmeans", sources=["x"])
    assert METHODS["kmeans"].adapt(config).selection == "paper"  # and so the set itself says


def test_what_is_no_method_is_refused_with_what_it_lacks() -> None:
    class Half:
        looks = 0

    with pytest.raises(ConfigError, match=r"Half has no .*order.*derive it from focusdd_det\.methods\.Base"):
        register("half", Half())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"register\('half', Half\(\)\)"):
        register("half", Half)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("order", "says"),
    [([0, 1, 1], "each at most once"), ([0, 3], "from 0 to 2"), ([-1], "from 0 to 2"), ([0.5, 1.0], "integers")],
)
def test_an_order_that_is_none_is_refused(order: list[float], says: str) -> None:
    with pytest.raises(ConfigError, match=f"method=mine: order.*{says}"):
        check_order(np.array(order), 3, "mine", "order")
    assert check_order(np.array([2, 0]), 3, "mine", "order").tolist() == [2, 0]
    assert len(check_order(np.array([]), 3, "mine", "order")) == 0


# --- herding


def test_herding_by_hand() -> None:
    # On the unit circle at 0, 90, 10 and 20 degrees. Mean = (0.731, 0.379), nearest to 20 degrees. Then the pair:
    # |2 mean - x20 - x|^2 with 2 mean - x20 = (0.523, 0.417), nearest to 20 again, which is used: 10 degrees. Then
    # 3 mean - x20 - x10 = (0.270, 0.623): 90 degrees.
    angles = np.deg2rad([0, 90, 10, 20])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)
    assert by_herding(features, 4).tolist() == [3, 2, 1, 0]


def greedy(features: np.ndarray, length: int) -> list[int]:
    """The definition, word by word: argmin of |mean - (chosen + x) / i|."""
    x = features.astype(np.float64)
    mean, order = x.mean(axis=0), []
    for i in range(1, length + 1):
        left = [j for j in range(len(x)) if j not in order]
        order.append(min(left, key=lambda j: round(float(np.sum((mean * i - x[order].sum(axis=0) - x[j]) ** 2)), 6)))
    return order


@pytest.mark.parametrize("block", [7, 4096])
def test_herding_is_the_greedy_choice_and_ends_where_it_is_of_no_use(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coresets, "_BLOCK", block)
    features = unit(np.random.default_rng(0), 60)
    expected = greedy(features, 20)
    order = by_herding(features, 20)
    assert order[:20].tolist() == expected
    assert sorted(order) == list(range(60))
    assert by_herding(features, 1000)[:20].tolist() == expected
    mean = features.astype(float).mean(axis=0)
    off = [float(np.sum((features[j].astype(float) - mean) ** 2)) for j in order[20:]]
    assert off == sorted(off)  # replacements: nearest to the mean first


def test_a_small_ipc_does_not_change_the_order_so_herded_sets_grow() -> None:
    c = candidates(unit(np.random.default_rng(1), 300))
    orders = [
        METHODS["herding"].backgrounds(c, METHODS["herding"].adapt(load_config(sources=["x"], ipc=ipc)), "dog")
        for ipc in (1, 50)
    ]
    assert orders[0].tolist() == orders[1].tolist()


# --- k-means


def test_clusters_by_hand() -> None:
    # Three groups far apart, of 4, 3 and 2; the middle of each is its nearest.
    groups = [[0.0, 0.1, 0.21, 0.3], [1.0, 1.1, 1.2], [2.0, 2.04]]
    features = np.array([[v, 0.0] for group in groups for v in group], np.float16)
    order = by_clusters(features, 3, lambda i: 0.5)
    # Means 0.1525, 1.1, 2.02: nearest are 0.1 and 0.21 (0.0525, 0.0575), 1.1, then 2.0 and 2.04 alike: the first.
    assert order[:3].tolist() == [1, 5, 7]
    assert set(order[3:6].tolist()) < {2, 4, 6, 8}
    assert sorted(order) == list(range(9))


@pytest.mark.parametrize("block", [5, 4096])
def test_each_cluster_gives_one_picture_before_any_gives_two(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coresets, "_BLOCK", block)
    rng = np.random.default_rng(2)
    centres = np.eye(6)
    features = np.concatenate([centres[i] + rng.normal(0, 0.02, (9, 6)) for i in range(6)])
    order = by_clusters(features.astype(np.float16), 6, lambda i: (i * 0.37 + 0.1) % 1)
    for turn in range(3):
        assert sorted(order[turn * 6 : turn * 6 + 6] // 9) == list(range(6))
    nearest = set()
    for start in range(0, 54, 9):
        group = features[start : start + 9]
        nearest.add(start + int(np.square(group - group.mean(axis=0)).sum(axis=1).argmin()))
    assert {int(v) for v in order[:6]} == nearest


def test_more_clusters_than_pictures_and_copies() -> None:
    same = np.ones((4, 3), np.float16)
    assert sorted(by_clusters(same, 9, lambda i: 0.5)) == [0, 1, 2, 3]
    assert sorted(by_clusters(same[:1], 2, lambda i: 0.5)) == [0]


@pytest.mark.parametrize("name", ["herding", "kmeans"])
def test_the_order_of_the_sources_decides_nothing(name: str) -> None:
    rng = np.random.default_rng(3)
    features = unit(rng, 40, 4)
    features[10:20] = features[:10]  # ties: equal pictures of other content
    c = candidates(features)
    method = METHODS[name]
    config = method.adapt(load_config(sources=["x"], ipc=12))
    order = method.backgrounds(c, config, "dog")
    turn = rng.permutation(40)
    shuffled = dataclasses.replace(candidates(features[turn], c.sha[turn]), ids=turn)
    assert turn[method.backgrounds(shuffled, config, "dog")].tolist() == order.tolist()
    assert len(method.backgrounds(candidates(features[:0], c.sha[:0]), config, "dog")) == 0


def test_a_coreset_without_features_says_so() -> None:
    c = dataclasses.replace(candidates(unit(np.random.default_rng(0), 3)), features=None)
    with pytest.raises(ConfigError, match="Herding needs the features"):
        METHODS["herding"].backgrounds(c, load_config(sources=["x"]), "dog")
    with pytest.raises(ValueError, match=r"features \[3, d\]"):
        dataclasses.replace(c, features=np.zeros((2, 4), np.float16))


# --- windows of attention


def test_the_window_with_the_least_attention() -> None:
    attention = torch.tensor([[[5.0, 5, 1, 1], [5, 5, 1, 1], [1, 1, 0, 0], [2, 2, 0, 0]], [[1.0] * 4] * 4])
    assert least_windows(attention, 2).tolist() == [[2, 2], [0, 0]]
    assert best_windows(attention, 2)[1].tolist() == [[0, 0], [0, 0]]


def test_a_random_window_is_one_of_the_grid_s_by_seed_and_content() -> None:
    config = load_config(sources=["x"])
    view = view_of(140, 140, "squash")
    method = METHODS["random_as"]
    crops = [method.crop(view, (0, 0), 14, config, str(i)) for i in range(400)]
    assert {(c.x, c.y) for c in crops} == {
        (10 * i, 10 * j) for i in range(4) for j in range(4)
    }  # 4 x 4 places of k = 11
    assert {c.side for c in crops} == {110}
    assert method.crop(view, (3, 3), 14, config, "7") == crops[7]  # whatever was seen
    assert [method.crop(view, (0, 0), 14, load_config(sources=["x"], seed=1), str(i)) for i in range(400)] != crops


# --- windows of the teacher


def found(*rows: tuple[float, float, float, float, int, float]) -> Detections:
    table = np.array(rows, np.float64).reshape(len(rows), 6)
    classes = table[:, 4].astype(np.int64)
    scores = np.zeros((len(rows), 3), np.float32)
    scores[np.arange(len(rows)), classes] = table[:, 5]
    return Detections(table[:, :4].astype(np.float32), classes, table[:, 5].astype(np.float32), scores)


WINDOW = [0.0, 0.0, 100.0, 100.0]


@pytest.mark.parametrize(
    ("rows", "score"),
    [
        ([(20, 20, 70, 70, 0, 0.8)], 0.8),  # whole, half of the cell's side
        ([(20, 20, 70, 70, 1, 0.8)], 0.0),  # of another class
        ([], 0.0),
        ([(75, 20, 125, 70, 0, 0.8)], 0.8 * 0.25 * (1 - 0.8 / 2)),  # cut in half: v = 0.5, r = 0.354, cut = 0.8
        ([(10, 10, 20, 20, 0, 0.8)], 0.8 * 0.4),  # r = 0.1: a sliver
        ([(0, 0, 100, 100, 0, 0.8)], 0.8 * 0.5),  # fills the cell
        ([(0, 0, 87.5, 87.5, 0, 0.8)], 0.8 * 0.75),  # r = 0.875: half way from 1 to 0.5
        ([(20, 20, 70, 70, 0, 0.8), (20, 20, 70, 70, 0, 0.5)], 1 - 0.2 * 0.5),  # two of them
        # beside it a thing of another class, of which a quarter is seen: cut = 0.6 * (1 - 0.5) = 0.3
        ([(20, 20, 70, 70, 0, 0.8), (90, 0, 130, 40, 2, 0.6)], 0.8 * (1 - 0.15)),
        ([(20, 20, 70, 70, 0, 0.8), (110, 0, 150, 40, 2, 0.6)], 0.8),  # wholly outside: no matter
        ([(200, 200, 250, 250, 0, 0.9)], 0.0),
    ],
)
def test_window_scores_by_hand(rows: list[tuple[float, ...]], score: float) -> None:
    assert window_scores(found(*rows), 0, np.array([WINDOW])) == pytest.approx([score], abs=1e-6)


def test_several_windows_at_once_are_each_by_itself() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 150, (9, 2))
    boxes = np.concatenate([low, low + rng.uniform(5, 80, (9, 2))], axis=1)
    rows = [(*box, int(rng.integers(0, 3)), float(rng.uniform(0.3, 1))) for box in boxes]
    windows = np.array([[x, y, x + 90, y + 90] for x in (0, 40, 110) for y in (0, 70)], np.float64)
    together = window_scores(found(*rows), 1, windows)
    assert (together >= 0).all()
    assert (together <= 1).all()
    assert len(set(together.round(6))) > 3
    assert [float(window_scores(found(*rows), 1, w[None])[0]) for w in windows] == together.tolist()


def test_boxes_come_back_from_the_letterbox() -> None:
    # 200 x 100 px in 96 x 96: half size but for rounding, 24 px of border above.
    back = on_source(found((0, 24, 96, 72, 0, 1), (48, 48, 72, 60, 0, 1), (0, 0, 96, 96, 0, 1)), 200, 100, 96)
    np.testing.assert_allclose(back.boxes, [[0, 0, 200, 100], [100, 50, 150, 75], [0, 0, 200, 100]], atol=1e-4)


class _Finds:
    """A detector that finds what it is told to."""

    names = ("cat", "dog")
    sha256 = "abc"

    def __init__(self, answers: list[Detections]) -> None:
        self.answers = answers

    def detect(self, looks: list[np.ndarray], *_: object) -> list[Detections]:
        return self.answers[: len(looks)]


def judge(answers: list[Detections], method: Base | None = None, **config: object) -> WindowJudge:
    detector = _Finds(answers)
    classes = {"cat": 0, "dog": 1}
    settings = load_config(sources=["x"], image_size=128, **config)
    return WindowJudge(detector, method or METHODS["teacher"], settings, classes, 14)  # type: ignore[arg-type]


def test_the_best_window_of_a_source_and_ties_to_the_middle() -> None:
    # 140 x 140 px in 128: 4 x 4 windows of 110 px, at 0, 10, 20, 30 px.
    at = lambda *box: tuple(v * 128 / 140 for v in box)  # noqa: E731
    corner = found((*at(95, 95, 139, 139), 1, 0.9))  # whole only in the last window
    middle = found((*at(50, 50, 90, 90), 1, 0.9))  # whole in all: the most central one, the first of four
    scores, corners = judge([corner, middle, Detections.none(2)])(
        [np.zeros((128, 128, 3), np.uint8)] * 3, [(140, 140)] * 3, ["dog"] * 3
    )
    assert corners.tolist() == [[3, 3], [1, 1], [1, 1]]
    assert scores.tolist() == pytest.approx([0.9, 0.9, 0.0], abs=1e-4)
    scores, _ = judge([corner])([np.zeros((128, 128, 3), np.uint8)], [(140, 140)], ["cat"])
    assert scores.tolist() == [0.0]


def test_a_score_depends_on_what_decides_it() -> None:
    one = judge([])
    assert one.depends_on("dog") == judge([]).depends_on("dog")
    others = [judge([], conf=0.5), judge([], crop="cover"), judge([], iou=0.5), judge([], side_ratio=0.5)]
    assert all(other.depends_on("dog") != one.depends_on("dog") for other in others)
    assert one.depends_on("dog") != one.depends_on("cat")


def test_a_judge_of_the_user_s_that_gives_nonsense_is_named() -> None:
    class Odd(Base):
        def judge(self, found: Detections, own: int, windows: np.ndarray) -> np.ndarray:
            return np.full(len(windows), np.nan)

    with pytest.raises(ConfigError, match=r"judge\(\) gave shape \(16,\), expected one finite number"):
        judge([Detections.none(2)], Odd())([np.zeros((128, 128, 3), np.uint8)], [(140, 140)], ["dog"])


# --- features


def _selector(model: torch.nn.Module) -> Selector:
    return Selector(
        model, ("a", "b", "c", "d"), 32, 4, (0.5,) * 3, (0.5,) * 3, "", "", "gca", "fp32", torch.device("cpu"),
        TimmViT("vit_tiny_patch16_224", {}),
    )  # fmt: skip


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_features_are_timm_s_own_and_change_nothing_else(arch: str) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(arch, img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=4).eval()
    pixels = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8)
    selector = _selector(model)
    plain = selector(pixels)
    probabilities, attention, features = selector.with_features(pixels)
    assert torch.equal(probabilities, plain[0])
    assert torch.equal(attention, plain[1])
    with torch.no_grad():
        tokens = model.forward_features((pixels.float() / 255 - 0.5) / 0.5)
        pooled = tokens[:, 0] if "distilled" in arch else model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(features, torch.nn.functional.normalize(pooled, dim=1), rtol=1e-4, atol=1e-5)
    assert features.std() > 0.01
    selector.with_features(pixels)
    assert not model.get_classifier()[0]._forward_pre_hooks if "distilled" in arch else True


def test_a_head_that_sees_no_single_vector_is_named() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(3, 3)

        def get_classifier(self) -> torch.nn.Module:
            return self.head

    class Blind(Selector):
        def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(1), torch.zeros(1)

    values = {field.name: getattr(_selector(Odd()), field.name) for field in dataclasses.fields(Selector)}
    with pytest.raises(WeightsError, match="features cannot be read"):
        Blind(**values).with_features(torch.zeros(1))


def test_realism_and_whole_are_as_before() -> None:
    config = load_config(sources=["x"])
    assert METHODS["whole"].crop(view_of(30, 20, "squash"), (0, 0), 7, config, "s") == Crop(5, 0, 20)
    looks: Callable[..., list[Crop]] = METHODS["realism"].look_crops
    assert len(looks(100, 80, "s", config)) == METHODS["realism"].looks == 5


@pytest.mark.parametrize("crop", ["window", "cover", "fixed"])
def test_random_crops_are_as_large_as_focusdd_s(crop: str) -> None:
    """Also where `crop=` makes those larger or of one size."""
    config, view = load_config(sources=["x"], crop=crop), view_of(1600, 600, "squash")
    names = ("focusdd", "random", "random_as", "ranked_crops")
    sides = {METHODS[name].crop(view, (1, 1), 14, config, "s").side for name in names}
    assert len(sides) == 1
