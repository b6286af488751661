"""Loss, optimizer parameter groups, and learning-rate schedule. Letters: B clips, K classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvit_cli.portable.vit import TemporalViT


@dataclass(frozen=True)
class Targets:
    """Labels and weights of the clips of one forward pass.

    A mixed clip has two labels: `labels` with weight `shares`, `others` with weight 1 - `shares`.
    """

    labels: Tensor  # int64 (B,)
    weights: Tensor  # float (B,): 1, or 0 for an unreadable or padding clip
    others: Tensor | None = None  # int64 (B,)
    shares: Tensor | None = None  # float (B,), 0 to 1

    @property
    def main(self) -> Tensor:
        """The label with the larger share of each clip, int64 (B,): the target of the training accuracy."""
        if self.others is None or self.shares is None:
            return self.labels
        return self.labels.where(self.shares >= 0.5, self.others)


def clip_losses(logits: Tensor, targets: Targets, *, class_weights: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy in nats of each clip, times the weight of its class: logits (B, K), weights (K,) -> (B,).

    For a mixed clip, the mean over both labels by their shares: with equal class weights, the cross-entropy against
    the mixed, then smoothed target.
    """

    def weighted_loss(labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
        return losses * class_weights[labels]

    losses = weighted_loss(targets.labels)
    if targets.others is None or targets.shares is None:
        return losses
    return targets.shares * losses + (1 - targets.shares) * weighted_loss(targets.others)


def loss_share(losses: Tensor, targets: Targets, *, step_clips: int) -> Tensor:
    """The contribution of one forward pass to the mean loss over the `step_clips` clips of an update."""
    return (losses * targets.weights).sum() / step_clips


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# Learned tokens and positions are offsets, not weights of a linear map; DeiT does not decay them either.
EMBEDDINGS = frozenset(
    {
        "class_token",
        "class_position",
        "spatial",
        "joint",
        "embedding",
        "gate",
        "queries",
        "query",
        "extra",
        "shift",
        "scale",
    }
)
MAGNITUDES = "lora_magnitude_vector"  # DoRA's magnitudes: decay would pull them to zero
# Pretrained layers before the first block; without the temporal embedding, which starts at zero.
STEM = frozenset({"patch_embed", "positions", "pre_norm"})


def parameter_groups(
    model: TemporalViT,
    *,
    weight_decay: float,
    bias_weight_decay: bool,
    norm_weight_decay: bool,
    layer_decay: float = 1.0,
    temporal_rate: float = 1.0,
    classifier_rate: float = 1.0,
) -> list[dict[str, Any]]:
    """The trainable parameters in groups of equal weight decay and equal `rate_scale` (see `set_rates`).

    Normalisation layers follow `norm_weight_decay`, all other biases `bias_weight_decay`; EMBEDDINGS and DoRA's
    magnitudes never decay. The scale is that of `layer_scale`, for temporal layers `temporal_rate`, for other
    temporal modules 1, for the classifier and its adapter `classifier_rate`.
    """
    added = model.added_modules().items()
    scales = {f"{path}.": temporal_rate if part.has_linear_layers else 1.0 for path, part in added}
    scales["classifier."] = classifier_rate
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for path, module in model.named_modules():
        own = layer_scale(path, depth=len(model.blocks), layer_decay=layer_decay)
        scale = next((rate for prefix, rate in scales.items() if f"{path}.".startswith(prefix)), own)
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, NORMS):
                decays = norm_weight_decay
            elif name == "bias":
                decays = bias_weight_decay
            else:
                decays = name not in EMBEDDINGS and MAGNITUDES not in path.split(".")
            if parameter.requires_grad:
                groups.setdefault((decays, scale), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "rate_scale": scale}
        for (decays, scale), parameters in groups.items()
    ]


def layer_scale(path: str, *, depth: int, layer_decay: float) -> float:
    """Learning-rate factor of a module and its adapters (layer-wise decay, BEiT, arXiv:2106.08254).

    Block i of L, counted from 1, gets layer_decay^(L - i + 1), the layers before the blocks layer_decay^(L + 1),
    all others 1. 2 blocks, decay 0.5 -> patch_embed 0.125 . 0.25 . 0.5 . norm 1
    """
    top, *below = path.split(".")
    if top == "blocks" and below:
        return layer_decay ** (depth - int(below[0]))
    return layer_decay ** (depth + 1) if top in STEM else 1.0


def set_rates(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every parameter group to `rate` times its `rate_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]


def adamw(
    groups: list[dict[str, Any]], *, learning_rate: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.AdamW:
    """AdamW over parameter groups, fused into one kernel (CPU and CUDA have it)."""
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)


def learning_rate_at(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of update `step`, counted from 0: linear warm-up, then half a cosine towards zero.

    The first rate is peak / warmup_steps, not 0: no update is wasted.
    peak 1, warm-up 2 of 4 steps -> 0.5 . 1.0 . 1.0 . 0.5
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
