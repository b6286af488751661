"""The number format of a training's forward pass: as told, or what the device is fast at."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from tvit_cli.errors import SettingsError
from tvit_cli.settings.fields import MixedPrecision

Precision = Literal["no", "bf16", "fp16"]

FAST_BF16 = (8, 0)  # CUDA compute capability: the first whose tensor cores take bfloat16 (Ampere white paper)


def resolve_precision(given: MixedPrecision, device: torch.device) -> Precision:
    """The format that a setting means on a device. See Note [Mixed precision].

    From then on convolutions in float32 are what they are called on CUDA as well: as torch starts, those take
    inputs of TF32, with 10 bits of mantissa.

    Raises SettingsError for fp16 on a CPU: Accelerate would compute in float32 and say nothing.
    """
    if given == "fp16" and device.type == "cpu":
        raise SettingsError("--mixed-precision fp16: nothing is computed in it on a CPU. Take bf16, or no.")
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    if given != "auto":
        return given
    return "bf16" if device.type == "cuda" and _is_fast_at_bf16(device) else "no"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Within it, a forward pass computes in that format."""
    if precision == "no":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


# Note [Mixed precision]
# ~~~~~~~~~~~~~~~~~~~~~~
# `auto` is bfloat16 on a GPU with the hardware for it, and nothing elsewhere: bfloat16 has float32's range, so no
# run needs a scaled loss or falls over for it. On CPUs it is slower, or a fifth faster where they have AVX512-BF16
# (tests/bench/RESULTS.md): not worth numbers of another format unasked. float16 on older GPUs was refused as a
# default: it is fast there, but its range is small, and a run that fails for it fails after hours. Whoever has such
# a card asks for `fp16`.


def _is_fast_at_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= FAST_BF16 and torch.cuda.is_bf16_supported()
