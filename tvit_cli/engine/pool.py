"""Work spread over processes that start fresh, with results in the order of the jobs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

J = TypeVar("J")
R = TypeVar("R")

_AHEAD = (
    4  # jobs per worker that are begun before their turn: one long video does not keep the others waiting
)


def in_order(
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
