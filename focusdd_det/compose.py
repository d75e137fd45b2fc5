"""Crops -> composite pixels (Eq. 8). Arrays in, arrays out; one resize per cell."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from focusdd_det.seeds import seed_of
from focusdd_det.types import Crop, Image

GREY = 114  # Ultralytics' padding colour


def cut(picture: Image, crop: Crop, width: int, height: int) -> Image:
    """A square of a picture as a cell: [height, width, 3] uint8; width and height differ by 1 px at most.

    Raises:
        ValueError: the crop reaches outside the picture.
    """
    if crop.x + crop.side > picture.shape[1] or crop.y + crop.side > picture.shape[0]:
        raise ValueError(f"{crop} reaches outside a picture of {picture.shape[1]} x {picture.shape[0]} px")
    return resize(picture[crop.y : crop.y + crop.side, crop.x : crop.x + crop.side], width, height)


def letterbox(picture: Image, side: int) -> tuple[Image, float, int, int]:
    """The whole picture in a square with grey borders.

    Returns:
        pixels [side, side, 3], the scale (cell px a picture px), and the left and top border in px.
    """
    height, width = picture.shape[:2]
    scale = side / max(width, height)
    inner_width, inner_height = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (side - inner_width) // 2, (side - inner_height) // 2
    canvas = np.full((side, side, 3), GREY, np.uint8)
    canvas[top : top + inner_height, left : left + inner_width] = resize(picture, inner_width, inner_height)
    return canvas, scale, left, top


def middle_square(width: int, height: int) -> Crop:
    """The short-side square in the middle: what a background shows."""
    side = min(width, height)
    return Crop((width - side) // 2, (height - side) // 2, side)


def resize(picture: Image, width: int, height: int) -> Image:
    """Area averaging when shrinking, Lanczos when enlarging."""
    old_height, old_width = picture.shape[:2]
    if (old_width, old_height) == (width, height):
        return np.ascontiguousarray(picture)
    shrinks = width <= old_width and height <= old_height
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LANCZOS4
    return np.asarray(cv2.resize(picture, (width, height), interpolation=how), np.uint8)


def cell_order(seed: int, cells: int) -> list[int]:
    """For each position of the grid, in row order, which of the cells goes there: a permutation drawn from the seed."""
    return sorted(range(cells), key=lambda i: seed_of("cell", seed, i))


def assemble(cells: Sequence[Image], grid: int) -> Image:
    """Cells in row order -> the composite, a square.

    Raises:
        ValueError: not grid^2 cells, or sizes that do not make rows and a square.
    """
    shapes = [cell.shape[:2] for cell in cells]
    if len(cells) != grid * grid or any(
        (height, width) != (shapes[i // grid * grid][0], shapes[i % grid][1]) or shapes[i // grid][1] != height
        for i, (height, width) in enumerate(shapes)
    ):
        raise ValueError(f"expected {grid * grid} cells that make a square, got {shapes}")
    rows = [np.concatenate(cells[row * grid : (row + 1) * grid], axis=1) for row in range(grid)]
    return np.concatenate(rows, axis=0)


def encode_jpeg(picture: Image, quality: int) -> bytes:
    """JPEG bytes of RGB pixels; the same bytes for the same pixels and OpenCV version."""
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise ValueError(f"OpenCV could not encode a picture of shape {picture.shape}")
    return bytes(data.tobytes())
