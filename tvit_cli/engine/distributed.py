"""Collectives between ranks (see Note [Out of memory]), processes on this machine, pools of worker processes."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from tvit_cli.data.clips import end_with_parent, hidden_main, later_interrupt

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

PREFETCH = 4  # jobs per worker that start before their turn, so that one long video does not block the others
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # one group: the device of a tensor chooses
JOIN_TIMEOUT = timedelta(minutes=10)  # for all processes to start
TIMEOUT = timedelta(hours=1)  # of a collective, while rank 0 writes to a slow disk; NCCL's default is 10 min
SECONDS_TO_END_ITSELF = 5  # for a process that has reached the limit of its job
J = TypeVar("J")
R = TypeVar("R")


def any_rank(value: bool, accelerator: Accelerator) -> bool:
    """Whether `value` is true on any rank; the same on all ranks."""
    return bool(all_reduce_max([value], accelerator)[0])


def all_reduce_max(values: list[int], accelerator: Accelerator | PartialState) -> list[int]:
    """The element-wise maximum over all ranks."""
    if accelerator.num_processes == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.int64)  # on the CPU: gloo does not wait for a GPU's queue
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [int(value) for value in tensor]


def all_reduce_min(value: int, accelerator: Accelerator) -> int:
    """The minimum over all ranks."""
    return -all_reduce_max([-value], accelerator)[0]


def set_timeout(timeout: timedelta) -> None:
    """Sets the time that a collective of the process group may take; its start has had JOIN_TIMEOUT."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(timeout)


def barrier(state: Accelerator | PartialState) -> None:
    """Waits until all ranks are here.

    Accelerate's barrier allocates on GPU number LOCAL_RANK, which may not exist, even between CPU processes.
    """
    all_reduce_max([0], state)


def shutdown(*, graceful: bool) -> None:
    """Leaves the process group at exit: gloo's threads abort a process that ends as a member.

    Unless `graceful`, NCCL groups are left as they are: the other ranks may be waiting for this one.
    """
    if graceful or dist.get_backend() == "gloo":
        dist.destroy_process_group()


def local_processes() -> int:
    """Processes of this command on this machine; all of them if the launcher (srun) does not set it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def preserve_process_count() -> Iterator[None]:
    """Removes LOCAL_WORLD_SIZE=1, which Accelerate sets within the block, even with several processes."""
    is_set = "LOCAL_WORLD_SIZE" in os.environ
    try:
        yield
    finally:
        if not is_set:
            os.environ.pop("LOCAL_WORLD_SIZE", None)


def worker_count(given: int | None) -> int:
    """Decoding workers of this process: the given number, else `default_worker_count`."""
    return default_worker_count() if given is None else given


def default_worker_count(*, spare: int = 1) -> int:
    """This process's share of the machine's cores except `spare`; at least 1, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // local_processes() - spare))


def map_in_order(
    work: Callable[[J], R],
    jobs: Sequence[J],
    *,
    workers: int,
    lost: Callable[[J, bool], R],
    seconds: float | None = None,
) -> Generator[R, None, None]:
    """`work(job)` of each job, in order, in `workers` processes; with 0 workers in this process.

    `work` is an importable function. A job that kills its process (by a crash, or for lack of memory) gives
    `lost(job, False)`, one that exceeds `seconds` gives `lost(job, True)`; the others continue. The limit needs
    workers and SIGALRM, which Windows lacks.
    """
    if workers == 0:
        yield from map(work, jobs)
        return
    waiting, started = deque(jobs), deque[tuple[J, Future[R]]]()
    while waiting:
        with _pool(min(workers, len(waiting))) as pool:
            while waiting or started:
                while waiting and len(started) < PREFETCH * workers:
                    started.append((waiting[0], _submit(pool, work, waiting.popleft(), seconds)))
                try:
                    result = _result(started[0][1], seconds)  # all earlier jobs have ended, so it has begun
                except BrokenProcessPool:
                    _kill(pool)
                    break
                started.popleft()
                yield result
        # Any running job may be the cause, so each is repeated in a process of its own.
        while started:
            yield _run_alone(work, started.popleft()[0], lost, seconds)


def _submit(pool: ProcessPoolExecutor, work: Callable[[J], R], job: J, seconds: float | None) -> Future[R]:
    try:
        return pool.submit(_run_limited, seconds, work, job)
    except BrokenProcessPool as error:
        future: Future[R] = Future()
        future.set_exception(error)
        return future


def _result(future: Future[R], seconds: float | None) -> R:
    """The result of a running job; a process that is stopped, and so cannot end itself, counts as dead."""
    try:
        return future.result(None if seconds is None else seconds + SECONDS_TO_END_ITSELF)
    except TimeoutError as error:
        if future.done():
            raise
        raise BrokenProcessPool from error


def _run_alone(work: Callable[[J], R], job: J, lost: Callable[[J, bool], R], seconds: float | None) -> R:
    started = time.monotonic()
    with _pool(1) as pool:
        try:
            return _result(_submit(pool, work, job, seconds), seconds)
        except BrokenProcessPool:
            _kill(pool)
            return lost(job, seconds is not None and time.monotonic() - started >= seconds)


def _run_limited(seconds: float | None, work: Callable[[J], R], job: J) -> R:
    """The job's result; ends this process after `seconds`, even within a library that hangs."""
    if seconds is None or not hasattr(signal, "setitimer"):
        return work(job)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at once; Python's handler would wait
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return work(job)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class _Worker(SpawnProcess):
    """A process that does not import the main script. See Note [Workers are not forked]."""

    @staticmethod
    def _Popen(process: Any) -> Any:
        with hidden_main():
            return SpawnProcess._Popen(process)


class _Context(SpawnContext):
    Process = _Worker  # a fork would copy the locks of other threads


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes, which are killed where the block ends early, as by Ctrl-C."""
    pool = ProcessPoolExecutor(max(1, workers), mp_context=_Context(), initializer=_init_worker)
    try:
        with suppress(BrokenProcessPool), later_interrupt():
            pool.submit(int).result()  # starts the processes, so that a job's time begins with the job
        yield pool
    except BaseException:
        _kill(pool)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()


def _init_worker() -> None:
    """Ignores Ctrl-C, which the parent handles, and ends with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
