"""The temporal Vision Transformer: patches, positions, attention schemes, pooling, classifier.

Each tubelet of a clip (a patch over a few frames) becomes a token. Tokens get temporal and spatial embeddings and
attend to each other in groups: the whole clip, or each frame. Pooling turns each group into one vector, by default
its class token; a summary of the groups is classified. Video ViTs have one table of positions over space and time,
or, as some image ViTs, rotary positions in their blocks.

Letters: B clips, T frames, C channels, H W pixels, t frames per tubelet, T' = T/t, p pixels along a patch,
P patches per frame, G groups (1 or T'), N tokens of a group, Q query tokens, D width, A heads, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .config import ViTConfig
from .layers import (
    AddedModule,
    AttentivePooler,
    Block,
    DividedBlock,
    FeatureNorm,
    TemporalEmbedding,
    TemporalEncoder,
    TokenIndexedEmbedding,
    autocast_dtype,
    resize_temporal,
    rotary_table,
    rotary_table_2d,
    rotary_table_pe,
    run_block,
    truncated_normal,
)

__all__ = [
    "Positions",
    "TemporalViT",
    "ViTConfig",
    "build_model",
    "init_layer",
    "resize_grid",
    "resize_joint",
]


class ClassToken(nn.Module):
    """The class token, first of its group."""

    n_queries = 1  # in the last block, other tokens need no queries

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, G, Q, D) -> (B, G, D)."""
        return tokens[:, :, 0]


class MeanPatch(nn.Module):
    """Mean of the patches, without the class token and extra tokens."""

    n_queries = None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.first = int(config.class_token) + config.extra_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, G, N, D) -> (B, G, D)."""
        return tokens[:, :, self.first :].mean(dim=2)


class AttentivePool(AddedModule):
    """Attention pooling: for each head's channels, a mean of all tokens weighted by a learned query.

    A key layer would fold into the query, and the classifier replaces the value layer. It starts as the plain mean,
    also from scratch. Compare arXiv:1810.00825, section 3.2.
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
        pooled = weights.transpose(2, 3).unsqueeze(3) @ values.transpose(2, 3)  # (B, G, A, 1, D/A)
        return pooled.flatten(2)

    def reset_parameters(self, *, generator: torch.Generator | None, from_scratch: bool) -> None:
        nn.init.zeros_(self.queries)


Pool = ClassToken | MeanPatch | AttentivePool | AttentivePooler
POOLING: dict[str, Callable[[ViTConfig], Pool]] = {  # by ViTConfig.pool
    "class": ClassToken,
    "mean": MeanPatch,
    "attentive": lambda config: (AttentivePool if config.pool_depth is None else AttentivePooler)(config),
    "first": ClassToken,
}


class WholeClip(nn.Module):
    """One group: every patch of the clip attends to every other."""

    def forward(self, patches: Tensor) -> Tensor:
        """(B, T', P, D) -> (B, 1, T'*P, D)."""
        return patches.flatten(1, 2).unsqueeze(1)


class MeanOverGroups(nn.Module):
    """Mean over the groups: over times, or the vector itself where the clip is one group."""

    def forward(self, groups: Tensor) -> Tensor:
        """(B, G, D) -> (B, D)."""
        return groups.mean(dim=1)


@dataclass(frozen=True)
class Scheme:
    """Modules of an attention scheme; a `grouping` of nn.Identity makes each time a group."""

    grouping: type[nn.Module]
    block: type[Block]
    has_embedding: bool = False  # a temporal embedding on the patches
    has_encoder: bool = False  # a TemporalEncoder of the groups, else their mean
    attends_over_time: bool = False


SCHEMES: dict[str, Scheme] = {  # by ViTConfig.attention
    "joint": Scheme(WholeClip, Block, has_embedding=True),  # ViViT's model 1, arXiv:2103.15691
    "divided": Scheme(nn.Identity, DividedBlock, has_embedding=True, attends_over_time=True),
    "factorized": Scheme(nn.Identity, Block, has_encoder=True),
    "space": Scheme(nn.Identity, Block),  # baseline without access to the order of frames
}


