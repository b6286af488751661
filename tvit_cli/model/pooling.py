"""How the tokens of each group become one vector.

Letters: B clips, G groups of tokens, N tokens of a group, Q those that the last block gives, D width, A heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .additions import Addition
from .config import ViTConfig


class ClassToken(nn.Module):
    """The class token, the first of its group."""

    n_queries = 1  # tokens that are read: no others need to ask in the last block

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, G, Q, D) -> (B, G, D)."""
        return tokens[:, :, 0]


class MeanPatch(nn.Module):
    """The mean of the patches, without the class token and what stands beside it."""

    n_queries = None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.first = 1 + config.extra_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, G, N, D) -> (B, G, D)."""
        return tokens[:, :, self.first :].mean(dim=2)


class AttentivePool(Addition):
    """A weighted mean of all tokens for each head's share of the channels; the weights come from a query.

    One learned query needs no keys of its own (they would fold into it), and the classifier stands in for a
    map of the values. It starts as the plain mean, also from scratch. Compare arXiv:1810.00825, section 3.2.
    """

    n_queries = None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(config.num_heads, config.width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, G, N, D) -> (B, G, D)."""
        n_heads, width = self.queries.shape
        weights = (tokens @ self.queries.T / width**0.5).softmax(dim=2)  # (B, G, N, A)
        values = tokens.reshape(*tokens.shape[:3], n_heads, width // n_heads)  # (B, G, N, A, D/A)
        pooled: Tensor = weights.transpose(2, 3).unsqueeze(3) @ values.transpose(2, 3)  # (B, G, A, 1, D/A)
        return pooled.flatten(2)

    def start(self, *, generator: torch.Generator | None, from_scratch: bool) -> None:
        nn.init.zeros_(self.queries)


class MeanOverGroups(nn.Module):
    """The mean over the groups: over frames, or the vector itself where the clip is one group."""

    def forward(self, groups: Tensor) -> Tensor:
        """(B, G, D) -> (B, D)."""
        return groups.mean(dim=1)


POOLING: dict[str, type[ClassToken] | type[MeanPatch] | type[AttentivePool]] = {  # by ViTConfig.pool
    "class": ClassToken,
    "mean": MeanPatch,
    "attentive": AttentivePool,
}
