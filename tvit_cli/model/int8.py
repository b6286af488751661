"""Linear layers in 8 bits, for predicting on a CPU.

See Note [Eight bits].
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

LARGEST = 127  # of a signed byte; -128 is left out, so that both signs have the same range

# Note [Eight bits]
# A weight is a whole number times the scale of its row, an activation one times the scale of its token, drawn
# anew in every call, so that nothing has to be calibrated; their products are summed as whole numbers, exactly.
# One scale for a whole tensor (torch.ao's dynamic quantisation, which is deprecated) is hardly faster and wrong
# more often: a few large activations of a ViT leave the others few steps. What is no Linear layer stays as
# it is: attention's own products, norms, the patch embedding; and the classifier, which costs nothing. Measured
# beside bf16 in tests/bench/RESULTS.md.
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
