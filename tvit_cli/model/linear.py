"""Linear layers: LoRA as one autograd function, and 8-bit layers for CPUs.

Note [Memory of a LoRA layer]. Autograd stores the dropped input and its mask, each in the input's size and dtype.
This function stores the input (shared by layers that read the same tokens), the r-wide product, and a byte per
number of the mask. The dropped input is
computed a few rows at a time, which fits the CPU's cache. A layer after a GELU computes the GELU itself, so that
its output, four times as wide as the tokens, is never stored. After a BlockNorm the norm's input, which the norm
stores, is kept in place of its output, which the backward pass computes again. Narrow products are (r, N), as
(N, r) takes a CPU up to eight times as long. Timings, and attempts without effect: docs/negative-results.md.

Letters: N rows (tokens of all clips), I and O the layer's inputs and outputs, r the rank.
"""

from __future__ import annotations

import timeit
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tvit_cli.portable.layers import autocast_dtype

CHUNK = 2**18  # numbers per chunk on a CPU: 1 MB of float32, about a core's own cache
BYTE = 256  # values of a random byte
LEAST_WIDTH = 192  # of a model whose steps bfloat16 can shorten
WORTHWHILE = 2.0  # speed of bfloat16 products, from which a whole step is faster, too
LARGEST = 127  # of a signed byte; without -128 both signs have the same range

gelu_backward = torch.ops.aten.gelu_backward.grad_input  # may write over its input


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    dropout: float = 0.0,
    gelu: str | None = None,
    cast: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`linear(x) + scale * drop(x) A' B'`, (..., I) -> (..., O), with lora_a (r, I) and lora_b (O, r).

    `weight` (O, I) is frozen and gets no gradient; `bias` (O) may be trained. Dropout on the adapter's input
    has the probability `dropout` and draws from torch's global generator. With `gelu`, an approximation of
    `F.gelu`, the layer's input is gelu(x). Under autocast all is computed in its dtype; `cast` are the adapter's
    matrices in it, if they are there already.
    """
    x = x.to(autocast_dtype(x.device) or x.dtype)
    norm_of = getattr(x, "norm_of", None)
    keep = draw_mask(x.numel(), dropout, x.device).view(-1, x.shape[-1]) if dropout else None
    return _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, lora_a, lora_b, keep, scale / (1 - dropout), gelu, norm_of, cast
    )


def draw_mask(count: int, dropout: float, device: torch.device) -> Tensor:
    """`count` independent uint8 numbers: 0 with the probability `dropout`, else 1.

    On a CPU, faster than torch: a random byte below 256 * dropout drops its number; geometric gaps drop the share
    that whole bytes cannot express. 0.1 -> bytes below 25 (0.0977), then 1 in 385 of all.
    """
    if device.type != "cpu":
        return torch.empty(count, dtype=torch.uint8, device=device).bernoulli_(1 - dropout)
    below = int(BYTE * dropout)
    words = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.uint8)[:count].ge_(below)
    rest = (dropout - below / BYTE) / (1 - below / BYTE)
    if rest > 0:
        keep[_successes(count, rest)] = 0
    return keep


def _successes(count: int, probability: float) -> Tensor:
    """Indices of the successes among `count` independent trials, by geometric gaps between them."""
    pieces = [torch.empty(0, dtype=torch.int64)]
    last = -1
    while last < count:
        gaps = torch.empty(int(1.1 * count * probability) + 16, dtype=torch.float64).geometric_(probability)
        pieces.append(last + gaps.cumsum(0).long())
        last = int(pieces[-1][-1])
    successes = torch.cat(pieces)
    return successes[successes < count]


class _LoraLinear(torch.autograd.Function):
    """See Note [Memory of a LoRA layer]. `scale` includes dropout's 1 / (1 - p); `keep` is its mask, (N, I)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        keep: Tensor | None,
        scale: float,
        gelu: str | None,
        norm_of: tuple[Tensor, nn.LayerNorm] | None,
        cast: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        needs_x, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        if cast is None or cast[0].dtype != x.dtype:  # the classifier computes without autocast
            cast = lora_a.to(x.dtype), lora_b.to(x.dtype)
        lora_a, lora_b = cast
        with _without_autocast(x.device):
            rows = x.reshape(-1, x.shape[-1])  # (N, I)
            rows = rows if gelu is None else F.gelu(rows, approximate=gelu)
            output = F.linear(rows, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))  # (N, O)
            product = rows.new_empty(lora_a.shape[0], rows.shape[0])  # (r, N)
            for part in _chunks(rows):
                torch.mm(lora_a, _dropped(rows[part], keep, part).t(), out=product[:, part])
            product *= scale
            output.addmm_(product.t(), lora_b.t())
        ctx.scale, ctx.gelu, ctx.shape, ctx.norm = scale, gelu, x.shape, None
        if norm_of is not None and needs_x:
            x, ctx.norm = norm_of[0].detach(), norm_of[1]
        ctx.save_for_backward(
            x if needs_a or (gelu is not None and needs_x) else None,
            weight if needs_x else None,
            lora_a if needs_x else None,
            lora_b if needs_x or needs_a else None,
            keep if needs_x or needs_a else None,
            product if needs_b else None,
        )
        return output.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
        x, weight, lora_a, lora_b, keep, product = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])  # (N, O)
        grad_x: Any = None
        grad_a: Any = None
        grad_bias = grad_b = None
        with _without_autocast(grad.device):
            if needs_bias:
                grad_bias = grad.sum(0)
            if needs_b:
                grad_b = (product @ grad).t().contiguous()  # (O, r)
            if needs_x:
                grad_x = grad @ weight.to(grad.dtype)  # (N, I)
            if needs_x or needs_a:
                product = (lora_b.t() @ grad.t()).mul_(ctx.scale)  # (r, N): the gradient at A's output
            if needs_a and grad.dtype.itemsize >= 4:
                grad_a = grad.new_zeros(product.shape[0], ctx.shape[-1])  # (r, I)
            before: Any = None if x is None else x.reshape(-1, x.shape[-1])  # (N, I)
            for part in _chunks(grad_x if before is None else before) if needs_x or needs_a else ():
                if needs_a:
                    rows = before[part] if ctx.norm is None else _normed(before[part], ctx.norm)
                    rows = rows if ctx.gelu is None else F.gelu(rows, approximate=ctx.gelu)
                    rows = _dropped(rows, keep, part)
                    if rows.dtype.itemsize >= 4:
                        grad_a.addmm_(product[:, part], rows)
                    else:  # summed in float32: chunk by chunk in bfloat16, the last chunks would be lost
                        own = product[:, part] @ rows
                        grad_a = own if grad_a is None else grad_a.float().add_(own)
                if needs_x:
                    gradient = grad_x[part]
                    if keep is None:
                        gradient.addmm_(product[:, part].t(), lora_a)
                    else:
                        gradient.addcmul_(product[:, part].t() @ lora_a, keep[part])
                    if ctx.gelu is not None:
                        gelu_backward(gradient, before[part], approximate=ctx.gelu, grad_input=gradient)
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, grad_bias, grad_a, grad_b, None, None, None, None, None