class TokenDrop(nn.Module):
    """PatchDropout (arXiv:2208.07220): in training mode, drops a random share of each group's patches.

    `aligned` drops the same patches in all groups of a clip, for blocks that attend over time.
    """

    def __init__(self, share: float, *, aligned: bool) -> None:
        super().__init__()
        self.share, self.aligned = share, aligned

    def forward(self, groups: Tensor) -> Tensor:
        """(B, G, P, D) -> (B, G, kept patches, D), at least one of each group."""
        if not self.training:
            return groups
        n_clips, n_groups, n_patches, width = groups.shape
        n_kept = max(1, round((1 - self.share) * n_patches))
        order = torch.rand(n_clips, 1 if self.aligned else n_groups, n_patches, device=groups.device)
        kept = order.argsort(dim=2)[:, :, :n_kept].expand(-1, n_groups, -1)  # (B, G, kept patches)
        return groups.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, width))


class Positions(nn.Module):
    """Adds the spatial embedding, groups the patches, and prepends class token and extra tokens to each group.

    Extra tokens: DINOv2's registers or DeiT's distillation token. Other frame sizes: the embedding is interpolated.
    """

    def __init__(self, config: ViTConfig, grouping: nn.Module, token_drop: nn.Module) -> None:
        super().__init__()
        self.grid = config.grid
        self.class_token = self._token(config.width) if config.class_token else None
        self.class_position = self._token(config.width) if config.class_token else None
        self.extra = self._token(config.width, config.extra_tokens) if config.extra_tokens else None
        self.add_table(config)
        self.grouping = grouping
        self.token_drop = token_drop

    def add_table(self, config: ViTConfig) -> None:
        """Makes the parameters that `place` reads."""
        self.spatial = self._token(config.width, config.patches_per_frame)

    def place(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Adds positions to patches, (B, T', P, D) -> (B, T', P, D)."""
        is_own = grid == (self.grid, self.grid)
        return patches + (self.spatial if is_own else resize_grid(self.spatial, grid))  # (1, P, D)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """(B, T', P, D) -> (B, G, N, D), and the rotation of rotary positions or None.

        `grid` is the number of patches of a frame, down and across.
        """
        return self.prepend(self.token_drop(self.grouping(self.place(patches, grid)))), None

    def prepend(self, groups: Tensor) -> Tensor:
        """Class token and extra tokens before the patches of each group, (B, G, patches, D) -> (B, G, N, D)."""
        if self.class_token is None or self.class_position is None:
            return groups
        first = self.class_token + self.class_position  # (1, 1, D)
        if self.extra is not None:
            first = torch.cat([first, self.extra], dim=1)  # (1, 1 + extra, D)
        return torch.cat([first.expand(*groups.shape[:2], -1, -1), groups], dim=2)

    @staticmethod
    def _token(width: int, count: int = 1) -> nn.Parameter:
        return nn.Parameter(torch.empty(1, count, width))


class JointPositions(Positions):
    """One table over space and time; other frame sizes: bicubic, other numbers of frames: linear interpolation."""

    def add_table(self, config: ViTConfig) -> None:
        n_times = config.n_frames // config.tubelet_size
        self.joint = nn.Parameter(torch.empty(1, n_times, config.patches_per_frame, config.width))

    def place(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return patches + resize_joint(self.joint, patches.shape[1], grid)


class RotaryPositions(Positions):
    """Positions turn the patches' queries and keys in every block; tokens stay as they are."""

    def add_table(self, config: ViTConfig) -> None:
        self.head_width = config.width // config.num_heads
        self.n_first = int(config.class_token) + config.extra_tokens

    def table(self, n_times: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Cosines and signed sines, (2, T', P, D/A), or (2, 1, P, D/A) if they are the same at all times."""
        table = rotary_table(n_times, grid, self.head_width, device)  # (2, T'*P, D/A)
        return table.reshape(2, n_times, -1, self.head_width)

    def place(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return patches

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """(B, T', P, D) -> (B, G, N, D), and each token's row of the rotary table, (2, B*G, 1, N, D/A)."""
        n_clips, n_times = patches.shape[:2]  # not len(patches): torch.export would fix the number of clips
        table = self.table(n_times, grid, patches.device)  # (2, T' or 1, P, D/A)
        rows = table.movedim(0, 2).flatten(2).expand(n_clips, n_times, -1, -1)  # (B, T', P, 2 D/A)
        # Dropped together, so that tokens keep their positions.
        both = self.token_drop(self.grouping(torch.cat([self.place(patches, grid), rows], dim=3)))
        groups, kept = both.split([patches.shape[3], rows.shape[3]], dim=3)
        cosines, sines = kept.flatten(0, 1).unsqueeze(1).chunk(2, dim=3)  # (B*G, 1, patches, D/A)
        before = (0, 0, self.n_first, 0)  # class token and extra tokens are not turned
        return self.prepend(groups), torch.stack((F.pad(cosines, before, value=1.0), F.pad(sines, before)))


class RotaryPositions2d(RotaryPositions):
    """Rotary positions of an image ViT: those of a row and a column, the same at all times."""

    def table(self, n_times: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        return rotary_table_2d(grid, self.head_width, device).unsqueeze(1)


class GridRotaryPositions(RotaryPositions):
    """Spatial embedding and rotary positions of the Perception Encoder, the same at all times."""

    def add_table(self, config: ViTConfig) -> None:
        super().add_table(config)
        Positions.add_table(self, config)
        assert config.rotary_grid is not None
        self.own_grid = config.rotary_grid

    def place(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return Positions.place(self, patches, grid)

    def table(self, n_times: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        return rotary_table_pe(grid, self.own_grid, self.head_width, device).unsqueeze(1)


POSITIONS = {  # by ViTConfig.positions
    "grid": Positions,
    "joint": JointPositions,
    "rotary": RotaryPositions,
    "rotary_2d": RotaryPositions2d,
    "grid_rotary_2d": GridRotaryPositions,
}


def resize_grid(positions: Tensor, grid: tuple[int, int], *, antialias: bool = False) -> Tensor:
    """Interpolates a square grid bicubically as transformers does, (n, P, D) -> (n, P of the new grid, D)."""
    side = round(positions.shape[1] ** 0.5)
    picture = positions.transpose(1, 2).reshape(len(positions), -1, side, side)  # (n, D, side, side)
    picture = F.interpolate(picture, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    return picture.flatten(2).transpose(1, 2)


def resize_joint(table: Tensor, n_times: int, grid: tuple[int, int]) -> Tensor:
    """A table over space and time, bicubic in space, linear in time: (1, T', P, D) -> (1, n_times, P new, D)."""
    side = round(table.shape[2] ** 0.5)
    if grid != (side, side):
        table = resize_grid(table[0], grid).unsqueeze(0)
    if n_times != table.shape[1]:
        table = resize_temporal(table.flatten(2).unsqueeze(2), n_times).view(1, n_times, *table.shape[2:])
    return table


class TemporalViT(nn.Module):
    """Classifies clips of normalised frames, (B, T, C, H, W) float -> logits (B, K).

    With pretrained weights, before training, frame-wise schemes give the mean over times of the image ViT's class
    token; `joint` gives it for one frame. `initialise=False` leaves all parameters uninitialised. `drop_path` is of
    the last block; it rises linearly from 0 in the first, as in DeiT (arXiv:2012.12877). `token_drop` is the share
    of patches dropped in training. `run_block` calls a block: `recompute_block` is gradient checkpointing. Without
    `encoder_grad` no gradient flows into the layers before the pool.
    """

    run_block: Callable[..., Tensor]

    def __init__(
        self, config: ViTConfig, *, initialise: bool = True, drop_path: float = 0.0, token_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.config = config
        self.run_block = run_block
        self.encoder_grad = True
        self.pools_in_last = config.norm == "pooled" and config.pool == "mean"  # see Block
        scheme, width, patch_size = SCHEMES[config.attention], config.width, config.patch_size
        embedding = TokenIndexedEmbedding if config.temporal_index == "token" else TemporalEmbedding
        with _SkipInit():
            n_channels = config.tubelet_size * config.num_channels
            self.patch_embed = nn.Conv2d(n_channels, width, kernel_size=patch_size, stride=patch_size)
            n_times = config.n_frames // config.tubelet_size
            has_embedding = scheme.has_embedding and not config.is_video
            self.temporal = embedding(n_times, width) if has_embedding else nn.Identity()
            drop = TokenDrop(token_drop, aligned=scheme.attends_over_time) if token_drop else nn.Identity()
            self.positions = POSITIONS[config.positions](config, scheme.grouping(), drop)
            self.pre_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.pre_norm else nn.Identity()
            last = max(1, config.depth - 1)
            self.blocks = nn.ModuleList(
                scheme.block(config, drop_path * n / last) for n in range(config.depth)
            )
            self.norm = nn.LayerNorm(width, eps=config.last_norm_eps or config.norm_eps)
            self.pool = POOLING[config.pool](config)
            self.summary = TemporalEncoder(config) if scheme.has_encoder else MeanOverGroups()
            self.feature_norm = FeatureNorm(width) if config.feature_norm else nn.Identity()
            self.classifier = nn.Linear(width, config.num_classes)
        if initialise:
            self.reset_parameters()

    def forward(self, clips: Tensor) -> Tensor:
        """Logits, (B, T, C, H, W) -> (B, K)."""
        return self.classify(self.features(clips))

    def features(self, clips: Tensor) -> Tensor:
        """Features before the classifier, (B, T, C, H, W) -> (B, D).

        Raises ValueError for a shape that does not fit the config; T may be any multiple of t, H and W any
        multiples of p.
        """
        self._check_shape(clips)
        with nullcontext() if self.encoder_grad else torch.no_grad():
            tokens = self.encode(clips)
        groups = tokens if self.pools_in_last else self.pool(tokens)  # (B, G, D)
        groups = self.norm(groups) if self.config.norm == "pooled" else groups
        return self.feature_norm(self.summary(groups))  # (B, D)

    def encode(self, clips: Tensor) -> Tensor:
        """Tokens that pooling reads, (B, T, C, H, W) -> (B, G, Q, D), or their mean, (B, G, D)."""
        n_clips, n_frames, n_channels, height, width = clips.shape
        tubelet_size, patch_size = self.config.tubelet_size, self.config.patch_size
        tubelets = clips.reshape(-1, tubelet_size * n_channels, height, width)  # (B*T', t*C, H, W)
        patches = self.patch_embed(tubelets).flatten(2).transpose(1, 2)  # (B*T', P, D)
        patches = patches.reshape(n_clips, n_frames // tubelet_size, *patches.shape[1:])  # (B, T', P, D)
        grid = (height // patch_size, width // patch_size)
        tokens, rotation = self.positions(self.temporal(patches), grid)
        tokens = self.pre_norm(tokens)  # (B, G, N, D)
        options: dict[str, Any] = {} if rotation is None else {"rotation": rotation}
        *blocks, last = self.blocks
        for block in blocks:
            tokens = self.run_block(block, tokens, **options)  # (B, G, N, D)
        # The last block computes only the tokens that pooling reads, or their mean alone.
        options |= {"pool": self.pool} if self.pools_in_last else {"n_queries": self.pool.n_queries}
        tokens = self.run_block(last, tokens, **options)  # (B, G, Q, D) or (B, G, D)
        return tokens if self.config.norm == "pooled" else self.norm(tokens)

    def classify(self, features: Tensor) -> Tensor:
        """Logits, (B, D) -> (B, K), without autocast: in bf16 the logits of likely classes would tie."""
        if autocast_dtype(features.device) is None:
            return self.classifier(features)
        with torch.autocast(features.device.type, enabled=False):
            return self.classifier(features.to(self.norm.weight.dtype))

    def added_modules(self) -> dict[str, AddedModule]:
        """The outermost modules, by name, with no counterpart in an image ViT."""
        found = {name: module for name, module in self.named_modules() if isinstance(module, AddedModule)}
        prefixes = tuple(f"{name}." for name in found)
        return {name: module for name, module in found.items() if not name.startswith(prefixes)}

    def copied_parameters(self) -> dict[str, str]:
        """Parameters that start as copies of pretrained ones: temporal attention's of spatial attention's."""
        names = (name for name, _ in self.blocks.named_parameters(prefix="blocks"))
        parts = ((".temporal.norm.", ".norm1."), (".temporal.attention.", ".attention."))
        return {n: n.replace(copy, original) for n in names for copy, original in parts if copy in n}

    @torch.no_grad()
    def reset_parameters(
        self, *, generator: torch.Generator | None = None, truncated: bool = False, from_scratch: bool = True
    ) -> None:
        """Draws all parameters anew.

        Linear and convolution layers get Xavier's uniform weights and zero biases, as in ViT's official code, or
        with `truncated` a truncated normal of std 0.02. Without `from_scratch` added modules start
        neutral, and the classifier starts small, which from scratch slows down training (docs/negative-results.md).
        """
        for module in self.modules():
            init_layer(module, generator, truncated=truncated)
        if not (truncated or from_scratch):
            self.classifier.weight.mul_(0.01)  # the first loss is close to log(K), whatever the features are
        for position in self.positions.parameters():
            truncated_normal(position, generator)
        for module in self.modules():
            if isinstance(module, AddedModule):
                module.reset_parameters(generator=generator, from_scratch=from_scratch)

    def _check_shape(self, clips: Tensor) -> None:
        config, shape = self.config, tuple(clips.shape)
        if len(shape) != 5 or shape[2] != config.num_channels:
            raise ValueError(f"clips have the shape {shape}; it must be (B, T, {config.num_channels}, H, W)")
        n_frames, _, height, width = shape[1:]
        if not height or not width or height % config.patch_size or width % config.patch_size:
            rule = f"both must be multiples of patch_size {config.patch_size}"
            raise ValueError(f"frames have {height} x {width} pixels; {rule}")
        if not n_frames or n_frames % config.tubelet_size:
            raise ValueError(
                f"clips have {n_frames} frames, no multiple of tubelet_size {config.tubelet_size}"
            )


def build_model(
    config: ViTConfig, *, seed: int, truncated_normal: bool = False, from_scratch: bool, **dropping: float
) -> TemporalViT:
    """A model whose parameters depend on the seed alone, not on the global random state, which stays as it is.

    `dropping` are `drop_path` and `token_drop` of TemporalViT.
    """
    model, generator = TemporalViT(config, initialise=False, **dropping), torch.Generator().manual_seed(seed)
    model.reset_parameters(generator=generator, truncated=truncated_normal, from_scratch=from_scratch)
    return model


def init_layer(
    module: nn.Module, generator: torch.Generator | None = None, *, truncated: bool = False
) -> None:
    """First values of a LayerNorm, or of a linear or convolution layer; other modules stay as they are."""
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear | nn.Conv2d):
        if truncated:
            truncated_normal(module.weight, generator)
        else:
            nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class _SkipInit(TorchFunctionMode):
    """Disables `torch.nn.init` in constructors, whose draws would be overwritten."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
