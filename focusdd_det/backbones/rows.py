"""Reads, while a ViT runs, where its class token looks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ClassTokenRows:
    """Collects, while the ViT runs, each block's attention row of the class token over the patch tokens.

    Only q of the class token and k of all tokens are needed, so the fused attention kernel stays in use. Blocks whose
    attention is not timm's standard one are run unfused and read at the input of `attn_drop`.
    """

    def __init__(self, model: nn.Module, exact: bool = False, prefix: int | None = None) -> None:
        """`exact` reads every block at `attn_drop` without fused attention: the reference for tests. `prefix`: tokens
        in front of the patch tokens; None: the model's own `num_prefix_tokens`."""
        self.model = model
        self.exact = exact
        self.prefix = prefix
        self.rows: list[Tensor] = []  # a [B, heads, g*g] float32 tensor per block
        self._undo: list[Any] = []

    def __enter__(self) -> ClassTokenRows:
        prefix = self.prefix if self.prefix is not None else int(self.model.num_prefix_tokens)  # type: ignore[arg-type]
        for block in self.model.blocks:  # type: ignore[union-attr]
            attention = block.attn
            if self.exact or not _is_standard(attention):
                fused = getattr(attention, "fused_attn", False)
                attention.fused_attn = False
                self._undo.append(lambda a=attention, f=fused: setattr(a, "fused_attn", f))

                def read(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                    self.rows.append(inputs[0][:, :, 0, prefix:].float())

                self._undo.append(attention.attn_drop.register_forward_pre_hook(read).remove)
            else:

                def compute(module: nn.Module, _: Any, qkv: Tensor, a: Any = attention) -> None:
                    batch, tokens, _width = qkv.shape
                    q, k, _v = qkv.view(batch, tokens, 3, a.num_heads, a.head_dim).unbind(2)
                    q = a.q_norm(q[:, :1].transpose(1, 2)).float() * a.scale  # [B, heads, 1, d]
                    k = a.k_norm(k.transpose(1, 2)).float()  # [B, heads, tokens, d]
                    row = (q @ k.transpose(-2, -1)).softmax(dim=-1)
                    self.rows.append(row[:, :, 0, prefix:])

                self._undo.append(attention.qkv.register_forward_hook(compute).remove)
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()


def _is_standard(attention: nn.Module) -> bool:
    from timm.layers import Attention

    return type(attention) is Attention and attention.qkv is not None
