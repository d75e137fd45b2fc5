"""A picture with what the selector sees in it -> PNG: heat map, key window, key crop, classes. Arrays in, bytes out."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from focusdd_det.compose import cut, resize
from focusdd_det.showing.explain import Explained, Finding
from focusdd_det.types import Crop, Floats, Image
from focusdd_det.windows import GCA_MASS

MARK = "focusdd explain"  # stands in every picture that is written, so that no other one is ever overwritten
_WIDTH, _SHOWN, _DPI = 4.0, 600, 110  # of a panel, inches; longer side of a picture in it, px; px an inch
_ACCENT, _TAKEN, _INK, _SOFT = "#00c2ff", "#ff8a00", "#1d1f24", "#8b9099"
_TALLEST = 1.6  # of a panel, in widths


def draw(
    found: Explained, picture: Image, names: Sequence[str], title: str, note: str, alpha: float, cell: int,
    taken: Crop | None = None,
) -> bytes:  # fmt: skip
    """One PNG for one picture.

    Args:
        found: what was found in it.
        picture: [H, W, 3] uint8, the whole of it at full size.
        names: what each output of the selector is called.
        title, note: the two lines at the top.
        alpha: weight of the share in S.
        cell: side of a composite's cell, px: the size that the key crop is shown at.
        taken: the crop that a set took of the picture, px of it: outlined in orange beside the picture's own view.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = picture.shape[:2]
    columns = 1 + len(found.findings)
    tall = min(max(height / width, 0.3), _TALLEST)
    figure = Figure((columns * _WIDTH, _WIDTH * (tall + 0.95) + 1.0), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(_plain(title), x=0.02, y=0.985, ha="left", va="top", fontsize=13, color=_INK, parse_math=False)
    figure.text(0.02, 1 - 0.42 / figure.get_figheight(), _plain(note), va="top", fontsize=9, color=_SOFT)
    grid: Any = figure.add_gridspec(
        2, columns, height_ratios=[tall, 0.95], left=0.02, right=0.98, bottom=0.03, hspace=0.16, wspace=0.05,
        top=1 - 0.95 / figure.get_figheight(),
    )  # fmt: skip
    scale = min(1.0, _SHOWN / max(height, width))
    small = resize(picture, max(1, round(width * scale)), max(1, round(height * scale)))
    below = "" if taken is None else f"in the set (orange): {taken.side} px at ({taken.x}, {taken.y})"
    axes = _panel(figure, grid[0, 0], small, (width, height), f"{width} x {height} px", below)
    _outline_view(axes, found)
    if taken is not None:
        _rectangle(axes, taken.x, taken.y, taken.side, taken.side, _TAKEN, 2.5, "-")
    _bars(figure.add_subplot(grid[1, 0]), found, names)
    for column, finding in enumerate(found.findings, 1):
        over = overlay(small, finding.heat, found, (width, height))
        worth = f"{found.p:.3f} + {alpha:g} x {GCA_MASS:.4f} x {finding.share:.3f}"
        axes = _panel(
            figure, grid[0, column], over, (width, height),
            f"{finding.attention}: share {finding.share:.3f},  S = {finding.score:.3f}", worth,
        )  # fmt: skip
        _outline_window(axes, found, finding)
        crop = finding.crop
        patch = cut(picture, crop, cell, cell)
        text = f"key crop {crop.side} px at ({crop.x}, {crop.y}), as its cell of {cell} px"
        _frame(_panel(figure, grid[1, column], patch, (cell, cell), text))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in a script that the font lacks is no reason for pages of warnings
        figure.savefig(buffer, format="png", metadata={"Software": MARK})
    return buffer.getvalue()


def overlay(small: Image, heat: Floats, found: Explained, size: tuple[int, int]) -> Image:
    """The heat map over a paled picture, where the ViT's square lies; what it did not see stays grey.

    Args:
        small: [h, w, 3], the picture, possibly shrunk.
        heat: [g, g] attention of the tokens.
        size: width and height of the whole picture, px.
    """
    import matplotlib

    rows, columns = small.shape[:2]
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)[:, :, None] / 255
    base = np.repeat(0.2 + 0.7 * grey, 3, axis=2)
    view = found.view
    across, down = columns / size[0], rows / size[1]
    x1, y1 = round(view.offset_x * across), round(view.offset_y * down)
    x2, y2 = round((view.offset_x + view.extent_x) * across), round((view.offset_y + view.extent_y) * down)
    x2, y2 = max(x2, x1 + 1), max(y2, y1 + 1)
    # The brightest tokens of a ViT are often single ones far above the rest: they are cut at the 98th percentile.
    top = float(np.percentile(heat, 98)) or float(heat.max()) or 1.0
    level = np.clip(heat / top, 0, 1).astype(np.float32)
    smooth = np.clip(cv2.resize(level, (x2 - x1, y2 - y1), interpolation=cv2.INTER_CUBIC), 0, 1)
    colour = matplotlib.colormaps["inferno"](smooth)[:, :, :3].astype(np.float32)
    weight = (0.25 + 0.6 * smooth)[:, :, None]
    base[y1:y2, x1:x2] = (1 - weight) * base[y1:y2, x1:x2] + weight * colour
    pixels: Image = np.clip(np.rint(base * 255), 0, 255).astype(np.uint8)
    return pixels