def _without_autocast(device: torch.device) -> AbstractContextManager[None]:
    is_on = autocast_dtype(device) is not None
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()


def _chunks(rows: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK // rows.shape[1]) if rows.device.type == "cpu" else max(1, rows.shape[0])
    for start in range(0, rows.shape[0], size):
        yield slice(start, start + size)


def _normed(rows: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(rows, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _dropped(rows: Tensor, keep: Tensor | None, part: slice) -> Tensor:
    return rows if keep is None else rows * keep[part]


def lora_layer(parent: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `parent`, PEFT's LoRA layer, that computes with `lora_linear` where the result is the same.

    `parent` computes other variants of LoRA, several, merged or disabled adapters, trainable base weights, and
    graphs of torch.compile, which chooses itself what to store. `gelu` names the GELU before the layer, if it
    computes it.
    """

    class LoraLinear(parent):  # type: ignore[misc, valid-type]
        gelu: str | None = None
        cast: tuple[Tensor, Tensor] | None = None  # see cast_adapters

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            name = None if args or kwargs or torch.compiler.is_compiling() else self._plain_adapter(x)
            if name is None:
                x = x if self.gelu is None else F.gelu(x, approximate=self.gelu)
                return super().forward(x, *args, **kwargs)
            base, dropout = self.base_layer, self.lora_dropout[name]
            weights = (base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight)
            share = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
            options = {"scale": self.scaling[name], "dropout": share, "gelu": self.gelu, "cast": self.cast}
            return lora_linear(x, *weights, **options)

        def _plain_adapter(self, x: Tensor) -> str | None:
            """The only active adapter, or None where `parent` computes."""
            active, base = self.active_adapters, self.base_layer
            if self.disable_adapters or self.merged or len(active) != 1:
                return None
            if type(base) is not nn.Linear or base.weight.requires_grad:
                return None
            name: str = active[0]
            if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
                return None
            own, dtype = self.lora_A[name].weight.dtype, autocast_dtype(x.device)
            same = base.weight.dtype in (own, dtype) and (x.dtype == own or dtype is not None)
            return name if same else None

    return LoraLinear


def cast_adapters(model: nn.Module, name: str) -> None:
    """Makes each pass of a model under autocast cast all adapters of this name at once, not layer by layer.

    The copies live until the end of the forward pass; a recomputed block (gradient checkpointing) casts its own.
    """
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "cast")]

    def cast(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        dtype = autocast_dtype(inputs[0].device)
        if dtype is None or not layers:
            return
        weights = [part[name].weight.detach() for layer in layers for part in (layer.lora_A, layer.lora_B)]
        copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(copies, weights)
        for layer, a, b in zip(layers, copies[::2], copies[1::2], strict=True):
            layer.cast = a, b

    def forget(*args: Any) -> None:
        for layer in layers:
            layer.cast = None

    model.register_forward_pre_hook(cast)
    model.register_forward_hook(forget, always_call=True)


@torch.no_grad()
def hold_frozen(model: nn.Module, dtype: torch.dtype, *, exclude: Iterable[nn.Module]) -> None:
    """Keeps frozen weights and biases of linear layers and convolutions in autocast's dtype, in place.

    Autocast would cast them in each pass: the results have the same bits, with half of the memory and without the
    casts. Layers in `exclude` stay, as do those whose weights an adapter reads or changes (DoRA, PiSSA, OLoRA).
    """
    without = {id(module) for module in exclude}
    for layer in model.modules():
        if getattr(layer, "lora_variant", None) or getattr(layer, "start", None):
            without.add(id(layer.base_layer))
        if type(layer) in (nn.Linear, nn.Conv2d) and id(layer) not in without:
            for parameter in layer.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


# Note [8-bit products]
# A weight is a whole number times its row's scale, an activation one times its token's, computed in every call
# without calibration. Sums of whole products are exact. A single scale per tensor (torch.ao) is hardly faster and
# less accurate: a few large activations leave few steps for the others. Only Linear layers are quantised, without
# the classifier, whose cost is negligible. Compared with bf16 in docs/negative-results.md. On CPUs without VNNI,
# torch's int8 matmul is about ten times slower than float32, so both are timed first.


class Int8Linear(nn.Module):
    """Linear layer with int8 products, no gradient: float32 (..., in) -> (..., out). See Note [8-bit products]."""

    weight: Tensor  # int8 (in, out)
    scale: Tensor  # float32 (out,)
    bias: Tensor  # float32 (out,)

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        scale = _scale(weight)  # (out, 1)
        bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float()
        self.register_buffer("weight", (weight / scale).round_().to(torch.int8).T)
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (N, in)
        scale = _scale(rows)  # (N, 1)
        sums = torch._int_mm((rows / scale).round_().to(torch.int8), self.weight)  # int32 (N, out)
        out = sums.float().mul_(self.scale)
        return torch.addcmul(self.bias, out, scale, out=out).view(*x.shape[:-1], -1)


def is_fast() -> bool:
    """Whether int8 matmul is faster than float32 on this CPU, by timing products of some ms each."""
    rows, weight = torch.ones(256, 512), torch.ones(512, 512)
    byte_rows, byte_weight = rows.to(torch.int8), weight.to(torch.int8)
    int8_s, float_s = (
        min(timeit.repeat(product, number=1, repeat=3))  # the first also fills caches
        for product in (lambda: torch._int_mm(byte_rows, byte_weight), lambda: rows @ weight)
    )
    return int8_s < float_s


def bf16_speedup(width: int) -> float:
    """Speed of a bfloat16 matmul of an MLP's shape on this CPU, as a multiple of float32's, by a few ms of timing.

    1 for narrow models: their steps are mostly other work, which bfloat16 slows down.
    """
    if width < LEAST_WIDTH:
        return 1.0
    times = []
    for dtype in (torch.float32, torch.bfloat16):
        rows, weight = torch.ones(512, width, dtype=dtype), torch.ones(4 * width, width, dtype=dtype)
        product = partial(F.linear, rows, weight)
        times.append(min(timeit.repeat(product, number=1, repeat=4)))  # the first also fills caches
    return times[0] / times[1]


def to_int8(model: nn.Module, *, exclude: str) -> int:
    """Replaces every Linear layer but the one named by an Int8Linear; returns the number of replaced layers."""
    modules = model.named_modules()
    layers = {path: m for path, m in modules if isinstance(m, nn.Linear) and path != exclude}
    for path, layer in layers.items():
        model.set_submodule(path, Int8Linear(layer))
    return len(layers)


def _scale(rows: Tensor) -> Tensor:
    """Quantisation step of each row, (N, D) -> (N, 1)."""
    largest = rows.abs().amax(1, keepdim=True)
    return largest.div_(LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)  # rows of zeros stay zeros
