"""Collectives between processes, their number on this machine, and pools of worker processes.

See Note [Out of memory] for why gradients are summed here and not by DistributedDataParallel.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20  # as in DistributedDataParallel: fast enough, and small beside what a step takes


@torch.no_grad()
def broadcast_weights(model: nn.Module, accelerator: Accelerator) -> None:
    """Give every process the main process's parameters and buffers."""
    if accelerator.num_processes > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


@torch.no_grad()
def all_reduce_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Add up each parameter's gradient over all processes; those that have none have none in any process."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, total in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
            gradient.copy_(total.view_as(gradient))


def any_rank(fact: bool, accelerator: Accelerator) -> bool:
    """Whether something is true in any process; all processes get the same answer."""
    return bool(all_reduce_max([fact], accelerator)[0])


def all_reduce_max(values: list[int], accelerator: Accelerator) -> list[int]:
    """Of each number the greatest that any process has."""
    return _reduced(values, dist.ReduceOp.MAX) if accelerator.num_processes > 1 else values


def all_reduce_min(value: int, accelerator: Accelerator) -> int:
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


def shutdown(*, graceful: bool) -> None:
    """Part from the other processes, at the end of this one: gloo's threads abort a process that ends with them.

    Unless `graceful`, NCCL groups are left as they are: the other ranks may be waiting for this one.
    """
    if graceful or dist.get_backend() == "gloo":
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


J = TypeVar("J")
R = TypeVar("R")

_AHEAD = (
    4  # jobs per worker that are begun before their turn: one long video does not keep the others waiting
)


def map_in_order(
    work: Callable[[J], R],
    jobs: Sequence[J],
    *,
    workers: int,
    lost: Callable[[J, bool], R],
    seconds: float | None = None,
) -> Iterator[R]:
    """`work(job)` of each job, in their order; with 0 workers in this process.

    `work` is an importable function. A job that takes its process down with it (a decoder that crashes, a
    picture that no memory holds) gives `lost(job, False)`, one that takes longer than `seconds` (a decoder
    that hangs) `lost(job, True)`, and the others go on. The limit needs workers and an alarm clock, which
    Windows has not.
    """
    if workers == 0:
        yield from map(work, jobs)
        return
    waiting = deque(jobs)
    begun: deque[tuple[J, Future[R]]] = deque()
    pool = _pool(min(workers, len(jobs)))
    try:
        while waiting or begun:
            while waiting and len(begun) < _AHEAD * workers:
                begun.append((waiting[0], _submit(pool, work, waiting.popleft(), seconds)))
            job, future = begun.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                # Nobody knows whose fault it was, so each job in flight is tried in a process of its own.
                pool.shutdown()
                for suspect in (job, *(other for other, _ in begun)):
                    yield _alone(work, suspect, lost, seconds)
                begun.clear()
                pool = _pool(min(workers, max(1, len(waiting))))
            else:
                yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, work: Callable[[J], R], job: J, seconds: float | None) -> Future[R]:
    try:
        return pool.submit(_within, seconds, work, job)
    except BrokenProcessPool as error:
        future: Future[R] = Future()
        future.set_exception(error)
        return future


def _alone(work: Callable[[J], R], job: J, lost: Callable[[J, bool], R], seconds: float | None) -> R:
    with _pool(1) as pool:
        began = time.monotonic()
        try:
            return pool.submit(_within, seconds, work, job).result()
        except BrokenProcessPool:
            return lost(job, seconds is not None and time.monotonic() - began >= seconds)


def _within(seconds: float | None, work: Callable[[J], R], job: J) -> R:
    """The job's result; the process ends where it takes longer, even deep within a library that hangs."""
    if seconds is None or not hasattr(signal, "setitimer"):
        return work(job)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the system ends the process; Python would wait its turn
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return work(job)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Fresh processes: a fork would copy the threads' locks of whatever this process has loaded.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max(1, workers), mp_context=context, initializer=_begin_worker)


def _begin_worker() -> None:
    """Leaves Ctrl-C to the parent, and ends with it: killed, it cannot tell its workers to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)


def local_processes() -> int:
    """Processes of this command on this machine; where the launcher does not say, as srun, all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def preserve_process_count() -> Iterator[None]:
    """Within, Accelerate starts, and notes down that this process is alone on its machine; that is undone after."""
    told = "LOCAL_WORLD_SIZE" in os.environ
    try:
        yield
    finally:
        if not told:
            os.environ.pop("LOCAL_WORLD_SIZE", None)


def worker_count(given: int | None) -> int:
    """Decoding workers of this process: what was given, else `default_workers`."""
    return default_worker_count() if given is None else given


def default_worker_count(*, spare: int = 1) -> int:
    """Decoding processes for this one: its share of this machine's cores but for `spare`, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // local_processes() - spare))
