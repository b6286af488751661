"""Maps of relevance that explanations were measured against, and that --explain does not offer (explain.py).

Those of attention are for the scheme `joint` and the class token: one group of tokens, the class token first, then the tubelets' patches.
A map is of tubelets; each of their frames has it. Letters: A heads, N tokens, T frames, P patches along a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tvit_cli.engine.predict.explain import by_patch
from tvit_cli.portable.layers import SelfAttention


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Tensor]]:
    """Every layer's attention, (1, A, Q, N) after softmax, of what the model is given inside."""
    seen: list[Tensor] = []

    def attend(self: SelfAttention, tokens: Tensor, n_queries: int | None = None) -> Tensor:
        asking = tokens[:, :, :n_queries].contiguous()
        q, k, v = (
            self._split_heads(layer(x)) for layer, x in ((self.q, asking), (self.k, tokens), (self.v, tokens))
        )
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        seen.append(attention)
        output: Tensor = self.proj((attention @ v).transpose(1, 2).reshape(asking.shape))
        return output

    layers = [module for module in model.modules() if isinstance(module, SelfAttention)]
    for layer in layers:
        layer.forward = attend.__get__(layer)  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def gradient_weighted(model: nn.Module, clip: Tensor, blank: Tensor, label: int) -> Tensor:
    """What speaks for the label in attention times its gradient, rolled through the layers, (T, P, P).

    Source: arXiv:2103.15679, equations 5 and 6.
    """
    with recorded(model) as layers:
        logit = model(clip[None])[0, label]
        gradients = torch.autograd.grad(logit, layers)
    rolled = torch.eye(layers[0].shape[-1])
    for attention, gradient in zip(layers, gradients, strict=True):
        weights = (attention * gradient).clamp(min=0).mean(1)[0].detach()  # (Q, N)
        rolled = rolled[: len(weights)] + weights @ rolled
    return _by_frame(rolled[0, 1:], model, clip)


@torch.no_grad()
def rollout(model: nn.Module, clip: Tensor, blank: Tensor, label: int) -> Tensor:
    """Attention, half of it the residual path, rolled through the layers, (T, P, P). arXiv:2005.00928."""
    with recorded(model) as layers:
        model(clip[None])
    rolled = torch.eye(layers[0].shape[-1])
    for attention in layers:
        weights = attention.mean(1)[0]  # (Q, N)
        rolled = (rolled[: len(weights)] + weights @ rolled) / 2
    return _by_frame(rolled[0, 1:], model, clip)


def _by_frame(tokens: Tensor, model: nn.Module, clip: Tensor) -> Tensor:
    side = clip.shape[-1] // model.config.patch_size
    return tokens.reshape(-1, side, side).repeat_interleave(model.config.tubelet_size, 0)


def in_groups(orders: int, groups: int) -> Callable[[nn.Module, Tensor, Tensor, int], Tensor]:
    """Gradients integrated along ways that uncover a random group of patches after the other, (T, P, P).

    What is seen on the way is what a deletion test shows. One step for each group: they hardly add up.
    """

    def relevance(model: nn.Module, clip: Tensor, blank: Tensor, label: int) -> Tensor:
        size = model.config.patch_size
        side = clip.shape[-1] // size
        count = len(clip) * side * side
        generator = torch.Generator().manual_seed(0)
        total = torch.zeros(count)
        for _ in range(orders):
            place = torch.empty(count, dtype=torch.long)
            for group, patches in enumerate(torch.randperm(count, generator=generator).chunk(groups)):
                place[patches] = group
            now = torch.arange(groups)[:, None]
            shown = (place < now) + 0.5 * (place == now)  # the middle of each group's way: (groups, patches)
            shown = shown.view(groups, len(clip), side, side)
            mask = shown.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, None]
            clips = torch.lerp(blank, clip, mask).requires_grad_(True)
            log_scores = model(clips).log_softmax(1)[:, label]
            (gradient,) = torch.autograd.grad(log_scores.sum(), clips)
            by_group = torch.stack([by_patch(one * (clip - blank), size).flatten() for one in gradient])
            total += by_group.gather(0, place[None])[0] / orders
        return total.view(len(clip), side, side)

    return relevance


def masked_gradients(samples: int) -> Callable[[nn.Module, Tensor, Tensor, int], Tensor]:
    """Mean gradients where random patches are blank, from few to most, times what they change, (T, P, P)."""

    def relevance(model: nn.Module, clip: Tensor, blank: Tensor, label: int) -> Tensor:
        size = model.config.patch_size
        side = clip.shape[-1] // size
        shown = (torch.arange(samples) + 0.5) / samples
        draws = torch.rand(samples, len(clip), side, side, generator=torch.Generator().manual_seed(0))
        mask = (draws < shown.view(-1, 1, 1, 1)).repeat_interleave(size, 2).repeat_interleave(size, 3)
        clips = torch.where(mask[:, :, None], clip, blank).requires_grad_(True)
        log_scores = model(clips).log_softmax(1)[:, label]
        (gradient,) = torch.autograd.grad(log_scores.sum(), clips)
        return by_patch(gradient.mean(0) * (clip - blank), size)

    return relevance
