"""The transformer blocks: the image ViT's, and those that look over time before they look over space.

Letters: B clips, G groups of tokens, N tokens of a group, Q tokens that ask, D width; T' times. The blocks that
look over time take one group per time, so that their tokens are (B, T', N, D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .additions import Addition, Gate, TemporalEmbedding
from .attention import SelfAttention, over_time
from .config import ViTConfig


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that CLIP is trained with (arXiv:1606.08415, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SwiGLU(nn.Module):
    """Half of the channels, through SiLU, gate the other half, (..., 2 d) -> (..., d). arXiv:2002.05202."""

    def forward(self, x: Tensor) -> Tensor:
        gate, values = x.chunk(2, dim=-1)
        return F.silu(gate) * values


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swiglu": SwiGLU,
}


class Block(nn.Module):
    """One pre-norm transformer block: attention, then an MLP, each beside a residual path."""

    def __init__(self, config: ViTConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = SelfAttention(config.width, config.num_heads, config.qkv_bias)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, config.hidden_width, config.activation)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, tokens: Tensor, n_queries: int | None = None) -> Tensor:
        """(B, G, N, D) -> (B, G, Q, D): the first `n_queries` tokens of each group (all when None)."""
        attended = self.attention(self.norm1(tokens), n_queries)  # (B, G, Q, D)
        tokens = tokens[:, :, :n_queries] + self.drop_path(attended)
        output: Tensor = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return output


class DividedBlock(Block):
    """First attends over time, with weights of its own, then within each frame.

    Source: TimeSformer's divided attention, arXiv:2102.05095. There the class token is left out of time and its
    copies are averaged in every block; here each frame keeps a class token, which attends over time as the
    patches do, and the average is taken once, at the end: at step 0 the model is the image ViT on each frame.
    """

    def __init__(self, config: ViTConfig, drop_path: float = 0.0) -> None:
        super().__init__(config, drop_path)
        self.temporal = TemporalAttention(config)

    def forward(self, tokens: Tensor, n_queries: int | None = None) -> Tensor:
        """(B, T', N, D) -> (B, T', Q, D)."""
        return super().forward(tokens + self.drop_path(self.temporal(tokens)), n_queries)


class TemporalAttention(nn.Module):
    """Attention among the tokens of one place in all frames, behind a norm and a gate of its own."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = SelfAttention(config.width, config.num_heads, config.qkv_bias)
        self.scale = Gate(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T', N, D) -> (B, T', N, D)."""
        output: Tensor = self.scale(over_time(self.attention, self.norm(tokens)))
        return output


class TemporalEncoder(Addition):
    """Blocks over the summaries of the frames, then their mean.

    Source: ViViT's model 2, arXiv:2103.15691, without its second class token.
    """

    is_map = True

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        assert config.temporal_depth is not None
        self.times = TemporalEmbedding(config.n_frames // config.tubelet_size, config.width)
        # Not `blocks`: PEFT matches the ends of names, and blocks.0 of the model must not be this one.
        self.temporal_blocks = nn.ModuleList(Block(config) for _ in range(config.temporal_depth))

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T', D) -> (B, D)."""
        tokens = self.times(frames.unsqueeze(2)).transpose(1, 2)  # (B, 1, T', D)
        for block in self.temporal_blocks:
            tokens = block(tokens)  # (B, 1, T', D)
        clips: Tensor = tokens.mean(dim=(1, 2))
        return clips

    def start(self, *, generator: torch.Generator | None, from_scratch: bool) -> None:
        if not from_scratch:
            for block in self.temporal_blocks:
                for last in ("attention.proj", "mlp.fc2"):
                    nn.init.zeros_(block.get_submodule(last).get_parameter("weight"))


class DropPath(nn.Module):
    """In training, leaves a clip's branch out with a probability, and scales it by 1 / keep where it stays.

    Drawn for each clip from torch's global generator, as dropout is. Source: arXiv:1603.09382.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.keep = 1 - probability

    def forward(self, branch: Tensor) -> Tensor:
        """(B, …) -> (B, …)."""
        if not self.training:
            return branch
        shape = (len(branch), *[1] * (branch.dim() - 1))
        return branch * (branch.new_empty(shape).bernoulli_(self.keep) / self.keep)


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, hidden_width: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden_width if activation == "swiglu" else hidden_width)
        self.act = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        hidden = self.act(self.fc1(tokens))  # (..., hidden width)
        output: Tensor = self.fc2(hidden)
        return output


def called(block: nn.Module, *inputs: Any, **options: Any) -> Tensor:
    """A block's output; all that its backward pass wants is kept."""
    output: Tensor = block(*inputs, **options)
    return output


def recomputed(block: nn.Module, *inputs: Any, **options: Any) -> Tensor:
    """A block's output; kept are its inputs alone, and the backward pass computes the rest again, bit for bit.

    Source: gradient checkpointing, arXiv:1604.06174.
    """
    if not torch.is_grad_enabled():
        return called(block, *inputs, **options)
    if inputs[0].device.type == "mps":
        options["context_fn"] = _same_mps_draws
    output: Tensor = checkpoint(block, *inputs, use_reentrant=False, **options)
    return output


def _same_mps_draws() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the pass and for its repetition: dropout's draws on MPS, which torch puts back on CPUs and CUDA alone."""
    return nullcontext(), _drawing_from(torch.mps.get_rng_state())


@contextmanager
def _drawing_from(state: Tensor) -> Iterator[None]:
    before = torch.mps.get_rng_state()
    torch.mps.set_rng_state(state)
    try:
        yield
    finally:
        torch.mps.set_rng_state(before)
