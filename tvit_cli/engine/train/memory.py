"""Memory of a training step: estimates, the micro-batch that fits, and recovery from out-of-memory errors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tvit_cli.engine.distributed import all_reduce_min, local_processes
from tvit_cli.engine.train.build import Built
from tvit_cli.errors import RunError, SettingsError
from tvit_cli.results import MemoryModel
from tvit_cli.settings.train import DEFAULT_MICRO_BATCH, TrainSettings

MOMENTS = 2  # AdamW keeps the mean of each gradient and of its square (arXiv:1711.05101)
CPU_SHARE = 0.5  # of the free memory: loader workers and the page cache live in it, too
CGROUPS = Path("/sys/fs/cgroup")  # version 2: docs.kernel.org/admin-guide/cgroup-v2.html
OWN_CGROUP = Path("/proc/self/cgroup")


def memory_model(model: nn.Module, peak_of: Callable[[int], int], *, averages: bool = False) -> MemoryModel:
    """The terms of a model as it is going to be trained.

    `peak_of(n)` tells how many bytes a forward and backward pass of n clips adds at its peak to gradients that
    are there. One clip and two are measured: a pass is linear in its clips.
    """
    trainable = _bytes(p for p in model.parameters() if p.requires_grad)
    one, two = peak_of(1), peak_of(2)
    per_clip = max(0, two - one)
    return MemoryModel(
        weights=_bytes(model.parameters()),
        gradients=trainable,
        moments=MOMENTS * trainable,
        average=trainable if averages else 0,
        workspace=max(0, one - per_clip),
        activations_per_clip=per_clip,
    )


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """Bytes that tensors take while `work` runs, at the peak, beyond those that were there before.

    On a GPU its allocator tells; elsewhere the tensors are counted, so what an operation allocates and frees
    within itself is missing.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _LiveTensors() as tensors:
        work()
    return int(tensors.peak)


def free_bytes(device: torch.device, processes: int = 1) -> int:
    """Bytes that one of a machine's `processes` processes may still take on its device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        recommended: int = torch.mps.recommended_max_memory()
        taken: int = torch.mps.current_allocated_memory()
        return recommended - taken
    return int(CPU_SHARE * free_host_bytes() / processes)


def free_host_bytes(groups: Path = CGROUPS, own: Path = OWN_CGROUP) -> int:
    """Memory that is not taken of this machine, or of the container or the queue's job that this process is in."""
    free = int(psutil.virtual_memory().available)
    for folder in _cgroups(groups, own):
        try:
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
            cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue  # the root of all groups has no limit
        if limit != "max":
            free = min(free, max(0, int(limit) - used + int(cache.get("inactive_file", 0))))
    return free


def _cgroups(groups: Path, own: Path) -> list[Path]:
    """The folders of the control groups that this process is in, from its own up to the root."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    folder = groups / next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    return [folder, *(f for f in folder.parents if f == groups or groups in f.parents)]


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make while they are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._live = 0
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = operation(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._live += size
            self.peak = max(self.peak, self._live)
            self._known[key] = weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._live -= size
        del self._known[key]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
        release_memory()
        return None


def release_memory() -> None:
    """Give back the memory of tensors that nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


