"""The temporal Vision Transformer, read top to bottom.

A clip becomes tubelets (patches over a few frames), tubelets become tokens, tokens are told where and when
they are, blocks let them attend to each other, and the class token, first in the sequence, is classified.

Letters: B clips, T frames, C channels, H W pixels, t frames per tubelet, T' = T/t, P patches per frame, p
pixels along a patch, N = 1 + T'*P tokens, Q tokens that ask, D width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .attention import SCHEMES

INIT_STD = 0.02  # of the truncated normal; ViT's official code (arXiv:2010.11929) draws positions with it
CLASSIFIER_SCALE = 0.01  # of Xavier's: the first loss is close to log(K), whatever the features are


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that CLIP is trained with (arXiv:1606.08415, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a temporal ViT. Raises ValueError where the numbers do not fit each other.

    `mlp_width` None becomes four times the width. `n_frames` is the length that the temporal embedding is
    made for; clips of other lengths are taken too.
    """

    num_classes: int
    frame_size: int = 224
    patch_size: int = 16
    n_frames: int = 8
    tubelet_size: int = 1
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int | None = None
    norm_eps: float = 1e-6
    activation: str = "gelu"
    qkv_bias: bool = True
    attention: str = "joint"
    num_channels: int = 3

    def __post_init__(self) -> None:
        if self.mlp_width is None:
            object.__setattr__(self, "mlp_width", 4 * self.width)
        for field in fields(self):
            _check_value(field.name, getattr(self, field.name), str(field.type))
        for name, divisor in (
            ("frame_size", "patch_size"),
            ("n_frames", "tubelet_size"),
            ("width", "num_heads"),
        ):
            _check_multiple(name, getattr(self, name), divisor, getattr(self, divisor))
        _check_known("activation", self.activation, ACTIVATIONS)
        _check_known("attention", self.attention, SCHEMES)

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.frame_size // self.patch_size

    @property
    def patches_per_frame(self) -> int:
        """P."""
        return self.grid**2

    @property
    def hidden_width(self) -> int:
        """Width inside the MLP of a block, `mlp_width` once resolved."""
        assert self.mlp_width is not None
        return self.mlp_width

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `card.json` holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViTConfig:
        """The inverse of `to_dict`. Raises ValueError for unknown or missing keys and for bad values."""
        known = [field.name for field in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"unknown keys {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
        if "num_classes" not in values:
            raise ValueError("the key 'num_classes' is missing")
        return cls(**values)


class TemporalViT(nn.Module):
    """Classifies clips of normalised frames, (B, T, C, H, W) float -> logits (B, K).

    With pretrained weights and a temporal embedding of zeros, the class token of a one-frame clip is the
    image ViT's. `initialise=False` leaves all parameters unset, for weights that are assigned at once.
    `drop_path` is that of the last block; it rises in a line from 0 in the first, as in DeiT
    (arXiv:2012.12877). It is of a training, not of the model: the config does not hold it.
    """

    def __init__(self, config: ViTConfig, *, initialise: bool = True, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = config
        with _SkipInit():
            self.patch_embed = nn.Conv2d(
                config.tubelet_size * config.num_channels,
                config.width,
                kernel_size=config.patch_size,
                stride=config.patch_size,
            )
            self.temporal = TemporalEmbedding(config.n_frames // config.tubelet_size, config.width)
            self.positions = Positions(config.patches_per_frame, config.width)
            self.blocks = nn.ModuleList(
                Block(config, drop_path * number / max(1, config.depth - 1)) for number in range(config.depth)
            )
            self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
            self.classifier = nn.Linear(config.width, config.num_classes)
        if initialise:
            self.reset_parameters()

    def forward(self, clips: Tensor) -> Tensor:
        """Logits, (B, T, C, H, W) -> (B, K)."""
        logits: Tensor = self.classifier(self.features(clips))
        return logits

    def features(self, clips: Tensor) -> Tensor:
        """The normalised class token, (B, T, C, H, W) -> (B, D).

        Raises ValueError for a shape that does not fit the config; T may be any multiple of t.
        """
        self._check_shape(clips)
        n_clips, n_frames, n_channels, height, width = clips.shape
        tubelet_size = self.config.tubelet_size
        n_times = n_frames // tubelet_size
        tubelets = clips.reshape(-1, tubelet_size * n_channels, height, width)  # (B*T', t*C, H, W)
        patches = self.patch_embed(tubelets)  # (B*T', D, H/p, W/p)
        patches = patches.flatten(2).transpose(1, 2)  # (B*T', P, D)
        patches = patches.reshape(n_clips, n_times, *patches.shape[1:])  # (B, T', P, D)
        tokens = self.positions(self.temporal(patches))  # (B, N, D)
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens)  # (B, N, D)
        tokens = last(tokens, n_queries=1)  # (B, 1, D): only the class token is read, so only it asks
        class_token: Tensor = self.norm(tokens[:, 0])  # (B, D)
        return class_token

    @torch.no_grad()
    def reset_parameters(
        self,
        *,
        generator: torch.Generator | None = None,
        truncated_normal: bool = False,
        from_scratch: bool = True,
    ) -> None:
        """Draws all parameters anew.

        Linear and convolution layers take Xavier's uniform weights and zero biases, as ViT's official code
        does, or with `truncated_normal` a truncated normal of std 0.02. Beside pretrained weights the
        classifier starts small and the temporal embedding at zero; from scratch, a small classifier would
        only slow what is below it (tests/bench/RESULTS.md).
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                if truncated_normal:
                    _truncated_normal(module.weight, generator)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if not (truncated_normal or from_scratch):
            self.classifier.weight.mul_(CLASSIFIER_SCALE)
        for position in self.positions.parameters():
            _truncated_normal(position, generator)
        if from_scratch:
            _truncated_normal(self.temporal.embedding, generator)
        else:
            nn.init.zeros_(self.temporal.embedding)

    def _check_shape(self, clips: Tensor) -> None:
        config = self.config
        frame = (config.num_channels, config.frame_size, config.frame_size)
        if clips.dim() != 5 or clips.shape[2:] != frame:
            expected = f"(B, T, {', '.join(map(str, frame))})"
            raise ValueError(f"clips have the shape {tuple(clips.shape)}; it must be {expected}")
        if clips.shape[1] == 0 or clips.shape[1] % config.tubelet_size:
            raise ValueError(
                f"clips have {clips.shape[1]} frames, no multiple of tubelet_size {config.tubelet_size}"
            )


class TemporalEmbedding(nn.Module):
    """Adds to each patch when it is seen; interpolated linearly for clips of another length."""

    def __init__(self, n_times: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(1, n_times, 1, width))

    def forward(self, patches: Tensor) -> Tensor:
        """(B, T', P, D) -> (B, T', P, D)."""
        embedding: Tensor = self.embedding
        n_times = patches.shape[1]
        if n_times != embedding.shape[1]:
            lines = embedding[:, :, 0].transpose(1, 2)  # (1, D, T' of the parameter)
            lines = F.interpolate(lines, size=n_times, mode="linear", align_corners=False)
            embedding = lines.transpose(1, 2).unsqueeze(2)  # (1, T', 1, D)
        return patches + embedding


class Positions(nn.Module):
    """Adds to each patch where it is seen, and puts the class token before them all."""

    def __init__(self, patches_per_frame: int, width: int) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.class_position = nn.Parameter(torch.empty(1, 1, width))
        self.spatial = nn.Parameter(torch.empty(1, patches_per_frame, width))

    def forward(self, patches: Tensor) -> Tensor:
        """(B, T', P, D) -> (B, 1 + T'*P, D)."""
        patches = (patches + self.spatial).flatten(1, 2)  # (B, T'*P, D)
        class_token = (self.class_token + self.class_position).expand(patches.shape[0], -1, -1)  # (B, 1, D)
        return torch.cat([class_token, patches], dim=1)


class Block(nn.Module):
    """One pre-norm transformer block: attention, then an MLP, each beside a residual path."""

    def __init__(self, config: ViTConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = SCHEMES[config.attention](config.width, config.num_heads, config.qkv_bias)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, config.hidden_width, config.activation)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, tokens: Tensor, n_queries: int | None = None) -> Tensor:
        """(B, N, D) -> (B, Q, D): the first `n_queries` tokens (all when None), having attended to all N."""
        tokens = tokens[:, :n_queries] + self.drop_path(
            self.attention(self.norm1(tokens), n_queries)
        )  # (B, Q, D)
        output: Tensor = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return output


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
        self.fc1 = nn.Linear(width, hidden_width)
        self.act = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        hidden = self.act(self.fc1(tokens))  # (B, N, hidden width)
        output: Tensor = self.fc2(hidden)
        return output


def build_model(
    config: ViTConfig,
    *,
    seed: int,
    truncated_normal: bool = False,
    from_scratch: bool,
    drop_path: float = 0.0,
) -> TemporalViT:
    """A model whose parameters depend on the seed alone; no other random state is read or changed."""
    model = TemporalViT(config, initialise=False, drop_path=drop_path)
    model.reset_parameters(
        generator=torch.Generator().manual_seed(seed),
        truncated_normal=truncated_normal,
        from_scratch=from_scratch,
    )
    return model


def count_flops(config: ViTConfig, n_frames: int | None = None) -> int:
    """Floating-point operations of one clip's forward pass, two per multiply-add, matrix products alone."""
    n_times = (n_frames or config.n_frames) // config.tubelet_size
    n_tokens = 1 + n_times * config.patches_per_frame
    width, hidden = config.width, config.hidden_width
    patch_values = config.tubelet_size * config.num_channels * config.patch_size**2

    def block(n_queries: int) -> int:
        keys_and_values = 2 * n_tokens * width * width
        queries_and_output = 2 * n_queries * width * width
        attention = 2 * n_queries * n_tokens * width
        mlp = 2 * n_queries * width * hidden
        return keys_and_values + queries_and_output + attention + mlp

    patch_embed = n_times * config.patches_per_frame * patch_values * width
    blocks = (config.depth - 1) * block(n_tokens) + block(1)
    return 2 * (patch_embed + blocks + width * config.num_classes)


class _SkipInit(TorchFunctionMode):
    """Inside, `torch.nn.init` draws nothing: a layer's constructor would, only to be overwritten."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _truncated_normal(parameter: Tensor, generator: torch.Generator | None) -> None:
    """Normal numbers of std 0.02, none beyond two deviations, from the inverse of their distribution.

    `nn.init.trunc_normal_` draws other numbers from the same seed in other torch versions, and takes longer.
    """
    within = math.erf(2 / math.sqrt(2))
    parameter.uniform_(-within, within, generator=generator).erfinv_().mul_(INIT_STD * math.sqrt(2))


def _check_value(name: str, value: object, annotation: str) -> None:
    if annotation.startswith("int") and (type(value) is not int or value < 1):
        raise ValueError(f"{name} is {value!r}; it must be a whole number, 1 or more")
    if annotation == "float" and not (isinstance(value, int | float) and value > 0):
        raise ValueError(f"{name} is {value!r}; it must be a number above 0")
    if annotation == "bool" and not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false")
    if annotation == "str" and not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; it must be a name")


def _check_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        below = value // divisor * divisor
        nearest = f"{below} or {below + divisor}" if below else f"{divisor}"
        raise ValueError(f"{name} {value} is not a multiple of {divisor_name} {divisor}; use {nearest}")


def _check_known(name: str, value: str, known: Mapping[str, object]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is not known; use one of {', '.join(known)}")
