"""One source, read, hashed and decoded to what the ViT will see of it.

Imported by processes that only decode: nothing here may import torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from focusdd_det.compose import letterbox, middle_square
from focusdd_det.config import SetConfig
from focusdd_det.scoring.decode import BadImage, decode
from focusdd_det.sources import Located
from focusdd_det.types import Crop, Image, round_half_up

UNREADABLE = "unreadable"  # how the reason begins when the file system refused; it is tried again by the next run


@dataclass(frozen=True)
class Glance:
    """A decoded source on its way to the ViT.

    Attributes:
        sha: sha256 of the file.
        width, height: of the whole picture, px; 0 if it was not decoded.
        views: uint8 RGB, [view, view, 3] each: the whole source, or the crops that the method looks at. Empty if the
            content was seen before, under whatever name: then nothing was decoded.
        phash: see `difference_hash`.
        entropy: see `grey_entropy`; None if it was not decoded, or seen before entropies were kept.
    """

    sha: bytes
    width: int
    height: int
    views: Sequence[Image]
    phash: int
    entropy: float | None


class Known(Container[bytes]):
    """Content hashes that were seen before, 8 bytes each in memory: by their first 8 bytes, so a yes must be checked
    and a no is certain."""

    def __init__(self, hashes: bytes = b"") -> None:
        """`hashes`: the first 8 bytes of each, one after the other."""
        self.heads: NDArray[np.uint64] = np.sort(np.frombuffer(hashes, np.uint64))

    def __contains__(self, sha: object) -> bool:
        if not isinstance(sha, bytes) or not len(self.heads):
            return False
        head = np.frombuffer(sha[:8], np.uint64)[0]
        at = int(np.searchsorted(self.heads, head))
        return at < len(self.heads) and bool(self.heads[at] == head)


class Whole:
    """Stands for every method that looks at sources as a whole."""

    looks = 0
    needs_teacher = False

    def look_crops(self, width: int, height: int, sha256: str, config: SetConfig) -> list[Crop]:
        """None."""
        return []


def glance(
    located: Located, view: int, method: Any, config: SetConfig, known: Container[bytes] = frozenset()
) -> Glance | str:
    """Read, hash, decode and shrink one source; a string is the reason why it cannot be used.

    Args:
        view: side of what the ViT sees, px.
        method: its `looks`, `look_crops` and `needs_teacher` count (methods.Method).
        known: content hashes that need not be decoded.
    """
    if located.problem:
        return located.problem
    try:
        data = located.read()
        digest = hashlib.sha256(data)
        if digest.digest() in known:
            return Glance(digest.digest(), 0, 0, (), 0, None)
        least = least_side(view, config.decode)
        if method.looks and least is not None:
            from focusdd_det.methods import REALISM_LEAST

            least = math.ceil(view / math.sqrt(REALISM_LEAST))  # the smallest crop fills a view
        picture, width, height = decode(data, least, config.max_pixels)
    except BadImage as error:
        return str(error)
    except OSError as error:
        return f"{UNREADABLE}: {error.strerror or error}"
    except MemoryError:
        return "too large for the memory"
    pixels = view_pixels(picture, view, config.geometry)
    crops = method.look_crops(width, height, digest.hexdigest(), config)
    views = tuple(_crop_pixels(picture, width, crop, view) for crop in crops) or (pixels,)
    if method.needs_teacher:
        views = (letterbox(picture, view)[0],)
    return Glance(digest.digest(), width, height, views, difference_hash(pixels), grey_entropy(pixels))


def least_side(view: int, how: str) -> int | None:
    """What `decode` is told for a view: `how` is the build's `decode`, reduced or full."""
    return None if how == "full" else view


def view_pixels(picture: Image, view: int, geometry: str) -> Image:
    """What the ViT sees: the whole picture squashed, or its middle square, at view x view px."""
    if geometry == "crop":
        square = middle_square(picture.shape[1], picture.shape[0])
        picture = picture[square.y : square.y + square.side, square.x : square.x + square.side]
    return _squashed(picture, view)


def difference_hash(picture: Image) -> int:
    """64-bit perceptual hash: is each cell of an 8 x 9 grey miniature brighter than its right neighbour?"""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    bits = (small[:, 1:] > small[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def grey_entropy(picture: Image) -> float:
    """Shannon entropy of the 256 grey levels, in bits, rounded to 1e-4: 0 for one level, 8 for all in equal parts.

    Photographs have some 7; drawings, and objects on a blank ground, have few levels or one that rules.
    """
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    counts = cv2.calcHist([grey], [0], None, [256], [0, 256]).ravel().astype(np.float64)
    share = counts[counts > 0] / grey.size
    return abs(round(float((share * np.log2(share)).sum()), 4))  # the sum is never above 0


def _crop_pixels(picture: Image, width: int, crop: Crop, view: int) -> Image:
    """A square of a source, from its picture that may have been decoded at reduced size, at view x view px."""
    scale = picture.shape[1] / width
    side = max(1, min(round_half_up(crop.side * scale), *picture.shape[:2]))
    x = min(round_half_up(crop.x * scale), picture.shape[1] - side)
    y = min(round_half_up(crop.y * scale), picture.shape[0] - side)
    return _squashed(picture[y : y + side, x : x + side], view)


def _squashed(picture: Image, view: int) -> Image:
    """At view x view px: area averaging along a side that shrinks, then bicubic along one that grows.

    That is near the filter ViTs are trained with (bicubic with antialiasing), at the price of a plain resize: a single
    call of OpenCV would not average along the one side of a picture of 300 x 200 px that shrinks to 224.
    """
    width, height = min(picture.shape[1], view), min(picture.shape[0], view)
    picture = np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    return np.asarray(cv2.resize(picture, (view, view), interpolation=cv2.INTER_CUBIC), np.uint8)