@contextmanager
def out_of_memory_errors(settings: TrainSettings, device: torch.device) -> Iterator[None]:
    """Within, memory that runs out becomes a RunError that says what takes less."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"Out of memory: {str(error).splitlines()[0]} {memory_advice(settings, device)}"
        ) from error


def memory_advice(settings: TrainSettings, device: torch.device) -> str:
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


def global_batch(settings: TrainSettings, processes: int) -> int:
    """Clips per update: as given, else micro-batch × accumulation × processes; for an automatic one, the default's.

    Raises SettingsError where a given one cannot be cut into equal passes.
    """
    micro = settings.per_gpu_batch_size
    wide = (DEFAULT_MICRO_BATCH if micro == "auto" else micro) * processes
    if settings.global_batch_size is None:
        return wide * settings.gradient_accumulation_steps
    wide = processes if micro == "auto" else wide
    if settings.global_batch_size % wide:
        below = settings.global_batch_size // wide * wide
        of = f"{processes} processes" if micro == "auto" else f"{processes} × --per-gpu-batch-size {micro}"
        raise SettingsError(
            f"--global-batch-size {settings.global_batch_size}: no multiple of {of}. "
            f"Take {f'{below} or ' if below else ''}{below + wide}."
        )
    return settings.global_batch_size


def resolve_batch(
    settings: TrainSettings, processes: int, *, find: Callable[[int], int]
) -> tuple[TrainSettings, int]:
    """The settings with a number for an automatic micro-batch, and the clips of an update.

    `find` tells how many of one process's clips of an update go into a pass; it is asked only for `auto`.
    """
    clips = global_batch(settings, processes)
    if settings.per_gpu_batch_size != "auto":
        return settings, clips
    found = {
        "per_gpu_batch_size": find(clips // processes),
        "gradient_accumulation_steps": 1,
        "global_batch_size": clips,
    }
    return settings.model_copy(update=found), clips


def reuse_batch_settings(settings: TrainSettings, before: Mapping[str, Any], processes: int) -> TrainSettings:
    """The settings with what a run of them has found where they say `auto`: nothing is looked for twice."""
    if settings.mixed_precision == "auto":
        settings = settings.model_copy(update={"mixed_precision": before["mixed_precision"]})
    return resolve_batch(settings, processes, find=lambda share: int(before["per_gpu_batch_size"]))[0]


def largest_that_fits(
    share: int, model: MemoryModel, *, free: int, fits: Callable[[int], bool]
) -> int | None:
    """The most clips per pass that divide a process's share of an update and fit; None where not even one does.

    What the model says is too much for `free` bytes is not tried; the rest is, the largest first.
    """
    for clips in range(share, 0, -1):
        if share % clips == 0 and model.needed(clips) - model.weights <= free and fits(clips):
            return clips
    return None


def find_micro_batch(
    share: int, built: Built, model: nn.Module, settings: TrainSettings, accelerator: Accelerator
) -> int:
    """The micro-batch that all processes can take, measured on their devices, the model's weights in place.

    Raises RunError where one clip is too much.
    """
    device = accelerator.device
    probe = Probe(built, model, accelerator, averages=settings.ema_decay is not None)
    if (terms := Attempt().run(probe.memory_model)) is None:  # two clips are too many to measure
        found = 1 if probe.fits(1) else None
    else:
        # On a CPU an allocation that is too large does not fail, it ends the process later: the model decides.
        tried = probe.fits if device.type != "cpu" else lambda clips: True
        free = free_bytes(device, local_processes())
        found = largest_that_fits(share, terms, free=free, fits=tried)
    least = all_reduce_min(found or 0, accelerator)
    if not least:
        raise RunError(
            f"--per-gpu-batch-size auto: not even one clip fits into the memory of {device}. "
            f"{memory_advice(settings, device)}",
            by_all=True,
        )
    return least


class Probe:
    """Forward and backward passes of empty clips, to see what they take."""

    def __init__(
        self, built: Built, model: nn.Module, accelerator: Accelerator, *, averages: bool = False
    ) -> None:
        """`averages` says whether a moving average of the trained weights is kept."""
        self._built = built
        self._averages = averages
        self._model = model
        self._accelerator = accelerator

    def memory_model(self) -> MemoryModel:
        """The terms of a training step of this model on this device."""
        device = self._accelerator.device
        model = self._built.model  # compiled, it takes less; how much less, the device says
        try:
            self.run(model, 1)  # makes the gradients, and what libraries make once
            return memory_model(
                model,
                lambda clips: peak_bytes(lambda: self.run(model, clips), device),
                averages=self._averages,
            )
        finally:
            model.zero_grad(set_to_none=True)

    def fits(self, clips: int) -> bool:
        """Whether a pass of so many clips finds its memory, beside the optimizer's moments and the average."""
        trainable = [p for p in self._built.model.parameters() if p.requires_grad]
        attempt = Attempt()
        copies = MOMENTS + self._averages
        others = attempt.run(lambda: [torch.empty_like(p) for p in trainable for _ in range(copies)])
        attempt.run(self.run, self._model, clips)
        del others
        self._model.zero_grad(set_to_none=True)
        release_memory()
        return not attempt.failed

    def run(self, model: nn.Module, clips: int) -> None:
        """One forward and backward pass of so many clips; it leaves gradients."""
        size, frames = self._built.preprocessing.frame_size, self._built.preprocessing.n_frames
        device = self._accelerator.device
        batch = torch.zeros(clips, frames, 3, size, size, device=device)
        labels = torch.zeros(clips, dtype=torch.long, device=device)
        model.train()
        with self._accelerator.autocast():
            logits = model(batch)
        self._accelerator.backward(F.cross_entropy(logits.float(), labels))
