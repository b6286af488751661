"""Attention among the tokens of a group, and among the same places of a clip's frames.

Letters: B clips, G groups of tokens (frames, or one for the whole clip), N tokens of a group, Q tokens that
ask, D width, A attention heads, D/A head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Every token of a group attends to every token of the same group."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.k = nn.Linear(width, width, bias=qkv_bias)
        self.v = nn.Linear(width, width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, n_queries: int | None = None) -> Tensor:
        """(B, G, N, D) -> (B, G, Q, D); only the first `n_queries` tokens of a group ask, all when None."""
        # Once for the three layers, each of which would keep a copy of its own.
        tokens = tokens.to(autocast_dtype(tokens.device) or tokens.dtype)
        # Without gaps between rows: for gapped ones torch's choice of matmul, and so the last bit of the
        # numbers, depends on which weights are frozen.
        asking = tokens[:, :, :n_queries].contiguous()  # (B, G, Q, D)
        q = self._split_heads(self.q(asking))  # (B*G, A, Q, D/A)
        k = self._split_heads(self.k(tokens))  # (B*G, A, N, D/A)
        v = self._split_heads(self.v(tokens))  # (B*G, A, N, D/A)
        attended = F.scaled_dot_product_attention(q, k, v)  # (B*G, A, Q, D/A)
        output: Tensor = self.proj(attended.transpose(1, 2).reshape(asking.shape))  # (B, G, Q, D)
        return output

    def _split_heads(self, tokens: Tensor) -> Tensor:
        heads = tokens.reshape(-1, tokens.shape[2], self.num_heads, tokens.shape[3] // self.num_heads)
        return heads.transpose(1, 2)  # (B*G, N, A, D/A) -> (B*G, A, N, D/A)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The number format that autocast computes in on a device; None where it is off, or not known there."""
    is_on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


def over_time(attention: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
    """Applies attention to the tokens of one place in all frames, (B, T', N, D) -> (B, T', N, D)."""
    places = frames.transpose(1, 2).contiguous()  # (B, N, T', D)
    return attention(places).transpose(1, 2)  # (B, T', N, D)
