"""Running out of memory within a training step, and what is done about it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from tvit_cli.errors import RunError
from tvit_cli.settings.train import TrainSettings

P = ParamSpec("P")
R = TypeVar("R")

# What is said where there is no exception for it: by PyTorch's allocators (c10/core/impl/alloc_cpu.cpp,
# aten/src/ATen/mps/MPSAllocator.mm), and by CUDA's libraries, which allocate beside PyTorch.
SENTENCES = (
    "can't allocate memory",
    "not enough memory",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)

# Note [Out of memory]
# ~~~~~~~~~~~~~~~~~~~~
# A window whose passes do not fit is thrown away in all processes and begun anew with half the micro-batch. Its
# clips are the same (engine/batches.py), so its update is what it would have been with that micro-batch from the
# beginning, dropout included, which is seeded by the pass. The micro-batch stands in every checkpoint from then on.
#
# For that, no process may wait in a collective while another has failed. So there is none in a pass: gradients are
# summed once per window, after all have said that theirs are whole (engine/parallel.py). DistributedDataParallel,
# which sums them within the last backward pass, was refused: a process that fails there leaves the others waiting
# for it until a timeout ends them all. What it gains is communication hidden behind the backward pass: nothing with
# LoRA (2 MB of gradients for ViT-B), 340 MB per window with `--train all`. It also keeps a second copy of them. A
# measurement of `--train all` over slow links could bring it back for that.
#
# What is not survived: memory that runs out in the optimizer's update, in validation, or in the machine itself,
# which kills a process. Those end the run with a sentence, and the last checkpoint is whole.


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SENTENCES)


class Attempt:
    """The passes of one window, up to the first that finds no memory."""

    def __init__(self) -> None:
        self.failed = False

    def run(self, work: Callable[P, R], *arguments: P.args, **keywords: P.kwargs) -> R | None:
        """What `work` returns; None where memory ran out, in it or in an earlier pass."""
        if self.failed:
            return None
        try:
            return work(*arguments, **keywords)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Out here the error is gone, and with it the frames that held the pass's tensors.
        self.failed = True
        release()
        return None


def release() -> None:
    """Give back the memory of tensors that nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


@contextmanager
def ends_with_advice(settings: TrainSettings, device: torch.device) -> Iterator[None]:
    """Within, memory that runs out becomes a RunError that says what takes less."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"Out of memory: {str(error).splitlines()[0]} {advice(settings, device)}") from error


def advice(settings: TrainSettings, device: torch.device) -> str:
    """What would take less memory than these settings do, the mildest first."""
    ways = []
    if not settings.gradient_checkpointing:
        ways.append("--gradient-checkpointing (the result stays the same)")
    if device.type == "cuda" and settings.mixed_precision == "no":
        ways.append("--mixed-precision bf16")
    if settings.n_frames > 1:
        ways.append(f"fewer frames than --n-frames {settings.n_frames}")
    ways.append(f"smaller frames than --img-size {settings.img_size}")
    if settings.hf_model_name is None:
        ways.append("a smaller --width or --depth")
    elif settings.train == "all":
        ways.append("--train lora")
    return f"What takes less: {'; '.join(ways)}."
