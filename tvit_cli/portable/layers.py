"""Layers of the temporal ViT: attention, blocks, MLPs, and temporal modules with no counterpart in an image ViT.

They are trained in full, whatever is frozen. Beside pretrained weights each starts so that it adds nothing.

Letters: B clips, T' times, P patches per frame, D width.

Letters: B clips, G groups of tokens (frames, or one for the whole clip), N tokens of a group, Q tokens that
ask, D width, A attention heads, D/A head_dim.

Letters: B clips, G groups of tokens, N tokens of a group, Q tokens that ask, D width; T' times. The blocks that
look over time take one group per time, so that their tokens are (B, T', N, D).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import ViTConfig

INIT_STD = 0.02  # of the truncated normal; ViT's official code (arXiv:2010.11929) draws positions with it
LEAST_DEVIATION = 0.1  # of a feature, as a share of the mean one
ROUNDING = 1e-5  # of a feature's size: batches of other sizes give one clip float32 features up to 1e-6 apart


class AddedModule(nn.Module):
    """A part that an image ViT lacks.

    A part that `is_map` holds linear layers. One step moves their output by the rate times the sum of all inputs,
    an offset or a gate by the rate alone: a rate that suits those and LoRA's thin matrices is too large for maps.
    """

    is_map = False

    def start(self, *, generator: torch.Generator | None, from_scratch: bool) -> None:
        """Sets the first values, once all linear layers inside have theirs; without `from_scratch` zeros."""
        raise NotImplementedError


class TemporalEmbedding(AddedModule):
    """Adds to each patch when it is seen; interpolated linearly for clips of another length."""

    def __init__(self, n_times: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(1, n_times, 1, width))

    def forward(self, patches: Tensor) -> Tensor:
        """(B, T', P, D) -> (B, T', P, D)."""
        embedding: Tensor = self.embedding
        n_times = patches.shape[1]
        if n_times != embedding.shape[1]:
            embedding = resize_temporal(embedding, n_times)
        return patches + embedding

    def start(self, *, generator: torch.Generator | None, from_scratch: bool) -> None:
        if from_scratch:
            truncated_normal(self.embedding, generator)
        else:
            nn.init.zeros_(self.embedding)


class TokenIndexedEmbedding(TemporalEmbedding):
    """Adds to each patch the row of its number in the clip, modulo the rows, where its frame's would be right.

    The reference implementation's mistake: what it has trained answers as it did with it alone.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """(B, T', P, D) -> (B, T', P, D)."""
        embedding: Tensor = self.embedding
        tokens = torch.arange(patches.shape[1] * patches.shape[2], device=patches.device)  # (T'*P,)
        rows = embedding[:, tokens % embedding.shape[1]]  # (1, T'*P, 1, D)
        return patches + rows.view(1, *patches.shape[1:])


class Gate(AddedModule):
    """Scales each channel, beside pretrained weights from nothing (LayerScale, arXiv:2103.17239)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return tokens * self.gate

    def start(self, *, generator: torch.Generator | None, from_scratch: bool) -> None:
        nn.init.constant_(self.gate, float(from_scratch))


class FeatureNorm(AddedModule):
    """Shifts and scales each feature, and is trained with what reads them.

    `fit` starts it at the mean and deviation over some clips, so that what all clips share weighs nothing to begin
    with: data-dependent initialisation, ActNorm, arXiv:1807.03039.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.empty(width))
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        return (features - self.shift) * self.scale

    def start(self, *, generator: torch.Generator | None, from_scratch: bool) -> None:
        nn.init.zeros_(self.shift)
        nn.init.ones_(self.scale)

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Take mean and deviation of features, (clips, D); those that hardly differ are not blown up."""
        deviation = features.std(dim=0, correction=0)  # (D,)
        self.shift.copy_(features.mean(dim=0))
        # Else all clips are one, and how far others lie from it is not known.
        if deviation.mean() > ROUNDING * features.abs().mean():
            self.scale.copy_(1 / deviation.clamp_min(LEAST_DEVIATION * float(deviation.mean())))


def resize_temporal(embedding: Tensor, n_times: int) -> Tensor:
    """A temporal embedding interpolated linearly, (1, T', 1, D) -> (1, new T', 1, D)."""
    lines = embedding[:, :, 0].transpose(1, 2)  # (1, D, T')
    lines = F.interpolate(lines, size=n_times, mode="linear", align_corners=False)
    return lines.transpose(1, 2).unsqueeze(2)


def truncated_normal(parameter: Tensor, generator: torch.Generator | None) -> None:
    """Normal numbers of std 0.02, none beyond two deviations, from the inverse of their distribution.

    `nn.init.trunc_normal_` draws other numbers from the same seed in other torch versions, and takes longer.
    """
    within = math.erf(2 / math.sqrt(2))
    parameter.uniform_(-within, within, generator=generator).erfinv_().mul_(INIT_STD * math.sqrt(2))


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


class TemporalEncoder(AddedModule):
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


def recompute_block(block: nn.Module, *inputs: Any, **options: Any) -> Tensor:
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
