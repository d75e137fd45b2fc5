"""LV-ViT (Jiang et al. 2021, "All Tokens Matter: Token Labeling for Training Better Vision Transformers").

A ViT with four convolutions as patch embedding, residuals divided by `skip`, and a second head that names every patch.
Architecture and key names follow https://github.com/zihangJiang/TokenLabeling (tlt/models/lvvit.py), so that its
checkpoint lvvit_s-26M-224-83.3.pth.tar fits key by key; written anew on timm's attention and MLP.

This file is also the example of a backbone that timm does not have: a copy of it, under another name in its last line,
works as `plugins=my_vit.py selector=my_name selector_weights=...`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from focusdd_det.backbones import Backbone, register_backbone

STEM = 64  # channels of the convolutions
PATCH = 16


class PatchEmbed(nn.Module):
    """A 7 x 7 convolution of stride 2, two of 3 x 3, then patches of the half-size map: [B, 3, H, W] -> [B, N, dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.conv2 = nn.Conv2d(STEM, STEM, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(STEM)
        self.conv3 = nn.Conv2d(STEM, STEM, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(STEM)
        self.proj = nn.Conv2d(STEM, dim, PATCH // 2, stride=PATCH // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class Block(nn.Module):
    """A pre-norm transformer block whose two branches are divided by `skip`."""

    def __init__(self, dim: int, heads: int, ratio: float, skip: float) -> None:
        super().__init__()
        self.skip = skip
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads=heads, qkv_bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) / self.skip
        out: Tensor = x + self.mlp(self.norm2(x)) / self.skip
        return out


class LVViTNet(nn.Module):
    """The network. Its logits are the class token's plus half of the largest that any patch token has of a class."""

    def __init__(
        self, grid: int, dim: int, depth: int, heads: int, ratio: float, skip: float, classes: int, aux: bool
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, ratio, skip) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        self.aux_head = nn.Linear(dim, classes) if aux else None
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, 3, view, view] -> tokens [B, 1 + N, dim], the class token first."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        tokens: Tensor = self.norm(x)
        return tokens

    def get_classifier(self) -> nn.Module:
        """The class token's head: what it is shown is the feature of a picture."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.forward_features(x)
        logits: Tensor = self.head(tokens[:, 0])
        return logits if self.aux_head is None else logits + 0.5 * self.aux_head(tokens[:, 1:]).amax(dim=1)


@dataclass(frozen=True)
class LVViT(Backbone):
    """LV-ViT of one size; the defaults are LV-ViT-S (26.15 M parameters, 83.3 % top-1 at 224 px as published)."""

    view: int = 224
    dim: int = 384
    depth: int = 16
    heads: int = 6
    ratio: float = 3.0
    skip: float = 2.0
    aux: bool = True
    patch: int = PATCH
    classes: tuple[str, ...] | None = None

    def build(self, view: int) -> nn.Module:
        if view % PATCH:
            raise ValueError(f"expected a multiple of {PATCH} px")
        count = 1000 if self.classes is None else len(self.classes)
        return LVViTNet(self.grid(view), self.dim, self.depth, self.heads, self.ratio, self.skip, count, self.aux)


register_backbone("lvvit_s", LVViT())
