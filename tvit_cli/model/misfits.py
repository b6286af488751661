"""Why saved tensors do not fit those of a model: their names, and their shapes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_SHOWN = 4  # how many of them a message tells


def misfits(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What is missing, unexpected or of another shape, the first few of all; empty where all fit."""
    problems = [f"{name} is missing" for name in own if name not in saved]
    problems += [f"{name} is unexpected" for name in saved if name not in own]
    problems += [
        f"{name} has the shape {tuple(saved[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in saved and saved[name].shape != tensor.shape
    ]
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more
