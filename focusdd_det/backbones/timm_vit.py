"""Every ViT of timm that has a class token, by its timm name: what `selector=` means unless a backbone has the name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from huggingface_hub import try_to_load_from_cache
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from focusdd_det.backbones import Backbone
from focusdd_det.backbones.rows import ClassTokenRows


class TimmViT(Backbone):
    """A model of timm, built with keyword arguments of its own; `pretrained`: with timm's own weights, fetched unless
    they are `cached`.

    Attributes:
        cached: what timm fetched before, in the cache of huggingface_hub; None if it is not there. Nobody is asked.
    """

    def __init__(self, name: str, kwargs: Mapping[str, Any], pretrained: bool = False) -> None:
        self.name = name
        self.kwargs = dict(kwargs)
        self.pretrained = pretrained
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        self.view = int(self.kwargs.get("img_size", config.input_size[-1] if config is not None else 224))
        self.mean = tuple(config.mean) if config is not None else IMAGENET_DEFAULT_MEAN
        self.std = tuple(config.std) if config is not None else IMAGENET_DEFAULT_STD
        hub = config.hf_hub_id if config is not None else None
        found = try_to_load_from_cache(hub, "model.safetensors") if hub else None
        self.cached = found if isinstance(found, str) else None

    def build(self, view: int) -> nn.Module:
        own = {"pretrained_cfg_overlay": {"file": self.cached}} if self.pretrained and self.cached else {}
        kwargs = {**self.kwargs, "img_size": view, **own}
        model: nn.Module = timm.create_model(self.name, pretrained=self.pretrained, **kwargs)
        return model

    def grid(self, view: int) -> int:
        """Side of the token grid; the network is laid out without memory for it.

        Raises:
            Exception: whatever timm says of a name or a view that it cannot build.
        """
        import torch

        with torch.device("meta"):
            model = timm.create_model(self.name, pretrained=False, **{**self.kwargs, "img_size": view})
        return int(model.patch_embed.grid_size[0])

    def fit(self, state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        from timm.models.vision_transformer import checkpoint_filter_fn

        fitted: dict[str, Tensor] = checkpoint_filter_fn(state, model)  # resamples the position embedding to the view
        own = hasattr(model, "head_dist")  # weights of a distilled ViT fit the same ViT without that head
        return {key: value for key, value in fitted.items() if own or not key.startswith("head_dist")}

    def look(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        with ClassTokenRows(model, whole=self.whole) as seen:
            logits = model(x)
        return logits, seen.rows

    def identity(self, name: str, view: int) -> list[Any]:
        return [name, sorted({**self.kwargs, "img_size": view}.items())]


def problems_of(model: nn.Module) -> list[str]:
    """Why a model of timm cannot select; empty if it can."""
    if not hasattr(model, "blocks") or not hasattr(getattr(model, "patch_embed", None), "grid_size"):
        return ["it is not a ViT (no blocks or patch grid)"]
    if getattr(model, "cls_token", None) is None or getattr(model, "num_prefix_tokens", 0) < 1:
        return ["it has no class token, whose attention the selection is made of"]
    if not all(hasattr(getattr(block, "attn", None), "attn_drop") for block in model.blocks):  # type: ignore[union-attr]
        return ["its blocks have no attention that can be read"]
    width, height = model.patch_embed.grid_size  # type: ignore[union-attr, misc]
    if width != height:
        return [f"its token grid is {(width, height)}, expected a square one"]
    return []
