"""How much memory a training step takes, and how much there is."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOMENTS = 2  # AdamW keeps the mean of each gradient and of its square (arXiv:1711.05101)
CPU_SHARE = 0.5  # of the free memory: loader workers and the page cache live in it, too
CGROUPS = Path("/sys/fs/cgroup")  # version 2: docs.kernel.org/admin-guide/cgroup-v2.html
OWN_CGROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MemoryModel:
    """Bytes that a training step takes, term by term; only `activations_per_clip` grows with the micro-batch."""

    weights: int
    gradients: int
    moments: int
    average: int  # of the trained weights, with --ema-decay
    workspace: int  # what the passes take besides, whatever the number of clips: weights in another format
    activations_per_clip: int  # at the peak: kept for the backward pass, or in use just then

    def needed(self, clips: int) -> int:
        """Bytes at the peak of a step whose passes hold so many clips each."""
        fixed = self.weights + self.gradients + self.moments + self.average + self.workspace
        return fixed + clips * self.activations_per_clip


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
