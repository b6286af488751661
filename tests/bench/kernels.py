"""Attention and patch embedding: torch's choice of kernels beside the alternatives, in turn.

    python tests/bench/kernels.py [--device cpu] [--precision no] [--rounds 5] [--threads 2]

Attention of ViT-B (12 heads of 64) over the tokens of 8 and 18 frames of 224 pixels, forward and backward, by each of
torch's backends that takes it; the patch embedding of 8 frames, forward, as the convolution that it is and as a matrix
product of cut-out patches. Times are of the clock, and ratios to what tvit runs: above 1 is slower.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from step import in_turn
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tvit_cli import __version__

WIDTH, HEADS, PATCH, SIZE = 768, 12, 16, 224
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(options: argparse.Namespace, frames: int) -> dict[str, Callable[[], object]]:
    """Forward and backward by torch's own choice, and by each backend that takes these tensors."""
    tokens = 1 + frames * (SIZE // PATCH) ** 2
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    shape = (1, HEADS, tokens, WIDTH // HEADS)
    inputs = [torch.randn(shape, device=options.device, dtype=dtype, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(shape, device=options.device, dtype=dtype)

    def chosen() -> object:
        return torch.autograd.grad(F.scaled_dot_product_attention(*inputs), inputs, gradient)

    def by(backend: SDPBackend) -> object:
        with sdpa_kernel([backend]):
            return chosen()

    works: dict[str, Callable[[], object]] = {"torch's choice": chosen}
    for name, backend in BACKENDS.items():
        try:
            by(backend)
        except RuntimeError:  # no such kernel for this device or number format
            continue
        works[name] = lambda backend=backend: by(backend)
    return works


def patch_embedding(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """A convolution whose stride is its kernel, and the product that it equals."""
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    frames = torch.randn(8, 3, SIZE, SIZE, device=options.device, dtype=dtype)
    weight = torch.randn(WIDTH, 3, PATCH, PATCH, device=options.device, dtype=dtype) / 28
    bias = torch.zeros(WIDTH, device=options.device, dtype=dtype)

    def convolution() -> Tensor:
        return F.conv2d(frames, weight, bias, stride=PATCH).flatten(2).transpose(1, 2).contiguous()

    def product() -> Tensor:
        side = SIZE // PATCH
        patches = (
            frames.view(-1, 3, side, PATCH, side, PATCH)
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(-1, side**2, 3 * PATCH**2)
        )
        return F.linear(patches, weight.flatten(1), bias)

    torch.testing.assert_close(convolution(), product(), atol=0.05, rtol=0.05)
    return {"convolution": no_grad(convolution), "product of patches": no_grad(product)}


def no_grad(work: Callable[[], object]) -> Callable[[], object]:
    def wrapped() -> object:
        with torch.no_grad():
            return work()

    return wrapped


def finished(options: argparse.Namespace, work: Callable[[], object]) -> Callable[[], None]:
    """The same, over when the device has done it."""

    def wrapped() -> None:
        work()
        if options.device != "cpu":
            torch.accelerator.synchronize()

    return wrapped


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("bf16", "no"), default="no")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # torch says of each backend why it does not take the tensors
    results = {}
    for what, works in (
        ("attention, 8 frames", attention(options, 8)),
        ("attention, 18 frames", attention(options, 18)),
        ("patch embedding, 8 frames", patch_embedding(options)),
    ):
        times = in_turn({name: finished(options, work) for name, work in works.items()}, options.rounds)
        took = {name: statistics.median(wall for _, wall in found) for name, found in times.items()}
        first = next(iter(took.values()))
        results[what] = {
            name: {"seconds": seconds, "times": seconds / first} for name, seconds in took.items()
        }
        print(
            f"{what:26}",
            *(f"{name} {s * 1e3:.1f} ms (x {s / first:.2f})" for name, s in took.items()),
            flush=True,
        )
    facts = {"device": options.device, "precision": options.precision, "threads": options.threads}
    facts |= {"tvit": __version__, "torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps({"benchmark": "kernels", **facts, "results": results}))


if __name__ == "__main__":
    main()
