"""ViTs that can select: what has to be known of one, and the names under which those beyond timm's are found.

timm's own ViTs need no entry here (timm_vit.py). Another one is a class with a `build`, entered by `register_backbone`;
lv_vit.py is one, and yours can lie in a file of your own: `plugins=my_vit.py selector=my_vit selector_weights=my.pth`.
"""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from focusdd_det.backbones.rows import ClassTokenRows
from focusdd_det.errors import ConfigError


class Backbone(ABC):
    """One kind of ViT with a class token. Only `build` has to be written for a network of the usual make.

    The usual make: `blocks` whose `attn` passes its attention [B, heads, tokens, tokens] through a module `attn_drop`
    (timm's, DeiT's, and what is derived from them); `pos_embed` [1, prefix + grid * grid, dim]; a forward that gives
    class logits. What is made otherwise says so by overriding `fit` or `look`.

    Attributes:
        view: side of the square that it was trained on, px.
        patch: side of a token, px.
        prefix: tokens in front of the patch tokens; the first is the class token.
        mean, std: normalisation of the pixels in [0, 1], RGB.
        classes: the folder (WordNet id) that each output stands for; None: ImageNet-1K's thousand in the usual order.
        whole: whether `look` computes all that a plain forward does, what nobody reads included; for comparisons.
    """

    view: int = 224
    patch: int = 16
    prefix: int = 1
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD
    classes: Sequence[str] | None = None
    whole: bool = False

    @abstractmethod
    def build(self, view: int) -> nn.Module:
        """The network for pictures of view x view px, with any weights.

        Raises:
            ValueError: there is none for that view.
        """

    def grid(self, view: int) -> int:
        """Side of the token grid at that view."""
        return view // self.patch

    def fit(self, state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """A checkpoint's tensors under the names and in the shapes of `model`: here a checkpoint is renamed, and what
        is not needed of it left out. Whatever then is missing or left over is an error."""
        return resampled_positions(state, model, self.prefix)

    def look(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """What the network says of a normalised batch, and where its class token looks.

        While it runs here, the last block of timm's own VisionTransformer gives the prefix tokens alone.

        Args:
            x: [B, 3, view, view] float.

        Returns:
            logits [B, classes]; and for each block the class token's attention over the patch tokens, after the
            softmax: [B, heads, grid * grid], at least 0.
        """
        with ClassTokenRows(model, prefix=self.prefix, whole=self.whole) as seen:
            logits = model(x)
        return logits, seen.rows

    def identity(self, name: str, view: int) -> list[Any]:
        """What decides, besides weights, classes and pixels, what it says; scores kept under another one are not used.
        The module of a plugin is named by the hash of its file."""
        return [name, view, type(self).__module__, ORIGINS.get(name, "")]


BACKBONES: dict[str, Backbone] = {}
ORIGINS: dict[str, str] = {}  # name -> module that registered it


def register_backbone(name: str, backbone: Backbone) -> None:
    """Enter a backbone under the name that `selector=` finds it by.

    Raises:
        ConfigError: not a plain name, one of timm's, or one that another class has.
    """
    import timm

    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or name.endswith(".json"):
        raise ConfigError(f"backbone `{name}`: expected a plain name of letters, digits, `_`, `-` and `.`")
    if timm.is_model(name.split(".")[0]):
        raise ConfigError(f"backbone `{name}` is the name of a model of timm; choose another name")
    if not isinstance(backbone, Backbone):
        raise ConfigError(f"backbone `{name}`: expected an instance of a subclass of Backbone, got {backbone!r:.80}")
    if name in BACKBONES and type(BACKBONES[name]).__qualname__ != type(backbone).__qualname__:
        raise ConfigError(f"backbone `{name}` exists already ({type(BACKBONES[name]).__name__}); choose another name")
    BACKBONES[name] = backbone
    ORIGINS[name] = str(sys._getframe(1).f_globals.get("__name__", ""))


def resampled_positions(state: dict[str, Tensor], model: nn.Module, prefix: int) -> dict[str, Tensor]:
    """`pos_embed` of a checkpoint, brought to the model's token grid (bicubic) where it was trained on another."""
    from timm.layers import resample_abs_pos_embed

    own, given = getattr(model, "pos_embed", None), state.get("pos_embed")
    if own is None or given is None or given.shape == own.shape or given.ndim != 3:
        return state
    side = round((own.shape[1] - prefix) ** 0.5)
    resampled: Tensor = resample_abs_pos_embed(given, [side, side], num_prefix_tokens=prefix)
    return {**state, "pos_embed": resampled}


@torch.inference_mode()
def check_look(backbone: Backbone, model: nn.Module, view: int, classes: int) -> list[str]:
    """Show a grey picture to a network; what is wrong with what `look` gives back."""
    grid = backbone.grid(view)
    try:
        logits, rows = backbone.look(model, torch.zeros(1, 3, view, view))
        shapes = [tuple(row.shape) for row in rows]
    except Exception as error:  # a user's own code may raise anything
        return [f"it cannot be shown a picture ({type(error).__name__}: {str(error)[:200]})"]
    problems = []
    if tuple(logits.shape) != (1, classes):
        problems.append(f"its logits are {list(logits.shape)}, expected [1, {classes}] for its {classes} classes")
    if not shapes:
        problems.append("it gave no attention rows; expected one [B, heads, tokens] for each block")
    elif any(len(shape) != 3 or shape[0] != 1 or shape[2] != grid * grid for shape in shapes):
        problems.append(f"its attention rows are {list(shapes[0])}, expected [1, heads, {grid} * {grid}]")
    elif not all(bool(torch.isfinite(row).all()) and bool((row >= 0).all()) for row in rows):
        problems.append("its attention has values that are negative or not finite; expected it after the softmax")
    return problems
