"""Self-attention whose projections are one matrix product, whatever is frozen. B images, N tokens, W width, H heads, E width of a head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aft.clip.reclass import reclass


class FoldedAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` of a batch with itself, faster, most of all where a gradient by the input alone is taken.

    torch swaps batch and tokens before the projection; with frozen weights, as in an attack, the product of that strided tensor is then
    carried out token by token, N small products in place of one. Here the projection comes first. Without a gradient torch has a kernel
    of its own for all of it, which is slower still (1.05 to 1.5 times on a CPU). The mathematics is the same; so are parameters and
    their names. All that is not plain self-attention goes the old way.

    See :func:`fold_attention`; a module is never built as this class.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``; ``[B, N, W]`` in and out."""
        asked = {name for name, given in settings.items() if given is not None and given is not False}
        plain = query is key and key is value and "need_weights" in settings and not (args or asked) and query.ndim == 3
        if not plain:
            return super().forward(query, key, value, *args, **settings)
        images, tokens, width = query.shape
        projected_BN3HE = F.linear(query, self.in_proj_weight, self.in_proj_bias).view(images, tokens, 3, self.num_heads, self.head_dim)
        query_BHNE, key_BHNE, value_BHNE = projected_BN3HE.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHNE = attend(query_BHNE, key_BHNE, value_BHNE)
        return F.linear(mixed_BHNE.transpose(1, 2).reshape(images, tokens, width), self.out_proj.weight, self.out_proj.bias), None


def attend(query_BHNE: Tensor, key_BHNE: Tensor, value_BHNE: Tensor) -> Tensor:
    """Scaled dot-product attention; bf16 on a CPU goes through fp32.

    There torch's kernel of the backward pass is up to four times slower in bf16 (17 tokens; as fast at 577): it would take half of a step.
    The products inside are a hundredth of a tower's at 50 tokens, a tenth at 577, and fp32 is the more exact.
    """
    if query_BHNE.dtype != torch.bfloat16 or query_BHNE.device.type != "cpu":
        return F.scaled_dot_product_attention(query_BHNE, key_BHNE, value_BHNE)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(query_BHNE.float(), key_BHNE.float(), value_BHNE.float()).to(query_BHNE.dtype)


def fold_attention(tower: nn.Module) -> None:
    """Makes every plain ``nn.MultiheadAttention`` of a tower a :class:`FoldedAttention`, in place; parameters stay where they are."""
    reclass(tower, nn.MultiheadAttention, FoldedAttention, is_plain)


def unfold_attention(tower: nn.Module) -> None:
    """Takes :func:`fold_attention` back, in place: what it is compared with."""
    reclass(tower, FoldedAttention, nn.MultiheadAttention)


def is_plain(attention: nn.MultiheadAttention) -> bool:
    """Batch first, one width for query, key and value, no dropout, nothing added to keys."""
    added = attention.add_zero_attn or attention.bias_k is not None
    return bool(attention._qkv_same_embed_dim and attention.batch_first and not attention.dropout and not added)
