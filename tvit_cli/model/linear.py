"""Linear layers of our own: LoRA as one autograd operation, and 8-bit layers for CPUs.

Note [What a LoRA layer keeps]. Written with autograd's own operations, `linear(x) + s * drop(x) A' B'` keeps
the dropped input and its noise, each in the input's size and number format, goes over the output three times
for the sum, and draws its noise one number at a time. Here the forward pass keeps the input (shared by layers
that read the same tokens), the r-wide product, and a byte per number for the mask; of the frozen weight nothing,
which under autocast is cast in either pass instead. The dropped input is made where it is needed, a few rows at a
time, so that it stays in the processor's cache, and never whole. A layer that follows a GELU takes it over and
keeps what comes before it, so that the GELU's output, four times as wide as the tokens, is kept nowhere. Products
with one narrow side are taken in the order that the CPU's matrix kernels are fast at: (r, N) where (N, r) takes
up to eight times as long. Figures of whole steps, and what did not help: docs/negative-results.md.

Letters: N rows (tokens of all clips), I and O the layer's inputs and outputs, r the rank.

See Note [Eight bits].
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tvit_cli.portable.layers import autocast_dtype

CHUNK = 2**18  # numbers that are dropped at a time on a CPU: 1 MB of float32, about a core's own cache
BYTE = 256  # values of a random byte

gelu_backward = torch.ops.aten.gelu_backward.grad_input  # writes where it is told, also over its input


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
) -> Tensor:
    """`linear(x) + scale * drop(x) A' B'`, (..., I) -> (..., O), with lora_a (r, I) and lora_b (O, r).

    `weight` (O, I) is frozen: it gets no gradient. `bias` (O) may learn.
    Before the adapter each number of the input is dropped with the probability `dropout`, drawn from torch's
    global generator, and the others grow by 1 / (1 - dropout). With `gelu`, the name of an approximation as
    `F.gelu` takes it, the layer's input is gelu(x). Under autocast all is computed in its number format.
    """
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        x, lora_a, lora_b = (tensor.to(dtype) for tensor in (x, lora_a, lora_b))
    keep = draw_mask(x.numel(), dropout, x.device).view(-1, x.shape[-1]) if dropout else None
    output: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, lora_a, lora_b, keep, scale / (1 - dropout), gelu
    )
    return output


def draw_mask(count: int, dropout: float, device: torch.device) -> Tensor:
    """`count` numbers of uint8: 0 with the probability `dropout`, else 1, each independent of the others.

    On a CPU, where torch draws Bernoulli numbers one by one, a number gets a byte of random bits and is dropped
    when it is below 256 * dropout; the share that whole bytes cannot express is dropped at gaps of geometric
    length. 0.1 -> bytes below 25 (0.0977), then 1 in 385 of all.
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
    """Which of `count` independent trials succeed: the gaps between successes are geometric."""
    pieces = [torch.empty(0, dtype=torch.int64)]
    last = -1
    while last < count:
        gaps = torch.empty(int(1.1 * count * probability) + 16, dtype=torch.float64).geometric_(probability)
        pieces.append(last + gaps.cumsum(0).long())
        last = int(pieces[-1][-1])
    successes = torch.cat(pieces)
    return successes[successes < count]


class _LoraLinear(torch.autograd.Function):
    """See Note [What a LoRA layer keeps]. `scale` holds the dropout's 1 / (1 - p); `keep` is its mask, (N, I)."""

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
    ) -> Tensor:
        needs_x, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1])  # (N, I)
            rows = rows if gelu is None else F.gelu(rows, approximate=gelu)
            output = F.linear(rows, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))  # (N, O)
            product = rows.new_empty(lora_a.shape[0], rows.shape[0])  # (r, N)
            for part in _chunks(rows):
                torch.mm(lora_a, _dropped(rows[part], keep, part).t(), out=product[:, part])
            product *= scale
            output.addmm_(product.t(), lora_b.t())
        ctx.scale, ctx.gelu, ctx.shape = scale, gelu, x.shape
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
        with torch.autocast(grad.device.type, enabled=False):
            if needs_bias:
                grad_bias = grad.sum(0)
            if needs_b:
                grad_b = (product @ grad).t().contiguous()  # (O, r)
            if needs_x:
                grad_x = grad @ weight.to(grad.dtype)  # (N, I)
            if needs_x or needs_a:
                product = (lora_b.t() @ grad.t()).mul_(ctx.scale)  # (r, N): the gradient at A's output
            if needs_a:
                grad_a = grad.new_zeros(product.shape[0], ctx.shape[-1])  # (r, I)
            before: Any = None if x is None else x.reshape(-1, x.shape[-1])  # (N, I)
            for part in _chunks(grad_x if before is None else before) if needs_x or needs_a else ():
                if needs_a:
                    rows = before[part]
                    rows = rows if ctx.gelu is None else F.gelu(rows, approximate=ctx.gelu)
                    grad_a.addmm_(product[:, part], _dropped(rows, keep, part))
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
        return grad_x, None, grad_bias, grad_a, grad_b, None, None, None


