"""What a method is, and what most of them have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from focusdd_det.config import SetConfig
from focusdd_det.errors import ConfigError
from focusdd_det.seeds import uniform
from focusdd_det.select import Candidates, Order, ranked
from focusdd_det.types import Crop, Detections, View

T = TypeVar("T", bound=Callable[..., Any])


def monotone(order: T) -> T:
    """Marks an `order` or `backgrounds` for which two things hold:

    - When the p or score of one source falls and nothing else changes, that source comes no sooner and those that came
      before it keep their places.
    - When one source is left out, those that came before it keep their places and no other comes later.

    A source that an order does not hold counts as behind all that it does.

    Of a method of which both are so marked, only the sources are kept that can come to the front (shortlist.py), and
    those that cannot, however good a second look, are looked at in low precision alone (screening.py). Whoever
    overrides one says so again, or all sources of a class are held in memory and looked at in full."""
    order.monotone = True  # type: ignore[attr-defined]
    return order


def is_monotone(method: Method) -> bool:
    """Whether `monotone` holds for both orders of a method."""
    both = (method.order, method.backgrounds)
    return not method.needs_features and all(getattr(order, "monotone", False) for order in both)


class Method(Protocol):
    """One way to choose sources and crops.

    Attributes:
        needs_selector: whether sources must be looked at by the ViT.
        needs_features: whether `order` and `backgrounds` want `candidates.features`, the ViT's.
        needs_teacher: whether sources must be looked at by the detection teacher, in place of the ViT; see `judge`.
        all_keys: whether every cell is a key patch (no backgrounds).
        growable: whether a smaller set is the beginning of a larger one.
        looks: crops of a source that the ViT is shown, of which the best counts; 0: the view of the whole source.
        window: which of the ViT's windows is kept of a source: the one with the most attention, or with the least.
    """

    needs_selector: bool
    needs_features: bool
    needs_teacher: bool
    all_keys: bool
    growable: bool
    looks: int
    window: Literal["most", "least"]

    def adapt(self, config: SetConfig) -> SetConfig:
        """The config as this method takes it: one that knows no grid sets the grid to 1."""

    def look_crops(self, width: int, height: int, sha256: str, config: SetConfig) -> list[Crop]:
        """`looks` squares of a source, by its content alone."""

    def judge(self, found: Detections, own: int, windows: NDArray[np.float64]) -> NDArray[np.float64]:
        """With `needs_teacher`: how good each window of a source would be as a key patch.

        Args:
            found: what the teacher finds in the whole source; boxes in pixels of the source.
            own: the class of the source, an index as in `found.classes`.
            windows: [m, 4] x1 y1 x2 y2 in pixels of the source: what each window would show.

        Returns:
            [m] in [0, 1]. The best window counts; its score takes the place of the confidence p.
        """

    def order(self, candidates: Candidates, config: SetConfig, group: str) -> Order:
        """Positions of the candidates, first choice first."""

    def backgrounds(self, candidates: Candidates, config: SetConfig, group: str) -> Order:
        """Positions of the candidates in the order in which they become backgrounds."""

    def crop(self, view: View, corner: tuple[int, int], grid: int, config: SetConfig, sha256: str) -> Crop:
        """The square of a source that is its key patch.

        Args:
            view, corner, grid: the ViT's square in the source, and the kept window's top left token in its grid; with
                `looks`, the row of `corner` is the number of the best look.
        """


class Base:
    """All of a method but `order` and `crop`: needs no model, grid of key patches alone."""

    needs_selector = False
    needs_features = False
    needs_teacher = False
    all_keys = True
    growable = True
    looks = 0
    window: Literal["most", "least"] = "most"

    def adapt(self, config: SetConfig) -> SetConfig:
        return config

    def look_crops(self, width: int, height: int, sha256: str, config: SetConfig) -> list[Crop]:
        return []

    def judge(self, found: Detections, own: int, windows: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.zeros(len(windows))

    @monotone
    def backgrounds(self, candidates: Candidates, config: SetConfig, group: str) -> Order:
        return shuffled(candidates, config, group)


def shuffled(candidates: Candidates, config: SetConfig, group: str) -> Order:
    """A random order that depends on the seed and on what the sources hold."""
    each = (uniform("random", config.seed, group, row.tobytes().hex()) for row in candidates.sha)
    draws = np.fromiter(each, np.float64, len(candidates))
    return ranked(candidates, (draws * 2**53).astype(np.int64), False)


def check_order(order: Order, sources: int, name: str, what: str) -> Order:
    """An order as a method gave it, if it is one: positions, each at most once.

    Raises:
        ConfigError: it is not.
    """
    order = np.asarray(order)
    if order.ndim != 1 or (len(order) and order.dtype.kind not in "iu"):
        raise ConfigError(
            f"method={name}: {what}() gave {order.dtype} of shape {order.shape}, expected positions, integers [n]"
        )
    if len(order) and not (order.min() >= 0 and order.max() < sources and len(np.unique(order)) == len(order)):
        raise ConfigError(
            f"method={name}: {what}() gave {len(order)} positions between {order.min()} and {order.max()}, expected "
            f"positions from 0 to {sources - 1}, each at most once"
        )
    return order.astype(np.int64)
