"""The attention schemes: how tokens are grouped, which blocks they pass, how groups become one vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .additions import TemporalEmbedding, TokenIndexedEmbedding
from .blocks import Block, DividedBlock, TemporalEncoder
from .config import ViTConfig
from .pooling import MeanOverGroups


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
