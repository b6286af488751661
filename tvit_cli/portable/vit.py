"""The temporal Vision Transformer: patches, positions, attention schemes, pooling, classifier.

Letters: B clips, G groups of tokens, N tokens of a group, Q those that the last block gives, D width, A heads.

A clip becomes tubelets (patches over a few frames), tubelets become tokens, tokens are told where and when
they are, blocks let them attend to each other in groups (the whole clip, or each frame), and what each group
is read as, by default its class token, becomes one vector that is classified.

Letters: B clips, T frames, C channels, H W pixels, t frames per tubelet, T' = T/t, P patches per frame, p
pixels along a patch, G groups (1 or T'), N tokens of a group, Q tokens that ask, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .config import ViTConfig
from .layers import (
    AddedModule,
    Block,
    DividedBlock,
    FeatureNorm,
    TemporalEmbedding,
    TemporalEncoder,
    TokenIndexedEmbedding,
    autocast_dtype,
    called,
    truncated_normal,
)


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


class AttentivePool(AddedModule):
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


class WholeClip(nn.Module):
    """One group: every patch of the clip meets every other."""

    def forward(self, patches: Tensor) -> Tensor:
        """(B, T', P, D) -> (B, 1, T'*P, D)."""
        return patches.flatten(1, 2).unsqueeze(1)


class FrameByFrame(nn.Module):
    """A group per time."""

    def forward(self, patches: Tensor) -> Tensor:
        """(B, T', P, D) -> (B, T', P, D)."""
        return patches


@dataclass(frozen=True)
class Scheme:
    """The modules that a temporal ViT takes from its scheme; with `looks_over_time`, groups meet at each place."""

    grouping: Callable[[], nn.Module]
    block: type[Block]
    embedding: Callable[[ViTConfig], nn.Module]
    summary: Callable[[ViTConfig], nn.Module]
    looks_over_time: bool = False


def _times_on_patches(config: ViTConfig) -> nn.Module:
    kind = TokenIndexedEmbedding if config.temporal_index == "token" else TemporalEmbedding
    return kind(config.n_frames // config.tubelet_size, config.width)


def _none(config: ViTConfig) -> nn.Module:
    return nn.Identity()


def _mean(config: ViTConfig) -> nn.Module:
    return MeanOverGroups()


SCHEMES: dict[str, Scheme] = {  # by ViTConfig.attention
    # ViViT's model 1, arXiv:2103.15691
    "joint": Scheme(WholeClip, Block, _times_on_patches, _mean),
    "divided": Scheme(FrameByFrame, DividedBlock, _times_on_patches, _mean, looks_over_time=True),
    "factorized": Scheme(FrameByFrame, Block, _none, TemporalEncoder),
    # The baseline that cannot know the order of frames.
    "space": Scheme(FrameByFrame, Block, _none, _mean),
}


__all__ = ["Positions", "TemporalViT", "ViTConfig", "build_model", "resize_grid"]

CLASSIFIER_SCALE = 0.01  # of Xavier's: the first loss is close to log(K), whatever the features are


class TemporalViT(nn.Module):
    """Classifies clips of normalised frames, (B, T, C, H, W) float -> logits (B, K).

    With pretrained weights, before training, frame-wise schemes give the mean over times of the image ViT's
    class token; `joint` gives it for one frame. `initialise=False` leaves all parameters unset, for weights
    that are assigned at once.

    `drop_path` is that of the last block; it rises in a line from 0 in the first, as in DeiT (arXiv:2012.12877).
    `token_drop` is the share of the patches that are left out of each pass in training mode, as in PatchDropout
    (arXiv:2208.07220). `run_block` is how `features` calls a block: `recomputed` in its place is gradient
    checkpointing. All three are of a training, not of the model: the config does not hold them.
    """

    run_block: Callable[..., Tensor]

    def __init__(
        self, config: ViTConfig, *, initialise: bool = True, drop_path: float = 0.0, token_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.config = config
        scheme = SCHEMES[config.attention]
        with _SkipInit():
            self.patch_embed = nn.Conv2d(
                config.tubelet_size * config.num_channels,
                config.width,
                kernel_size=config.patch_size,
                stride=config.patch_size,
            )
            self.temporal = scheme.embedding(config)
            dropping = TokenDrop(token_drop, aligned=scheme.looks_over_time) if token_drop else nn.Identity()
            self.positions = Positions(config, scheme.grouping(), dropping)
            self.pre_norm = (
                nn.LayerNorm(config.width, eps=config.norm_eps) if config.pre_norm else nn.Identity()
            )
            self.blocks = nn.ModuleList(
                scheme.block(config, drop_path * number / max(1, config.depth - 1))
                for number in range(config.depth)
            )
            self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
            self.pool = POOLING[config.pool](config)
            self.summary = scheme.summary(config)
            self.feature_norm = FeatureNorm(config.width) if config.feature_norm else nn.Identity()
            self.classifier = nn.Linear(config.width, config.num_classes)
        self.run_block = called
        if initialise:
            self.reset_parameters()

    def forward(self, clips: Tensor) -> Tensor:
        """Logits, (B, T, C, H, W) -> (B, K)."""
        return self.classify(self.features(clips))

    def classify(self, features: Tensor) -> Tensor:
        """Logits, (B, D) -> (B, K), under autocast in full precision: in bf16 those of likely classes would tie."""
        logits: Tensor
        if autocast_dtype(features.device) is None:
            logits = self.classifier(features)
        else:
            with torch.autocast(features.device.type, enabled=False):
                logits = self.classifier(features.to(self.norm.weight.dtype))
        return logits

    def features(self, clips: Tensor) -> Tensor:
        """What is classified, (B, T, C, H, W) -> (B, D).

        Raises ValueError for a shape that does not fit the config; T may be any multiple of t, H and W any
        multiples of p.
        """
        self._check_shape(clips)
        n_clips, n_frames, n_channels, height, width = clips.shape
        tubelet_size, patch_size = self.config.tubelet_size, self.config.patch_size
        n_times = n_frames // tubelet_size
        tubelets = clips.reshape(-1, tubelet_size * n_channels, height, width)  # (B*T', t*C, H, W)
        patches = self.patch_embed(tubelets)  # (B*T', D, H/p, W/p)
        patches = patches.flatten(2).transpose(1, 2)  # (B*T', P, D)
        patches = patches.reshape(n_clips, n_times, *patches.shape[1:])  # (B, T', P, D)
        grid = (height // patch_size, width // patch_size)
        tokens = self.pre_norm(self.positions(self.temporal(patches), grid))  # (B, G, N, D)
        *blocks, last = self.blocks
        for block in blocks:
            tokens = self.run_block(block, tokens)  # (B, G, N, D)
        # Of the last block some tokens are read, and only they ask.
        tokens = self.run_block(last, tokens, n_queries=self.pool.n_queries)  # (B, G, Q, D)
        groups = self.pool(self.norm(tokens))  # (B, G, D)
        features: Tensor = self.feature_norm(self.summary(groups))  # (B, D)
        return features

    def additions(self) -> dict[str, AddedModule]:
        """The outermost parts, by name, that an image ViT lacks."""
        found = {name: module for name, module in self.named_modules() if isinstance(module, AddedModule)}
        inner = [name for name in found if any(name.startswith(f"{outer}.") for outer in found)]
        return {name: module for name, module in found.items() if name not in inner}

    def sees_tubelets(self) -> bool:
        """Whether a patch spans several frames, of which image weights have looked at one."""
        return self.config.tubelet_size > 1

    def copies(self) -> dict[str, str]:
        """Parameters that start as copies of pretrained ones: temporal attention's of spatial attention's."""
        pairs = (("temporal.norm.", "norm1."), ("temporal.attention.", "attention."))
        names = dict(self.named_parameters())
        return {
            f"blocks.{n}.{copy}{leaf}": f"blocks.{n}.{original}{leaf}"
            for n, block in enumerate(self.blocks)
            for copy, original in pairs
            for leaf, _ in block.get_submodule(original[:-1]).named_parameters()
            if f"blocks.{n}.{copy}{leaf}" in names
        }

    @torch.no_grad()
    def reset_parameters(
        self,
        *,
        generator: torch.Generator | None = None,
        truncated_normal_weights: bool = False,
        from_scratch: bool = True,
    ) -> None:
        """Draws all parameters anew.

        Linear and convolution layers take Xavier's uniform weights and zero biases, as ViT's official code
        does, or with `truncated_normal_weights` a truncated normal of std 0.02. Beside pretrained weights the
        classifier starts small and what an image ViT lacks at zero; from scratch, a small classifier would
        only slow what is below it (docs/negative-results.md).
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                if truncated_normal_weights:
                    truncated_normal(module.weight, generator)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if not (truncated_normal_weights or from_scratch):
            self.classifier.weight.mul_(CLASSIFIER_SCALE)
        for position in self.positions.parameters():
            truncated_normal(position, generator)
        for module in self.modules():
            if isinstance(module, AddedModule):
                module.start(generator=generator, from_scratch=from_scratch)

    def _check_shape(self, clips: Tensor) -> None:
        config = self.config
        if clips.dim() != 5 or clips.shape[2] != config.num_channels:
            raise ValueError(
                f"clips have the shape {tuple(clips.shape)}; it must be (B, T, {config.num_channels}, H, W)"
            )
        for size in clips.shape[3:]:
            if size == 0 or size % config.patch_size:
                raise ValueError(
                    f"frames have {clips.shape[3]} x {clips.shape[4]} pixels; both must be multiples of "
                    f"patch_size {config.patch_size}"
                )
        if clips.shape[1] == 0 or clips.shape[1] % config.tubelet_size:
            raise ValueError(
                f"clips have {clips.shape[1]} frames, no multiple of tubelet_size {config.tubelet_size}"
            )


