"""Layers of the temporal ViT: blocks, attention, MLPs, and modules with no counterpart in an image ViT.

Letters: B clips, G groups of tokens (one per time T', or one for the whole clip), N tokens of a group, Q query
tokens, P patches per frame, D width, A attention heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import ViTConfig

MAX_GROUPS = 65_535  # blocks in the second and third dimension of a CUDA grid (CUDA programming guide)
Pool = Callable[[Tensor], Tensor]


class SelfAttention(nn.Module):
    """Multi-head attention among the tokens of each group."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool = True, has_output: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.k = nn.Linear(width, width, bias=qkv_bias)
        self.v = nn.Linear(width, width, bias=qkv_bias)
        self.proj = nn.Linear(width, width) if has_output else nn.Identity()

    def forward(
        self,
        tokens: Tensor,
        n_queries: int | None = None,
        rotation: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """(B, G, N, D) -> (B, G, Q, D): the first `n_queries` tokens of each group are the queries (None: all).

        `rotation` is that of rotary positions, (2, B*G, 1, N, D/A): see `rotary_table`.
        `queries` of other tokens, (B, G, Q, D), make it cross-attention.
        """
        # Cast once: autocast would make and keep a copy for each of the three layers.
        dtype = autocast_dtype(tokens.device) or tokens.dtype
        tokens = tokens.to(dtype)
        # Contiguous: for strided rows torch's choice of matmul, and so the last bit of the result, depends on
        # which weights are frozen.
        own = tokens[:, :, :n_queries].contiguous()
        queries = own if queries is None else queries.to(dtype)  # (B, G, Q, D)
        q = self._split_heads(self.q(queries))  # (B*G, A, Q, D/A)
        k = self._split_heads(self.k(tokens))  # (B*G, A, N, D/A)
        v = self._split_heads(self.v(tokens))  # (B*G, A, N, D/A)
        if rotation is not None:
            q, k = rotate(q, rotation[:, :, :, : q.shape[2]]), rotate(k, rotation)
        attended = attend(q, k, v)  # (B*G, A, Q, D/A)
        return self.proj(attended.transpose(1, 2).reshape(queries.shape))  # (B, G, Q, D)

    def _split_heads(self, tokens: Tensor) -> Tensor:
        heads = tokens.reshape(-1, tokens.shape[2], self.num_heads, tokens.shape[3] // self.num_heads)
        heads = heads.transpose(1, 2)  # (B*G, N, A, D/A) -> (B*G, A, N, D/A)
        # A CPU reads many tokens faster if a head's rows are adjacent.
        return heads.contiguous() if heads.is_cpu and heads.shape[2] >= 768 else heads


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, (B, A, Q, D) and twice (B, A, N, D) -> (B, A, Q, D), for any B.

    Kernels on CUDA take a batch as the second dimension of their grid, which has at most MAX_GROUPS blocks.
    """
    if not q.is_cuda or q.shape[0] <= MAX_GROUPS:
        return F.scaled_dot_product_attention(q, k, v)
    parts = zip(*(torch.split(x, MAX_GROUPS) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])


def rotary_table(n_times: int, grid: tuple[int, int], head_width: int, device: torch.device) -> Tensor:
    """Cosines and signed sines of V-JEPA 2's rotary positions (arXiv:2506.09985), float32 (2, T'*P, D/A).

    A third of a head's channels, rounded down to an even number, turns with the time, the next with the row, the
    next with the column, at frequencies down to 1 / 10,000; the rest does not turn. The frequencies of a third are
    in order, twice, while adjacent channels are a pair: V-JEPA 2 was trained so.
    """
    part = 2 * (head_width // 3 // 2)
    frequencies = 10000 ** -(torch.arange(part // 2, device=device) / (part / 2))  # (part/2,)
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in (n_times, *grid)]
    places = torch.cartesian_prod(*axes)  # (T'*P, 3)
    angles = (places.unsqueeze(2) * frequencies).repeat(1, 1, 2).flatten(1)  # (T'*P, 3 part)
    return _cosines_and_sines(F.pad(angles, (0, head_width - 3 * part)))


def rotary_table_2d(grid: tuple[int, int], head_width: int, device: torch.device) -> Tensor:
    """Cosines and signed sines of DINOv3's rotary positions (arXiv:2508.10104), float32 (2, P, D/A).

    Half of a head's channels turns with the row, half with the column. Centres of patches lie between -1 and 1,
    whatever the grid is; from 0 to 1, pairs turn once, and less down to 1 / 100 of a turn. Adjacent channels are a
    pair.
    """
    frequencies = 2 * math.pi * 100 ** -(torch.arange(head_width // 4, device=device) / (head_width / 4))
    axes = [(torch.arange(n, dtype=torch.float32, device=device) + 0.5) / n * 2 - 1 for n in grid]
    return _table_2d(torch.cartesian_prod(*axes), frequencies)


def rotary_table_pe(grid: tuple[int, int], own: int, head_width: int, device: torch.device) -> Tensor:
    """Cosines and signed sines of the Perception Encoder's rotary positions, float32 (2, P, D/A). arXiv:2504.13181

    Half of a head's channels turns with the column, half with the row, at frequencies down to 1 / 10,000. Places
    are counted from 1, scaled to the weights' own grid of `own` x `own` patches. Adjacent channels are a pair.
    """
    frequencies = 10000 ** -(torch.arange(head_width // 4, device=device) / (head_width / 4))
    axes = [torch.arange(1, n + 1, dtype=torch.float32, device=device) / n * own for n in grid]
    return _table_2d(torch.cartesian_prod(*axes).flip(1), frequencies)


def _table_2d(places: Tensor, frequencies: Tensor) -> Tensor:
    """(P, 2) and (D/4A,) -> (2, P, D/A)."""
    return _cosines_and_sines((places.unsqueeze(2) * frequencies).flatten(1).repeat_interleave(2, dim=1))


def _cosines_and_sines(angles: Tensor) -> Tensor:
    """Of the first channel of each pair the sine is negative, (P, D/A) -> (2, P, D/A)."""
    signs = torch.arange(angles.shape[1], device=angles.device) % 2 * 2 - 1  # -1, 1, -1, 1, …
    return torch.stack((angles.cos(), signs * angles.sin()))


def rotate(heads: Tensor, table: Tensor) -> Tensor:
    """Turns pairs of adjacent channels, (B, A, N, D/A) and (2, B, 1, N, D/A) -> (B, A, N, D/A)."""
    swapped = heads.reshape(*heads.shape[:3], -1, 2).flip(4).reshape(heads.shape)
    return torch.addcmul(heads * table[0], swapped, table[1]).to(heads.dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Autocast's number format on a device; None where autocast is off or not available."""
    is_on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


class QuickGELU(nn.Module):
    """CLIP's sigmoid approximation of GELU (arXiv:1606.08415, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SwiGLU(nn.Module):
    """Gates half of the channels by SiLU of the other half, (..., 2 d) -> (..., d). arXiv:2002.05202."""

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


class BlockNorm(nn.LayerNorm):
    """LayerNorm whose output names its input, which a layer after it may store in place of the output."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        normed = super().forward(tokens)
        if not torch.compiler.is_compiling():
            normed.norm_of = tokens, self  # type: ignore[attr-defined]
        return normed


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, hidden_width: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden_width if activation == "swiglu" else hidden_width)
        self.act = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, tokens: Tensor, pool: Pool | None = None) -> Tensor:
        """(..., D) -> (..., D); with `pool`, a mean of tokens, the mean of the results."""
        hidden = self.act(self.fc1(tokens))
        return self.fc2(hidden if pool is None else pool(hidden))  # the mean of a linear layer's outputs


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training, drops a clip's residual branch, else scales it by 1 / keep.

    Drawn for each clip from torch's global generator, as dropout is.
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


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP, each with a residual connection."""

    def __init__(self, config: ViTConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = SelfAttention(config.width, config.num_heads, config.qkv_bias)
        self.norm2 = BlockNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, config.hidden_width, config.activation)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self,
        tokens: Tensor,
        n_queries: int | None = None,
        rotation: Tensor | None = None,
        pool: Pool | None = None,
    ) -> Tensor:
        """(B, G, N, D) -> (B, G, Q, D): the first `n_queries` tokens of each group (None: all).

        With `pool`, a mean of tokens, the mean of the results, (B, G, D), for less than computing each.
        """
        attended = self.attention(self.norm1(tokens), n_queries, rotation)  # (B, G, Q, D)
        tokens = tokens[:, :, :n_queries] + self.drop_path(attended)
        branch = self.drop_path(self.mlp(self.norm2(tokens), pool))
        return (tokens if pool is None else pool(tokens)) + branch


class DividedBlock(Block):
    """Temporal attention with its own weights, then a block within each frame (TimeSformer, arXiv:2102.05095).

    TimeSformer's temporal attention leaves the class token out, and each block averages its copies. Here each frame
    keeps a class token, which attends over time as patches do, and the copies are averaged once, after the last
    block. So at step 0 the model is the image ViT applied to each frame.
    """

    def __init__(self, config: ViTConfig, drop_path: float = 0.0) -> None:
        super().__init__(config, drop_path)
        self.temporal = TemporalAttention(config)

    def forward(self, tokens: Tensor, *args: Any, **options: Any) -> Tensor:
        """(B, T', N, D) -> (B, T', Q, D)."""
        return super().forward(tokens + self.drop_path(self.temporal(tokens)), *args, **options)


class TemporalAttention(nn.Module):
    """Norm, attention across time at each token position, and a gate."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = SelfAttention(config.width, config.num_heads, config.qkv_bias)
        self.scale = Gate(config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T', N, D) -> (B, T', N, D)."""
        return self.scale(over_time(self.attention, self.norm(tokens)))


def over_time(attention: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
    """Applies attention across time to each token position, (B, T', N, D) -> (B, T', N, D)."""
    positions = frames.transpose(1, 2).contiguous()  # (B, N, T', D)
    return attention(positions).transpose(1, 2)  # (B, T', N, D)


class AddedModule(nn.Module):
    """Module with no counterpart in an image ViT: trained in full, and neutral at first beside pretrained weights.

    One step moves the output of linear layers by the learning rate times the sum of all inputs, an embedding or a
    gate by the rate alone. The rate that suits LoRA's thin matrices is too large for `has_linear_layers`.
    """

    has_linear_layers = False

    def reset_parameters(self, *, generator: torch.Generator | None, from_scratch: bool) -> None:
        """Sets first values, after those of all linear layers inside; neutral ones without `from_scratch`."""
        raise NotImplementedError


class TemporalEmbedding(AddedModule):
    """Adds an embedding of its time to each patch; interpolated linearly for clips of another length."""

    def __init__(self, n_times: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(1, n_times, 1, width))

    def forward(self, patches: Tensor) -> Tensor:
        """(B, T', P, D) -> (B, T', P, D)."""
        is_own = patches.shape[1] == self.embedding.shape[1]
        return patches + (self.embedding if is_own else resize_temporal(self.embedding, patches.shape[1]))

    def reset_parameters(self, *, generator: torch.Generator | None, from_scratch: bool) -> None:
        if from_scratch:
            truncated_normal(self.embedding, generator)
        else:
            nn.init.zeros_(self.embedding)


class TokenIndexedEmbedding(TemporalEmbedding):
    """Temporal embedding indexed by the patch's number in the clip, modulo T', a mistake of the reference."""

    def forward(self, patches: Tensor) -> Tensor:
        """(B, T', P, D) -> (B, T', P, D)."""
        tokens = torch.arange(patches.shape[1] * patches.shape[2], device=patches.device)  # (T'*P,)
        rows = self.embedding[:, tokens % self.embedding.shape[1]]  # (1, T'*P, 1, D)
        return patches + rows.view(1, *patches.shape[1:])


def resize_temporal(embedding: Tensor, n_times: int) -> Tensor:
    """A temporal embedding interpolated linearly, (1, T', 1, D) -> (1, n_times, 1, D)."""
    lines = embedding[:, :, 0].transpose(1, 2)  # (1, D, T')
    lines = F.interpolate(lines, size=n_times, mode="linear", align_corners=False)
    return lines.transpose(1, 2).unsqueeze(2)


class Gate(AddedModule):
    """Learned scale of each channel; 0 at first beside pretrained weights (LayerScale, arXiv:2103.17239)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return tokens * self.gate

    def reset_parameters(self, *, generator: torch.Generator | None, from_scratch: bool) -> None:
        nn.init.constant_(self.gate, float(from_scratch))


class TemporalEncoder(AddedModule):
    """Blocks over one vector per frame, then a mean: ViViT's model 2 (arXiv:2103.15691), no second class token."""

    has_linear_layers = True

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        assert config.temporal_depth is not None
        self.times = TemporalEmbedding(config.n_frames // config.tubelet_size, config.width)
        # Not `blocks`: PEFT matches the ends of names, and blocks.0 of the model must not match this one.
        self.temporal_blocks = nn.ModuleList(Block(config) for _ in range(config.temporal_depth))

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T', D) -> (B, D)."""
        tokens = self.times(frames.unsqueeze(2)).transpose(1, 2)  # (B, 1, T', D)
        for block in self.temporal_blocks:
            tokens = block(tokens)  # (B, 1, T', D)
        return tokens.mean(dim=(1, 2))

    def reset_parameters(self, *, generator: torch.Generator | None, from_scratch: bool) -> None:
        for block in () if from_scratch else self.temporal_blocks:
            for last in ("attention.proj", "mlp.fc2"):
                nn.init.zeros_(block.get_submodule(last).get_parameter("weight"))


class FeatureNorm(AddedModule):
    """Standardises features with a learned shift and scale, which `fit` initialises (ActNorm, arXiv:1807.03039)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.empty(width))
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        return (features - self.shift) * self.scale

    def reset_parameters(self, *, generator: torch.Generator | None, from_scratch: bool) -> None:
        nn.init.zeros_(self.shift)
        nn.init.ones_(self.scale)

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Takes mean and deviation of features, (clips, D); near-constant features are not amplified."""
        deviation = features.std(dim=0, correction=0)  # (D,)
        self.shift.copy_(features.mean(dim=0))
        # Otherwise all clips are the same one: the batch size alone changes float32 features by up to 1e-6.
        if deviation.mean() > 1e-5 * features.abs().mean():
            self.scale.copy_(1 / deviation.clamp_min(0.1 * float(deviation.mean())))


class AttentivePooler(AddedModule):
    """Attentive probe: self-attention blocks, then one cross-attention block with a learned query.

    V-JEPA 2's pooler (arXiv:2506.09985; `VJEPA2AttentivePooler` in transformers): the cross-attention has no output
    layer. VideoPrism's (arXiv:2402.13217) is one cross-attention block, too. Beside weights without a pooler it
    starts as the mean of the normalised tokens.
    """

    has_linear_layers = True
    n_queries = None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width, depth = config.width, config.pool_depth
        assert depth is not None
        # Biases and the width of the MLPs do not depend on those of the encoder.
        config = replace(config, qkv_bias=True, mlp_width=4 * width)
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.layers = nn.ModuleList(Block(config) for _ in range(depth))
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.cross = SelfAttention(width, config.num_heads, has_output=False)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(width, config.hidden_width, config.activation)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, G, N, D) -> (B, G, D)."""
        for layer in self.layers:
            tokens = layer(tokens)  # (B, G, N, D)
        query = self.query.expand(*tokens.shape[:2], -1, -1)  # (B, G, 1, D)
        pooled = query + self.cross(self.norm1(tokens), queries=query)
        return (pooled + self.mlp(self.norm2(pooled))).squeeze(2)

    def reset_parameters(self, *, generator: torch.Generator | None, from_scratch: bool) -> None:
        truncated_normal(self.query, generator)
        if from_scratch:
            return
        nn.init.zeros_(self.query)
        nn.init.eye_(self.cross.v.weight)
        nn.init.zeros_(self.mlp.fc2.weight)
        for layer in self.layers:
            for last in ("attention.proj", "mlp.fc2"):
                nn.init.zeros_(layer.get_submodule(last).get_parameter("weight"))


def truncated_normal(parameter: Tensor, generator: torch.Generator | None) -> None:
    """Draws normal numbers of std 0.02, as ViT's official code, within two deviations by their inverse CDF.

    `nn.init.trunc_normal_` takes longer, and its numbers differ between torch versions.
    """
    within = math.erf(2 / math.sqrt(2))
    parameter.uniform_(-within, within, generator=generator).erfinv_().mul_(0.02 * math.sqrt(2))


def run_block(block: nn.Module, *inputs: Any, **options: Any) -> Tensor:
    """A block's output; its activations are stored for the backward pass."""
    return block(*inputs, **options)


def recompute_block(block: nn.Module, *inputs: Any, **options: Any) -> Tensor:
    """A block's output; the backward pass recomputes its activations (gradient checkpointing, arXiv:1604.06174)."""
    if not torch.is_grad_enabled():
        return run_block(block, *inputs, **options)
    if inputs[0].device.type == "mps":
        options["context_fn"] = _mps_rng_contexts
    return checkpoint(block, *inputs, use_reentrant=False, **options)


def _mps_rng_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the pass and its recomputation; torch itself restores random states of CPUs and CUDA alone."""
    return nullcontext(), _mps_rng_state(torch.mps.get_rng_state())


@contextmanager
def _mps_rng_state(state: Tensor) -> Iterator[None]:
    before = torch.mps.get_rng_state()
    torch.mps.set_rng_state(state)
    try:
        yield
    finally:
        torch.mps.set_rng_state(before)
