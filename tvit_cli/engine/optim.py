"""The optimizer's parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# Learned tokens and positions are offsets, not weights of a map; decay would pull them to nothing (DeiT).
EMBEDDINGS = frozenset({"class_token", "class_position", "spatial", "embedding"})


def parameter_groups(
    model: nn.Module, *, weight_decay: float, bias_weight_decay: bool, norm_weight_decay: bool
) -> list[dict[str, object]]:
    """The trainable parameters in two groups: with weight decay, and without.

    Normalisation layers follow `norm_weight_decay`, all other biases `bias_weight_decay`; learned tokens and
    positions are never decayed.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if isinstance(module, NORMS):
                decays = norm_weight_decay
            elif name == "bias":
                decays = bias_weight_decay
            else:
                decays = name not in EMBEDDINGS
            (decayed if decays else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(
    groups: list[dict[str, object]], *, learning_rate: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.AdamW:
    """AdamW over parameter groups, fused into one kernel (CPU and CUDA have it)."""
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)


def learning_rate_at(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up, then half a cosine towards zero.

    The rate of update `step`, counted from 0; the first is peak / warmup_steps, not 0, so that no update is
    spent on nothing. peak 1, warm-up 2 of 4 steps -> 0.5 . 1.0 . 1.0 . 0.5
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
