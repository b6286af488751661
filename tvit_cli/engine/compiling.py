"""`--compile`: the training's forward and backward pass through torch.compile."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from tvit_cli.errors import RunError, SettingsError

# What torch.compile looks for where CXX names no other (torch/_inductor/config.py, cpp.cxx).
COMPILERS = {"darwin": "clang++", "win32": "cl"}

# Note [Compiled shapes]
# ~~~~~~~~~~~~~~~~~~~~~~
# Passes have three sizes at most: the micro-batch, what is left over at an epoch's end, and one clip, in a process
# that has none of those left. Each is compiled once, with its sizes as constants (`dynamic=False`); a graph for any
# size would be slower for every pass. Validation is not compiled: it runs the plain model, whose parameters the
# compiled one shares, so names in checkpoints and in the model folder are the plain ones.


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, compiled when it is first called for a size. See Note [Compiled shapes].

    Raises SettingsError where PyTorch has nothing to compile with.
    """
    if missing := _missing(device):
        raise SettingsError(f"--compile: {missing}, or leave --compile out.")
    torch.compiler.reset()  # what was compiled for the run before, of a series, counts towards a limit of eight
    return cast(nn.Module, torch.compile(model, dynamic=False))


@contextmanager
def compiles(is_asked: bool) -> Iterator[None]:
    """Within, where a model is compiled at all, one that cannot be becomes a RunError."""
    if not is_asked:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        yield
    except (TorchDynamoException, InductorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(error).__name__  # who says it, and what
        raise RunError(
            f"--compile: PyTorch could not compile the model: {reason}. Leave --compile out."
        ) from error


def _missing(device: torch.device) -> str:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "PyTorch writes code for GPUs with Triton, which is not installed. Install triton"
    name = os.environ.get("CXX") or COMPILERS.get(sys.platform, "g++")
    if device.type == "cpu" and shutil.which(name) is None:
        return f"PyTorch wants a C++ compiler, and there is no {name}. Install one, name another in CXX"
    return ""
