"""Floating-point operations of a forward pass, from the config alone."""

from __future__ import annotations

from .config import ViTConfig


def count_flops(config: ViTConfig, n_frames: int | None = None) -> int:
    """Operations of one clip's forward pass, two per multiply-add, matrix products alone."""
    n_times = (n_frames or config.n_frames) // config.tubelet_size
    n_patches = config.patches_per_frame
    first = 1 + config.extra_tokens
    groups, tokens = (
        (1, first + n_times * n_patches) if config.attention == "joint" else (n_times, first + n_patches)
    )
    asking = 1 if config.pool == "class" else tokens  # in the last block
    total = (
        n_times * n_patches * config.tubelet_size * config.num_channels * config.patch_size**2 * config.width
    )
    total += (config.depth - 1) * _block(config, groups, tokens, tokens) + _block(
        config, groups, tokens, asking
    )
    if config.attention == "divided":  # before its attention within frames, a block attends over time
        total += config.depth * _attention(config, tokens, n_times, n_times)
    if config.pool == "attentive":
        total += groups * tokens * config.width * (config.num_heads + 1)
    total += (config.temporal_depth or 0) * _block(config, 1, n_times, n_times)
    return 2 * (total + config.width * config.num_classes)


def _block(config: ViTConfig, groups: int, tokens: int, asking: int) -> int:
    """Multiply-adds of a plain block on `groups` groups of `tokens`, of which `asking` ask."""
    width = config.width
    attention = _attention(config, groups, tokens, asking)
    layers = 3 if config.activation == "swiglu" else 2
    return attention + layers * groups * asking * width * config.hidden_width


def _attention(config: ViTConfig, groups: int, tokens: int, asking: int) -> int:
    layers = 2 * groups * (tokens + asking) * config.width**2
    return layers + 2 * groups * asking * tokens * config.width