def _panel(figure: Any, place: Any, pixels: Image, size: tuple[int, int], title: str, below: str = "") -> Any:
    """Axes in pixels of the whole picture."""
    axes = figure.add_subplot(place)
    axes.imshow(pixels, extent=(0, size[0], size[1], 0), interpolation="bilinear", aspect="equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=10, color=_INK, loc="center", pad=5)
    if below:
        axes.set_xlabel(below, fontsize=8, color=_SOFT, labelpad=4)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _frame(axes: Any) -> None:
    for spine in axes.spines.values():
        spine.set(visible=True, color=_ACCENT, linewidth=2.5)


def _outline_view(axes: Any, found: Explained) -> None:
    """The square that the ViT saw, where it is not the whole picture."""
    view = found.view
    if (view.extent_x, view.extent_y) != (view.width, view.height):
        _rectangle(axes, view.offset_x, view.offset_y, view.extent_x, view.extent_y, "white", 1.4, "--")


def _outline_window(axes: Any, found: Explained, finding: Finding) -> None:
    """The best window of tokens (dashed) and the square that is cut for it."""
    view, grid = found.view, len(finding.heat)
    row, column = finding.corner
    wide, tall = finding.k / grid * view.extent_x, finding.k / grid * view.extent_y
    x, y = column / grid * view.extent_x + view.offset_x, row / grid * view.extent_y + view.offset_y
    _rectangle(axes, x, y, wide, tall, "white", 1.4, (0, (4, 3)))
    crop = finding.crop
    _rectangle(axes, crop.x, crop.y, crop.side, crop.side, _ACCENT, 2.5, "-")


def _rectangle(axes: Any, x: float, y: float, wide: float, tall: float, colour: str, width: float, style: Any) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import Normal, Stroke

    patch = Rectangle((x, y), wide, tall, fill=False, edgecolor=colour, linewidth=width, linestyle=style, clip_on=False)
    patch.set_path_effects([Stroke(linewidth=width + 1.2, foreground="#00000066"), Normal()])
    axes.add_patch(patch)


def _bars(axes: Any, found: Explained, names: Sequence[str]) -> None:
    """The likeliest classes; those that stand for the picture's own in colour."""
    own = set(found.own)
    places = np.arange(len(found.top))
    axes.barh(places, [1.0] * len(places), color="#eef0f2", height=0.34)
    axes.barh(places, [p for _, p in found.top], color=[_ACCENT if c in own else "#9aa0aa" for c, _ in found.top],
              height=0.34)  # fmt: skip
    for place, (index, p) in zip(places, found.top, strict=True):
        name = _plain(names[index])
        weight = "bold" if index in own else "normal"
        shown = name if len(name) < 34 else name[:32] + "..."
        axes.text(0, place - 0.27, shown, fontsize=9, color=_INK, va="bottom", weight=weight, parse_math=False)
        axes.text(1, place - 0.27, f"{p:.3f}", fontsize=9, color=_INK, va="bottom", ha="right", weight=weight)
    whose = "the likeliest class" if not own else f"{len(own)} classes together" if len(own) > 1 else "its class"
    axes.text(0, -1.05, f"p = {found.p:.3f}, {whose}", fontsize=10, color=_INK, va="bottom")
    axes.set(xlim=(0, 1), ylim=(len(places) - 0.4, -1.4))
    axes.set_axis_off()


def _plain(text: str) -> str:
    """What a font can be asked to draw: no control characters, no halves of a character."""
    shown = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else "?" for c in shown)
