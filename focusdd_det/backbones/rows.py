"""Reads, while a ViT runs, where its class token looks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class ClassTokenRows:
    """Collects, while the ViT runs, each block's attention row of the class token over the patch tokens.

    Only q of the class token and k of all tokens are needed, so the fused attention kernel stays in use. Blocks whose
    attention is not timm's standard one are run unfused and read at the input of `attn_drop`. Where nothing but the
    prefix tokens is read after the last block, it computes no others.
    """

    def __init__(self, model: Any, exact: bool = False, prefix: int | None = None, whole: bool = False) -> None:
        """`exact` reads every block at `attn_drop` without fused attention: the reference for tests. `prefix`: tokens
        in front of the patch tokens; None: the model's own `num_prefix_tokens`. `whole`: all tokens of the last block,
        too."""
        self.model = model
        self.exact = exact
        self.whole = whole
        self.prefix = prefix
        self.rows: list[Tensor] = []  # a [B, heads, g*g] float32 tensor per block
        self._undo: list[Any] = []

    def __enter__(self) -> ClassTokenRows:
        prefix = self.prefix if self.prefix is not None else int(self.model.num_prefix_tokens)
        for block in self.model.blocks:
            attention = block.attn
            last = block is self.model.blocks[-1]
            if last and not (self.exact or self.whole) and _ends_in_class_token(self.model):
                block.forward = lambda x, b=block: self._last(b, x, prefix)
                self._undo.append(lambda b=block: delattr(b, "forward"))
            elif self.exact or not _is_standard(attention):
                fused = getattr(attention, "fused_attn", False)
                attention.fused_attn = False
                self._undo.append(lambda a=attention, f=fused: setattr(a, "fused_attn", f))

                def read(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                    self.rows.append(inputs[0][:, :, 0, prefix:].float())

                self._undo.append(attention.attn_drop.register_forward_pre_hook(read).remove)
            else:

                def compute(module: nn.Module, _: Any, qkv: Tensor, a: Any = attention) -> None:
                    q, k, _v = _heads(qkv, a, 3)
                    self.rows.append(_attention(q[:, :, :1], k, a)[:, :, 0, prefix:])

                self._undo.append(attention.qkv.register_forward_hook(compute).remove)
        return self

    def _last(self, block: Any, x: Tensor, prefix: int) -> Tensor:
        """timm's Block on [B, tokens, dim], for the prefix tokens alone, which see all: [B, prefix, dim]."""
        a = block.attn
        y = block.norm1(x)
        width = a.num_heads * a.head_dim
        weights = a.qkv.weight.tensor_split([width])
        biases = (None, None) if a.qkv.bias is None else a.qkv.bias.tensor_split([width])
        (q,) = _heads(linear(y[:, :prefix], weights[0], biases[0]), a, 1)
        k, v = _heads(linear(y, weights[1], biases[1]), a, 2)
        attention = _attention(q, k, a)
        self.rows.append(attention[:, :, 0, prefix:])
        y = (attention.to(v.dtype) @ v).transpose(1, 2).flatten(2)
        x = x[:, :prefix] + block.ls1(a.proj(a.norm(y)))
        return x + block.ls2(block.mlp(block.norm2(x)))  # type: ignore[no-any-return]

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()


def _heads(projected: Tensor, attention: Any, parts: int) -> tuple[Tensor, ...]:
    """[B, tokens, parts * heads * d] -> so many [B, heads, tokens, d]."""
    batch, tokens, _ = projected.shape
    shape = (batch, tokens, parts, attention.num_heads, attention.head_dim)
    return projected.view(shape).permute(2, 0, 3, 1, 4).unbind(0)


def _attention(q: Tensor, k: Tensor, attention: Any) -> Tensor:
    """After the softmax, in float32: [B, heads, tokens of q, tokens of k]."""
    q, k = attention.q_norm(q).float() * attention.scale, attention.k_norm(k).float()
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1)


def _is_standard(attention: nn.Module) -> bool:
    from timm.layers import Attention

    return type(attention) is Attention and attention.qkv is not None


def _ends_in_class_token(model: Any) -> bool:
    """Whether it is a plain ViT of timm, whose head reads the class token alone (a distilled one's: both prefixes)."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        return False
    block = model.blocks[-1]
    return (
        not model.training
        and not {"forward", "forward_features", "forward_head", "pool"} & vars(model).keys()  # somebody's own
        and "forward" not in vars(block)
        and type(block) is Block
        and _is_standard(block.attn)
        and getattr(block.attn, "gate", None) is None
        and model.global_pool == "token"
        and model.attn_pool is None
    )
