"""What the processes of one training share: weights at its start, gradients at each update, and bad news.

See Note [Out of memory] for why gradients are summed here and not by DistributedDataParallel.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20  # as in DistributedDataParallel: fast enough, and small beside what a step takes


@torch.no_grad()
def share_weights(model: nn.Module, accelerator: Accelerator) -> None:
    """Give every process the main process's parameters and buffers."""
    if accelerator.num_processes > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Add up each parameter's gradient over all processes; those that have none have none in any process."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, total in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
            gradient.copy_(total.view_as(gradient))


def any_of_them(fact: bool, accelerator: Accelerator) -> bool:
    """Whether something is true in any process; all processes get the same answer."""
    return bool(greatest_of_them([fact], accelerator)[0])


def greatest_of_them(values: list[int], accelerator: Accelerator) -> list[int]:
    """Of each number the greatest that any process has."""
    return _reduced(values, dist.ReduceOp.MAX) if accelerator.num_processes > 1 else values


def least_of_them(value: int, accelerator: Accelerator) -> int:
    """The smallest value that any process has."""
    return _reduced([value], dist.ReduceOp.MIN)[0] if accelerator.num_processes > 1 else value


def _reduced(values: list[int], how: dist.ReduceOp.RedOpType) -> list[int]:
    shared = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(shared, how, group=None if dist.get_backend() == "gloo" else _between_processors())
    reduced: list[int] = shared.tolist()
    return reduced


@functools.cache
def _between_processors() -> dist.ProcessGroup:
    """All processes, joined by their processors: what those alone know is not asked of GPUs and waited for."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo")
    return group


def leave(*, well: bool) -> None:
    """Part from the other processes, at the end of this one: gloo's threads abort a process that ends with them.

    A process that did not end `well` leaves NCCL's as they are: the others may be waiting for it, and it for them.
    """
    if well or dist.get_backend() == "gloo":
        _between_processors.cache_clear()
        dist.destroy_process_group()


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients in their order, in lists of one type and of at most BUCKET_BYTES (or one tensor)."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        fits = size + gradient.nbytes <= BUCKET_BYTES
        if bucket and not (fits and gradient.dtype == bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket
