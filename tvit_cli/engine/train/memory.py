"""Memory of a training step: estimates, the micro-batch that fits, and recovery from out-of-memory errors."""

from __future__ import annotations

import gc
import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed import DistError
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tvit_cli.engine.distributed import all_reduce_min, local_processes
from tvit_cli.engine.train.build import Built
from tvit_cli.errors import CheckpointError, RunError, SettingsError
from tvit_cli.results import MemoryModel
from tvit_cli.settings.train import DEFAULT_MICRO_BATCH, TrainSettings

MOMENTS = 2  # of AdamW: means of each gradient and of its square (arXiv:1711.05101)
LIMIT = ".micro-batch-"  # a file beside the checkpoints: see Note [Out of memory]
CPU_SHARE = 0.5  # of the free memory; the rest is for loader workers and the page cache
P = ParamSpec("P")
R = TypeVar("R")


def memory_model(model: nn.Module, peak_of: Callable[[int], int], *, averages: bool = False) -> MemoryModel:
    """The memory terms of a training step; `averages`: with a moving average of the weights.

    `peak_of(n)`: peak bytes of the passes of n clips, beyond existing gradients; measured for 1 and 2, as linear.
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
    """Peak bytes of tensors while `work` runs, beyond earlier ones; off CUDA, without those within operations."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _LiveTensors() as tensors:
        work()
    return int(tensors.peak)