class Positions(nn.Module):
    """Adds to each patch where it is seen, groups the patches, and puts a class token before each group.

    Some pretrained models have `extra` tokens after the class token: DINOv2's registers, DeiT's distillation
    token. For frames of another size than the model's the positions are interpolated.
    """

    def __init__(self, config: ViTConfig, grouping: nn.Module, token_drop: nn.Module) -> None:
        super().__init__()
        self.grid = config.grid
        self.class_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.class_position = nn.Parameter(torch.empty(1, 1, config.width))
        extra = nn.Parameter(torch.empty(1, config.extra_tokens, config.width))
        self.extra = extra if config.extra_tokens else None
        self.spatial = nn.Parameter(torch.empty(1, config.patches_per_frame, config.width))
        self.grouping = grouping
        self.token_drop = token_drop

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, T', P, D) -> (B, G, N, D); `grid` counts the patches of a frame, down and across."""
        spatial: Tensor = self.spatial
        if grid != (self.grid, self.grid):
            spatial = resize_grid(spatial, grid)  # (1, P, D)
        groups = self.token_drop(self.grouping(patches + spatial))  # (B, G, patches of a group, D)
        first = self.class_token + self.class_position  # (1, 1, D)
        if self.extra is not None:
            first = torch.cat([first, self.extra], dim=1)  # (1, 1 + extra, D)
        return torch.cat([first.expand(*groups.shape[:2], -1, -1), groups], dim=2)