def _chunks(rows: Tensor) -> Iterator[slice]:
    """Rows a few at a time on a CPU, all at once elsewhere."""
    many = max(1, CHUNK // rows.shape[1]) if rows.device.type == "cpu" else max(1, rows.shape[0])
    for start in range(0, rows.shape[0], many):
        yield slice(start, start + many)


def _dropped(rows: Tensor, keep: Tensor | None, part: slice) -> Tensor:
    return rows if keep is None else rows * keep[part]


def lora_layer(parent: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a LoRA layer that computes by `lora_linear` where that is the same function.

    `parent` has PEFT's form: base_layer, and lora_A, lora_B, lora_dropout, scaling by adapter. It computes what
    it alone can: other variants of LoRA, several adapters at once, merged or disabled ones, weights that learn
    beside their adapter, and graphs of torch.compile, which finds out by itself what to keep. `gelu` names the
    GELU that was taken over, if any.
    """

    class LoraLinear(parent):  # type: ignore[misc, valid-type]
        gelu: str | None = None

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            name = None if args or kwargs or torch.compiler.is_compiling() else self._plain_adapter(x)
            if name is None:
                x = x if self.gelu is None else F.gelu(x, approximate=self.gelu)
                output: Tensor = super().forward(x, *args, **kwargs)
                return output
            base, dropout = self.base_layer, self.lora_dropout[name]
            return lora_linear(
                x,
                base.weight,
                base.bias,
                self.lora_A[name].weight,
                self.lora_B[name].weight,
                scale=self.scaling[name],
                dropout=dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
                gelu=self.gelu,
            )

        def _plain_adapter(self, x: Tensor) -> str | None:
            """The one active adapter, or None where `parent` has to compute."""
            active = self.active_adapters
            if (
                self.disable_adapters
                or self.merged
                or len(active) != 1
                or type(self.base_layer) is not nn.Linear
                or self.base_layer.weight.requires_grad
            ):
                return None
            name: str = active[0]
            if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
                return None
            dtype = self.base_layer.weight.dtype
            same = self.lora_A[name].weight.dtype == dtype
            return name if same and (x.dtype == dtype or autocast_dtype(x.device) is not None) else None

    return LoraLinear


LARGEST = 127  # of a signed byte; -128 is left out, so that both signs have the same range

# Note [Eight bits]
# A weight is a whole number times the scale of its row, an activation one times the scale of its token, drawn
# anew in every call, so that nothing has to be calibrated; their products are summed as whole numbers, exactly.
# One scale for a whole tensor (torch.ao's dynamic quantisation, which is deprecated) is hardly faster and wrong
# more often: a few large activations of a ViT leave the others few steps. What is no Linear layer stays as
# it is: attention's own products, norms, the patch embedding; and the classifier, which costs nothing. Measured
# beside bf16 in docs/negative-results.md.
#
# On a processor without instructions for it (VNNI), torch multiplies bytes some ten times slower than floats, so it
# is tried out which of the two is faster.


class Int8Linear(nn.Module):
    """A Linear layer that multiplies in 8 bits: (..., in) float32 -> (..., out) float32, without a gradient."""

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
    """Whether bytes are multiplied faster than floats here; products of either kind are timed, some ms each."""
    rows, weight = torch.ones(256, 512), torch.ones(512, 512)
    byte_rows, byte_weight = rows.to(torch.int8), weight.to(torch.int8)
    in_bytes, in_floats = (
        min(_seconds(product) for _ in range(3))  # the first also makes what is kept for the next
        for product in (lambda: torch._int_mm(byte_rows, byte_weight), lambda: rows @ weight)
    )
    return in_bytes < in_floats


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def to_int8(model: nn.Module, *, but: str) -> int:
    """Put an Int8Linear in place of every Linear layer but the one named; returns how many there were."""
    layers = {
        path: part for path, part in model.named_modules() if isinstance(part, nn.Linear) and path != but
    }
    for path, layer in layers.items():
        model.set_submodule(path, Int8Linear(layer))
    return len(layers)


def _scale(rows: Tensor) -> Tensor:
    """What one step of the whole numbers is worth in each row: (N, D) -> (N, 1)."""
    largest = rows.abs().amax(1, keepdim=True)
    return largest.div_(LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)  # rows of zeros stay zeros