def free_bytes(device: torch.device, processes: int = 1) -> int:
    """Free bytes of a device for one of `processes` processes on this machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return int(CPU_SHARE * free_host_bytes() / processes)


def free_host_bytes(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Free bytes of main memory within the limits of machine, container and job (docs.kernel.org, cgroup-v2)."""
    free = int(psutil.virtual_memory().available)
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return free
    folder = groups / next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    for group in (folder, *(f for f in folder.parents if f == groups or groups in f.parents)):
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
            cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:
            continue  # the root group has no limit
        if limit != "max":
            free = min(free, max(0, int(limit) - used + int(cache.get("inactive_file", 0))))
    return free


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live storages that operations create."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._live = 0
        self._counted: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = operation(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._counted:
            self._live += size
            self.peak = max(self.peak, self._live)
            self._counted[key] = weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._live -= size
        del self._counted[key]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# Messages of errors without a class of their own: of PyTorch's allocators (c10/core/impl/alloc_cpu.cpp,
# aten/src/ATen/mps/MPSAllocator.mm), and of CUDA's libraries, which allocate beside PyTorch.
OUT_OF_MEMORY = re.compile(
    "can't allocate memory|not enough memory|(MPS backend|CUDA error:|CUDA driver error:) out of memory"
    "|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
)

# Note [Out of memory]
# ~~~~~~~~~~~~~~~~~~~~
# A step that does not fit is discarded and repeated with half the micro-batch, which later checkpoints record. Its
# clips are the same (engine/train/batches.py), and so is its update.
# With several processes the run ends instead, with the exit code that has job queues start it again: the others may
# wait in DistributedDataParallel's sum of gradients, which cannot be left. A file beside the checkpoints has the
# smaller micro-batch for the run that resumes. The process that makes the file reports; others that fail do not.
# Memory that runs out in the update, in validation or in the machine itself ends the run; its checkpoint is whole.


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports that a device or the machine has no memory left."""
    is_message = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    return is_message or isinstance(error, torch.OutOfMemoryError)


def limit_micro_batch(checkpoints: Path, clips: int) -> None:
    """Records the micro-batch for the run that resumes. Raises DistError if another process has done so."""
    try:
        checkpoints.mkdir(exist_ok=True)
        (checkpoints / f"{LIMIT}{clips}").touch(exist_ok=False)
    except FileExistsError:
        raise DistError("another process has reported it") from None


def micro_batch_limit(checkpoints: Path) -> float:
    """The smallest recorded micro-batch of a run; infinite without a record."""
    sizes = (path.name.removeprefix(LIMIT) for path in checkpoints.glob(f"{LIMIT}*"))
    return min((int(size) for size in sizes if size.isdecimal() and int(size)), default=math.inf)


class Attempt:
    """The passes of one step, up to the first that runs out of memory."""

    def __init__(self) -> None:
        self.failed = False

    def run(self, work: Callable[P, R], *arguments: P.args, **keywords: P.kwargs) -> R | None:
        """The result of `work`; None if memory ran out, in it or in an earlier pass."""
        if self.failed:
            return None
        try:
            return work(*arguments, **keywords)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside the except block the traceback is gone, and with it the frames that keep the pass's tensors alive.
        self.failed = True
        release_memory()
        return None


def release_memory() -> None:
    """Returns the memory of unreferenced tensors to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


@contextmanager
def out_of_memory_errors(settings: TrainSettings, device: torch.device) -> Iterator[None]:
    """Turns out-of-memory errors into a RunError with advice."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        raise RunError(f"Out of memory: {reason} {memory_advice(settings, device)}") from error


def memory_advice(settings: TrainSettings, device: torch.device) -> str:
    """Settings that would need less memory, those with the least effect on the result first."""
    is_scratch = settings.pretrained is None
    ways = {
        "--gradient-checkpointing (the result stays the same)": not settings.gradient_checkpointing,
        "--mixed-precision bf16": device.type == "cuda" and settings.mixed_precision == "no",
        f"fewer frames than --n-frames {settings.n_frames}": settings.n_frames > 1,
        f"smaller frames than --img-size {settings.img_size}": True,
        "a smaller --width or --depth": is_scratch,
        "--train lora": settings.train == "all" and not is_scratch,
    }
    return f"To need less: {'; '.join(way for way, applies in ways.items() if applies)}."


def global_batch(settings: TrainSettings, processes: int) -> int:
    """Clips per update: --global-batch-size, else micro-batch (for `auto` the default) × accumulation × processes.

    Raises SettingsError for a --global-batch-size that cannot be divided evenly.
    """
    micro = settings.per_gpu_batch_size
    if settings.global_batch_size is None:
        clips = DEFAULT_MICRO_BATCH if micro == "auto" else micro
        return clips * processes * settings.gradient_accumulation_steps
    unit = processes * (1 if micro == "auto" else micro)
    if settings.global_batch_size % unit:
        below = settings.global_batch_size // unit * unit
        factor = "processes" if micro == "auto" else f"× --per-gpu-batch-size {micro}"
        raise SettingsError(
            f"--global-batch-size {settings.global_batch_size}: no multiple of {processes} {factor}. "
            f"Take {f'{below} or ' if below else ''}{below + unit}."
        )
    return settings.global_batch_size


def resolve_batch(
    settings: TrainSettings, processes: int, *, find: Callable[[int], int]
) -> tuple[TrainSettings, int]:
    """The settings with a number for an automatic micro-batch, and the clips of an update.

    `find` maps the clips of a process per update to its micro-batch; it is called for `auto` only.
    """
    clips = global_batch(settings, processes)
    if settings.per_gpu_batch_size != "auto":
        return settings, clips
    found = {"per_gpu_batch_size": find(clips // processes), "gradient_accumulation_steps": 1}
    return settings.model_copy(update={**found, "global_batch_size": clips}), clips


def reuse_batch_settings(settings: TrainSettings, before: Mapping[str, Any], processes: int) -> TrainSettings:
    """The settings with the values that an earlier process of the run has found for `auto`.

    Raises CheckpointError if it has found no valid number.
    """

    processes = before.get("processes", processes)

    def find(share: int) -> int:
        size = before.get("per_gpu_batch_size")
        if not isinstance(size, int) or size < 1:
            problem = f"per_gpu_batch_size {size!r}, recorded by the run, is no number of clips"
            raise CheckpointError(f"{problem}. Resume from another checkpoint, or start a new run.")
        return size

    if settings.mixed_precision == "auto":
        settings = settings.model_copy(update={"mixed_precision": before["mixed_precision"]})
    return resolve_batch(settings, processes, find=find)[0]


def largest_that_fits(
    share: int, model: MemoryModel, *, free: int, fits: Callable[[int], bool]
) -> int | None:
    """The largest divisor of `share` clips that fits in memory; None if even 1 does not fit.

    Divisors that need more than `free` bytes by the model are skipped; `fits` tries the others, the largest first.
    """
    divisors = (clips for clips in range(share, 0, -1) if share % clips == 0)
    return next((n for n in divisors if model.needed(n) - model.weights <= free and fits(n)), None)


def find_micro_batch(
    share: int, built: Built, model: nn.Module, settings: TrainSettings, accelerator: Accelerator
) -> int:
    """The largest micro-batch that fits on all ranks, measured with the model on its device.

    Raises RunError if not even one clip fits.
    """
    device = accelerator.device
    probe = Probe(built, model, accelerator, averages=settings.ema_decay is not None)
    if (terms := Attempt().run(probe.memory_model)) is None:  # two clips are too many to measure
        found: int | None = int(probe.fits(1))
    else:
        # Overcommitment on a CPU does not fail at once but kills the process later: the model alone decides.
        fits = probe.fits if device.type != "cpu" else lambda clips: True
        found = largest_that_fits(share, terms, free=free_bytes(device, local_processes()), fits=fits)
    smallest = all_reduce_min(found or 0, accelerator)
    if not smallest:
        text = f"--per-gpu-batch-size auto: not even one clip fits into the memory of {device}."
        raise RunError(f"{text} {memory_advice(settings, device)}", by_all=True)
    return smallest


@dataclass(frozen=True)
class Probe:
    """Memory measurements with forward and backward passes of blank clips."""

    built: Built
    model: nn.Module  # that of `built`, or compiled from it
    accelerator: Accelerator
    averages: bool = False  # whether there is a moving average of the weights

    def memory_model(self) -> MemoryModel:
        """The memory terms of a training step of this model on this device."""
        device = self.accelerator.device
        model = self.built.model  # the compiled one needs less, by an unknown amount
        try:
            self.run(model, 1)  # allocates the gradients and the buffers of libraries
            return memory_model(
                model, lambda n: peak_bytes(lambda: self.run(model, n), device), averages=self.averages
            )
        finally:
            model.zero_grad(set_to_none=True)

    def fits(self, clips: int) -> bool:
        """Whether a pass of this many clips fits, beside the optimizer's moments and the average."""
        trainable = [p for p in self.built.model.parameters() if p.requires_grad]
        attempt, copies = Attempt(), MOMENTS + self.averages
        others = attempt.run(lambda: [torch.empty_like(p) for p in trainable for _ in range(copies)])
        attempt.run(self.run, self.model, clips)
        del others
        self.model.zero_grad(set_to_none=True)
        release_memory()
        return not attempt.failed

    def run(self, model: nn.Module, clips: int) -> None:
        """One forward and backward pass of this many clips; adds to the gradients."""
        size, frames = self.built.preprocessing.frame_size, self.built.preprocessing.n_frames
        batch = torch.zeros(clips, frames, 3, size, size, device=self.accelerator.device)
        labels = torch.zeros(clips, dtype=torch.long, device=self.accelerator.device)
        model.train()
        with self.accelerator.autocast():
            logits = model(batch)
        self.accelerator.backward(F.cross_entropy(logits.float(), labels))
