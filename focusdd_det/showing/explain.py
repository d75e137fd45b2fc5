"""What the selector sees in any picture: where it looks, which window method=focusdd would cut, and what it is worth.

found = explain([Path("cat.jpg").read_bytes()], [()], selector, ["gca"], load_config())[0]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from focusdd_det.classmap import find_map, lemmas, read_class_map
from focusdd_det.config import BuildConfig, SetConfig, suggest
from focusdd_det.errors import ConfigError
from focusdd_det.methods import METHODS
from focusdd_det.scoring.contents import confidence, steps
from focusdd_det.scoring.decode import BadImage, decode
from focusdd_det.scoring.glance import least_side, view_pixels
from focusdd_det.selector import Selector
from focusdd_det.types import Crop, Floats, View
from focusdd_det.windows import best_windows, realism, view_of, window_side

TOP = 5  # classes that are named


@dataclass(frozen=True)
class Finding:
    """What one kind of attention makes of a picture.

    Attributes:
        attention: gca, last or mean.
        heat: [g, g] float32, at least 0: the attention of each token.
        corner: (row, column) of the key window's top left token; k: its side in tokens.
        share: the window's share of all attention, in [0, 1].
        score: realism score S.
        crop: the key patch, in pixels of the picture.
    """

    attention: str
    heat: Floats
    corner: tuple[int, int]
    k: int
    share: float
    score: float
    crop: Crop


@dataclass(frozen=True)
class Explained:
    """What a selector makes of one picture.

    Attributes:
        view: the square that it saw.
        p: probability of the outputs in `own`; of the likeliest class where there are none.
        own: outputs that stand for the picture's class.
        top: the likeliest outputs and their probabilities, falling; one of `own` is added if none is among them.
        findings: one for each attention that was asked for.
    """

    view: View
    p: float
    own: tuple[int, ...]
    top: tuple[tuple[int, float], ...]
    findings: tuple[Finding, ...]


def explain(
    pictures: Sequence[bytes],
    columns: Sequence[tuple[int, ...]],
    selector: Selector,
    attentions: Sequence[str],
    config: SetConfig,
) -> list[Explained | str]:
    """Look at up to `config.batch` pictures as a build would: the same view, batch shape, rounding and crop.

    Args:
        pictures: files' bytes.
        columns: for each picture the outputs that stand for its class; none: the likeliest class counts.
        attentions: some of gca, last, mean.
        config: geometry, decode, side_ratio, alpha, confidence, crop, image_size and grid are used.

    Returns:
        For each picture what was found, or the reason why it cannot be used.
    """
    seen: list[tuple[int, View, str]] = []
    found: list[Explained | str] = [""] * len(pictures)
    pixels = np.zeros((config.batch, selector.view, selector.view, 3), np.uint8)
    for i, data in enumerate(pictures):
        try:
            picture, width, height = decode(data, least_side(selector.view, config.decode), config.max_pixels)
        except BadImage as error:
            found[i] = str(error)
            continue
        pixels[len(seen)] = view_pixels(picture, selector.view, config.geometry)
        seen.append((i, view_of(width, height, config.geometry), hashlib.sha256(data).hexdigest()))
    if not seen:
        return found
    probabilities, maps = selector.maps(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), attentions)
    table = probabilities.double().numpy()
    k = window_side(selector.grid, config.side_ratio)
    windows = [best_windows(heat[: len(seen)], k) for heat in maps]
    for place, (i, view, sha256) in enumerate(seen):
        row, own = table[place], columns[i]
        p = round(float(confidence(steps(row)[None], own, config.confidence)[0]), 4)
        findings = []
        for how, heat, (shares, corners) in zip(attentions, maps, windows, strict=True):
            corner, share = (int(corners[place, 0]), int(corners[place, 1])), float(shares[place])
            crop = METHODS["focusdd"].crop(view, corner, selector.grid, config, sha256)
            score = int(realism(np.array([p]), np.array([share]), config.alpha)[0]) / 1e4
            findings.append(Finding(how, heat[place].numpy(), corner, k, share, score, crop))
        best = [int(c) for c in np.argsort(-row, kind="stable")[:TOP]]
        named = [*best, *(c for c in own[:1] if not set(own) & set(best))]
        top = tuple((c, float(row[c])) for c in named)
        found[i] = Explained(view, p, own, top, tuple(findings))
    return found


def outputs_of(name: str, selector: Selector, config: BuildConfig) -> tuple[int, ...]:
    """The outputs of a selector that stand for a class: one of its own (`n02123045`), or a class of the build's class
    map (`cat`), which has several.

    Raises:
        ConfigError: it knows no such class.
    """
    position = {folder: i for i, folder in enumerate(selector.classes)}
    if name in position:
        return (position[name],)
    class_map = read_class_map(find_map(config.class_map), config.levels)
    found = tuple(sorted(position[f] for f in class_map.folders_of(name) if f in position))
    if not found:
        near = suggest(name, [*class_map.names, *selector.classes])
        raise ConfigError(
            f"class={name}: the selector knows no such class{near or '; expected a folder such as '}"
            f"{'' if near else selector.classes[0]}{'' if near else ', or a class of ' + config.class_map}"
        )
    return found


def readable(classes: Sequence[str]) -> list[str]:
    """Names for people: WordNet ids by their first word, others as they are."""
    known = lemmas()
    return [known[name].split(",")[0] if name in known else name for name in classes]
