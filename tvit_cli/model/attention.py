"""The attention schemes of the temporal ViT.

A scheme is a module built from `(width, num_heads, qkv_bias)`, with the linear layers `q`, `k`, `v` and
`proj`. `SCHEMES` is the table that `ViTConfig.attention` chooses from.

Letters: B clips, N tokens, Q tokens that ask, D width, A attention heads, D/A head_dim.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class JointAttention(nn.Module):
    """Every token attends to every token of the clip, across space and time.

    Source: ViViT's model 1, arXiv:2103.15691.
    """

    def __init__(self, width: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.k = nn.Linear(width, width, bias=qkv_bias)
        self.v = nn.Linear(width, width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, n_queries: int | None = None) -> Tensor:
        """Attended tokens, (B, N, D) -> (B, Q, D); only the first `n_queries` tokens ask, all when None."""
        # Without gaps between rows: for gapped ones torch's choice of matmul, and so the last bit of the
        # numbers, depends on which weights are frozen.
        asking = tokens[:, :n_queries].contiguous()  # (B, Q, D)
        q = self._split_heads(self.q(asking))  # (B, A, Q, D/A)
        k = self._split_heads(self.k(tokens))  # (B, A, N, D/A)
        v = self._split_heads(self.v(tokens))  # (B, A, N, D/A)
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, A, Q, D/A)
        output: Tensor = self.proj(attended.transpose(1, 2).flatten(2))  # (B, Q, D)
        return output

    def _split_heads(self, tokens: Tensor) -> Tensor:
        heads = tokens.reshape(*tokens.shape[:2], self.num_heads, -1)  # (B, N, A, D/A)
        return heads.transpose(1, 2)  # (B, A, N, D/A)


SCHEMES: dict[str, type[JointAttention]] = {"joint": JointAttention}