class TokenDrop(nn.Module):
    """Leaves a share of the patches out in training mode: others of each clip, and of each of its groups.

    `aligned` leaves out the same of all groups of a clip, for blocks that look at one place in all of them.
    """

    def __init__(self, share: float, *, aligned: bool) -> None:
        super().__init__()
        self.share, self.aligned = share, aligned

    def forward(self, groups: Tensor) -> Tensor:
        """(B, G, P, D) -> (B, G, patches that stay, D), at least one of each group."""
        if not self.training:
            return groups
        n_clips, n_groups, n_patches, width = groups.shape
        n_kept = max(1, round((1 - self.share) * n_patches))
        order = torch.rand(n_clips, 1 if self.aligned else n_groups, n_patches, device=groups.device)
        kept = order.argsort(dim=2)[:, :, :n_kept].expand(-1, n_groups, -1)  # (B, G, patches that stay)
        return groups.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, width))


def resize_grid(positions: Tensor, grid: tuple[int, int], *, antialias: bool = False) -> Tensor:
    """Positions of a square grid interpolated bicubically, (1, P, D) -> (1, P of the new grid, D).

    With align_corners False, as transformers does it.
    """
    side = round(positions.shape[1] ** 0.5)
    picture = positions.transpose(1, 2).reshape(1, -1, side, side)  # (1, D, side, side)
    picture = F.interpolate(picture, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    return picture.flatten(2).transpose(1, 2)


def build_model(
    config: ViTConfig,
    *,
    seed: int,
    truncated_normal: bool = False,
    from_scratch: bool,
    drop_path: float = 0.0,
    token_drop: float = 0.0,
) -> TemporalViT:
    """A model whose parameters depend on the seed alone; no other random state is read or changed."""
    model = TemporalViT(config, initialise=False, drop_path=drop_path, token_drop=token_drop)
    model.reset_parameters(
        generator=torch.Generator().manual_seed(seed),
        truncated_normal_weights=truncated_normal,
        from_scratch=from_scratch,
    )
    return model


class _SkipInit(TorchFunctionMode):
    """Inside, `torch.nn.init` draws nothing: a layer's constructor would, only to be overwritten."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
